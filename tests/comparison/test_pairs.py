"""Paired differences of recipes: their means and errors, and what cannot be paired."""

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from compress.cli.main import app
from compress.comparison.compare import compare
from compress.comparison.pairs import difference_rows, differences_of, pairing_line
from compress.errors import UsageError
from support.measured_recipes import recipe_of
from support.refusals import refused

TOKENS = [511, 511, 300, 200]


def run_of(name, seed, nll, kl=None, tokens=TOKENS):
    windows = {"tokens": tokens, "nll": list(nll)} | ({} if kl is None else {"kl": list(kl)})
    return {"name": name, "seed": seed, "evaluation": {"windows": windows}}


def random_runs(names, seeds, rng):
    return [
        run_of(name, seed, rng.normal(size=4) * TOKENS, rng.random(4) * TOKENS)
        for name in names
        for seed in seeds
    ]


def test_mean_and_errors_are_those_of_the_formulas():
    rng = np.random.default_rng(0)
    runs = random_runs(["a", "b"], [0, 1, 7], rng)
    found = {difference.of: difference for difference in differences_of(runs, "a")}
    assert set(found) == {"nll", "kl"}
    n = np.array(TOKENS)
    for of, difference in found.items():
        totals = np.array([run["evaluation"]["windows"][of] for run in runs])
        d = totals[3:] - totals[:3]  # [seed, window], b minus a
        mean = d.sum() / (3 * n.sum())
        assert difference.value == pytest.approx(mean, rel=1e-12)
        residuals = d.mean(0) - mean * n
        over_samples = math.sqrt(4 / 3 * (residuals**2).sum()) / n.sum()
        over_seeds = (d.sum(1) / n.sum()).std(ddof=1) / math.sqrt(3)
        assert difference.over_samples == pytest.approx(over_samples, rel=1e-12)
        assert difference.over_seeds == pytest.approx(over_seeds, rel=1e-12)
        assert difference.stderr == pytest.approx(math.hypot(over_samples, over_seeds), rel=1e-12)
        assert (difference.name, difference.against, difference.seeds) == ("b", "a", 3)


def test_only_seeds_and_windows_that_both_have_are_paired():
    rng = np.random.default_rng(1)
    runs = random_runs(["a", "b"], [0, 1], rng)
    alone = run_of("b", 2, [5.0] * 4)
    elsewhere = [run_of("c", 0, [1.0, 2.0], tokens=[10, 10])]
    found = differences_of([*runs, alone, *elsewhere], "a")
    assert {(d.name, d.seeds) for d in found} == {("b", 2)}


def test_one_seed_has_the_error_over_samples_and_one_window_none():
    one = differences_of(random_runs(["a", "b"], [3], np.random.default_rng(2)), "a")[0]
    assert one.over_seeds is None
    assert one.stderr == one.over_samples > 0
    assert "windows" in pairing_line([one])
    assert "seeds" not in pairing_line([one]).partition("±")[2]
    none = differences_of([run_of("a", 0, [1], [1], [5]), run_of("b", 0, [3], [2], [5])], "a")[0]
    assert (none.value, none.stderr, none.over_samples) == (0.4, None, None)
    assert "±" not in pairing_line([none])


def test_what_measured_no_text_has_no_differences():
    tasks_only = [{"name": name, "seed": 0, "evaluation": {"results": {}}} for name in "ab"]
    assert differences_of(tasks_only, "a") == []
    assert difference_rows([]) == []
    assert pairing_line([]) == ""


def answered(name, seed, answers, **more):
    items = {"t": {"acc": {"right": answers}}, "drawn": {"acc": {"right": answers}}}
    groups = {"g": {"acc": {"t": 0.5, "drawn": 0.5}}}
    return {"name": name, "seed": seed, "evaluation": {"items": items, "groups": groups} | more}


def test_recipes_are_paired_by_item_and_groups_with_them():
    texts = {("a", 0): "1100", ("a", 1): "1010", ("b", 0): "0101", ("b", 1): "1110"}
    runs = [answered(name, seed, text) for (name, seed), text in texts.items()]
    found = {d.of: d for d in differences_of(runs, "a", ("drawn",))}
    assert list(found) == ["t acc", "drawn acc", "g acc"]
    # b minus a: seed 0 has -1 0 0 1, seed 1 has 0 1 0 0
    same, drawn, group = found.values()
    assert same.value == drawn.value == group.value == pytest.approx(1 / 8)
    assert (same.right_to_wrong, same.wrong_to_right) == (1, 2)  # an item counts once
    assert (drawn.right_to_wrong, drawn.wrong_to_right) == (1, 2)  # and here every one
    assert (group.right_to_wrong, group.wrong_to_right) == (2, 4)
    assert same.mcnemar_p == 1 and group.mcnemar_p == pytest.approx(0.6875)
    assert same.seeds == 2
    rows = {row.name: row for row in difference_rows(list(found.values()))}
    assert rows["b, t acc"].values["right to wrong"] == 1
    assert rows["b, g acc"].values["McNemar p"] == 0.6875
    line = pairing_line(list(found.values()))
    assert "same items and seeds;" in line and "counts once" in line and "NLL" not in line


def test_recipes_are_paired_by_the_items_of_a_real_task(checkpoint, text, tmp_path):
    section = {"tasks": ["demo_code"], "limit": 8}
    recipes = [recipe_of(checkpoint(), text, f"w{b}", section, bits=b) for b in (4, 2)]
    compared = compare(recipes, tmp_path / "out", self_check=False)
    found = {d.of: d for d in compared.differences}
    assert {"nll", "kl", "demo_code acc", "demo_code acc_norm"} == set(found)
    w4, w2 = (run["evaluation"] for run in compared.runs)
    change = found["demo_code acc"]
    figures = [scores["results"]["demo_code"]["acc"] for scores in (w2, w4)]
    assert change.value == pytest.approx(figures[0] - figures[1])
    a, b = (scores["items"]["demo_code"]["acc"]["right"] for scores in (w2, w4))
    assert len(a) == 8
    assert change.right_to_wrong == sum(x < y for x, y in zip(a, b, strict=True))
    against = w2["difference"]["results"]["demo_code"]["acc"]
    assert {"right_to_wrong", "wrong_to_right", "mcnemar_p"} < set(against)
    assert "| w2, demo_code acc |" in compared.markdown() and "McNemar p" in compared.markdown()
    assert "same windows, items and seeds, NLL" in compared.pairing
    assert "demo_code acc right to wrong" in (tmp_path / "out" / "comparison.csv").read_text()


def test_the_first_recipe_is_the_reference_unless_another_is_named(checkpoint, text, tmp_path):
    recipes = [recipe_of(checkpoint(), text, f"w{bits}", bits=bits) for bits in (4, 2)]
    first = compare(recipes, tmp_path / "out", self_check=False)
    second = compare(recipes, tmp_path / "out", against="w2", self_check=False)
    of_first = {d.of: d for d in first.differences}
    of_second = {d.of: d for d in second.differences}
    assert {d.against for d in first.differences} == {"w4"}
    for of in ("nll", "kl"):
        assert of_first[of].value == -of_second[of].value
        assert of_first[of].stderr == of_second[of].stderr
    rows = {row["name"]: row for row in first.as_dict()["rows"]}
    assert of_first["kl"].value == pytest.approx(rows["w2"]["kl"] - rows["w4"]["kl"], rel=1e-9)
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["differences"] == [d.as_dict() for d in second.differences]
    assert second.pairing in (tmp_path / "out" / "comparison.md").read_text()


def test_a_reference_that_is_not_compared_is_refused_before_anything_runs(
    checkpoint, text, tmp_path
):
    recipes = [recipe_of(checkpoint(), text, f"w{bits}", bits=bits) for bits in (4, 2)]
    with refused(UsageError, "--against", "'w3'", "w4"):
        compare(recipes, tmp_path / "out", against="w3")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_both_tables(checkpoint, text, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(recipe_of(checkpoint(), text, "w").dump())
    asked = ["compare", str(recipe), "--vary", "quantize.bits=4,2", "--no-self-check"]
    asked += ["--output", str(tmp_path / "out"), "--against", "w bits=2"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert "minus w bits=2" in result.stdout
    assert "NLL" in result.stdout
