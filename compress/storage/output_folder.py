"""A result's folder: whole, or not there. What it may replace, and the move into its place.

Policy: until a result is whole, everything lives in OUT/.modelpress. `publish` notes what it is
about to do, takes away config.json and then all else that an earlier result had, moves the new
weights, what stands beside them, and config.json last. So OUT holds a whole checkpoint or none that
any engine would load, never a mixture; and what was killed on the way is finished by
`go_on_publishing`, or undone by `withdraw`. What a user has put there beside a result stays.

    check_output(output, overwrite=False); ...
    publish(output / WORK_FOLDER / "final", output, fingerprint); tidy(output)
"""

import shutil
from pathlib import Path

from compress.errors import CheckpointError, UsageError
from compress.storage.files import read_json, sync_file, sync_folder, write_json
from compress.storage.lease import HOLDER, LOCK, WORK_FOLDER

FINAL = "final"  # in the work folder: the result, until it is moved
MARKER = "publish.json"  # in the work folder: what is being moved, until all is done
PROVENANCE = "modelpress.json"
# What an earlier result without a list of its files holds beside weights and config.
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
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf")
# What describes a result, and would describe another one once that is replaced.
DESCRIPTIONS = (PROVENANCE, "report.html", "README.md", "recipe.yaml", "pruning.json", "eval")


def check_output(output: Path, overwrite: bool, unfinished: bool = False) -> None:
    """UsageError if `output` holds anything but an unfinished run, unless it may be replaced.

    `unfinished`: a whole result may be one that its run has not measured yet.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"output {output} is a file; expected a folder")
    if not output.is_dir() or overwrite:
        return
    found = sorted(p.name for p in output.iterdir() if p.name != WORK_FOLDER)
    work = output / WORK_FOLDER
    # A run that was killed while its files were being moved has left some, but no config.json.
    publishing = (work / FINAL).is_dir() or (work / MARKER).is_file()
    publishing = publishing and "config.json" not in found
    if found and not publishing and not (unfinished and PROVENANCE in found):
        refuse(output, found[0])


def refuse(output: Path, found: str) -> None:
    """Raises the UsageError for a folder that holds something."""
    raise UsageError(
        f"output folder {output} exists and holds {found}: "
        "choose another --output, or give --overwrite"
    )


def files_below(folder: Path) -> list[str]:
    """Every file in a folder and those below it, by its name relative to the folder."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# ---- the move -----------------------------------------------------------------------------------


def publish(final: Path, output: Path, fingerprint: str = "") -> None:
    """Moves the finished files to `output` in place of an earlier result.

    `fingerprint`: of the run, for the one that goes on with it if this is killed. What is in the
    work folder stays until `tidy`.
    """
    names = files_below(final)
    for name in names:
        sync_file(final / name)
    plan = {"fingerprint": fingerprint, "files": names, "old": _earlier(output)}
    write_json(output / WORK_FOLDER / MARKER, plan)
    go_on_publishing(output)


def publishing(output: Path) -> str | None:
    """The fingerprint of what was being moved to `output`, None if nothing was."""
    plan = read_json(output / WORK_FOLDER / MARKER)
    return None if plan is None else plan["fingerprint"]


def go_on_publishing(output: Path) -> None:
    """Finishes a `publish` that was killed; where nothing is left to move, it does nothing."""
    final = output / WORK_FOLDER / FINAL
    plan = read_json(output / WORK_FOLDER / MARKER)
    assert plan is not None
    left = files_below(final)
    moved = set(plan["files"]) - set(left)
    if not left:
        return
    if "config.json" not in moved:
        (output / "config.json").unlink(missing_ok=True)
        sync_folder(output)
        _remove(output, [name for name in plan["old"] if name not in moved])
        sync_folder(output)
    for name in sorted(left, key=_turn):
        target = output / name
        if name == "config.json":
            sync_folder(output)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir() and not target.is_symlink():  # a rename goes over files and links alone
            shutil.rmtree(target)
        (final / name).replace(target)
        if target.parent != output:
            sync_folder(target.parent)
    sync_folder(output)


def replace_documents(documents: Path, output: Path) -> None:
    """Moves files that describe a result, and no weights, over those of the same name.

    modelpress.json goes last: until then the earlier ones are as good as they were.
    """
    for name in sorted(files_below(documents), key=_turn):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        sync_file(documents / name)
        (documents / name).replace(output / name)
    sync_folder(output)


def withdraw(output: Path) -> None:
    """Undoes a `publish` that was killed on the way: takes away what it had moved already."""
    work = output / WORK_FOLDER
    plan = read_json(work / MARKER)
    if plan is None or (output / "config.json").exists():
        return
    left = set(files_below(work / FINAL))
    _remove(output, [name for name in plan["files"] if name not in left])
    shutil.rmtree(work / FINAL, ignore_errors=True)
    (work / MARKER).unlink()


def unfinished(output: Path) -> bool:
    """Whether a folder holds a run that was not finished, or one that is under way.

    One that has only its evaluation before it is finished: its result is whole.
    """
    return any((output / WORK_FOLDER / name).exists() for name in ("journal.jsonl", FINAL))


def tidy(output: Path, keep: tuple[str, ...] = ()) -> None:
    """Empties the work folder, but for `keep` and for what says who holds it; the marker last."""
    work = output / WORK_FOLDER
    spared = {LOCK, HOLDER, MARKER, *keep}
    for path in sorted(work.iterdir()):
        if path.name not in spared:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if MARKER not in keep:
        (work / MARKER).unlink(missing_ok=True)


def _turn(name: str) -> tuple[int, str]:
    """Weights, their index, all else, provenance, config.json."""
    ends = (".safetensors", ".index.json", "", PROVENANCE, "config.json")
    if name in ends:
        return ends.index(name), name
    weights = name.endswith((".safetensors", ".gguf"))
    return (0 if weights else 1 if name.endswith(".index.json") else 2), name


def _earlier(output: Path) -> list[str]:
    """The files of an earlier result in `output`: those that it lists, else those of any model."""
    own = [output / name for name in DESCRIPTIONS]
    listed = _listed(output)
    if listed is None:
        own += [path for pattern in (*WEIGHTS, *COMPANIONS) for path in output.glob(pattern)]
    else:
        own += listed
    names = set()
    for path in own:
        below = [path / name for name in files_below(path)] if path.is_dir() else [path]
        names |= {file.relative_to(output).as_posix() for file in below if file.exists()}
    return sorted(names)


def _listed(output: Path) -> list[Path] | None:
    """What modelpress.json says that its run has written; None where it does not say."""
    try:
        files = (read_json(output / PROVENANCE) or {}).get("files")
    except CheckpointError:
        return None
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        return None
    # A folder may come from anywhere: nothing outside it is ours.
    inside = output.resolve()
    paths = [output / name for name in files]
    return [
        path
        for path in paths
        if inside in (path.parent.resolve(), *path.parent.resolve().parents) and path.is_file()
    ]


def _remove(output: Path, names: list[str]) -> None:
    for name in names:
        (output / name).unlink(missing_ok=True)
    folders = {parent for name in names for parent in Path(name).parents if parent != Path()}
    for folder in sorted(folders, key=lambda path: -len(path.parts)):
        if (output / folder).is_dir() and not any((output / folder).iterdir()):
            (output / folder).rmdir()
