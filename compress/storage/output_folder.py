"""A result's folder: whole, or not there. What it may replace, and the move into its place.

Policy: until a result is whole, everything lives in OUT/.modelpress. `publish` moves config.json
last and removes the old one first, so that OUT holds a whole checkpoint or none that any engine
would load.

    check_output(output, overwrite=False); ...; publish(output / WORK_FOLDER / "final", output)
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from compress.errors import UsageError

WORK_FOLDER = ".modelpress"
# What a model folder holds beside weights and config: copied as it is.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "pruning.json",
)


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


def copy_files(source: Path, folder: Path, patterns: Iterable[str]) -> None:
    """Copies the files of `source` that match one of the patterns."""
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def publish(final: Path, output: Path) -> None:
    """Moves the finished files to `output`, config.json last, and removes the work folder."""
    files = sorted(final.iterdir(), key=lambda f: f.name == "config.json")
    new = {file.name for file in files}
    (output / "config.json").unlink(missing_ok=True)
    for file in files:
        file.replace(output / file.name)
    for file in [*output.glob("*.safetensors*"), *output.glob("*.gguf")]:
        if file.name not in new:
            file.unlink()
    # Reports of a checkpoint that was replaced would be about another one.
    for name in ("modelpress.json", "report.html", "README.md", "eval"):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.rmtree(output / WORK_FOLDER)
