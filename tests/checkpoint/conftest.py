"""Checkpoints that several tests read."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import WINDOWS, dequantised, read_tensors, recipe_for, widths_of
from tiny_quantised import MIXED, Quantised, write_quantised


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> Quantised:
    """Widths 2, 3, 4 and 8 in groups of 32 and per channel. Tests must not change the folder."""
    return write_quantised(tmp_path_factory.mktemp("mixed"), MIXED)


@dataclass
class Packed:
    folder: Path
    weights: dict[str, torch.Tensor]  # fp32, as the checkpoint's documented layout says


@pytest.fixture(scope="session")
def packed(checkpoint, tmp_path_factory) -> Callable[..., Packed]:
    """`packed("qwen2", bits=8)`: a bf16 model, rounded. Tests must not change the folder.

    The second argument is what is special about the model, the others are keys of `quantize`.
    """
    from compress.pipeline.run import run

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
