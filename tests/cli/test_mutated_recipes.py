"""Recipes changed at random: refused in a line, or what is written runs in transformers as here.

More cases: see `support/mutations.py`.
"""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

import compress
from compress.checkpoint.quantization_config import needs_own_reader, read_config
from compress.pipeline.run import run
from compress.recipe.recipe import Recipe
from support.tiny_checkpoints import load_whole, logits_of, write_checkpoint, write_text

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from support.mutations import cases, damaged, mutated, outcome, same, told

WIDER = [{"match": "re:.*down_proj$", "bits": 8}]
HALF = {"keep": 0.5, "stages": [0, 1], "strategy": {"voter_threshold": 1.1}}
KINDS = {
    "gptq": {"quantize": {"bits": 4, "group_size": 32, "overrides": WIDER}},
    "rsq": {
        "rotate": "hadamard",
        "quantize": {"method": "rsq", "bits": 3, "group_size": "channel", "act_order": True},
    },
    "rtn": {"quantize": {"method": "rtn", "bits": 8, "group_size": 32, "symmetric": False}},
    "none": {"rotate": "random", "quantize": {"method": "none"}},
    "allocate": {
        "quantize": {"bits": 4, "group_size": 32},
        "allocate": {"importance": "layer_embedding_change", "average_bits": 3.0, "samples": 2},
    },
    "prune": {"quantize": {"method": "none"}, "prune_visual_tokens": HALF},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    write_checkpoint(folder / "model", dtype=torch.float32)
    write_text(folder / "text.jsonl")
    return folder


def written(place: Path, kind: str) -> dict:
    """A recipe with every key."""
    text = {"dataset": str(place / "text.jsonl"), "samples": 2, "length": 12}
    measured = {"perplexity": {"dataset": text["dataset"], "length": 12, "tokens": 24}, "limit": 1}
    sections = {"rotate": "none", "calibration": text} | KINDS[kind]
    sections |= {"evaluate": measured} if kind == "rtn" else {}
    recipe = Recipe.from_dict({"model": str(place / "model"), **sections})
    return yaml.safe_load(recipe.dump())


@cases
@given(st.data())
def test_a_mutated_recipe(offline, place, data):
    recipe = written(place, data.draw(st.sampled_from([*KINDS])))
    if data.draw(st.integers(0, 4)):
        text = yaml.safe_dump(mutated(recipe, data), sort_keys=False).encode(errors="replace")
    else:
        text = damaged(yaml.safe_dump(recipe, sort_keys=False).encode(), data)
    file, out = place / "recipe.yaml", place / "out"
    file.write_bytes(text)
    planned = told("plan", file)
    shutil.rmtree(out, ignore_errors=True)

    def run_it():
        run(Recipe.load(file), out, self_check=False, check_source=False)

    refused = outcome(run_it)
    if planned is not None:
        assert refused is not None
    if refused is not None:
        assert not (out / "config.json").exists()
        return
    section = read_config(out).get("quantization_config", {})
    own = needs_own_reader(section)  # transformers alone does not load it
    dense = compress.load(out, dtype=torch.float32, packed=False)[0] if own else load_whole(out)
    expected = logits_of(dense)
    assert same(logits_of(compress.load(out, dtype=torch.float32)[0]), expected)
    if Recipe.load(file).quantize.method == "none":
        assert same(expected, logits_of(load_whole(place / "model")))
