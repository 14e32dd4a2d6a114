"""Questions about drawn scenes: how they are drawn, asked and scored through the harness."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch

from compress.errors import UsageError
from compress.eval.harness import score_tasks
from compress.eval.settings import EvaluationSettings
from compress.eval.task_names import LOCAL_TASKS
from compress.loading.load import load
from compress.recipes.demo import scenes
from support.refusals import refused
from support.tiny_lm import byte_tokenizer, tiny_llama
from support.tiny_vlm import write_vlm

LIMIT = 3 * len(scenes.TYPES) + 2


def task_utils():
    import importlib.util

    file = LOCAL_TASKS / "demo_vqa" / "utils.py"
    spec = importlib.util.spec_from_file_location("demo_vqa_utils", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results_of(model, tokenizer, **settings):
    return score_tasks(model, tokenizer, EvaluationSettings(**settings)).results


@pytest.fixture(scope="module")
def yes(tmp_path_factory):
    """A model that answers every question with `yes`, and its processor."""
    return load(write_vlm(tmp_path_factory.mktemp("vlm") / "yes", word="yes"))


def items(seed, count=LIMIT):
    return list(scenes.examples("held_out", seed, count))


# ---- the items ----------------------------------------------------------------------------------


def test_items_are_the_held_out_scenes_of_the_seed():
    drawn = task_utils().draw_items(seed=5, items=LIMIT, version=1.0)["test"]
    assert len(drawn) == LIMIT
    for found, expected in zip(drawn, items(5), strict=True):
        assert {k: found[k] for k in ("question", "answer", "type")} == {
            k: expected[k] for k in ("question", "answer", "type")
        }
        assert np.array_equal(np.asarray(found["image"]), np.asarray(expected["image"]))
    other = task_utils().draw_items(seed=6, items=LIMIT)["test"]
    assert other["question"] != drawn["question"]


@pytest.mark.parametrize(
    ("said", "right"), [("red", 1), (" Red \n", 1), ("red red", 0), ("reddish", 0), ("", 0)]
)
def test_an_answer_is_right_if_all_of_it_is(said, right):
    doc = {"answer": "red", "type": "colour"}
    assert task_utils().score(doc, [said]) == {
        "exact_match": right,
        "exact_match_colour": right,
    }


# ---- through the harness ------------------------------------------------------------------------


def test_one_constant_answer_scores_what_its_share_of_the_answers_is(yes):
    said = 0
    for seed in (0, 1):
        asked = items(seed)
        settings = EvaluationSettings(tasks=["demo_vqa"], limit=LIMIT, batch_size=4, seed=seed)
        scores = score_tasks(*yes, settings, per_item=True)
        right = [float(item["answer"] == "yes") for item in asked]
        assert [*scores.items["demo_vqa"]["exact_match"].values] == right
        metrics = scores.results["demo_vqa"]
        assert next(iter(metrics)) == "exact_match"
        assert metrics["exact_match"] == pytest.approx(sum(right) / LIMIT)
        counts = Counter(item["type"] for item in asked)
        for name, count in counts.items():
            own = [r for r, item in zip(right, asked, strict=True) if item["type"] == name]
            assert [*scores.items["demo_vqa"][f"exact_match_{name}"].values] == own
            assert metrics[f"exact_match_{name}"] == pytest.approx(sum(own) / count)
        said += sum(right)
        assert scores.samples == {"demo_vqa": LIMIT}
        assert scores.chat_template and scores.warnings == {}
    assert 0 < said < 2 * LIMIT


def test_the_model_is_asked_the_question_and_shown_the_picture(yes, monkeypatch):
    model, processor = yes
    seen = []
    generate = model.generate

    def watched(**inputs):
        for ids, pixels in zip(inputs["input_ids"], inputs["pixel_values"], strict=True):
            text = processor.tokenizer.decode(ids).replace("<pad>", "").split()
            assert text.count("<image>") == scenes.GRID**2
            seen.append((" ".join(t for t in text if t != "<image>"), pixels))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", watched)
    results_of(model, processor, tasks=["demo_vqa"], limit=LIMIT, batch_size=5)
    asked = {item["question"] for item in items(0)}
    assert {text for text, _ in seen} == asked
    for item in items(0):
        pixels = processor.image_processor(item["image"], return_tensors="pt")["pixel_values"][0]
        assert any(text == item["question"] and torch.equal(shown, pixels) for text, shown in seen)


def test_scores_do_not_depend_on_the_batch_and_nothing_is_left_changed(yes):
    model, processor = yes[0], copy.deepcopy(yes[1])
    # The harness pads left, and with a token of its choice if there is none.
    processor.tokenizer.padding_side, processor.tokenizer.pad_token = "right", None
    before = processor.tokenizer.padding_side, processor.tokenizer.pad_token
    scores = [
        results_of(model, processor, tasks=["demo_vqa"], limit=6, batch_size=b) for b in (1, 6)
    ]
    assert scores[0] == scores[1]
    assert (processor.tokenizer.padding_side, processor.tokenizer.pad_token) == before
    assert not model.training


def test_a_text_model_is_told_in_one_line():
    with refused(UsageError, "demo_vqa", "images"):
        results_of(tiny_llama(), byte_tokenizer(), tasks=["demo_vqa"], limit=2)


def test_batches_must_have_a_size(yes):
    with refused(UsageError, "'auto'"):
        results_of(*yes, tasks=["demo_vqa"], limit=2, batch_size="auto")
