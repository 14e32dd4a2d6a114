"""What the tests of the whole program share: tiny checkpoints and a tiny text, written once.

Imports are inside the fixtures, so that tests of one part need no more than that part.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from support.tiny_quantised import Quantised

# Test workers say that a terminal of 80 columns is there; output then wraps.
os.environ.pop("COLUMNS", None)


@pytest.fixture(scope="session", autouse=True)
def forked_scripts() -> Iterator[None]:
    """The checks' scripts need not import their libraries again for each test."""
    from compress.pipeline.script_process import OFFLINE
    from support.forked_scripts import ForkedScripts

    scripts = ForkedScripts(OFFLINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.pipeline.script_process.completed", scripts.completed)
        yield
    scripts.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """`checkpoint("qwen2", tied=True)`: its folder, the same for the same arguments.

    Tests must not change it; one that damages a checkpoint writes its own.
    """
    from support.tiny_checkpoints import write_checkpoint

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
    from support.tiny_checkpoints import write_text

    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="session")
def finished(checkpoint, tmp_path_factory) -> Path:
    """A finished result in several shards; tests work on copies."""
    from compress.pipeline.run import run
    from support.tiny_checkpoints import recipe_for

    folder = tmp_path_factory.mktemp("finished") / "out"
    recipe = recipe_for(checkpoint(), quantize={"method": "rtn"}, save={"shard_size": "50KB"})
    run(recipe, folder, self_check=False)
    return folder


@pytest.fixture
def press(tmp_path) -> Callable[..., Path]:
    """`press(recipe, windows)` runs it, on WINDOWS per default, and returns the result's folder."""
    from compress.pipeline.run import run
    from support.tiny_checkpoints import WINDOWS

    numbers = itertools.count()

    def press(recipe: Any, windows: Any = WINDOWS, **options: Any) -> Path:
        folder = tmp_path / f"out-{next(numbers)}"
        run(recipe, folder, windows=windows, **{"self_check": False} | options)
        return folder

    return press


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A forked child has no other, and sums depend on their number."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def empty_folder(monkeypatch, tmp_path) -> None:
    """An empty working folder for a command; what it sets in the environment is undone."""
    from compress.cli.main import QUIET

    monkeypatch.chdir(tmp_path)
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)


# ---- checkpoints that packed loading and the formats read ---------


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> "Quantised":
    """Widths 2, 3, 4 and 8 in groups of 32 and per channel. Tests must not change the folder."""
    from support.tiny_quantised import MIXED, write_quantised

    return write_quantised(tmp_path_factory.mktemp("mixed"), MIXED)


@dataclass
class Packed:
    folder: Path
    weights: "dict[str, Tensor]"  # fp32, as the checkpoint's documented layout says


@pytest.fixture(scope="session")
def packed(checkpoint, tmp_path_factory) -> Callable[..., Packed]:
    """`packed("qwen2", bits=8)`: a bf16 model, rounded. Tests must not change the folder.

    The second argument is what is special about the model, the others are keys of `quantize`.
    """
    import torch

    from compress.pipeline.run import run
    from support.tiny_checkpoints import WINDOWS, dequantised, read_tensors, recipe_for, widths_of

    made: dict[str, Packed] = {}

    def packed_model(family: str = "llama", model: dict | None = None, **quantize: Any) -> Packed:
        key = json.dumps([family, model, quantize])
        if key not in made:
            source = checkpoint(family, dtype=torch.bfloat16, **model or {})
            recipe = recipe_for(source, quantize={"method": "rtn"} | quantize)
            folder = tmp_path_factory.mktemp(family) / "packed"
            run(recipe, folder, windows=WINDOWS, self_check=False)
            weights = dequantised(read_tensors(folder), widths_of(recipe, source))
            made[key] = Packed(folder, weights)
        return made[key]

    return packed_model


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    """The folder of `packed()`, one that a test may change."""
    return shutil.copytree(packed().folder, tmp_path / "copy")


# ---- tiny multimodal models ---------


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    from support.tiny_folders import tiny_folder

    written = {}

    def folder_of(family="llava"):
        if family not in written:
            written[family] = tiny_folder(
                tmp_path_factory.mktemp(family) / "model", family, noisy=True
            )
        return written[family]

    return folder_of


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    from support.tiny_folders import write_samples

    return write_samples(tmp_path_factory.mktemp("samples") / "data")
