"""Draws the items of `demo_vqa` and scores the answers, overall and by type of question.

draw_items(seed=0, items=490)["test"]     # image, question, answer, type
"""

import functools
from typing import Any

import datasets
from PIL import Image

from compress.recipes.demo import scenes


def draw_items(seed: int, items: int, **_: Any) -> dict[str, datasets.Dataset]:
    """The task's only split; `seed` and `items` are of its metadata. Fewer items are a prefix."""
    return {"test": _drawn(seed, items)}


@functools.lru_cache(maxsize=4)  # several models are asked the same
def _drawn(seed: int, items: int) -> datasets.Dataset:
    columns: dict[str, list[Any]] = {name: [] for name in ("image", "question", "answer", "type")}
    for example in scenes.examples("held_out", seed, items):
        for name, column in columns.items():
            column.append(example[name])
    features = datasets.Features(
        {name: datasets.Value("string") for name in columns} | {"image": datasets.Image()}
    )
    return datasets.Dataset.from_dict(columns, features=features)


def doc_to_image(doc: dict[str, Any]) -> list[Image.Image]:
    return [doc["image"].convert("RGB")]


def score(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Exact match of the whole answer, and the same under the question's type."""
    right = float(" ".join(answers[0].lower().split()) == doc["answer"])
    return {"exact_match": right, f"exact_match_{doc['type']}": right}
