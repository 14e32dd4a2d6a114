"""What is measured of a model, and how: one class for recipes, the command line and Python.

settings = EvaluationSettings(tasks=["demo_code"], perplexity="python-stdlib", tokens=2048)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

WINDOW = 2048  # tokens, where neither `length` nor the model's context says less


@dataclass(frozen=True)
class EvaluationSettings:
    """Tasks, a text, and how both are put to a model.

    Attributes:
        tasks: names of tasks, groups or tags, glob patterns, or paths of task files (of a recipe's
            file: names alone, for a task's file can run code).
        include_path: further folders of task files.
        limit: items of each task, or a share of them if below 1; None for all.
        batch_size: windows, documents or requests in a forward pass.
        num_fewshot: examples in front of each item; None for what the task says. Tasks that are
            defined with none stay so.
        perplexity: the dataset whose held-out part is the text; None for no text.
        text_field: key of a FILE.jsonl's text, or column of a hub dataset's.
        length: tokens that the model sees in a window, BOS included; the most of a document. None:
            2048, or the model's context where that is shorter.
        stride: tokens from one window to the next; None: windows do not overlap.
        bos: whether the tokenizer's BOS stands in front of each window or document.
        tokens: only the first so many tokens of the text; None for all.
        per_document: each document on its own, cut to `length`, instead of one stream.
        seed: of Python's, numpy's and torch's generators, of the choice of examples, and of the
            items of tasks that draw theirs.
    """

    tasks: Sequence[str] = ()
    include_path: str | Path | Sequence[str | Path] | None = None
    limit: int | float | None = None
    batch_size: int = 8
    num_fewshot: int | None = None
    perplexity: str | None = None
    text_field: str = "text"
    length: int | None = None
    stride: int | None = None
    bos: bool = False
    tokens: int | None = None
    per_document: bool = False
    seed: int = 0

    def window(self, context: int | None) -> int:
        """Tokens of a window, for a model whose config says that it takes `context` tokens."""
        return self.length or min(WINDOW, context or WINDOW)

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> "EvaluationSettings":
        """The settings among a function's arguments, which have the names of the fields."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})
