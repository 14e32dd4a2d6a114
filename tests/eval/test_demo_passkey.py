"""Keys in source text: where they are hidden, and how answers are scored."""

import importlib.util

import pytest

from compress.errors import UsageError
from compress.eval.harness import score_tasks
from compress.eval.settings import EvaluationSettings
from compress.eval.task_names import LOCAL_TASKS
from support.refusals import refused
from support.tiny_lm import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def utils():
    file = LOCAL_TASKS / "demo_passkey" / "utils.py"
    spec = importlib.util.spec_from_file_location("demo_passkey_utils", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_length_has_its_key_once_at_every_depth(utils):
    items = utils.hide_keys(seed=5, version=1.0)["test"]
    assert len(items) == 3 * 5 * 4
    assert len(set(items["key"])) == len(set(items["text"])) == len(items)
    for item in items:
        line = f"PASS_KEY = {item['key']}\n"
        assert item["text"].count(item["key"]) == item["text"].count(line) == 1
        text, question = item["text"].split("\n# The value of PASS_KEY")
        assert question.endswith("assert PASS_KEY ==")
        assert 0.8 * item["length"] < len(text) - len(line) <= item["length"]
        share = text.index(line) / (len(text) - len(line))
        assert share == pytest.approx(
            item["depth"] / 100, abs=0.25 if item["length"] < 4000 else 0.1
        )
        assert (item["depth"] == 0) == text.startswith(line)
        assert (item["depth"] == 100) == text.endswith(line)


def test_items_do_not_depend_on_seed_and_number_and_take_turns(utils):
    items = utils.hide_keys(seed=0)["test"]
    assert utils.hide_keys(seed=1, items=7)["test"].to_list() == items.to_list()
    assert utils.hide_keys(repeats=1)["test"].to_list() == items.to_list()[:15]
    assert {(item["length"], item["depth"]) for item in items.to_list()[:15]} == {
        (length, depth) for length in (1000, 4000, 16000) for depth in (0, 25, 50, 75, 100)
    }


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" 12345", 1), ("12345, as set above", 1), ("The key is 12345.", 1), ("`12345`", 1),
     (" 1234", 0), ("123456", 0), (" 54321 or 12345", 0), ("", 0)],
)  # fmt: skip
def test_the_first_number_of_an_answer_is_scored(utils, answer, right):
    doc = {"key": "12345", "length": 1000, "depth": 25}
    assert utils.score(doc, [answer]) == dict.fromkeys(
        ("exact_match", "exact_match_length_1000", "exact_match_depth_25"), right
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("lengths", [100]), ("lengths", 1000), ("lengths", []), ("lengths", ["long"]),
     ("lengths", [10**9]), ("depths", [101]), ("depths", [0.5]), ("repeats", 0), ("repeats", True)],
)  # fmt: skip
def test_what_no_text_has_is_refused(utils, name, value):
    with refused(UsageError, "demo_passkey", name, repr(value)):
        utils.hide_keys(**{name: value})


def test_figures_by_length_and_depth_without_warnings():
    settings = EvaluationSettings(
        tasks=["demo_passkey"], metadata={"lengths": [300, 600], "depths": [0, 100], "repeats": 1}
    )
    scores = score_tasks(tiny_llama(), byte_tokenizer(), settings, per_item=True)
    assert scores.warnings == {}
    found = {metric for metric in scores.results["demo_passkey"] if not metric.endswith("_stderr")}
    kinds = ("length_300", "length_600", "depth_0", "depth_100")
    assert found == {"exact_match", *(f"exact_match_{kind}" for kind in kinds)}
    assert scores.items["demo_passkey"]["exact_match"].right
    assert len(scores.items["demo_passkey"]["exact_match_depth_0"].values) == 2
    with refused(UsageError, "demo_passkey", "lengths"):
        wrong = EvaluationSettings(tasks=["demo_passkey"], metadata={"lengths": "long"})
        score_tasks(tiny_llama(), byte_tokenizer(), wrong)
