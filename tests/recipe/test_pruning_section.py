"""The recipe's section on visual tokens: what it means, what it refuses, and its names."""

import json

import pytest
import yaml

from compress.errors import RecipeError, UsageError
from compress.pruning.search import search_variables
from compress.recipe.pruning import PruneVisualTokens, StrategySettings
from compress.recipe.recipe import Recipe
from compress.recipe.strategy import METHODS, PUBLISHED_CELL, PruneStrategy
from support.refusals import refused

LAYERS = 28


def section(**keys):
    return Recipe.from_dict({"prune_visual_tokens": keys}).prune_visual_tokens


def test_nothing_is_pruned_unless_it_is_asked_for():
    assert Recipe().prune_visual_tokens is None


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_alone_is_the_strategy_of_the_method(method):
    keep = 0.5 if method in ("fastv", "pyramiddrop") else 0.25
    found = section(keep=keep, strategy={"method": method}).strategy_for(LAYERS)
    more = {"cell": PUBLISHED_CELL} if method == "vflowopt" else {}
    assert found == PruneStrategy.for_budget(method, keep, LAYERS, **more)
    assert found.average_kept(LAYERS) == pytest.approx(keep)


@pytest.mark.parametrize(
    ("keys", "cell"),
    [
        ({}, PUBLISHED_CELL),
        ({"strategy": {"vit_layer": 1}}, PUBLISHED_CELL),
        ({"stages": [0, 9]}, PUBLISHED_CELL),
        ({"strategy": {"cell": 3}}, 3),
        ({"strategy": {"cell": None}}, None),  # switched off
        ({"stages": [2]}, None),  # nothing is pruned before the language model
        ({"strategy": {"method": "visionzip"}}, None),
    ],
)
def test_vflowopt_recycles_unless_it_is_told_not_to(keys, cell):
    recipe = Recipe.from_dict({"prune_visual_tokens": {"keep": 0.25, **keys}})
    assert recipe.prune_visual_tokens.strategy_for(LAYERS).cell == cell
    again = Recipe.from_dict(yaml.safe_load(recipe.dump()))
    assert again == recipe and again.prune_visual_tokens.strategy_for(LAYERS).cell == cell


def test_a_quantile_of_voters_stands_in_the_place_of_their_threshold():
    found = section(keep=0.25, strategy={"voter_quantile": 0.97}).strategy_for(LAYERS)
    assert found.voter_quantile == 0.97
    assert search_variables(found, None) == ("ratios", "entropy_weight", "cell")
    with refused(UsageError, "voter_threshold"):
        search_variables(found, ["voter_threshold"])


def test_every_setting_of_a_strategy_has_a_key_with_the_same_default():
    keys = StrategySettings.model_fields
    settings = {name for name in PruneStrategy.model_fields if name != "stages"}
    assert keys.keys() == settings | {"file"}
    for name in settings - {"ratios"}:
        assert keys[name].default == PruneStrategy.model_fields[name].default, name


FULL = PruneStrategy(
    stages=(0, 9, 18),
    ratios=(0.5, 0.9, 0.7),
    voter_threshold=3.0,
    vote="sum",
    entropy_weight=0.2,
    cell=2.5,
    vit_layer=-2,
    positions="renumbered",
    protect_newlines=False,
)


def test_settings_and_strategies_turn_into_each_other():
    settings = StrategySettings.of(FULL)
    assert (settings.voter_threshold, settings.entropy_weight) == (3.0, 0.2)
    values = settings.model_dump(exclude={"file"})
    assert section(stages=[0, 9, 18], strategy=values).strategy_for(LAYERS) == FULL


def test_a_file_is_read_with_the_recipe_and_written_out_in_it(tmp_path):
    FULL.save(tmp_path / "found.json")
    path = tmp_path / "recipe.yaml"
    path.write_text("prune_visual_tokens: {strategy: found.json}\n")  # beside the recipe
    recipe = Recipe.load(path)
    assert recipe.prune_visual_tokens.strategy_for(LAYERS) == FULL
    (tmp_path / "found.json").unlink()
    again = tmp_path / "again.yaml"
    again.write_text(recipe.dump())
    assert Recipe.load(again).prune_visual_tokens == recipe.prune_visual_tokens
    assert recipe.with_changes(name="other").prune_visual_tokens.strategy_for(LAYERS) == FULL
    given = Recipe.load(again, overrides=["prune_visual_tokens.strategy=null",
                                          "prune_visual_tokens.stages=null",
                                          "prune_visual_tokens.keep=0.25"])  # fmt: skip
    assert given.prune_visual_tokens == PruneVisualTokens(keep=0.25)


def test_a_damaged_or_missing_file_is_named(tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps({"ratio": [0.5]}))
    with refused(RecipeError, f"{tmp_path}/bad.json: ratio: "):
        section(strategy=str(tmp_path / "bad.json"))
    with refused(RecipeError, "'nowhere/at/all.json'"):
        section(strategy="nowhere/at/all.json")


def test_given_ratios_may_be_rounded_but_not_contradict_the_budget():
    keys = {"keep": 0.25, "stages": [0, 9, 18], "strategy": {"ratios": [0.265, 0.983, 0.877]}}
    assert section(**keys).strategy_for(LAYERS).ratios == (0.265, 0.983, 0.877)
    with refused(UsageError, "keep", 0.5, 0.2505):
        section(**keys | {"keep": 0.5}).strategy_for(LAYERS)


@pytest.mark.parametrize(
    ("keys", "field", "named"),
    [
        ({}, "keep", "strategy.ratios"),
        ({"keep": 0}, "keep", 0),
        ({"keep": 1.5}, "keep", 1.5),
        ({"keep": 0.5, "stage": [0]}, "stage", "'stages'"),
        ({"keep": 0.5, "strategy": {"threshold": 3.0}}, "strategy.threshold", "voter_threshold"),
        ({"keep": 0.5, "stages": [9, 0]}, "stages", [9, 0]),
        ({"strategy": {"ratios": [0.5, 0.5]}}, "stages", "2 ratios"),
        ({"stages": [0, 2], "strategy": {"ratios": [0.5]}}, "strategy.ratios", 2),
        (
            {"keep": 0.5, "strategy": {"method": "uniform", "voter_threshold": 2.0}},
            "strategy.voter_threshold",
            "uniform",
        ),
        ({"keep": 0.5, "strategy": {"voter_quantile": 1.0}}, "strategy.voter_quantile", 1.0),
        (
            {"keep": 0.5, "strategy": {"voter_quantile": 0.9, "voter_threshold": 2.0}},
            "strategy.voter_quantile",
            "voter_threshold",
        ),
        ({"keep": 0.5, "stages": [0], "strategy": {"method": "fastv"}}, "stages", "fastv"),
        ({"keep": 0.5, "stages": [2], "strategy": {"cell": 2}}, "strategy.cell", "stage 0"),
        ({"strategy": {"file": "a.json", "seed": 1}}, "strategy.file", "strategy"),
        ({"search": {}, "strategy": {"ratios": [0.5]}}, "keep", "search"),
        ({"keep": 1, "search": {}}, "keep", "search"),
        ({"keep": 0.5, "search": {"sampler": "cma"}}, "search.sampler", '"cma"'),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_field(keys, field, named):
    with refused(RecipeError, f"prune_visual_tokens.{field}: ", named):
        section(**keys)


def test_a_search_begins_with_the_papers_defaults():
    found = section(keep=0.25, search={}).search
    assert (found.samples, found.trials, found.seed, found.sampler) == (30, 50, 0, "tpe")
