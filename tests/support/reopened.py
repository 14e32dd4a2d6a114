"""A written folder as plain transformers has it, and how far a run's probe is from that.

errors = compared_here(monkeypatch)
"""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from compress.pipeline import run as run_module
from compress.pipeline.reload_script import (
    TOGETHER,
    has_experts,
    with_experts_together,
    with_wide_scales,
)
from support.tiny_checkpoints import relative_error


def opened(folder: Path, **options: object) -> torch.nn.Module:
    """Plain transformers in fp32, nothing missing or left over; packed experts that it has no place
    for are made dense before."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind, place, given = getattr(transformers, config.architectures[0]), folder, {}
    if config.model_type in TOGETHER and has_experts(str(folder)):
        tensors = with_wide_scales(str(folder))
        with_experts_together(tensors, config)
        place, given = None, {"config": config, "state_dict": tensors}
    options = {"dtype": torch.float32, "output_loading_info": True} | options | given
    model, loading = kind.from_pretrained(place, **options)
    assert not any(loading.values()), loading
    return model.eval()


def compared_here(monkeypatch: pytest.MonkeyPatch, *needed: str) -> list[float]:
    """Puts the self-check into this process; a list that gets its relative errors.

    `needed`: what the prompt must have beside its ids.
    """
    errors: list[float] = []

    def compare(folder: Path, probe: Path) -> dict[str, float]:
        seen = load_file(probe)
        assert {*needed} <= {*seen}
        logits = seen.pop("logits")
        with torch.no_grad():
            errors.append(relative_error(opened(folder)(**seen).logits, logits))
        return {"relative_error": errors[-1], "tolerance": 0, "tokens": 0}

    monkeypatch.setattr(run_module, "reload_and_compare", compare)
    return errors
