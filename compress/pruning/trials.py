"""The trials of a strategy search: a file of JSON lines that a search goes on from.

The first line holds the settings and a fingerprint of the model's answers, each further line one
trial: {"trial", "parameters", "strategy", "score"}, with a digest of it ("sha256"). A line is on
disk before the next trial begins; one that was cut short by a kill is dropped. What optuna needs is
rebuilt from the lines. Names of settings that earlier versions wrote are replaced where a file is
opened.

    file = TrialFile.open(path, settings, fingerprint)
    file.trials; file.append(trial)
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError, UsageError
from compress.recipe.strategy import with_new_names
from compress.storage.files import append_line, seal, write_text

KIND = "modelpress-pruning-search"
VERSION = 1
# Fingerprints are about 1 in size; rounding differs between devices and thread counts by far less.
FINGERPRINT_TOLERANCE = 0.1

Line = dict[str, Any]  # of JSON


@dataclass(frozen=True)
class Trial:
    """One strategy that was tried. `parameters`: what the sampler chose, by name."""

    trial: int
    parameters: dict[str, float]
    strategy: dict[str, object]
    score: float


class TrialFile:
    """The trials so far, and a place to add to; `path` None keeps them in memory."""

    def __init__(self, path: Path | None, trials: list[Trial]):
        self.path, self.trials = path, trials

    @classmethod
    def open(
        cls, path: str | Path | None, settings: dict[str, object], fingerprint: Sequence[float]
    ) -> "TrialFile":
        """Reads what an earlier search has left, or starts a new file.

        Raises:
            UsageError: the file is of a search with other settings, data or another model.
            CheckpointError: it cannot be read or written.
        """
        if path is None:
            return cls(None, [])
        path = Path(path)
        header = {"kind": KIND, "version": VERSION, "settings": settings}
        lines = _whole_lines(path)
        if not lines:
            _write(path, [header | {"fingerprint": list(fingerprint)}])
            return cls(path, [])
        _check_header(path, lines[0], header, fingerprint)
        trials = [_trial(path, number, line) for number, line in enumerate(lines[1:])]
        # Without the line that a kill has cut short, which the next one would be appended to.
        _write(path, [lines[0], *(_sealed(asdict(trial)) for trial in trials)])
        return cls(path, trials)

    def append(self, trial: Trial) -> None:
        """Adds a trial; it is on disk when this returns."""
        self.trials.append(trial)
        if self.path is not None:
            append_line(self.path, _line(_sealed(asdict(trial))))


def _sealed(trial: Line) -> Line:
    return trial | {"sha256": seal(trial)}


def _write(path: Path, lines: Iterable[dict[str, object]]) -> None:
    write_text(path, "".join(f"{_line(line)}\n" for line in lines))


def _line(value: dict[str, object]) -> str:
    return json.dumps(value, allow_nan=False)


def _whole_lines(path: Path) -> list[Line]:
    """The file's lines as objects, without a last one that has no end; [] if there is no file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a file of trials: {error}") from error
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{path}:{number}: not a line of JSON: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}:{number}: expected a JSON object")
        digest = value.pop("sha256", None)  # files of earlier versions have none
        if digest not in (None, seal(value)):
            raise CheckpointError(f"{path}:{number}: not the line that was written")
        lines.append(with_new_names(value))
    return lines


def _check_header(
    path: Path, found: Line, header: dict[str, object], fingerprint: Sequence[float]
) -> None:
    if found.get("kind") != KIND or found.get("version") != VERSION:
        raise CheckpointError(f"{path} is not a file of trials: name another one")
    remedy = "search into another file, or start afresh (--no-resume)"
    # Through JSON, as the file's own settings went: tuples are lists there.
    ours, theirs = json.loads(json.dumps(header["settings"])), found.get("settings", {})
    for name in sorted({*ours, *theirs}):
        if _given(ours.get(name)) != _given(theirs.get(name)):
            raise UsageError(
                f"{path} is of a search with {name} {theirs.get(name)}, not {ours.get(name)}: "
                f"{remedy}"
            )
    before = found.get("fingerprint", [])
    if len(before) != len(fingerprint) or not all(
        math.isclose(a, b, rel_tol=0, abs_tol=FINGERPRINT_TOLERANCE)
        for a, b in zip(before, fingerprint, strict=True)
    ):
        raise UsageError(f"{path} is of another model or other samples: {remedy}")


def _given(value: object) -> object:
    """A value without the keys that are null in it, which earlier versions may not know."""
    if isinstance(value, dict):
        return {key: inner for key, inner in value.items() if inner is not None}
    return value


def _trial(path: Path, number: int, line: Line) -> Trial:
    try:
        trial = Trial(**line)
    except TypeError:
        raise CheckpointError(f"{path}:{number + 2}: expected a trial, found {line}") from None
    if trial.trial != number:
        raise CheckpointError(f"{path}:{number + 2}: expected trial {number}, found {trial.trial}")
    return trial
