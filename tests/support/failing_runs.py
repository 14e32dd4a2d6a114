"""Runs and exports that must fail: what is wrong with them, and what must come of it.

error = failure(recipe, tmp_path / "out", Case(("No space left",)))
assert visible(tmp_path / "out") == {}
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from compress.checkpoint.export import export
from compress.data.windows import CalibrationWindows
from compress.errors import CompressError, UsageError
from compress.pipeline.run import run
from support.refusals import check_line, refused
from support.tiny_checkpoints import WINDOWS, every_file


@dataclass
class Case:
    """What is done to a sound model or recipe, and what must come of it.

    expected: what the message names. windows None: drawn from the recipe's dataset.
    """

    expected: tuple[str, ...]
    damage: Callable[[Path], None] = lambda model: None
    sections: dict[str, Any] = field(default_factory=dict)
    windows: CalibrationWindows | None = WINDOWS
    usage: bool = False  # exit code 2 rather than 1
    options: dict[str, Any] = field(default_factory=dict)


def failure(recipe, output, case: Case, **options) -> CompressError:
    """The error of a run, which must be of the right class, on one line, and name its cause."""
    options = {"self_check": False} | case.options | options
    with pytest.raises(CompressError) as caught:
        run(recipe, output, windows=case.windows, **options)
    assert isinstance(caught.value, UsageError) == case.usage
    assert caught.value.exit_code == (2 if case.usage else 1)
    check_line(str(caught.value), *case.expected)
    return caught.value


def refused_export(
    format: str, source: Path, output: Path, *named, kind: type = UsageError, **options
) -> None:
    """An export is refused with all that is named, and nothing is written."""
    before = every_file(output) if output.is_dir() else None
    with refused(kind, *named):
        export(source, format, output, **options)
    assert (every_file(output) if output.is_dir() else None) == before


def visible(folder: Path) -> dict[str, bytes]:
    """The files of a folder outside the journal."""
    return {n: b for n, b in every_file(folder).items() if not n.startswith(".modelpress")}
