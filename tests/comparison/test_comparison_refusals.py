"""What a comparison refuses before it runs anything: no result, no folder, one line."""

import pytest

from compress.comparison.compare import compare
from compress.errors import CompressError, UsageError
from compress.recipe.recipe import Recipe
from support.calling import pretend
from support.measured_recipes import recipe_of
from support.refusals import refused


@pytest.fixture
def runs(monkeypatch) -> list:
    """The runs that were started; each fails."""
    return pretend(monkeypatch, "compress.comparison.results", "run", CompressError("it ran"))


@pytest.fixture
def fitting(checkpoint, text) -> Recipe:
    """A recipe that the others follow."""
    return recipe_of(checkpoint(), text, "fitting")


def check_refused(recipes, output, *named, seeds=(0,)) -> None:
    with refused(UsageError, *named):
        compare(recipes, output, seeds)
    assert not output.exists()


@pytest.mark.parametrize(
    "sections, named",
    [
        ({"allocate": {"average_bits": 1.5}}, ("average_bits", 1.5)),
        ({"allocate": {"budget": "9KB"}}, ("budget", "9,000 bytes")),
        ({"quantize": {"ignore": ["lm_haed"]}}, ("'lm_haed'",)),
        ({"quantize": {"group_size": 256}}, ("quantize.group_size", 256)),
    ],
)
def test_the_last_recipe_does_not_fit_the_model(fitting, runs, tmp_path, sections, named):
    """After hours of the others it would be too late."""
    other = fitting.with_changes(name="other", **sections)
    check_refused([fitting, other], tmp_path / "out", "other: ", *named)
    assert runs == []


@pytest.mark.parametrize("names", [("a b", "a-b"), ("a x=+1", "a x=1"), ("LIM", "lim")])
def test_two_names_that_make_one_folder(fitting, runs, tmp_path, names):
    recipes = [
        fitting.with_changes(name=name, quantize={"bits": bits})
        for name, bits in zip(names, (4, 2), strict=True)
    ]
    check_refused(recipes, tmp_path / "out", *map(repr, names))
    assert runs == []


@pytest.mark.parametrize(
    "section, base",
    [
        ("calibration", {}),
        ("rotate", {}),
        ("allocate", {"narrow": 1}),
        ("allocate.importance", {"narrow": 1}),
    ],
)
def test_a_seed_is_for_seeds_to_vary(fitting, runs, tmp_path, section, base):
    """Each would be overwritten by --seeds, and the same thing be run twice as two."""
    outer, _, inner = section.partition(".")
    recipes = []
    for seed in (1, 2):
        value = {"importance": {"name": "random", "seed": seed}} if inner else {"seed": seed}
        recipes.append(fitting.with_changes(name=f"seed {seed}", **{outer: base | value}))
    assert recipes[0] != recipes[1]
    check_refused(recipes, tmp_path / "out", "--seeds", seeds=(0, 1))
    assert runs == []


def test_recipes_that_differ_are_run(fitting, runs, tmp_path):
    """The refusals above are not of everything."""
    other = fitting.with_changes(name="other", quantize={"bits": 3})
    with pytest.raises(CompressError, match="it ran"):
        compare([fitting, other], tmp_path / "out")
    assert len(runs) == 1
