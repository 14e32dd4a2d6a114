"""Scenes of coloured digits and shapes, and questions whose answers follow from what was drawn.

    from compress.recipes.demo import scenes
    rng = scenes.generator("held_out", seed=0)
    batch = scenes.draw(rng, 64)                      # batch.images [64, 96, 96, 3]
    table = scenes.answer_table(batch)                # [64, questions]: every answer to everything
    for item in scenes.examples("held_out", seed=0, count=64): ...   # one picture, one question

A scene holds up to five objects, none touching another, on a noisy striped background. Coordinates
are pixels, x to the right and y down; an object is a square window of `size` pixels round its
centre. A question is asked only where its answer leaves no doubt: what lies within a few pixels of
a boundary (the midlines of the picture, another object's row or column) makes it unaskable.

Everything is numpy over whole batches. A split is a random stream of its own: train and held-out
scenes come from the same distribution and are never the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import UsageError

SIDE, PATCH = 96, 8
GRID = SIDE // PATCH  # patches per side
SLOTS = 5  # objects in a scene, at most
SMALLEST, LARGEST = 16, 24  # sides of an object's window, pixels
GAP = 2  # pixels between two windows, at least
TRIES = 24  # random places tried for an object; none free: the scene has one object fewer
MIDLINE, BESIDE = 4, 6  # pixels of doubt round the picture's midlines; beside another object
FINE = 32  # side of a glyph before it is scaled

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "moon")
KINDS = DIGITS + SHAPES
COLOURS = {
    "red": (225, 45, 40),
    "green": (50, 200, 70),
    "blue": (60, 90, 245),
    "yellow": (245, 215, 50),
    "purple": (190, 70, 220),
    "white": (245, 245, 245),
}
ANSWERS = (*KINDS, *COLOURS, "yes", "no", "nothing")
NEGATIVE = tuple(ANSWERS.index(word) for word in ("no", "nothing"))
SPLITS = {"train": 0, "held_out": 1}

# Seven rows of five pixels each, the usual matrix-display digits.
FONT = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)


@dataclass(frozen=True)
class Question:
    text: str
    type: str


SIDES = ("left of", "right of", "above", "below")
CORNERS = tuple(f"{v} {h}" for v in ("top", "bottom") for h in ("left", "right"))
QUESTIONS = (
    *(Question(f"what is {corner} ?", "corner") for corner in CORNERS),
    *(Question(f"how many {what} ?", "count") for what in ("objects", "digits", "shapes")),
    *(Question(f"what colour is the {kind} ?", "colour") for kind in KINDS),
    *(Question(f"what is {colour} ?", "kind") for colour in COLOURS),
    *(
        Question(f"is there {'an' if kind == 'eight' else 'a'} {kind} ?", "presence")
        for kind in KINDS
    ),
    *(Question(f"which digit is {which} ?", "order") for which in ("largest", "smallest")),
    *(Question(f"what is {side} the {kind} ?", "beside") for side in SIDES for kind in KINDS),
)
TYPES = tuple(dict.fromkeys(question.type for question in QUESTIONS))
QUESTION_TYPE = np.array([TYPES.index(question.type) for question in QUESTIONS])
WORDS = tuple(sorted({w for q in QUESTIONS for w in q.text.split()} | set(ANSWERS)))


@dataclass(frozen=True)
class Scenes:
    """n scenes. Objects are [n, SLOTS]; where `present` is false the other fields mean nothing."""

    images: NDArray[np.uint8]  # [n, SIDE, SIDE, 3]
    present: NDArray[np.bool_]
    kind: NDArray[np.int64]  # index into KINDS
    colour: NDArray[np.int64]  # index into COLOURS
    x: NDArray[np.int64]  # centre, pixels from the left
    y: NDArray[np.int64]  # centre, pixels from the top
    size: NDArray[np.int64]  # side of the window, even


def generator(split: str, *key: int) -> np.random.Generator:
    """The random stream of a split ("train" or "held_out") under a key (seed, stage, step...)."""
    if split not in SPLITS:
        raise UsageError(f"no split {split!r}: expected one of {', '.join(SPLITS)}")
    return np.random.default_rng([SPLITS[split], *key])


@cache
def glyphs() -> NDArray[np.bool_]:
    """The outline of every kind, filled: [KINDS, FINE, FINE]."""
    fine = np.arange(FINE)
    width = 22  # of a digit, so that its pixels are nearly square
    column = np.clip((fine - (FINE - width) // 2) * 5 // width, -1, 5)
    digits = []
    for rows in FONT:
        pixels = np.array([[bit == "1" for bit in row] for row in rows.split()])
        padded = np.pad(pixels, ((0, 0), (1, 1)))  # columns -1 and 5 are empty
        digits.append(padded[fine[:, None] * 7 // FINE, column[None] + 1])
    v, u = np.meshgrid(*[(fine + 0.5) / FINE * 2 - 1] * 2, indexing="ij")
    radius = np.hypot(u, v)
    shapes = {
        "circle": radius < 0.95,
        "square": np.maximum(abs(u), abs(v)) < 0.8,
        "triangle": (abs(v) < 0.9) & (abs(u) < (v + 0.9) / 1.9),
        "diamond": abs(u) + abs(v) < 1,
        "cross": (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 0.95),
        "moon": (radius < 0.95) & (np.hypot(u - 0.45, v) > 0.7),
    }
    return np.stack(digits + [shapes[name] for name in SHAPES])


def draw(rng: np.random.Generator, count: int) -> Scenes:
    """`count` scenes of two to five objects (fewer where no free place was found)."""
    shape = (count, SLOTS)
    digit = rng.random(shape) < 0.6
    kind = np.where(
        digit,
        rng.integers(0, len(DIGITS), shape),
        rng.integers(len(DIGITS), len(KINDS), shape),
    )
    colour = rng.integers(0, len(COLOURS), shape)
    size = 2 * rng.integers(SMALLEST // 2, LARGEST // 2 + 1, shape)
    wanted = np.arange(SLOTS) < rng.integers(2, SLOTS + 1, (count, 1))
    x, y, present = _place(rng, size, wanted)
    images = _background(rng, count)
    _paint(rng, images, present, kind, colour, x, y, size)
    # The same noise in all three channels, over objects and background alike.
    images += rng.uniform(2, 6, (count, 1, 1, 1)) * rng.standard_normal(
        (count, SIDE, SIDE, 1), dtype=np.float32
    )
    pixels = np.clip(np.rint(images), 0, 255).astype(np.uint8)
    return Scenes(pixels, present, kind, colour, x, y, size)


def _place(
    rng: np.random.Generator, size: NDArray, wanted: NDArray
) -> tuple[NDArray, NDArray, NDArray]:
    """Centres x, y [n, SLOTS] of windows that do not touch, and which slots found a place."""
    count = len(size)
    x, y = np.zeros_like(size), np.zeros_like(size)
    present = np.zeros_like(wanted)
    for slot in range(SLOTS):
        half = size[:, slot, None] // 2
        tried = half[..., None] + np.floor(
            rng.random((count, TRIES, 2)) * (SIDE - 2 * half[..., None] + 1)
        ).astype(np.int64)
        free = np.ones((count, TRIES), dtype=bool)
        for other in range(slot):
            apart = (size[:, slot] + size[:, other]) // 2 + GAP
            distance = np.maximum(
                abs(tried[..., 0] - x[:, other, None]), abs(tried[..., 1] - y[:, other, None])
            )
            free &= (distance >= apart[:, None]) | ~present[:, other, None]
        first = free.argmax(axis=1)
        x[:, slot], y[:, slot] = tried[np.arange(count), first].T
        present[:, slot] = wanted[:, slot] & free.any(axis=1)
    return x, y, present


def _background(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Dim, nearly grey pictures with two gratings each: [n, SIDE, SIDE, 3]."""
    base = rng.uniform(40, 110, (count, 1, 1, 1)) + rng.uniform(-15, 15, (count, 1, 1, 3))
    y, x = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    waves = np.zeros((count, SIDE, SIDE), dtype=np.float32)
    for _ in range(2):
        frequency = rng.uniform(-0.15, 0.15, (2, count, 1, 1))  # cycles per pixel
        phase = rng.random((count, 1, 1))
        turns = (frequency[0] * x + frequency[1] * y + phase).astype(np.float32)
        waves += rng.uniform(0, 12, (count, 1, 1)).astype(np.float32) * np.sin(2 * np.pi * turns)
    return base.astype(np.float32) + waves[..., None]


def _paint(
    rng: np.random.Generator,
    images: NDArray[np.float32],
    present: NDArray,
    kind: NDArray,
    colour: NDArray,
    x: NDArray,
    y: NDArray,
    size: NDArray,
) -> None:
    """Puts the objects into the pictures, in place; windows of LARGEST pixels, cut to each size."""
    scene, slot = np.nonzero(present)
    side = size[scene, slot][:, None]
    step = np.arange(LARGEST)[None]
    fine = np.minimum(step * FINE // side, FINE - 1)  # [objects, LARGEST]
    inside = step < side
    mask = glyphs()[kind[scene, slot][:, None, None], fine[:, :, None], fine[:, None, :]]
    mask = mask & inside[:, :, None] & inside[:, None, :]
    paint = np.array(list(COLOURS.values()))[colour[scene, slot]]
    paint = paint + rng.uniform(-18, 18, paint.shape)
    thing, row, column = np.nonzero(mask)
    top = (y[scene, slot] - side[:, 0] // 2)[thing] + row
    left = (x[scene, slot] - side[:, 0] // 2)[thing] + column
    images[scene[thing], top, left] = paint[thing]


def answer_table(scenes: Scenes) -> NDArray[np.int64]:
    """[n, QUESTIONS]: the index into ANSWERS, or -1 where the question cannot be asked."""
    parts = (_corners, _counts, _colours, _kinds, _presence, _order, _beside)
    return np.concatenate([part(scenes) for part in parts], axis=1)


def _one_or_nothing(kind: NDArray, sure: NDArray, doubtful: NDArray) -> NDArray:
    """The one kind among `sure` [..., SLOTS], "nothing" for none; -1 for more, or for a doubt."""
    number = sure.sum(axis=-1)
    answer = np.where(number == 1, (kind * sure).sum(axis=-1), ANSWERS.index("nothing"))
    return np.where((number > 1) | doubtful.any(axis=-1), -1, answer)


def _corners(s: Scenes) -> NDArray:
    columns = []
    for corner in CORNERS:
        signs = [(s.y, -1 if "top" in corner else 1), (s.x, -1 if "left" in corner else 1)]
        depth = np.minimum(*[sign * (place - SIDE // 2) for place, sign in signs])
        sure = s.present & (depth >= MIDLINE)
        doubtful = s.present & (abs(depth) < MIDLINE)
        columns.append(_one_or_nothing(s.kind, sure, doubtful))
    return np.stack(columns, axis=1)


def _counts(s: Scenes) -> NDArray:
    digit = s.kind < len(DIGITS)
    counted = [s.present, s.present & digit, s.present & ~digit]
    # A count is answered by the digit's word, and those are the first answers.
    return np.stack([part.sum(axis=1) for part in counted], axis=1)


def _value_of_single(group: NDArray, value: NDArray, present: NDArray, groups: int) -> NDArray:
    """`value` of the object of each group if the scene has exactly one of it, else -1."""
    member = present[..., None] & (group[..., None] == np.arange(groups))  # [n, SLOTS, groups]
    return np.where(member.sum(axis=1) == 1, (member * value[..., None]).sum(axis=1), -1)


def _colours(s: Scenes) -> NDArray:
    return _value_of_single(s.kind, len(KINDS) + s.colour, s.present, len(KINDS))


def _kinds(s: Scenes) -> NDArray:
    return _value_of_single(s.colour, s.kind, s.present, len(COLOURS))


def _presence(s: Scenes) -> NDArray:
    there = (s.present[..., None] & (s.kind[..., None] == np.arange(len(KINDS)))).any(axis=1)
    return np.where(there, ANSWERS.index("yes"), ANSWERS.index("no"))


def _order(s: Scenes) -> NDArray:
    digit = s.present & (s.kind < len(DIGITS))
    ends = [np.where(digit, s.kind, -1).max(axis=1), np.where(digit, s.kind, 99).min(axis=1)]
    return np.where(digit.sum(axis=1, keepdims=True) >= 2, np.stack(ends, axis=1), -1)


def _beside(s: Scenes) -> NDArray:
    columns = []
    others = s.present[:, None] & ~np.eye(SLOTS, dtype=bool)  # [n, reference, other]
    for place, sign in ((s.x, -1), (s.x, 1), (s.y, -1), (s.y, 1)):
        ahead = sign * (place[:, None, :] - place[:, :, None])  # [n, reference, other]
        sure, doubtful = others & (ahead >= BESIDE), others & (abs(ahead) < BESIDE)
        answer = _one_or_nothing(s.kind[:, None], sure, doubtful)  # [n, reference]
        columns.append(_value_of_single(s.kind, answer, s.present, len(KINDS)))
    return np.concatenate(columns, axis=1)


def choose(
    rng: np.random.Generator, table: NDArray, per_scene: int, types: NDArray | None = None
) -> NDArray[np.int64]:
    """`per_scene` different questions of each scene [n, per_scene]; -1 where it has no more.

    All types are equally likely; within one, "no" has half the weight and "nothing" a third, so
    that no answer can be guessed. `types` [n] asks for one type in each scene.
    """
    weight = np.zeros(table.shape)
    negative = np.isin(table, NEGATIVE)
    for index, name in enumerate(TYPES):
        of_type = np.equal(QUESTION_TYPE, index) & (table >= 0)
        share = 1 / 2 if name == "presence" else 1 / 3
        for group, part in ((of_type & negative, share), (of_type & ~negative, 1 - share)):
            weight += group * part / np.maximum(group.sum(axis=1, keepdims=True), 1)
    if types is not None:
        weight *= np.equal(QUESTION_TYPE, types[:, None])
    # Smallest exponential arrival times: a weighted draw without replacement.
    with np.errstate(divide="ignore"):
        arrival = rng.exponential(size=table.shape) / weight
    chosen = np.argsort(arrival, axis=1)[:, :per_scene]
    return np.where(np.isfinite(np.take_along_axis(arrival, chosen, axis=1)), chosen, -1)


def one_of_each_type(rng: np.random.Generator, table: NDArray) -> NDArray[np.int64]:
    """A question of every type for each scene, [n, TYPES]; -1 where none can be asked."""
    columns = [choose(rng, table, 1, np.full(len(table), t))[:, 0] for t in range(len(TYPES))]
    return np.stack(columns, axis=1)


def patch_labels(scenes: Scenes) -> dict[str, NDArray[np.int64]]:
    """What each patch [n, GRID * GRID] holds; a patch is an object's if its centre lies within.

    `kind` and `colour` (the last class is background), `centre`: the kind of the object whose
    centre is in this very patch; `row` and `column` of the patch that holds the object's centre
    (of the patch itself, on background).
    """
    middle = np.arange(GRID) * PATCH + PATCH / 2
    half = scenes.size[..., None] / 2
    offset_x, offset_y = middle - scenes.x[..., None], middle - scenes.y[..., None]
    across = (offset_x >= -half) & (offset_x < half)  # [n, SLOTS, GRID]
    down = (offset_y >= -half) & (offset_y < half)
    owned = down[..., :, None] & across[..., None, :] & scenes.present[..., None, None]
    row, column = scenes.y // PATCH, scenes.x // PATCH
    patch = np.arange(GRID)
    centred = (patch == row[..., None])[..., :, None] & (patch == column[..., None])[..., None, :]
    centred &= scenes.present[..., None, None]

    def painted(mask: NDArray, value: NDArray, background: NDArray | int) -> NDArray:
        inside = (mask * value[..., None, None]).sum(axis=1)
        return np.where(mask.any(axis=1), inside, background).reshape(len(value), -1)

    return {
        "kind": painted(owned, scenes.kind, len(KINDS)),
        "colour": painted(owned, scenes.colour, len(COLOURS)),
        "centre": painted(centred, scenes.kind, len(KINDS)),
        "row": painted(owned, row, patch[:, None]),
        "column": painted(owned, column, patch[None, :]),
    }


def examples(split: str, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """`count` single questions, the types in turn: `image` (PIL), `question`, `answer`, `type`.

    Fewer examples are a prefix of more.
    """
    streams = [_questions_of_type(generator(split, seed, t), t) for t in range(len(TYPES))]
    for i in range(count):
        yield next(streams[i % len(TYPES)])


def _questions_of_type(rng: np.random.Generator, index: int) -> Iterator[dict[str, Any]]:
    from PIL import Image  # an optional extra

    while True:
        scenes = draw(rng, 16)
        table = answer_table(scenes)
        chosen = choose(rng, table, 1, np.full(len(table), index))[:, 0]
        for i in np.flatnonzero(chosen >= 0):
            yield {
                "image": Image.fromarray(scenes.images[i]),
                "question": QUESTIONS[chosen[i]].text,
                "answer": ANSWERS[table[i, chosen[i]]],
                "type": TYPES[index],
            }
