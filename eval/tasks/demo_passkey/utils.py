"""Hides the keys of `demo_passkey` in source text, and scores the answers by length and depth.

    hide_keys(lengths=[1000], depths=[0, 50], repeats=2)["test"]    # text, key, length, depth

An item is lines of the documents of `demo_text`, in an order of its own, with a line `PASS_KEY = N`
among them, and `assert PASS_KEY ==` behind them. Items take turns by depth, then by length, so that
the first N are a fair sample.
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from compress.errors import UsageError

TEXT = Path(__file__).parents[1] / "demo_text" / "documents.jsonl"
SHORTEST = 200  # characters of a text
QUESTION = "\n# The value of PASS_KEY, as it was set above:\nassert PASS_KEY =="


def hide_keys(
    lengths: Sequence[int] = (1000, 4000, 16000),
    depths: Sequence[int] = (0, 25, 50, 75, 100),
    repeats: int = 4,
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """The task's only split; the arguments are of its metadata. Fewer items are a prefix.

    Raises UsageError for lengths, depths or repeats that no text has.
    """
    lines = TEXT.read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    _check("lengths", lengths, SHORTEST, sum(map(len, documents)))
    _check("depths", depths, 0, 100)
    _check("repeats", [repeats], 1, 1000)
    items = [
        _item(documents, length, depth, number)
        for number in range(repeats)
        for length in lengths
        for depth in depths
    ]
    return {"test": datasets.Dataset.from_list(items)}


def _check(name: str, values: object, least: int, most: int) -> None:
    several = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else []
    right = (type(value) is int and least <= value <= most for value in several)
    if not several or not all(right):
        raise UsageError(
            f"demo_passkey: metadata {name}: expected whole numbers from {least} to {most}, "
            f"found {values!r}"
        )


def _item(documents: list[str], length: int, depth: int, number: int) -> dict[str, Any]:
    draw = random.Random(f"{length}:{depth}:{number}")  # noqa: S311
    text = "\n".join(draw.sample(documents, len(documents)))[:length]
    lines = text[: text.rindex("\n") + 1].splitlines(keepends=True)
    key = _key(draw, text)
    place = round(depth / 100 * len(lines))
    lines.insert(place, f"PASS_KEY = {key}\n")
    return {"text": "".join(lines) + QUESTION, "key": key, "length": length, "depth": depth}


def _key(draw: random.Random, text: str) -> str:
    """Five digits that the text has not."""
    while (key := str(draw.randrange(10_000, 100_000))) in text:
        pass
    return key


def score(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Whether the first number of the answer is the key; the same under its length and depth."""
    found = re.search(r"\d+", answers[0])
    right = float(found is not None and found[0] == doc["key"])
    kinds = (f"length_{doc['length']}", f"depth_{doc['depth']}")
    return {"exact_match": right} | {f"exact_match_{kind}": right for kind in kinds}
