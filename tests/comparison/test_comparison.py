"""Comparisons: what is run, what is kept, and how a table is made of what was measured.

Where the figures themselves are the subject, `measure` gives known ones for each result.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest

from compress.comparison.compare import compare
from compress.comparison.study import seeded
from compress.errors import CompressError, UsageError
from compress.eval import kept_logits
from compress.eval.settings import BATCH
from compress.observer import Observer
from compress.pipeline.evaluation import Evaluator, evaluate
from compress.recipe.recipe import Recipe
from support.calling import Counts, pretend
from support.measured_recipes import LENGTH, TOKENS, recipe_of
from support.refusals import refused
from support.tiny_checkpoints import (
    every_file,
    load_whole,
    weight_files,
    write_checkpoint,
)

SPREAD = {0: 1.0, 1: 4.0, 5: 5.5}  # what a seed adds to a figure


@pytest.fixture(autouse=True)
def no_reload(monkeypatch):
    """Results are not reloaded in another process; how that is done has tests of its own."""
    report = {"relative_error": 0.0, "tolerance": 1e-4, "tokens": 1}
    return pretend(monkeypatch, "compress.pipeline.run", "reload_and_compare", report)


@pytest.fixture
def recipes(checkpoint, text) -> list[Recipe]:
    """Two that differ in their width, measured on the first tokens of the text."""
    return [recipe_of(checkpoint(), text, f"w{bits}", bits=bits) for bits in (4, 2)]


@pytest.fixture
def measured(monkeypatch) -> list[Path]:
    """The folders that were measured; each result's figures follow from its width and seed."""
    folders: list[Path] = []

    def measure(self, folder, seed=None, files=None, items=False):
        folders.append(Path(folder))
        facts = json.loads((Path(folder) / "modelpress.json").read_text())
        figure = 10 * facts["average_bits"] + SPREAD[facts["seeds"]["rotate"]]
        part = {
            "results": {"task": {"acc": figure / 100, "acc_stderr": 0.01}},
            "perplexity": {"value": figure, "value_stderr": 0.5, "tokens": TOKENS}
            | {"length": LENGTH, "stride": LENGTH},
        }
        reference = {"perplexity": part["perplexity"] | {"value": 9.0, "value_stderr": 0.25}}
        conditions = {"samples": {"task": 7}, "dtype": "float32"}
        kl = {"mean": figure / 1000, "stderr": 0.001}
        return part | {"kl": kl, "baseline": reference, "conditions": conditions}

    monkeypatch.setattr(Evaluator, "measure", measure)
    return folders


class Watch(Observer):
    """Notes the layers that are started, by run; stops at a stage or a layer of it."""

    def __init__(self, stop: tuple[str, int] | None = None):
        self.stop, self.run, self.started, self.warnings = stop, None, [], []

    def stage(self, name):
        if ", seed " in name:
            self.run = name

    def layers(self, done, total):
        if (self.run, done) == self.stop:
            raise KeyboardInterrupt
        if done < total:
            self.started.append((self.run, done))

    def warning(self, text):
        self.warnings.append(text)


# ---- real figures -------------------------------------------------------------------------------


def test_the_figures_are_those_of_evaluating_each_result_on_its_own(
    recipes, checkpoint, text, tmp_path, monkeypatch
):
    passes = Counts(monkeypatch, kept_logits, "logits_of")
    compared = compare(recipes, tmp_path / "out", seeds=(0,))
    # Of the 16-bit model, for two results.
    assert len(passes.first) == math.ceil(TOKENS // LENGTH / BATCH)
    assert [row["name"] for row in compared.as_dict()["rows"]] == ["16-bit", "w4", "w2"]
    settings = {"perplexity": str(text), "length": LENGTH, "tokens": TOKENS}
    for row, run in zip(compared.as_dict()["rows"][1:], compared.runs, strict=True):
        alone = evaluate(run["folder"], baseline=checkpoint(), **settings)
        assert row["perplexity"] == alone["perplexity"]["value"]
        assert row["perplexity_stderr"] == alone["perplexity"]["value_stderr"]
        assert row["kl"] == alone["kl"]["mean"]
        weights = Path(run["folder"]).glob("*.safetensors")
        assert row["bytes"] <= sum(file.stat().st_size for file in weights) < row["bytes"] + 20_000
    baseline, w4, w2 = compared.as_dict()["rows"]
    assert baseline["perplexity"] == evaluate(checkpoint(), **settings)["perplexity"]["value"]
    assert baseline["bytes"] == sum(p.numel() * 4 for p in load_whole(checkpoint()).parameters())
    assert w2["kl"] > w4["kl"] > 0
    assert (w2["bits"], w4["bits"]) == (2, 4)
    assert w2["bytes"] < w4["bytes"] < baseline["bytes"]
    scored = TOKENS // LENGTH * (LENGTH - 1)  # whole windows, without the first token of each
    for words in (str(text), f"{scored} tokens", f"windows of {LENGTH}", "no BOS", "seed 0", "cpu"):
        assert words in compared.conditions


def test_the_16_bit_model_is_left_out_where_the_recipes_say_so(checkpoint, text, tmp_path):
    """It then has its size, but no figures; nothing is told about a divergence from it."""
    alone = {"evaluate": {"baseline": False}}
    recipes = [recipe_of(checkpoint(), text, f"w{b}", **alone, bits=b) for b in (4, 8)]
    compared = compare(recipes, tmp_path / "out")
    assert set(compared.as_dict()["rows"][0]) == {"name", "bytes"}
    assert all(row["perplexity"] > 1 and "kl" not in row for row in compared.as_dict()["rows"][1:])
    assert "kl" not in compared.conditions


# ---- the table ----------------------------------------------------------------------------------


def test_with_one_seed_a_row_is_what_was_measured(recipes, measured, tmp_path):
    compared = compare(recipes, tmp_path / "out", seeds=(1,))
    for row, bits in zip(compared.as_dict()["rows"][1:], (4, 2), strict=True):
        figure = 10 * bits + SPREAD[1]
        assert (row["perplexity"], row["perplexity_stderr"]) == (figure, 0.5)
        assert (row["kl"], row["kl_stderr"]) == (figure / 1000, 0.001)
        assert (row["task acc"], row["task acc_stderr"]) == (figure / 100, 0.01)
    assert "standard error over windows or items; seed 1" in compared.conditions
    assert "task: 7 items" not in compared.conditions  # the recipes ask for no task


def test_with_several_seeds_it_is_their_mean_and_sample_standard_deviation(
    recipes, measured, tmp_path
):
    compared = compare(recipes, tmp_path / "out", seeds=(0, 1, 5))
    mean = (1.0 + 4.0 + 5.5) / 3
    deviation = math.sqrt(sum((x - mean) ** 2 for x in (1.0, 4.0, 5.5)) / 2)
    for row, bits in zip(compared.as_dict()["rows"][1:], (4, 2), strict=True):
        assert row["perplexity"] == pytest.approx(10 * bits + mean)
        assert row["perplexity_stderr"] == pytest.approx(deviation)
        assert row["task acc_stderr"] == pytest.approx(deviation / 100)
        assert row["kl_stderr"] == pytest.approx(deviation / 1000)
        assert row["bits"] == bits
        mine = [run for run in compared.runs if run["name"] == row["name"]]
        assert [run["seed"] for run in mine] == [0, 1, 5]
        assert {run["bytes"] for run in mine} == {row["bytes"]}
        assert row["seconds"] == pytest.approx(sum(run["seconds"] for run in mine) / 3)
        assert "seconds_stderr" not in row and "bits_stderr" not in row
    assert compared.as_dict()["rows"][0]["perplexity_stderr"] == 0.25  # measured once
    assert "sample standard deviation over seeds 0, 1, 5" in compared.conditions
    assert measured == [tmp_path / "out" / f"w{b}-{seed}" for b in (4, 2) for seed in (0, 1, 5)]


def test_what_was_measured_by_position_is_a_table_of_its_own(recipes, checkpoint, text, tmp_path):
    """A column a stretch; of several seeds their mean and standard deviation."""
    section = {"dataset": str(text), "length": 128, "tokens": 512, "by_position": True}
    asked = [recipe.with_changes(evaluate={"perplexity": section}) for recipe in recipes]
    compared = compare(asked, tmp_path / "out", seeds=(0, 1), self_check=False)
    measured = [run["evaluation"]["by_position"] for run in compared.runs if run["name"] == "w2"]
    first, second = ([stretch["kl"]["value"] for stretch in of] for of in measured)
    row = compared.positions[1]
    assert row.name == "w2"
    assert list(row.values) == ["1 – 63", "64 – 127"]
    means = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert list(row.values.values()) == pytest.approx(means)
    spread = [abs(a - b) / math.sqrt(2) for a, b in zip(first, second, strict=True)]
    assert list(row.errors.values()) == pytest.approx(spread)
    line = "kl, nats per token, by the tokens in front of a prediction, BOS included"
    assert line in compared.markdown()
    for name in ("comparison.md", "comparison.html"):
        written = (tmp_path / "out" / name).read_text()
        for said in ("1 – 63", row.cell("64 – 127"), line):
            assert said in written

    without = {"perplexity": section, "baseline": False}
    alone = [recipe.with_changes(evaluate=without) for recipe in recipes]
    compared = compare(alone, tmp_path / "alone", self_check=False)
    (stretch, _) = compared.runs[0]["evaluation"]["by_position"]
    assert compared.positions[0].values["1 – 63"] == stretch["perplexity"]
    assert "perplexity, by the tokens in front" in compared.markdown()


def test_documents_are_no_windows(recipes, text, tmp_path):
    documents = {"dataset": str(text), "length": LENGTH, "per_document": True}
    asked = [recipe.with_changes(evaluate={"perplexity": documents}) for recipe in recipes]
    compared = compare(asked, tmp_path / "out", self_check=False)
    counted = compared.runs[0]["evaluation"]["perplexity"]["windows"]
    assert f"{counted} documents of at most {LENGTH}, no BOS" in compared.conditions
    assert "None" not in compared.conditions


def test_long_names_are_cut_for_folders_and_pictures(recipes, measured, tmp_path, recwarn):
    long = [recipe.with_changes(name=f"{recipe.name} {'long ' * 60}") for recipe in recipes]
    compared = compare(long, tmp_path / "out", seeds=(0, 1))
    assert [row.name for row in compared.rows[1:]] == [recipe.name for recipe in long]
    assert compared.plot is not None
    assert not [w for w in recwarn if "layout" in str(w.message)]
    folders = {folder.name for folder in measured}
    assert len(folders) == 4 and all(len(name) < 140 for name in folders)


def test_the_table_is_written_beside_the_results(recipes, measured, tmp_path):
    output = tmp_path / "out"
    compared = compare(recipes, output, seeds=(0, 1))
    assert json.loads((output / "comparison.json").read_text()) == compared.as_dict()
    written = (output / "comparison.md").read_text()
    assert written == compared.markdown()
    assert compared.conditions in written
    assert [line.split(" | ")[0] for line in written.splitlines()[2:5]] == [
        "| 16-bit",
        "| w4",
        "| w2 ◆",
    ]
    assert compared.plot == output / "comparison.png"
    assert compared.plot.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_a_table_and_a_warning(
    recipes, measured, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    watch = Watch()
    compared = compare(recipes, tmp_path / "out", observer=watch)
    assert compared.plot is None
    (warning,) = [w for w in watch.warnings if "no plot" in w]
    assert "pip install 'matplotlib'" in warning
    assert compared.as_dict()["warnings"] == [warning]
    assert (tmp_path / "out" / "comparison.md").is_file()


def test_calibration_tokens_are_a_column_and_told_where_they_differ(
    recipes, measured, checkpoint, text, tmp_path
):
    more = recipe_of(checkpoint(), text, "more", bits=3)
    more = more.with_changes(calibration={"expansion": 2})
    twice = recipe_of(checkpoint(), text, "twice", bits=3, target="full_precision")
    nearest = recipe_of(checkpoint(), text, "nearest", method="rtn", bits=3)
    section = recipes[0].calibration
    tokens = section.samples * section.length
    watch = Watch()
    compared = compare([*recipes, nearest], tmp_path / "a", observer=watch)
    assert [row.get("calibration_tokens") for row in compared.as_dict()["rows"]] == [
        None, tokens, tokens, 0,
    ]  # fmt: skip
    assert compared.warnings == []
    compared = compare([recipes[0], more, twice], tmp_path / "b", observer=watch)
    (warning,) = compared.warnings
    assert warning in watch.warnings and warning in compared.markdown()
    for part in (f"w4 {tokens:,} tokens", f"more {2 * tokens:,} tokens", "quantize.target"):
        assert part in warning
    for file in ("comparison.html", "comparison.json", "comparison.csv"):
        assert "unequal calibration" in (tmp_path / "b" / file).read_text() or file[-3:] == "csv"
        assert "calibration" in (tmp_path / "b" / file).read_text()
    assert {run["calibration_tokens"] for run in compared.runs} == {tokens, 2 * tokens}


# ---- what is run --------------------------------------------------------------------------------


def test_a_seed_draws_windows_and_rotation_of_one_result(recipes, measured, press, tmp_path):
    compare(recipes, tmp_path / "out", seeds=(0, 1))
    for recipe in recipes:
        for seed in (0, 1):
            seeded = recipe.with_changes(
                calibration={"seed": seed}, rotate={"seed": seed}, evaluate=None
            )
            expected = weight_files(press(seeded, None))
            assert weight_files(tmp_path / "out" / f"{recipe.name}-{seed}") == expected
    results = [weight_files(tmp_path / "out" / f"w4-{seed}") for seed in (0, 1)]
    assert results[0] != results[1]


def test_what_is_finished_is_kept(recipes, measured, tmp_path):
    output = tmp_path / "out"
    first = compare(recipes, output, seeds=(0,))
    before = every_file(output / "w4-0")
    watch = Watch()
    second = compare(recipes, output, seeds=(0, 1), observer=watch)
    assert watch.started == [(f"{n}, seed 1", layer) for n in ("w4", "w2") for layer in (0, 1)]
    assert every_file(output / "w4-0") == before
    assert second.runs[0] == first.runs[0]


def test_kept_results_that_were_not_checked_are_told(recipes, measured, tmp_path):
    one, two = recipes
    without = compare([one], tmp_path / "out", self_check=False, check_source=False)
    assert without.warnings == [] and without.runs[0]["unchecked"] == ["self-check", "source check"]
    checked = {"self_check": True, "check_source": True}
    assert [
        warning
        for warning in compare([one, two], tmp_path / "out", **checked).warnings
        if "kept" in warning
    ] == [
        f"kept from runs without {check}: w4, seed 0; --overwrite makes them anew"
        for check in ("self-check", "source check")
    ]
    assert not compare([one], tmp_path / "out", overwrite=True, **checked).warnings


def test_what_is_measured_is_kept_with_its_conditions(recipes, measured, tmp_path):
    output = tmp_path / "out"
    first = compare(recipes, output)
    assert len(measured) == 2
    assert compare(recipes, output).rows == first.rows
    assert len(measured) == 2
    other, watch = [r.with_changes(evaluate={"batch_size": 3}) for r in recipes], Watch()
    compare(other, output, observer=watch)
    assert len(measured) == 4
    assert watch.started == []  # the results stay
    compare(other, output, overwrite=True)
    assert len(measured) == 6


def test_a_random_order_of_layers_and_an_evolving_one_are_drawn_by_the_seed(checkpoint, text):
    section = {"widths": [4, 2], "narrow": 1}
    by_chance = recipe_of(checkpoint(), text, "r").with_changes(
        allocate={"importance": "random"} | section
    )
    assert seeded(by_chance, 5).allocate.importance.seed == 5
    assert seeded(by_chance, 5).allocate.seed == 5
    by_place = by_chance.with_changes(allocate={"importance": "position"})
    assert seeded(by_place, 5).allocate.importance == by_place.allocate.importance


def test_clusters_of_tokens_are_drawn_by_the_seed(checkpoint, text):
    clusters = {"name": "cluster", "centroids": 5, "reverse": True}
    recipe = recipe_of(checkpoint(), text, "c").with_changes(
        quantize={"token_importance": clusters}
    )
    before, after = recipe.quantize, seeded(recipe, 5).quantize
    assert after.token_importance.seed == 5 and before.token_importance.seed == 0
    same = {"token_importance": before.token_importance}
    assert after.model_copy(update=same) == before


def test_rows_that_differ_in_a_number_alone_are_lines(checkpoint, text, measured, tmp_path):
    names = ("a narrow=0", "a narrow=1", "b narrow=0")
    recipes = [
        recipe_of(checkpoint(), text, name, bits=bits)
        for name, bits in zip(names, (8, 4, 3), strict=True)
    ]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "compress.comparison.compare.plot_lines", lambda *a: drawn.append(a) or Path("x")
        )
        compare(recipes, tmp_path / "out", self_check=False)
    (lines, baseline, _, x), *_ = drawn
    assert {label: [row.name for row in line] for label, line in lines.items()} == {
        "a": ["a narrow=0", "a narrow=1"],
        "b": ["b narrow=0"],
    }
    assert (baseline.name, x) == ("16-bit", "bytes")


def test_an_interrupted_comparison_continues_at_its_layer(recipes, measured, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compare(recipes, output, observer=Watch(stop=("w2, seed 0", 1)))
    watch = Watch()
    compare(recipes, output, observer=watch)
    assert watch.started == [("w2, seed 0", 1)]


def test_results_on_data_that_changed_under_its_name_are_not_reported(
    recipes, measured, checkpoint, text, tmp_path
):
    copy, output = shutil.copyfile(text, tmp_path / "text.jsonl"), tmp_path / "out"
    recipes = [recipe_of(checkpoint(), copy, f"w{bits}", bits=bits) for bits in (4, 2)]
    compare(recipes, output)
    before = every_file(output)
    copy.write_text("".join(reversed(copy.read_text().splitlines(keepends=True))))
    with refused(UsageError, "calibration data", "--overwrite"):
        compare(recipes, output)
    assert every_file(output) == before
    compare(recipes, output, overwrite=True)
    assert len(measured) == 4


def test_figures_on_a_text_that_changed_under_its_name_are_taken_again(
    recipes, measured, checkpoint, text, tmp_path
):
    copy, output = shutil.copyfile(text, tmp_path / "measured.jsonl"), tmp_path / "out"
    section = {"perplexity": {"dataset": str(copy), "length": LENGTH, "tokens": TOKENS}}
    recipes = [recipe.with_changes(evaluate=section) for recipe in recipes]
    compare(recipes, output)
    copy.write_text("".join(reversed(copy.read_text().splitlines(keepends=True))))
    watch = Watch()
    compare(recipes, output, observer=watch)
    assert watch.started == [] and len(measured) == 4


def test_another_recipe_of_the_same_name_replaces_nothing_unasked(
    recipes, measured, checkpoint, text, tmp_path
):
    output = tmp_path / "out"
    compare(recipes, output)
    before = {name: every_file(output / name) for name in ("w4-0", "w2-0")}
    changed = [recipes[0], recipe_of(checkpoint(), text, "w2", bits=3)]
    watch = Watch()
    with refused(UsageError, "w2-0", "--overwrite"):
        compare(changed, output, observer=watch)
    assert watch.started == []
    assert {name: every_file(output / name) for name in before} == before
    assert len(measured) == 2
    compare(recipes, output)
    assert len(measured) == 2  # the figures are there as well
    compared = compare(changed, output, overwrite=True, observer=watch)
    assert [row.get("bits") for row in compared.as_dict()["rows"]] == [None, 4, 3]
    assert [name for name, _ in watch.started] == ["w4, seed 0"] * 2 + ["w2, seed 0"] * 2


def test_a_model_of_the_hub_is_fetched_and_its_results_are_kept(
    measured, checkpoint, text, tmp_path, monkeypatch
):
    """The folder of a snapshot stands for the id wherever files are read."""
    fetched = []

    def snapshot_download(name, revision, **_):
        fetched.append((name, revision))
        return str(checkpoint())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    baselines = []
    of_section = Evaluator.of_section

    def noted(section, resolve, path, device, **keep):
        baselines.append(path)
        return of_section(section, resolve, path, device, **keep)

    monkeypatch.setattr(Evaluator, "of_section", noted)
    section = {"model": {"path": "someone/some-model", "revision": "abc"}}
    recipes = [
        recipe_of(checkpoint(), text, f"w{bits}", bits=bits).with_changes(**section)
        for bits in (4, 2)
    ]
    compare(recipes, tmp_path / "out")
    watch = Watch()
    compare(recipes, tmp_path / "out", observer=watch)
    assert watch.started == []
    assert set(fetched) == {("someone/some-model", "abc")}
    assert baselines == [checkpoint()]  # the second time, all figures are there


# ---- what cannot be compared --------------------------------------------------------------------


def test_what_cannot_be_compared_is_refused_before_anything_runs(
    recipes, checkpoint, text, tmp_path, monkeypatch
):
    runs = pretend(monkeypatch, "compress.comparison.results", "run", CompressError("it ran"))
    one, two = recipes
    model = shutil.copytree(checkpoint(), tmp_path / "model")
    cases = {
        "no recipes": ([], (0,), "recipe"),
        "no seeds": (recipes, (), "seed"),
        "a seed twice": (recipes, (0, 1, 0), "0, 1, 0"),
        "a name twice": ([one, two, one], (0,), "'w4'"),
        "a name that is a path": ([one, two.with_changes(name="../up")], (0,), "'../up'"),
        "two models": ([one, recipe_of(model, text, "b")], (0,), str(model)),
        "two revisions": ([one, two.with_changes(model={"revision": "abc"})], (0,), "abc"),
        "two ways to measure": (
            [one, recipe_of(checkpoint(), text, "b", evaluate={"limit": 2})],
            (0,),
            "`evaluate`",
        ),
        "nothing measured": (
            [recipe.with_changes(evaluate=None) for recipe in recipes],
            (0,),
            "evaluate.tasks",
        ),
        "no task and no text": (
            [recipe.with_changes(evaluate={"perplexity": None}) for recipe in recipes],
            (0,),
            "evaluate.tasks",
        ),
        "no such text": (
            [r.with_changes(evaluate={"perplexity": "nothing.txt"}) for r in recipes],
            (0,),
            "nothing.txt",
        ),
    }
    for compared, seeds, said in cases.values():
        with refused(UsageError, said):
            compare(compared, tmp_path / "out", seeds)
    assert runs == []
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_fails_the_comparison_and_what_was_finished_stays(
    recipes, measured, text, tmp_path
):
    broken = write_checkpoint(tmp_path / "model")

    class Break(Watch):
        def stage(self, name):
            if name == "w2, seed 0":
                (broken / "config.json").rename(tmp_path / "config.json")

    two = [recipe_of(broken, text, f"w{bits}", bits=bits) for bits in (4, 2)]
    with refused(UsageError, broken, "config.json"):
        compare(two, tmp_path / "out", observer=Break())
    load_whole(tmp_path / "out" / "w4-0")
    assert not (tmp_path / "out" / "comparison.md").exists()
    (tmp_path / "config.json").rename(broken / "config.json")
    watch = Watch()
    compare(two, tmp_path / "out", observer=watch)
    assert {name for name, _ in watch.started} == {"w2, seed 0"}
