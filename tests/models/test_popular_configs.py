"""The configs of popular models that come along are those of models of the published size."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from compress.models.pretrained import load_config
from compress.models.skeleton import empty_model
from support.popular_models import COUNTS, FOLDER, NAMES, SOURCES, config_of


@pytest.fixture
def config(request, tmp_path):
    """The transformers config of a name, read from a folder that has nothing else."""
    (tmp_path / "config.json").write_bytes((FOLDER / f"{request.param}.json").read_bytes())
    return load_config(tmp_path)


def test_every_config_has_a_count_and_a_source():
    assert len(NAMES) >= 40
    assert {*NAMES} == {*COUNTS} == {*SOURCES}


@pytest.mark.parametrize("config, name", [(n, n) for n in NAMES], ids=NAMES, indirect=["config"])
def test_transformers_makes_a_model_of_the_published_size(config, name):
    kind = (
        AutoModelForImageTextToText if "vision_config" in config_of(name) else AutoModelForCausalLM
    )
    with torch.device("meta"):
        model = kind.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(COUNTS[name] * 1e9, rel=0.01)


@pytest.mark.parametrize(
    "config", ["Llama-3.1-405B", "DeepSeek-V3", "Qwen3-VL-30B-A3B"], indirect=True
)
def test_an_empty_model_takes_no_memory_but_for_what_is_computed(config):
    """Its largest tensor alone has 30 GB: it is never made."""
    model = empty_model(config, hasattr(config, "vision_config"))
    assert all(parameter.is_meta for parameter in model.parameters())
    buffers = dict(model.named_buffers())
    assert buffers and not any(buffer.is_meta for buffer in buffers.values())
