"""What the tests of the whole program share: tiny checkpoints and a tiny text, written once.

Imports are inside the fixtures, so that tests of one part need no more than that part.
"""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Test workers say that a terminal of 80 columns is there; output then wraps.
os.environ.pop("COLUMNS", None)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """`checkpoint("qwen2", tied=True)`: its folder, the same for the same arguments.

    Tests must not change it; one that damages a checkpoint writes its own.
    """
    from tiny_checkpoints import write_checkpoint

    written: dict[Any, Path] = {}

    def folder_of(family: str = "llama", **model: Any) -> Path:
        key = (family, *sorted(model.items()))
        if key not in written:
            folder = tmp_path_factory.mktemp(family) / "model"
            written[key] = write_checkpoint(folder, family, **model)
        return written[key]

    return folder_of


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A jsonl file of about 4,000 tokens."""
    from tiny_checkpoints import write_text

    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="session")
def finished(checkpoint, tmp_path_factory) -> Path:
    """A finished result in several shards; tests work on copies."""
    from tiny_checkpoints import recipe_for

    from compress.pipeline.run import run

    folder = tmp_path_factory.mktemp("finished") / "out"
    recipe = recipe_for(checkpoint(), quantize={"method": "rtn"}, save={"shard_size": "50KB"})
    run(recipe, folder, self_check=False)
    return folder


@pytest.fixture
def press(tmp_path) -> Callable[..., Path]:
    """`press(recipe, windows)` runs it, on WINDOWS per default, and returns the result's folder."""
    from tiny_checkpoints import WINDOWS

    from compress.pipeline.run import run

    numbers = itertools.count()

    def press(recipe: Any, windows: Any = WINDOWS, **options: Any) -> Path:
        folder = tmp_path / f"out-{next(numbers)}"
        run(recipe, folder, windows=windows, **{"self_check": False} | options)
        return folder

    return press


@pytest.fixture
def empty_folder(monkeypatch, tmp_path) -> None:
    """An empty working folder for a command; what it sets in the environment is undone."""
    from compress.cli.main import QUIET

    monkeypatch.chdir(tmp_path)
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
