"""The recipe's `allocate` section: what it resolves to, round trips, and errors by field."""

import pytest

from compress.errors import RecipeError
from compress.importance.layers import LAYER_IMPORTANCE
from compress.recipe.recipe import Recipe
from compress.storage.files import parse_size
from support.calling import refuses
from support.refusals import refused

# Each with what else the method asks for.
SECTIONS = {
    "top_n": "average_bits: 3.25",
    "counted": "narrow: 3",
    "three widths": "average_bits: 3, widths: [2, 3, 4]",
    "bytes": "budget: 1.5GB, method: greedy, unit: fused_group",
    "kl": "maximum_kl: 5e-2, importance: logit_divergence",
    "evolve": "average_bits: 3, method: evolve, generations: 3, offspring: 2, seed: 5, samples: 4",
    "remove": "narrow: 2, method: remove, importance: position",
    "reverse": "narrow: 2, importance: {name: reverse, of: random, seed: 3}",
    "lim": "narrow: 2, importance: {average: flattened, sink: false}",
    "zd": "narrow: 2, importance: {name: outlier_weight_count, two_sided: true}",
}


@pytest.fixture
def load(tmp_path):
    def load(section: str, quantize: str = "{}") -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(f"model: m\nquantize: {quantize}\nallocate: {{{section}}}\n")
        return Recipe.load(path)

    return load


# Resolution and round trips


@pytest.mark.parametrize("case", SECTIONS)
def test_dump_loads_back_to_an_equal_recipe_with_no_more_to_resolve(load, tmp_path, case):
    recipe = load(SECTIONS[case])
    (tmp_path / "again.yaml").write_text(recipe.dump())
    again = Recipe.load(tmp_path / "again.yaml")
    assert again == recipe
    assert again.dump() == recipe.dump()
    assert again.allocate == recipe.allocate
    assert again.allocate.method is not None


def test_no_section_allocates_nothing():
    assert Recipe(model="m").allocate is None


@pytest.mark.parametrize(
    "section, method",
    [
        ("average_bits: 3", "top_n"),
        ("narrow: 1, widths: [8, 3]", "top_n"),
        ("average_bits: 3, widths: [2, 3, 4]", "knapsack"),
        ("budget: 1MB, widths: [2, 3, 4, 8]", "knapsack"),
        ("maximum_kl: 0.1, importance: logit_divergence", "knapsack"),
        ("average_bits: 3, method: greedy", "greedy"),
        ("maximum_kl: 0.1, importance: logit_divergence, method: top_n", "top_n"),
    ],
)
def test_the_method_follows_from_the_widths_unless_it_is_given(load, section, method):
    assert load(section).allocate.method == method


@pytest.mark.parametrize(
    "text, nbytes", [("5GB", 5_000_000_000), ("1.5MB", 1_500_000), ("0.25KB", 250)]
)
def test_a_budget_is_in_decimal_bytes(load, text, nbytes):
    assert parse_size(load(f"budget: {text}").allocate.budget) == nbytes


def test_the_names_of_the_schema_are_those_of_the_registry():
    assert set(LAYER_IMPORTANCE.shipped) == set(LAYER_IMPORTANCE)


def test_reverse_is_not_taken_for_a_measured_error(load):
    """Its score has the other sign, so its errors by width must not be what is minimised."""
    score = load("narrow: 1, importance: {name: reverse, of: output_error}").allocate.importance
    assert (score.base, score.measured) == ("output_error", False)


# Errors

WRONG = [
    # section, field, words
    ("", "average_bits", ["average_bits", "budget", "maximum_kl", "narrow", "none"]),
    ("average_bits: 3, budget: 5GB", "average_bits", ["average_bits and budget"]),
    ("average_bits: 0", "average_bits", [0]),
    ("average_bits: .nan", "average_bits", ["NaN"]),
    ("average_bits: many", "average_bits", ["many"]),
    ("budget: 5", "budget", [5]),
    ("budget: 5 GB", "budget", ["5 GB"]),
    ("budget: -5GB", "budget", ["-5GB"]),
    ("narrow: -1", "narrow", [-1]),
    ("maximum_kl: 0.1", "maximum_kl", ["logit_divergence"]),
    ("maximum_kl: 0.1, importance: logit_divergence, method: evolve", "maximum_kl", ["knapsack"]),
    ("average_bits: 3, widths: []", "widths", [[]]),
    ("average_bits: 3, widths: [4, 4]", "widths", [[4, 4]]),
    ("average_bits: 3, widths: [4, 7]", "widths[1]", [7]),
    ("average_bits: 3, widths: [4]", "widths", [[4]]),
    ("average_bits: 3, widths: [2, 3, 4], method: top_n", "widths", ["top_n", [2, 3, 4]]),
    ("narrow: 2, widths: [2, 3, 4]", "narrow", ["average_bits", "budget"]),
    ("narrow: 2, method: knapsack", "narrow", ["average_bits", "budget"]),
    ("average_bits: 3, method: remove", "method", ["remove", "narrow"]),
    ("narrow: 1, method: remove, unit: fused_group", "method", ["remove", "narrow"]),
    ("average_bits: 3, method: topn", "method", ["'top_n'", "topn"]),
    ("average_bits: 3, unit: head", "unit", ["fused_group", "head"]),
    ("average_bits: 3, importance: lim", "importance.name", ["layer_embedding_change", "lim"]),
    (
        "average_bits: 3, importance: outlier_weight_coun",
        "importance.name",
        ["'outlier_weight_count'"],
    ),
    ("average_bits: 3, importance: reverse", "importance.of", ["reverse"]),
    ("average_bits: 3, importance: {of: random}", "importance.of", ["reverse"]),
    ("average_bits: 3, importance: {name: reverse, of: reverse}", "importance.of", ["reverse"]),
    ("average_bits: 3, importance: {average: both}", "importance.average", ["flattened", "both"]),
    (
        "average_bits: 3, importance: {weighted_by: position}",
        "importance.weighted_by",
        ["measured"],
    ),
    (
        "average_bits: 3, importance: {name: output_error, weighted_by: weight_error}",
        "importance.weighted_by",
        ["weight_error"],
    ),
    ("average_bits: 3, importance: {minimum: 2}", "importance.minimum", [2]),
    (
        "maximum_kl: 0.1, importance: {name: logit_divergence, weighted_by: position}",
        "maximum_kl",
        ["weighted_by"],
    ),
    ("average_bits: 3, samples: 0", "samples", [0]),
    ("average_bits: 3, generations: 0", "generations", [0]),
    ("average_bits: 3, seed: -1", "seed", [-1]),
    ("average_bit: 3", "average_bit", ["'average_bits'"]),
]


@pytest.mark.parametrize("section, field, words", WRONG, ids=[w[0] or "empty" for w in WRONG])
def test_an_error_is_one_line_with_file_line_and_field(load, section, field, words):
    with refused(RecipeError, f"/recipe.yaml:3: allocate.{field}: ", *words):
        load(section)


def test_widths_for_a_method_that_quantises_nothing(load):
    with refused(RecipeError, "recipe.yaml:3", "allocate", "quantize.method"):
        load("average_bits: 3", "{method: none}")
    assert load("narrow: 1, method: remove", "{method: none}").allocate.method == "remove"


def test_an_override_is_named_as_the_place(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\nallocate: {average_bits: 3}\n")
    given = "allocate.widths=[9]"
    refuses(capsys, ["plan", path, "--set", given], f"--set {given}: allocate.widths[0]: ")
