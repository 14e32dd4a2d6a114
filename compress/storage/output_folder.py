"""A result's folder: whole, or not there. What it may replace, and the move into its place.

Policy: until a result is whole, everything lives in OUT/.modelpress. `publish` moves config.json
last and removes the old one first, so that OUT holds a whole checkpoint or none that any engine
would load.

    check_output(output, overwrite=False); ...; publish(output / WORK_FOLDER / "final", output)
"""

import shutil
from pathlib import Path

from compress.errors import UsageError

WORK_FOLDER = ".modelpress"


def check_output(output: Path, overwrite: bool) -> None:
    """UsageError if `output` holds anything but an unfinished run, unless it may be replaced."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"output {output} is a file; expected a folder")
    if not output.is_dir() or overwrite:
        return
    found = sorted(p.name for p in output.iterdir() if p.name != WORK_FOLDER)
    # A run that was killed while its files were being moved has left some, but no config.json.
    publishing = (output / WORK_FOLDER / "final").is_dir() and "config.json" not in found
    if found and not publishing:
        raise UsageError(
            f"output folder {output} exists and holds {found[0]}: "
            "choose another --output, or give --overwrite"
        )


def publish(final: Path, output: Path) -> None:
    """Moves the finished files to `output`, config.json last, and removes the work folder."""
    files = sorted(final.iterdir(), key=lambda f: f.name == "config.json")
    new = {file.name for file in files}
    (output / "config.json").unlink(missing_ok=True)
    for file in files:
        place = output / file.name
        if place.is_dir() and not place.is_symlink():  # a rename goes over files and links alone
            shutil.rmtree(place)
        file.replace(place)
    for file in [*output.glob("*.safetensors*"), *output.glob("*.gguf")]:
        if file.name not in new:
            file.unlink()
    # Reports of a checkpoint that was replaced would be about another one.
    for name in ("modelpress.json", "report.html", "README.md", "eval"):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.rmtree(output / WORK_FOLDER)
