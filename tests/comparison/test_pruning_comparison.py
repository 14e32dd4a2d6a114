"""Comparisons of recipes that only prune: measured on one loaded model, nothing written anew."""

import json
import statistics
from pathlib import Path

import pytest

from compress.comparison.compare import compare
from compress.comparison.strategies import PruningComparison, only_prunes
from compress.comparison.study import Entry, seeded
from compress.errors import UsageError
from compress.observer import Observer
from compress.pipeline.evaluation import Evaluator, evaluate
from compress.pruning.saved import save_strategy
from compress.pruning.search import Objective
from compress.recipe.recipe import Recipe, shipped_recipes
from compress.recipe.strategy import PruneStrategy
from support.calling import call
from support.refusals import refused
from support.tiny_vlm import LAYERS, write_vlm

LIMIT = 14


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_vlm(tmp_path_factory.mktemp("vlm") / "model", word="no")


def recipe_of(model: Path, name: str, keep: float = 0.25, **section) -> Recipe:
    return Recipe.from_dict(
        {
            "name": name,
            "model": str(model),
            "calibration": {"dataset": "demo-scenes", "samples": 4},
            "rotate": "none",
            "quantize": {"method": "none"},
            "prune_visual_tokens": {"keep": keep} | section,
            "evaluate": {"tasks": ["demo_vqa"], "limit": LIMIT, "batch_size": 14},
        }
    )


def uniform(model, keep=0.25, name="uniform"):
    return recipe_of(model, name, keep, strategy={"method": "uniform"})


class Watch(Observer):
    def __init__(self):
        self.measured, self.warnings = [], []

    def module(self, name, facts):
        self.measured.append(name)

    def warning(self, text):
        self.warnings.append(text)


@pytest.fixture
def measurements(monkeypatch):
    """Counts those that are really taken."""
    taken = []
    real = Evaluator.measure_loaded

    def noting(self, model, processor, name, **options):
        taken.append((Path(name).name, options["seed"]))
        return real(self, model, processor, name, **options)

    monkeypatch.setattr(Evaluator, "measure_loaded", noting)
    return taken


# ---- figures ------------------------------------------------------------------------------------


def test_the_figures_are_those_of_a_checkpoint_with_that_strategy(model, tmp_path):
    recipes = [uniform(model), recipe_of(model, "fastv", 0.75, strategy={"method": "fastv"})]
    compared = compare(recipes, tmp_path / "out", seeds=(3,))
    for recipe, run in zip(recipes, compared.runs, strict=True):
        strategy = recipe.prune_visual_tokens.strategy_for(LAYERS)
        assert PruneStrategy.load(Path(run["folder"]) / "pruning.json") == strategy
        save_strategy(strategy, model)
        try:
            alone = evaluate(
                model, tasks=["demo_vqa"], limit=LIMIT, batch_size=14, seed=3, baseline=model
            )
        finally:
            (model / "pruning.json").unlink()
            config = json.loads((model / "config.json").read_text())
            config.pop("visual_token_pruning")
            (model / "config.json").write_text(json.dumps(config))
        for part in ("results", "baseline", "difference"):
            assert run["evaluation"][part] == alone[part]
        theirs = alone["pruning"]
        assert {k: run["evaluation"]["pruning"][k] for k in theirs} == theirs
        row = next(row for row in compared.as_dict()["rows"] if row["name"] == recipe.name)
        assert row["kept"] == pytest.approx(strategy.average_kept(LAYERS), abs=0.5 / 144)
        assert row["kv_bytes"] == theirs["kv_bytes"] / LIMIT
        assert row["demo_vqa exact_match"] == alone["results"]["demo_vqa"]["exact_match"]
    whole = compared.as_dict()["rows"][0]
    assert (whole["name"], whole["kept"]) == ("16-bit", 1)
    assert whole["kv_bytes"] == theirs["kv_bytes_unpruned"] / LIMIT
    assert not any("bytes" in row or "bits" in row for row in compared.as_dict()["rows"])
    assert f"demo_vqa: {LIMIT} items a seed, drawn from it" in compared.conditions


def test_a_seed_draws_its_own_questions_for_all_models(model, tmp_path):
    compared = compare([uniform(model)], tmp_path / "out", seeds=(0, 1, 4))
    per_seed = [run["evaluation"]["baseline"]["results"]["demo_vqa"] for run in compared.runs]
    values = [metrics["exact_match"] for metrics in per_seed]
    assert len(set(values)) > 1
    metric = "demo_vqa exact_match"
    for row in compared.as_dict()["rows"]:  # the model says no, pruned or not
        assert row[metric] == pytest.approx(statistics.fmean(values))
        assert row[metric + "_stderr"] == pytest.approx(statistics.stdev(values))
    assert compared.as_dict()["rows"][1]["demo_vqa retained"] == 1
    assert "sample standard deviation over seeds 0, 1, 4" in compared.conditions
    lines = (tmp_path / "out" / "comparison.csv").read_text().splitlines()
    assert len(lines) == 4 and "kept" in lines[0] and "demo_vqa retained" in lines[0]


def test_a_search_finds_the_best_of_its_trials_on_the_seeds_prompts(model, tmp_path):
    section = {"strategy": {"method": "vflowopt"}, "search": {"samples": 4, "trials": 3}}
    recipe = recipe_of(model, "searched", **section)
    run = compare([recipe], tmp_path / "out", seeds=(1,)).runs[0]
    lines = (Path(run["folder"]) / "trials.jsonl").read_text().splitlines()
    header, *trials = map(json.loads, lines)
    assert header["settings"]["seed"] == 1 and len(trials) == 3
    best = max(trials, key=lambda trial: trial["score"])
    assert run["strategy"] == best["strategy"]
    study = PruningComparison(recipe, "cpu", Observer())
    from compress.data.samples import read_samples

    one_by_one = read_samples("demo-scenes", study.processor, 4, seed=1)
    score = Objective(study.model, one_by_one)(PruneStrategy(**best["strategy"]))
    assert score == pytest.approx(best["score"], abs=1e-5)


def test_the_variables_of_a_search_are_the_recipes(model, tmp_path):
    section = {
        "strategy": {"method": "vflowopt", "voter_threshold": 0, "cell": None},
        "search": {"samples": 2, "trials": 2, "variables": ["ratios", "entropy_weight"]},
    }
    run = compare([recipe_of(model, "it", **section)], tmp_path / "out").runs[0]
    header, *trials = map(
        json.loads, (Path(run["folder"]) / "trials.jsonl").read_text().splitlines()
    )
    assert header["settings"]["variables"] == ["ratios", "entropy_weight"]
    assert all(trial["strategy"]["voter_threshold"] == 0 for trial in trials)
    assert all(trial["strategy"]["cell"] is None for trial in trials)


# ---- budgets ------------------------------------------------------------------------------------


def test_a_method_is_measured_at_the_least_that_it_can_keep(model, tmp_path):
    """FastV's first two of three layers see all tokens; one token is left for the last."""
    least = (2 + 1 / 144) / 3
    recipes = [
        recipe_of(model, f"fastv keep={keep}", keep, strategy={"method": "fastv"})
        for keep in (0.9, 0.1)
    ]
    watch = Watch()
    compared = compare(recipes, tmp_path / "out", observer=watch)
    kept = [row["kept"] for row in compared.as_dict()["rows"][1:]]
    assert kept == [pytest.approx(0.9, abs=0.5 / 144), pytest.approx(least)]
    assert [run["asked"] for run in compared.runs] == [None, 0.1]
    (warning,) = watch.warnings
    assert "fastv keep=0.1" in warning and "66.9%" in warning and "10.0%" in warning
    assert compared.warnings == [warning]


def test_other_methods_that_cannot_keep_so_little_are_refused(model, tmp_path):
    for section in (
        {"strategy": {"method": "vflowopt"}, "stages": [2]},
        {"strategy": {"method": "fastv", "ratios": [1e-4]}, "stages": [1]},
    ):
        with pytest.raises(UsageError):
            compare([recipe_of(model, "it", 0.34, **section)], tmp_path / "out")


# ---- what is kept -------------------------------------------------------------------------------


def test_what_is_measured_is_kept(model, tmp_path, measurements):
    output, recipe = tmp_path / "out", uniform(model)
    first = compare([recipe], output, seeds=(0,))
    second = compare([recipe], output, seeds=(0, 1))
    assert second.runs[0] == first.runs[0]
    assert measurements == [("uniform-0", 0), ("uniform-1", 1)]
    again = recipe.with_changes(evaluate={"limit": 7})
    third = compare([again], output, seeds=(0,))
    assert third.runs[0]["evaluation"]["pruning"]["prompts"] == 7
    assert len(measurements) == 3


def test_another_recipe_of_the_same_name_replaces_nothing_unasked(model, tmp_path, measurements):
    output = tmp_path / "out"
    compare([uniform(model)], output)
    with refused(UsageError, "uniform-0", "--overwrite"):
        compare([uniform(model, 0.5)], output)
    compared = compare([uniform(model, 0.5)], output, overwrite=True)
    assert compared.as_dict()["rows"][1]["kept"] == 0.5
    assert len(measurements) == 2


def test_a_measurement_that_was_cut_short_is_taken_again(model, tmp_path, measurements):
    output = tmp_path / "out"
    first = compare([uniform(model)], output)
    file = output / "uniform-0" / "measured.json"
    file.write_text(file.read_text()[:100])
    second = compare([uniform(model)], output)
    assert len(measurements) == 2
    assert second.as_dict()["rows"][1]["kept"] == first.as_dict()["rows"][1]["kept"]


def test_the_model_is_left_unpruned_by_a_measurement_that_fails(model, tmp_path, monkeypatch):
    study = PruningComparison(uniform(model), "cpu", Observer())

    def fail(*_, **__):
        raise RuntimeError("power cut")

    monkeypatch.setattr(study.evaluator, "measure_loaded", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        study.run(Entry(uniform(model), 0, tmp_path / "it"))
    assert not hasattr(study.model, "visual_token_pruning")
    assert not (tmp_path / "it" / "measured.json").exists()


# ---- recipes ------------------------------------------------------------------------------------


def test_a_seed_goes_to_all_that_draws(model):
    random = recipe_of(model, "random", strategy={"method": "random"})
    section = seeded(random, 5).prune_visual_tokens
    assert section.strategy_for(LAYERS).seed == 5 and section.search is None
    searched = recipe_of(model, "it", search={"trials": 2})
    drawn = seeded(searched, 6)
    assert drawn.prune_visual_tokens.search.seed == drawn.calibration.seed == 6
    assert drawn.prune_visual_tokens.strategy_for(LAYERS).seed == 0  # vflowopt draws nothing
    assert seeded(searched, 6) == seeded(drawn, 6)


def test_what_changes_weights_is_run_as_a_recipe(model):
    plain = uniform(model)
    assert only_prunes(plain)
    assert not only_prunes(plain.with_changes(quantize={"method": "gptq", "bits": 4}))
    assert not only_prunes(plain.with_changes(rotate="hadamard"))
    assert not only_prunes(plain.with_changes(prune_visual_tokens=None))


def test_the_shipped_recipes_can_be_compared():
    found = [Recipe.load(path) for name, _, path in shipped_recipes() if name.startswith("prune-")]
    assert len(found) == 11
    assert all(only_prunes(recipe) for recipe in found)
    assert len({recipe.name for recipe in found}) == len(found)
    assert len({json.dumps(r.evaluate.model_dump()) for r in found}) == 1
    assert found[0].evaluate.limit >= 490
    for recipe in found:  # twelve layers, as the demo model has
        recipe.prune_visual_tokens.strategy_for(12)


def test_from_the_command_line_every_budget_gets_its_line(model, tmp_path, capsys):
    names = ("prune-uniform", "prune-random")
    options = ("--vary", "prune_visual_tokens.keep=0.5,0.25", "--set", "evaluate.limit=7")
    code = call("compare", *names, "--model", model, *options, "--output", tmp_path / "o", "--json")
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    kept = {row["name"]: row["kept"] for row in found["rows"]}
    assert kept == {
        "16-bit": 1, "uniform keep=0.5": 0.5, "uniform keep=0.25": 0.25,
        "random keep=0.5": 0.5, "random keep=0.25": 0.25,
    }  # fmt: skip
    assert Path(found["plot"]).read_bytes().startswith(b"\x89PNG")
