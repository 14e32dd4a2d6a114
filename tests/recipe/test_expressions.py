"""Expressions that could match for very long are refused; those that people write pass."""

import json
import shutil

import pytest

import compress
from compress.checkpoint.quantization_config import checked_section
from compress.errors import CheckpointError, RecipeError
from compress.recipe import expressions
from compress.recipe.expressions import (
    LENGTH,
    LONGEST_NAME,
    check_expression,
    check_patterns,
)
from compress.recipe.recipe import Recipe
from support.refusals import refused
from support.tiny_checkpoints import change_config

SLOW = [
    r"\d+" * 12 + "x", r"[^.]*" * 9 + "x", r"\d+5" * 9,
    "(a+)+$", "(a*)*b", "(a|a)*$", "(?:[a-z]+\\.?)+x", "(.*)*x", "((a?){30}){30}a", "(a|aa){40}$",
    "(?:a|b|ab)*c", "(a|a)" * 30 + "$", "a?" * 30 + "a" * 30, ".*" * 20 + "x", "(?:(?:a+)?)+b",
    "(?=(a+)+$)", "(?!(a+)+$)x", "(?P<n>a+)+b", "(.+?)+?x", "(?i:(a+)+)$", "(?>(a+)+)b",
    "(a+){30}", "(?:a{1,30}){1,30}b", "x|(a+)+$",
]  # fmt: skip
WRONG = ["(", "[a", "*a", "a{99999999999999999999}", "(?P<1>a)", "(" * 1500 + ")" * 1500]
USUAL = [
    ".*", ".*lm_head", "model.layers.1.*", r".*\.(q|k|v|o|gate|up|down)_proj$", "visual.*",
    r"model\.layers\.(0|1|2|31)\.mlp\..*", r"^(?!.*lm_head).*$",
    r".*layers\.\d+\..*experts\.\d+\..*",
    r"(?:model\.)?layers\.\d{1,2}\.", r".*self_attn\.[qkvo]_proj", "", "model", r".*\.mlp\.gate$",
    r"(\d+\.)+x",
    "|".join(f"model.layers.{i}.mlp" for i in range(100)), r"(.*\.)?(attn|mlp)\.(.*)_proj.*",
]  # fmt: skip


@pytest.mark.parametrize("expression", SLOW + WRONG + ["a" * (LENGTH + 1)])
def test_slow_or_wrong_is_refused(expression):
    with pytest.raises(ValueError):
        check_expression(expression)


@pytest.mark.parametrize("expression", USUAL)
def test_what_people_write_passes(expression):
    check_expression(expression)


@pytest.mark.parametrize("expression", SLOW[:4] + WRONG[:2])
def test_a_recipe_names_the_line(tmp_path, expression):
    path = tmp_path / "r.yaml"
    path.write_text("quantize:\n  ignore:\n  - lm_head\n  - " + json.dumps(f"re:{expression}"))
    with refused(RecipeError, f"{path}:4:", "quantize.ignore[1]", repr(f"re:{expression}")):
        Recipe.load(path)


MANY = {
    "many": ["re:a"] * 51,
    "long together": ["re:.*a.*b.*c.*"] * 40,
    "a long name": ["x" * (LONGEST_NAME + 1)],
}


@pytest.mark.parametrize("patterns", MANY.values(), ids=MANY.keys())
def test_lists_that_would_take_too_long_are_refused(patterns, monkeypatch):
    monkeypatch.setattr(expressions, "MOST", 50)
    with pytest.raises(ValueError):
        check_patterns(patterns)
    with pytest.raises(RecipeError, match=r"quantize\.ignore"):
        Recipe.from_dict({"quantize": {"ignore": patterns}})
    with pytest.raises(RecipeError, match=r"quantize\.overrides"):
        overrides = [{"match": pattern, "bits": 8} for pattern in patterns]
        Recipe.from_dict({"quantize": {"overrides": overrides}})
    arguments = {"num_bits": 4, "type": "int"}
    half = len(patterns) // 2
    groups = {
        "a": {"targets": patterns[:half], "weights": arguments},
        "b": {"targets": patterns[half:], "weights": arguments},
    }
    method = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    for section in (
        method | {"config_groups": groups},
        method | {"config_groups": {"a": groups["a"] | {"targets": []}}, "ignore": patterns},
    ):
        with pytest.raises(CheckpointError, match=r"ignore|config_groups"):
            checked_section({"quantization_config": section}, "config.json")
    if len(patterns) > 1:
        rules = {f"+:{p[3:]}{i}": {"bits": 8} for i, p in enumerate(patterns)}
        with refused(CheckpointError, "config.json", "dynamic"):
            section = {"quant_method": "gptq", "bits": 4, "dynamic": rules}
            checked_section({"quantization_config": section}, "config.json")
        with refused(CheckpointError, "config.json", "modules_to_not_convert"):
            section = {"quant_method": "awq", "modules_to_not_convert": [p[3:] for p in patterns]}
            checked_section({"quantization_config": section}, "config.json")


def test_lists_as_long_as_those_of_large_models_pass():
    check_patterns(
        [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(61) for j in range(256)]
    )
    check_patterns([rf"re:.*\.{i}\..*(up|gate)_proj" for i in range(120)])


SECTIONS = {
    "ignore": lambda rule: {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
        "ignore": [f"re:{rule}"],
    },
    "targets": lambda rule: {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": [f"re:{rule}"], "weights": {"num_bits": 4}}},
    },
    "dynamic": lambda rule: {"quant_method": "gptq", "bits": 4, "dynamic": {f"+:{rule}": {}}},
    "modules_to_not_convert": lambda rule: {
        "quant_method": "awq", "bits": 4, "modules_to_not_convert": [rule]
    },
}  # fmt: skip


@pytest.mark.parametrize("key", SECTIONS)
@pytest.mark.parametrize("expression", SLOW[:3])
def test_a_config_names_the_key(checkpoint, tmp_path, key, expression):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    change_config(folder, quantization_config=SECTIONS[key](expression))
    with refused(CheckpointError, folder / "config.json", "quantization_config", key):
        compress.load(folder)
