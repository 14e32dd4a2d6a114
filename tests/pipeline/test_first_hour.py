"""What a newcomer meets in Python: recipes as names and dicts, what results show of themselves."""

import sys
from types import SimpleNamespace

import pytest

import compress
from compress.errors import RecipeError
from compress.pipeline.notebook import Bars, observer_here
from compress.recipe.recipe import Recipe
from support.refusals import refused


@pytest.fixture
def plain(checkpoint, text):
    return {
        "model": str(checkpoint()),
        "calibration": {"dataset": str(text), "samples": 4, "length": 16},
        "quantize": {"bits": 4, "group_size": 32},
    }


def test_a_recipe_is_a_name_a_file_a_dict_or_itself(plain, tmp_path):
    recipe = Recipe.from_dict(plain)
    file = tmp_path / "mine.yaml"
    file.write_text(recipe.dump())
    assert Recipe.of(recipe) is recipe
    assert Recipe.of(plain) == recipe == Recipe.of(file) == Recipe.of(str(file))
    assert Recipe.of("rsq-w4") == Recipe.load("rsq-w4")
    for given in (recipe, plain, str(file), "rsq-w4"):
        assert Recipe.of(given, "elsewhere").model.path == "elsewhere"
    with refused(RecipeError, "rsq-w5", "rsq-w4"):
        Recipe.of("rsq-w5")


def test_run_and_plan_take_them_and_results_show_themselves(plain, tmp_path):
    planned = compress.plan(plain)
    assert 5 < len(repr(planned).splitlines()) <= 10
    assert planned.source_bytes > planned.bytes["total"]
    result = compress.run(plain, tmp_path / "out", self_check=False)
    lines = repr(result).splitlines()
    assert lines[0] == "RunResult"
    assert len(lines) <= 10
    assert str(tmp_path / "out") in lines[1]
    assert planned.summary()["bytes"] in result._repr_html_()
    assert "<script" not in compress.plan(plain | {"name": "<script>"})._repr_html_()


def test_bars_are_for_notebooks_alone(monkeypatch):
    assert not isinstance(observer_here(), Bars)
    for shell, drawn in (
        (None, False),
        (SimpleNamespace(), False),
        (SimpleNamespace(kernel=1), True),
    ):
        ipython = SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        assert isinstance(observer_here(), Bars) == drawn


def test_an_evaluation_has_a_bar_in_a_notebook(plain, monkeypatch, capsys):
    asked = {"perplexity": plain["calibration"]["dataset"], "length": 16, "tokens": 64}
    compress.evaluate(plain["model"], **asked)
    assert "windows:" not in capsys.readouterr().err
    ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    compress.evaluate(plain["model"], **asked)
    assert "windows: 100%" in capsys.readouterr().err


def test_bars_follow_a_run(plain, tmp_path, capsys):
    section = {
        "perplexity": {"dataset": plain["calibration"]["dataset"], "length": 16, "tokens": 64}
    }
    compress.run(plain | {"evaluate": section}, tmp_path / "out", self_check=False, observer=Bars())
    said = capsys.readouterr().err
    assert "layers: 100%" in said
    assert "windows: 100%" in said
