"""The demo model's scenes, and the training that reads them.

The answers are checked against a second reading of the drawn objects, written as plain loops; the
objects against the picture; packed training sequences against asking each question alone.
"""

import argparse

import numpy as np
import pytest
import torch

from compress.errors import UsageError
from compress.recipes.demo import scenes
from support.refusals import refused

COUNT = 200


@pytest.fixture(scope="module")
def batch():
    return scenes.draw(scenes.generator("train", 5), COUNT)


@pytest.fixture(scope="module")
def table(batch):
    return scenes.answer_table(batch)


def objects(batch, i):
    """Scene i's objects as (kind, colour, x, y, size), names for the first two."""
    colours = list(scenes.COLOURS)
    rows = zip(batch.present[i], batch.kind[i], batch.colour[i], batch.x[i], batch.y[i],
               batch.size[i], strict=True)  # fmt: skip
    return [(scenes.KINDS[k], colours[c], x, y, size) for there, k, c, x, y, size in rows if there]


def only(found):
    """The one element, "nothing" for none, None for several: then there is no single answer."""
    return "nothing" if not found else found[0] if len(found) == 1 else None


def beside(things, side, kind):
    reference = [t for t in things if t[0] == kind]
    if len(reference) != 1:
        return None
    _, _, x, y, _ = reference[0]
    where = {
        "left": lambda t: x - t[2],
        "right": lambda t: t[2] - x,
        "above": lambda t: y - t[3],
        "below": lambda t: t[3] - y,
    }[side]
    others = [t for t in things if t is not reference[0]]
    if any(abs(where(t)) < scenes.BESIDE for t in others):
        return None
    return only([t[0] for t in others if where(t) > 0])


def corner(things, vertical, horizontal):
    middle = scenes.SIDE / 2
    found = []
    for kind, _, x, y, _ in things:
        depth = min(
            (middle - y) if vertical == "top" else (y - middle),
            (middle - x) if horizontal == "left" else (x - middle),
        )
        if abs(depth) < scenes.MIDLINE:
            return None
        found += [kind] if depth > 0 else []
    return only(found)


def read_answer(things, text):
    """The answer to a question about the objects, None where it has none."""
    words = text.removesuffix(" ?").split()
    digits = [scenes.DIGITS.index(t[0]) for t in things if t[0] in scenes.DIGITS]
    match words:
        case ["what", "is", ("top" | "bottom") as vertical, horizontal]:
            return corner(things, vertical, horizontal)
        case ["how", "many", what]:
            number = {
                "objects": len(things),
                "digits": len(digits),
                "shapes": len(things) - len(digits),
            }
            return scenes.DIGITS[number[what]]
        case ["what", "colour", "is", "the", kind]:
            found = [t[1] for t in things if t[0] == kind]
            return found[0] if len(found) == 1 else None
        case ["is", "there", ("a" | "an"), kind]:
            return "yes" if any(t[0] == kind for t in things) else "no"
        case ["which", "digit", "is", which]:
            chosen = {"largest": max, "smallest": min}[which]
            return scenes.DIGITS[chosen(digits)] if len(digits) >= 2 else None
        case ["what", "is", side, *_, "the", kind]:
            return beside(things, side, kind)
        case ["what", "is", colour]:
            found = [t[0] for t in things if t[1] == colour]
            return found[0] if len(found) == 1 else None
    raise AssertionError(text)


def test_answers_follow_from_the_objects(batch, table):
    for i in range(COUNT):
        things = objects(batch, i)
        for q, question in enumerate(scenes.QUESTIONS):
            found = None if table[i, q] < 0 else scenes.ANSWERS[table[i, q]]
            assert found == read_answer(things, question.text), (question.text, things)


def test_objects_are_in_the_picture_where_they_say(batch):
    """Inside a window the outline has the object's colour, and what is outside is background."""
    paint = np.array(list(scenes.COLOURS.values()))
    for i in range(COUNT):
        left_over = np.ones((scenes.SIDE, scenes.SIDE), dtype=bool)
        for kind, colour, x, y, size in objects(batch, i):
            window = np.s_[y - size // 2 : y + size // 2, x - size // 2 : x + size // 2]
            assert left_over[window].all(), "two windows overlap"
            left_over[window] = False
            fine = np.arange(size) * scenes.FINE // size
            mask = scenes.glyphs()[scenes.KINDS.index(kind)][fine[:, None], fine]
            seen = batch.images[i][window][mask].mean(axis=0)
            assert list(scenes.COLOURS)[((paint - seen) ** 2).sum(axis=1).argmin()] == colour
        background = batch.images[i][left_over].astype(int)
        assert (background.max(axis=1) - background.min(axis=1)).max() <= 32  # nearly grey


def test_every_glyph_is_unlike_every_other_at_the_smallest_size():
    fine = np.arange(scenes.SMALLEST) * scenes.FINE // scenes.SMALLEST
    small = scenes.glyphs()[:, fine[:, None], fine].astype(int)
    differ = abs(small[:, None] - small[None]).sum(axis=(2, 3))
    differ[np.diag_indices(len(small))] = 999
    assert differ.min() >= 10


def test_patch_labels_mark_the_objects(batch):
    labels = scenes.patch_labels(batch)
    for i in range(COUNT):
        for kind, _, x, y, size in objects(batch, i):
            at = y // scenes.PATCH * scenes.GRID + x // scenes.PATCH
            index = scenes.KINDS.index(kind)
            assert labels["centre"][i, at] == index
            # A window of at least two patches covers the middle of at least one.
            mine = (labels["row"][i] == y // scenes.PATCH) & (
                labels["column"][i] == x // scenes.PATCH
            )
            covered = (mine & (labels["kind"][i] == index)).sum()
            assert (size // scenes.PATCH) ** 2 <= covered <= (size // scenes.PATCH + 1) ** 2
        assert (labels["centre"][i] < len(scenes.KINDS)).sum() == batch.present[i].sum()
    assert ((labels["kind"] < len(scenes.KINDS)) == (labels["colour"] < len(scenes.COLOURS))).all()


def test_same_key_same_scenes_and_splits_are_disjoint():
    def drawn(split, *key):
        return {x.tobytes() for x in scenes.draw(scenes.generator(split, *key), COUNT).images}

    assert drawn("train", 1, 2) == drawn("train", 1, 2)
    sets = [drawn("train", 1, 2), drawn("train", 1, 3), drawn("held_out", 1, 2)]
    assert len(set.union(*sets)) == 3 * COUNT
    with refused(UsageError, "train", "held_out"):
        scenes.generator("test", 0)


def test_chosen_questions_are_askable_different_and_not_guessable(table):
    chosen = scenes.choose(scenes.generator("train", 9), table, 12)
    assert (np.take_along_axis(table, np.maximum(chosen, 0), axis=1)[chosen >= 0] >= 0).all()
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in chosen)
    each = scenes.one_of_each_type(scenes.generator("train", 9), table)
    for t, name in enumerate(scenes.TYPES):
        asked = np.flatnonzero(each[:, t] >= 0)
        assert len(asked) > COUNT / 4, name
        assert (scenes.QUESTION_TYPE[each[asked, t]] == t).all()
        commonest = np.bincount(table[asked, each[asked, t]]).max() / len(asked)
        assert commonest < (0.62 if name == "presence" else 0.5), name


def test_a_scene_without_enough_questions_leaves_slots_empty(table):
    everything = scenes.choose(scenes.generator("train", 9), table, len(scenes.QUESTIONS))
    assert ((everything >= 0).sum(axis=1) == (table >= 0).sum(axis=1)).all()


def test_examples_take_types_in_turn_and_fewer_are_a_prefix():
    pytest.importorskip("PIL")
    more, fewer = (list(scenes.examples("held_out", 0, n)) for n in (21, 10))
    assert [e["type"] for e in more] == list(scenes.TYPES) * 3
    for one, other in zip(fewer, more, strict=False):
        assert one["image"].tobytes() == other["image"].tobytes()
        assert (one["question"], one["answer"]) == (other["question"], other["answer"])


def arguments(folder, **changes):
    settings = {
        "tower_steps": 2,
        "language_steps": 3,
        "joint_steps": 2,
        "questions": 5,
        "width": 32,
        "tower_layers": 1,
        "layers": 1,
        "held_out": 8,
        "seed": 0,
    }
    return argparse.Namespace(output=folder, **(settings | changes))


def test_packed_questions_equal_asking_each_alone(tmp_path):
    from compress.recipes.demo.train_vlm import Training
    from compress.recipes.demo.vlm_model import IGNORED, VISUAL

    training = Training(arguments(tmp_path / "model", layers=2))
    packing, model = training.packing, training.model.eval()
    # Larger weights than at the start, so that what a token sees changes what it says.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and ".language_model." in name:
                p.mul_(5)
    rng = scenes.generator("held_out", 3)
    drawn = scenes.draw(rng, 2)
    answers = scenes.answer_table(drawn)
    chosen = scenes.choose(rng, answers, 5)
    ids, labels = packing.pack(answers, chosen)
    with torch.no_grad():
        packed = packing.logits(model, drawn.images, ids)[:, VISUAL:].unflatten(1, (5, -1))
    said = labels.unflatten(1, (5, -1))
    for i, j in np.ndindex(*chosen.shape):
        question = scenes.QUESTIONS[chosen[i, j]].text
        inputs = training.processor(
            images=[drawn.images[i]], text=[f"<image> {question}"], return_tensors="pt"
        )
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == VISUAL
        with torch.no_grad():
            alone = model(**inputs).logits[0, -1]
        last = len(question.split()) - 1
        torch.testing.assert_close(packed[i, j, last], alone, atol=1e-5, rtol=1e-4)
        answer = scenes.ANSWERS[answers[i, chosen[i, j]]]
        assert training.processor.tokenizer.decode(said[i, j, last]) == answer
        assert said[i, j, last + 1] == model.config.text_config.eos_token_id
        assert (said[i, j] != IGNORED).sum() == 2


def test_interrupted_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    from compress.recipes.demo.train_vlm import Training

    monkeypatch.setattr(Training, "write", lambda self: None)
    whole = Training(arguments(tmp_path / "whole"))
    whole.run()

    class StoppedError(Exception):
        pass

    first = Training(arguments(tmp_path / "parts"))
    draw_loss = first.loss

    def stops(stage):
        if stage.name == "language" and first.step == 2:
            first.save()
            raise StoppedError
        return draw_loss(stage)

    monkeypatch.setattr(first, "loss", stops)
    with pytest.raises(StoppedError):
        first.run()
    second = Training(arguments(tmp_path / "parts"))
    second.run()
    ended = second.parameters()
    for name, p in whole.parameters().items():
        assert torch.equal(p, ended[name]), name

    with refused(UsageError, "width", 32, 64):
        Training(arguments(tmp_path / "parts", width=64)).resume()
    longer = Training(arguments(tmp_path / "parts", joint_steps=4))
    longer.resume()
    assert (longer.stage, longer.step) == (2, 2)
