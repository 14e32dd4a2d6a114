"""The GPTQ section of config.json, read as GPTQModel and vLLM read it."""

import random
import re

import pytest

from compress.checkpoint.engines import gptq_notes, split_fusions
from compress.checkpoint.gptq import quantization_config
from compress.scheme import Scheme

A, B, C = Scheme(4, 128), Scheme(2, 64), Scheme(8, None)
INNER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
FUSED = {"self_attn.qkv_proj": INNER[:3], "mlp.gate_up_proj": INNER[4:6]}
LAYERS = 13  # two digits: 1 must not match 11


def resolve(config, name, rules=None):
    """The scheme that a reader gives to a module; None if it leaves it alone."""
    settings = {key: config[key] for key in ("bits", "group_size", "sym")}
    for pattern, override in rules or config.get("dynamic", {}).items():
        if re.match(pattern.removeprefix("-:"), name):
            if pattern.startswith("-:"):
                return None
            settings |= override
            break
    size = settings["group_size"]
    return Scheme(settings["bits"], None if size == -1 else size, settings["sym"])


def split(schemes):
    return (
        {name: scheme for name, scheme in schemes.items() if scheme is not None},
        [name for name, scheme in schemes.items() if scheme is None],
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_module_gets_its_scheme_under_every_name(seed):
    draw = random.Random(seed)  # noqa: S311
    schemes = {}
    for layer in range(LAYERS):
        for part in (INNER[:3], INNER[3:4], INNER[4:6], INNER[6:]):
            chosen = draw.choice([A, A, B, C, Scheme(3, 32, symmetric=False), None])
            schemes |= {f"model.layers.{layer}.{inner}": chosen for inner in part}
    modules, plain = split(schemes)
    config = quantization_config(modules, plain)
    backwards = list(config["dynamic"].items())[::-1]
    fused = {
        f"model.layers.{layer}.{name}": schemes[f"model.layers.{layer}.{parts[0]}"]
        for layer in range(LAYERS)
        for name, parts in FUSED.items()
    }
    for name, scheme in (schemes | fused).items():
        assert resolve(config, name) == scheme
        assert resolve(config, name, backwards) == scheme  # whichever pattern is tried first
    assert not split_fusions(schemes)


def test_the_scheme_of_most_weights_needs_no_rule():
    modules = {f"model.layers.{i}.mlp.down_proj": B if i < 9 else A for i in range(LAYERS)}
    assert quantization_config(modules)["bits"] == B.bits
    weights = {name: 1 if scheme == B else 100 for name, scheme in modules.items()}
    config = quantization_config(modules, weights=weights)
    assert config["bits"] == A.bits
    assert len(config["dynamic"]) == 1
    uniform = quantization_config(dict.fromkeys(modules, C))
    assert "dynamic" not in uniform
    assert uniform["group_size"] == -1


def test_the_head_is_said_to_be_quantised_only_if_it_is():
    inside = {"model.layers.0.mlp.down_proj": A}
    assert quantization_config(inside)["lm_head"] is False
    config = quantization_config({"lm_head": C} | inside, weights={"lm_head": 10**9})
    assert config["lm_head"] is True
    assert config["bits"] == A.bits  # of the layers, however large the head is
    assert resolve(config, "lm_head") == C


def test_asymmetric_modules_make_it_version_2():
    modules = {"model.layers.0.mlp.up_proj": A, "model.layers.0.mlp.down_proj": B}
    assert quantization_config(modules)["checkpoint_format"] == "gptq"
    modules["model.layers.1.mlp.up_proj"] = Scheme(4, 128, symmetric=False)
    config = quantization_config(modules)
    assert config["checkpoint_format"] == config["format"] == "gptq_v2"


def test_transformers_is_told_which_linears_stay():
    """It replaces, in every layer, the linears whose name ends with one that is listed."""
    schemes = {f"model.layers.{i}.{n}": A for i in range(LAYERS) for n in INNER}
    left = {name: None for name in schemes if name.endswith("down_proj")}
    config = quantization_config(*split(schemes | left))
    (listed,) = config["modules_in_block_to_quantize"]
    replaced = {name for name in schemes if any(name.endswith(part) for part in listed)}
    assert replaced == schemes.keys() - left
    assert not gptq_notes(*split(schemes | left))
    uneven = schemes | {"model.layers.2.mlp.down_proj": None}
    assert "modules_in_block_to_quantize" not in quantization_config(*split(uneven))
    assert "transformers" in " ".join(gptq_notes(*split(uneven)))
