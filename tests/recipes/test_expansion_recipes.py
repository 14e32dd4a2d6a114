"""The shipped recipes on dataset expansion: one comparison, in which nothing else differs."""

import json
from pathlib import Path

import pytest

from compress.pipeline.inputs import RunInputs
from compress.pipeline.plan import make_plan
from compress.recipe.recipe import Recipe
from support.calling import call, pretend

NAMES = ("expansion-none", "expansion-8", "expansion-samples", "expansion-8-uniform")


@pytest.fixture(scope="module")
def recipes() -> dict[str, Recipe]:
    return {name: Recipe.load(name) for name in NAMES}


def test_each_can_be_run(recipes):
    for recipe in recipes.values():
        assert make_plan(RunInputs.open(recipe)).problems == []


def test_they_differ_in_what_is_studied_alone(recipes):
    none, eight, samples, uniform = (r.calibration for r in recipes.values())
    assert (none.expansion, samples.expansion, eight.expansion) == (1, 1, 8)
    assert none.samples == eight.samples and samples.samples == 8 * none.samples
    assert uniform == eight  # the same windows, whoever weighs them
    for recipe in recipes.values():
        same = {"name": "", "calibration": none.model_dump()}
        same["quantize"] = recipes["expansion-none"].quantize.model_dump()
        assert recipe.with_changes(**same) == recipes["expansion-none"].with_changes(name="")
    assert len({r.name for r in recipes.values()}) == len(NAMES)
    weighed = [r.quantize.token_importance.name for r in recipes.values()]
    assert weighed == ["attention_concentration"] * 3 + ["uniform"]
    rest = {"token_importance": None}
    sections = [r.quantize.model_copy(update=rest) for r in recipes.values()]
    assert all(section == sections[0] for section in sections)


def test_expansion_and_its_control_are_compared_by_one_command(
    checkpoint, text, tmp_path, monkeypatch, capsys
):
    """On a tiny model and text: as many windows, the same of them in both."""
    pretend(monkeypatch, "compress.pipeline.run", "reload_and_compare", {})
    perplexity = f"{{dataset: {text}, length: 16, tokens: 64}}"
    changes = (
        f"calibration.dataset={text}",
        "calibration.length=16",
        "quantize.group_size=32",
        f"evaluate={{perplexity: {perplexity}}}",
    )
    sets = [part for change in changes for part in ("--set", change)]
    options = ("--model", checkpoint(), *sets, "--no-check-source", "--output", tmp_path / "out")
    assert call("compare", *NAMES[1:3], *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len({row["name"] for row in found["rows"]}) == 3
    windows = {}
    for run in found["runs"]:
        facts = json.loads((Path(run["folder"]) / "modelpress.json").read_text())
        windows[run["name"]] = facts["calibration"]["windows"][0]
    assert list(windows.values()) == [256, 256]
