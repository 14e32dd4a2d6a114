"""Checkpoints that GPTQModel and llm-compressor wrote give, packed and dense, their own logits.

How they were made: tests/interop/make_foreign.py.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.checkpoint.packed import PackedLinears
from compress.kernels.linear import QuantLinear
from support.tiny_checkpoints import relative_error

FOREIGN = Path(__file__).parents[1] / "interop" / "foreign"
# What each of them was told to do: (bits, group size, symmetric) of modules by a part of the name.
ALL = {
    "gptqmodel-w4": {"proj": (4, 32, True)},
    "gptqmodel-w4-act-order": {"proj": (4, 32, True)},
    "gptqmodel-w3-asymmetric": {"proj": (3, 64, False)},
    "gptqmodel-mixed": {
        "down_proj": (8, None, True),
        "1.mlp.gate_proj": (2, 32, True),
        "1.mlp.up_proj": (2, 32, True),
        "0.self_attn.o_proj": None,
        "proj": (4, 64, True),
    },
    "llmcompressor-w4": {"proj": (4, 32, True)},
    "llmcompressor-w4-act-order": {"proj": (4, 32, True)},
    "llmcompressor-w8a8": {"proj": (8, None, True)},
    "llmcompressor-mixed": {
        "self_attn": (8, None, True),
        "down_proj": (4, 64, False),
        "0.mlp": (3, 32, False),
        "1.mlp": (5, 64, True),
    },
}


ROUNDED = "llmcompressor-w8a8"
CASES = [(name, packed) for name in ALL if name != ROUNDED for packed in (True, False)]


@pytest.mark.parametrize(("name", "packed"), CASES)
def test_logits_are_those_of_the_program_that_made_it(name, packed):
    expected = load_file(FOREIGN / name / "expected.safetensors")
    model, _ = compress.load(FOREIGN / name, dtype=torch.float32, packed=packed)
    kept = [n for n, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert len(kept) == (packed and 14 - (name == "gptqmodel-mixed"))
    with torch.no_grad():
        found = model(expected["input_ids"]).logits
    assert relative_error(found, expected["logits"]) < 1e-5


@torch.no_grad()
def test_activations_are_rounded_as_by_the_program_that_made_it():
    """As near as may be: the last bit of a token's largest value decides about an integer."""
    expected = load_file(FOREIGN / ROUNDED / "expected.safetensors")
    ids, logits = expected["input_ids"], expected["logits"]
    model, _ = compress.load(FOREIGN / ROUNDED, dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert [layer.activation_bits for layer in layers] == [8] * 14
    error = relative_error(model(ids).logits, logits)
    for layer in layers:
        layer.forward = lambda x, W=layer.dequantize(): torch.nn.functional.linear(x, W)
    weights_only = relative_error(model(ids).logits, logits)
    assert error < 0.5 * weights_only


@pytest.mark.parametrize("name", ALL)
def test_schemes_are_those_that_were_asked_for(name):
    linears = PackedLinears(FOREIGN / name)
    listed = {module["name"]: module for module in compress.inspect(FOREIGN / name)["modules"]}
    for module in (n for n in listed if n.endswith("_proj")):
        asked = next(scheme for part, scheme in ALL[name].items() if part in module)
        if asked is None:
            assert module not in linears.schemes
            continue
        found = linears.schemes[module]
        assert (found.bits, found.group_size, found.symmetric) == asked
        assert listed[module]["bits"] == asked[0]
        assert (linears.codes(module).zero is None) == asked[2]


@pytest.mark.parametrize("name", ["gptqmodel-w4-act-order", "llmcompressor-w4-act-order"])
def test_act_order_permutes_columns(name):
    linears = PackedLinears(FOREIGN / name)
    codes = linears.codes("model.layers.0.mlp.down_proj")
    assert sorted(codes.order.tolist()) == list(range(128)) != codes.order.tolist()


def test_small_enough_to_be_kept():
    assert {folder.name for folder in FOREIGN.iterdir()} == set(ALL)
    for folder in FOREIGN.iterdir():
        assert sum(file.stat().st_size for file in folder.iterdir()) < 300_000
