"""`quantize.token_importance`: what each option takes, and which cannot stand together."""

import dataclasses

import pytest
import yaml

from compress.errors import RecipeError
from compress.importance.weighting import TokenSettings
from compress.recipe.recipe import Recipe
from compress.recipe.token_importance import TokenImportance
from support.refusals import refused

# Recipes by the lines under `token_importance`, and the field that is refused.
REFUSED = {
    # values
    "quantile: 0.5": ("quantile", [0.5]),
    "quantile: 1": ("quantile", [1]),
    "quantile: .nan": ("quantile", []),
    "mask: 0": ("mask", [0]),
    "mask: 1.0": ("mask", [1]),
    "truncate: -0.1": ("truncate", [-0.1]),
    "bins: 1": ("bins", [2, 1]),
    "bins: 2.5": ("bins", [2.5]),
    "weight_cap: 1": ("weight_cap", [1]),
    "sample_size_floor: 0": ("sample_size_floor", [0]),
    "sample_size_floor: 1.1": ("sample_size_floor", [1.1]),
    "scale: cube": ("scale", ["'square'", '"cube"']),
    "normalize: lineer": ("normalize", ["'linear'"]),
    "sinks: leave": ("sinks", ["'clamp'", "'drop'"]),
    "reverse: 1": ("reverse", [1]),
    "modules: []": ("modules", []),
    'modules: ["re:("]': ("modules[0]", ["re:("]),
    "quantil: 0.9": ("quantil", ["'quantile'"]),
    # chunks
    "name: chunks": ("chunks", ["0_31_32"]),
    "{name: chunks, chunks: 0_8_8}": ("chunks", ["0_8_8"]),
    "{name: chunks, chunks: '1_1_8'}": ("chunks", ["1_1_8"]),
    "{name: chunks, chunks: 0_31_32}": ("chunks", ["in quotes", 1626]),
    "{name: chunks, chunks: '8'}": ("chunks", ["'8'"]),
    "{name: chunks, chunks: 0-8}": ("chunks", ["0-8"]),
    "{name: chunks, chunks: second_half}": ("chunks", ["first_half"]),
    "{name: chunks, chunks: 0_2049}": ("chunks", ["calibration.length", 2048, 2049]),
    "{name: first_n, chunks: 0_8}": ("chunks", ["first_n"]),
    # clusters
    "{name: cluster, centroids: 2048}": ("centroids", ["calibration.length", 2048]),
    "{name: cluster, centroids: 0}": ("centroids", [0]),
    "centroids: 3": ("centroids", ["cluster", "attention_concentration"]),
    "seed: 3": ("seed", ["cluster"]),
    # uniform has no scores
    "{name: uniform, reverse: true}": ("reverse", ["uniform"]),
    "{name: uniform, sinks: drop}": ("sinks", ["uniform"]),
    "{name: uniform, modules: [a]}": ("modules", ["uniform"]),
    # hard masks have two
    "{name: first_n, scale: sqrt}": ("scale", ["first_n"]),
    "{name: first_last_n, normalize: linear}": ("normalize", ["first_last_n"]),
    "{name: chunks, chunks: 0_8, quantile: 0.9}": ("quantile", ["chunks"]),
    "{name: first_n, mask: 0.5}": ("mask", ["first_n"]),
    "{name: first_n, weight_cap: 3}": ("weight_cap", ["first_n"]),
    "{name: first_n, minimum: 0, sample_size_floor: 0.5}": ("sample_size_floor", ["first_n"]),
    # one shape
    "{mask: 0.5, truncate: 0.5}": ("truncate", ["mask"]),
    "{mask: 0.5, bins: 3}": ("bins", ["mask"]),
    "{truncate: 0.5, bins: 3}": ("bins", ["truncate"]),
    "{mask: 0.5, minimum: 0.1}": ("minimum", ["mask"]),
    "{mask: 0.5, maximum: 2}": ("maximum", ["mask"]),
    "{mask: 0.5, power: 2}": ("power", ["mask"]),
    "{mask: 0.5, quantile: 0.9}": ("quantile", ["mask"]),
    "{mask: 0.5, weight_cap: 3}": ("weight_cap", ["mask"]),
    "{mask: 0.5, sample_size_floor: 0.3}": ("sample_size_floor", ["mask"]),
    "{bins: 3, quantile: 0.9}": ("quantile", ["bins"]),
    "{truncate: 0.9, weight_cap: 5}": ("weight_cap", [10]),
    "{truncate: 0.9, sample_size_floor: 0.2}": ("sample_size_floor", [0.1]),
    # raw scores
    "{normalize: none, minimum: 0.1}": ("minimum", ["normalize none"]),
    "{normalize: none, maximum: 3}": ("maximum", ["normalize none"]),
    "{normalize: none, quantile: 0.9}": ("quantile", ["normalize none"]),
    "{normalize: none, bins: 3}": ("bins", ["normalize none"]),
    "{normalize: none, reverse: true}": ("reverse", ["normalize none"]),
    "{name: token_frequency, normalize: none}": ("normalize", ["token_frequency"]),
    "{name: activation_difference, normalize: none}": ("normalize", ["activation_difference"]),
    "{name: dot, normalize: none}": ("normalize", ["dot"]),
}
ACCEPTED = [
    "first_n",
    "first_last_n",
    "{name: chunks, chunks: first_half}",
    "{name: chunks, chunks: '0_31_32', reverse: true}",
    "{name: first_n, minimum: 0.1, weight_cap: 3, sample_size_floor: 0.5}",
    "{name: cluster, centroids: 7, seed: 3, reverse: true, scale: sqrt}",
    "{quantile: 0.99, sinks: clamp, weight_cap: 20, sample_size_floor: 0.25}",
    "{normalize: none, power: 2, truncate: 0.5}",
    "{mask: 0.9, normalize: linear, sinks: drop}",
    "{bins: 4, minimum: 0}",
    "{modules: ['re:.*[qk]_proj', model.layers.0.mlp.down_proj]}",
    "{truncate: 0.5, weight_cap: 2, sample_size_floor: 0.5}",
]


@pytest.mark.parametrize("lines", REFUSED)
def test_wrong_values_and_combinations_name_the_field(lines, tmp_path):
    field, named = REFUSED[lines]
    text = lines if lines.startswith("{") else f"{{{lines}}}"
    path = tmp_path / "recipe.yaml"
    path.write_text(f"rotate: none\nquantize:\n  token_importance: {text}\n")
    with refused(RecipeError, f"{path}:3: quantize.token_importance.{field}: ", *named):
        Recipe.load(path)


@pytest.mark.parametrize("text", ACCEPTED)
def test_a_resolved_recipe_with_options_is_read_back_as_the_same(text, tmp_path):
    """By name alone too: what the published code's own files for the hard masks could not."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"quantize:\n  token_importance: {text}\n")
    recipe = Recipe.load(path)
    assert Recipe.from_dict(yaml.safe_load(recipe.dump())) == recipe
    assert recipe.quantize.token_importance.minimum is not None


@pytest.mark.parametrize("text", ["{mask: 0.5}", "{normalize: none}", "first_n", "first_last_n"])
def test_there_is_no_least_weight_where_there_is_no_range(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"quantize:\n  token_importance: {text}\n")
    assert Recipe.load(path).quantize.token_importance.minimum == 0


def test_settings_have_every_option_of_the_recipe_and_its_defaults():
    """So that what a recipe asks for cannot be lost on the way."""
    section = TokenImportance(minimum=0.0).model_dump(exclude={"modules"})
    assert dataclasses.asdict(TokenSettings("attention_concentration")) == section


def test_options_are_what_differs_from_the_defaults():
    assert TokenImportance(minimum=0.3, power=2).options == {}
    section = TokenImportance(sinks="drop", quantile=0.9)
    assert section.options == {"sinks": "drop", "quantile": 0.9}
