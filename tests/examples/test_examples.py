"""Every example does what it says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import compress
from compress.registry import TOKEN_IMPORTANCE

FOLDER = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_here():
    source = Path(__file__).read_text()
    assert [file.stem for file in FOLDER.glob("*.py") if f'"{file.stem}"' not in source] == []


def test_a_model_is_quantised_loaded_and_asked(tmp_path):
    text = example("quantize_and_ask").main(str(tmp_path / "out"))
    assert text.startswith("import os")
    assert {m["bits"] for m in compress.inspect(tmp_path / "out")["modules"]} >= {3}


def test_gptq_loses_less_than_rounding():
    errors = example("one_linear").main()
    assert errors["gptq"] < errors["rtn"]


def test_layers_get_the_widths_that_a_budget_allows():
    widths = example("layer_widths").main()
    assert set(widths.values()) == {2, 4}
    assert sum(widths.values()) / len(widths) <= 3.25


def test_a_quarter_of_the_visual_tokens_is_left():
    visual, left = example("prune_a_picture").main()
    assert sum(left) / len(left) == pytest.approx(0.25 * visual, rel=0.02)


def test_an_importance_of_ones_own_weights_tokens(tmp_path):
    before = dict(TOKEN_IMPORTANCE)
    try:
        tokens = example("own_importance").main(str(tmp_path / "out"))
    finally:
        TOKEN_IMPORTANCE.clear()
        TOKEN_IMPORTANCE.update(before)
    # n equally spaced weights from 0 to 1: (sum w)^2 / sum w^2 = 3 n / 4; the least one is 0.01.
    assert tokens == pytest.approx(0.75 * 64, rel=0.02)
