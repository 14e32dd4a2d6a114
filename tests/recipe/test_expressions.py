"""Expressions that could match for very long are refused; those that people write pass."""

import json
import shutil

import pytest

import compress
from compress.errors import CheckpointError, RecipeError
from compress.recipe.expressions import LENGTH, check_expression
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
