"""Pairing of two models by item: differences, flips, seeds pooled, groups."""

import math

import numpy as np
import pytest

from compress.errors import UsageError
from compress.eval.harness import score_tasks
from compress.eval.items import Items, group_weights, paired_changes
from compress.eval.settings import EvaluationSettings
from compress.eval.statistics import mcnemar_p, mean_and_stderr
from support.local_tasks import write_tasks
from support.refusals import refused
from support.tiny_lm import byte_tokenizer, tiny_llama


def answers(text):
    return Items(tuple(map(float, text)), right=True)


def changed(*pairs, drawn=()):
    seeds = [({"t": {"acc": answers(a)}}, {"t": {"acc": answers(b)}}) for a, b in pairs]
    return paired_changes(seeds, drawn=drawn)["t"]["acc"]


def test_flips_of_one_seed_are_those_of_the_items():
    change = changed(("0110100", "1110001"))
    assert (change.right_to_wrong, change.wrong_to_right) == (2, 1)
    assert change.value == pytest.approx(-1 / 7)
    assert change.mcnemar_p == mcnemar_p(2, 1)
    assert change.over_seeds is None and change.stderr == change.over_items
    same = changed(("0101", "0101"))
    assert (same.value, same.stderr, same.mcnemar_p) == (0, 0, 1)


def test_an_item_counts_once_however_many_seeds_there_are():
    """As most of its seeds that differ have it; a tie is no flip."""
    reference = "1100"
    change = changed(("0110", reference), ("0100", reference), ("1010", reference))
    # item 0 lost in two of three, item 1 in one, item 2 gained in two, item 3 never changed
    assert (change.right_to_wrong, change.wrong_to_right) == (2, 1)
    tie = changed(("01", "10"), ("10", "01"))
    assert (tie.right_to_wrong, tie.wrong_to_right, tie.value) == (0, 0, 0)
    again = changed(*[("0110", reference)] * 5)
    assert again.mcnemar_p == changed(("0110", reference)).mcnemar_p


def test_errors_over_items_and_seeds_are_those_of_the_formulas():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 2, (2, 3, 40))
    texts = [["".join(map(str, row)) for row in side] for side in (a, b)]
    change = changed(*zip(*texts, strict=True))
    d = a - b
    over_items = d.mean(0).std(ddof=1) / math.sqrt(40)
    over_seeds = d.mean(1).std(ddof=1) / math.sqrt(3)
    assert change.value == pytest.approx(d.mean())
    assert change.over_items == pytest.approx(over_items)
    assert change.over_seeds == pytest.approx(over_seeds)
    assert change.stderr == pytest.approx(math.hypot(over_items, over_seeds))


def test_items_that_each_seed_draws_all_count():
    change = changed(("0011", "1111"), ("10", "11"), drawn=("t",))
    assert (change.count, change.right_to_wrong, change.wrong_to_right) == (6, 3, 0)
    assert change.value == pytest.approx(-0.5)
    with refused(UsageError, 2, 4):
        changed(("0011", "1111"), ("10", "11"))
    with refused(UsageError, 3, 4):
        changed(("0011", "111"))


def test_a_paired_difference_sees_what_two_means_hide():
    draw = np.random.default_rng(3)
    difficulty = 10 * draw.normal(size=100)
    worse = difficulty + 0.5 + 0.1 * draw.normal(size=100)
    seeds = [({"t": {"x": Items(tuple(worse))}}, {"t": {"x": Items(tuple(difficulty))}})]
    change = paired_changes(seeds)["t"]["x"]
    assert change.value == pytest.approx(0.5, abs=0.05)
    assert change.stderr < 0.02 < mean_and_stderr(difficulty).stderr
    assert change.mcnemar_p is None and set(change.to_dict()) == {"value", "stderr", "count"}


def test_items_of_different_size_have_the_figure_of_their_sums():
    ours, theirs = (Items(values, (4.0, 6.0)) for values in ((8.0, 6.0), (4.0, 6.0)))
    change = paired_changes([({"t": {"x": ours}}, {"t": {"x": theirs}})])["t"]["x"]
    assert ours.figure() == 1.4
    assert change.value == pytest.approx(0.4)
    # residuals d - mean n: 4 - 1.6 and 0 - 2.4
    assert change.stderr == pytest.approx(math.sqrt(2 * (2.4**2 + 2.4**2)) / 10)


def test_items_go_through_json():
    for items in (answers("0110"), Items((0.5, 2.0)), Items((8.0, 6.0), (4.0, 6.0))):
        assert Items.of_json(items.as_json()) == items
    assert answers("0110").as_json() == {"right": "0110"}


# ---- groups --------------------------------------------------------------------------------------

MEMBERS = {"all": ["a", "few"], "few": ["b", "c"]}
SIZES = {"a": 2, "b": 4, "c": 4}


def figures(weights):
    tasks = {"a": {"acc": 0.5}, "b": {"acc": 0.25}, "c": {"acc": 1.0}}
    mean = sum(weights[task] * tasks[task]["acc"] for task in weights) / sum(weights.values())
    return tasks | {"all": {"acc": mean}}


@pytest.mark.parametrize("weights", [SIZES, dict.fromkeys("abc", 1)], ids=["by size", "alike"])
def test_a_group_has_the_weights_of_its_own_figure(weights):
    total = sum(weights.values())
    found = group_weights(MEMBERS, SIZES, figures(weights))
    assert found == {"all": {"acc": {task: weight / total for task, weight in weights.items()}}}


def test_a_group_that_is_neither_mean_is_left_out():
    assert group_weights(MEMBERS, SIZES, figures(SIZES) | {"all": {"acc": 0.9}}) == {}


def test_a_group_is_paired_as_its_figure_is_a_mean():
    ours = {"a": {"acc": answers("01")}, "b": {"acc": answers("0001")}}
    theirs = {"a": {"acc": answers("11")}, "b": {"acc": answers("1100")}}
    alone = paired_changes([(ours, theirs)])
    weights = {"a": 0.25, "b": 0.75}
    group = paired_changes([(ours, theirs)], {"g": {"acc": weights}})["g"]["acc"]
    assert group.value == pytest.approx(sum(w * alone[t]["acc"].value for t, w in weights.items()))
    errors = [weight * alone[task]["acc"].stderr for task, weight in weights.items()]
    assert group.stderr == pytest.approx(math.hypot(*errors))
    assert (group.right_to_wrong, group.wrong_to_right, group.count) == (3, 1, 6)
    partly = {"a": ours["a"]}
    assert "g" not in paired_changes([(partly, theirs)], {"g": {"acc": weights}})


# ---- of the harness ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Local tasks; a group of two that are right or wrong, and one whose figure is no mean."""
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    choice = (folder / "local_choice.yaml").read_text(encoding="utf-8")
    (folder / "second.yaml").write_text(choice.replace("local_choice", "second"), encoding="utf-8")
    metrics = choice.replace("local_choice", "harmonic").replace(
        "{metric: acc_norm}", "{metric: f1}"
    )
    (folder / "harmonic.yaml").write_text(metrics, encoding="utf-8")
    group = "group: two\ntask: [local_choice, second]\naggregate_metric_list: [{metric: acc}]\n"
    (folder / "two.yaml").write_text(group, encoding="utf-8")
    return folder


def test_every_figure_that_is_a_mean_of_items_has_them(tasks):
    asked = ["two", "local_answer", "local_text", "harmonic"]
    settings = EvaluationSettings(tasks=asked, include_path=tasks)
    scores = score_tasks(tiny_llama(), byte_tokenizer(), settings, per_item=True)
    for task, metrics in scores.items.items():
        for metric, items in metrics.items():
            assert items.figure() == pytest.approx(scores.results[task][metric]), (task, metric)
    assert set(scores.items["local_choice"]) == {"acc", "acc_norm"}
    assert set(scores.items["local_text"]) == {"bits_per_byte"}  # not of word_perplexity
    assert set(scores.items["harmonic"]) == {"acc"}  # f1 is of all items at once
    assert scores.items["local_answer"]["exact_match"].right
    assert scores.groups == {"two": {"acc": {"local_choice": 0.5, "second": 0.5}}}
