"""What is measured of a model, and how: one class for recipes, the command line and Python.

settings = EvaluationSettings(tasks=["demo_code"], perplexity="python-stdlib", tokens=2048)
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

WINDOW = 2048  # tokens, where neither `length` nor the model's context says less
BATCH = 8  # windows, documents or requests in a forward pass

# `auto`, or `auto:N`
AUTO = re.compile(r"auto(:[1-9][0-9]*)?")
CacheRequests = bool | Literal["refresh", "delete"]


@dataclass(frozen=True)
class EvaluationSettings:
    """Tasks, a text, and how both are put to a model.

    Attributes:
        tasks: names of tasks, groups or tags, glob patterns, or paths of task files (of a recipe's
            file: names alone, for a task's file can run code).
        include_path: further folders of task files.
        limit: items of each task, or a share of them if below 1; None for all.
        batch_size: windows, documents or requests in a forward pass. `auto`: as many requests as
            fit, found out once, `auto:N` N times; the text's windows then go 8 at a time.
        num_fewshot: examples in front of each item; None for what the task says. Tasks that are
            defined with none stay so.
        apply_chat_template: whether prompts are put into the model's chat template, or the name of
            one of several; None: where the model takes images and has one, otherwise not.
        system_instruction: a system prompt; without a chat template it stands before each prompt.
        fewshot_as_multiturn: examples as turns of their own; None: where there is a template.
        gen_kwargs: of generation, over what the tasks say: temperature, max_gen_toks, until.
        max_length: the most tokens that the tasks put to the model; None: its context.
        add_bos_token: whether BOS stands before the tasks' prompts that have none; None: as the
            tokenizer does. A template that writes BOS itself never gets a second.
        cache_requests: keep the prompts that lm-eval has built, and use those that it has kept;
            `refresh` makes them again, `delete` removes them.
        log_samples: keep every prompt and answer, where lm-eval's files are written.
        metadata: what tasks are told that are made for a model, such as ruler's max_seq_lengths.
        confirm_run_unsafe_code: run tasks that execute what the model wrote.
        perplexity: the dataset whose held-out part is the text; None for no text.
        text_field: key of a FILE.jsonl's text, or column of a hub dataset's.
        length: tokens that the model sees in a window, BOS included; the most of a document. None:
            2048, or the model's context where that is shorter.
        stride: tokens from one window to the next; None: windows do not overlap.
        bos: whether the tokenizer's BOS stands in front of each window or document.
        tokens: only the first so many tokens of the text; None for all.
        per_document: each document on its own, cut to `length`, instead of one stream.
        by_position: the text's figures also by the tokens that stand in front of a prediction.
        seed: of Python's, numpy's and torch's generators, of the choice of examples, and of the
            items of tasks that draw theirs.
    """

    tasks: Sequence[str] = ()
    include_path: str | Path | Sequence[str | Path] | None = None
    limit: int | float | None = None
    batch_size: int | str = BATCH
    num_fewshot: int | None = None
    apply_chat_template: bool | str | None = None
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None
    gen_kwargs: Mapping[str, Any] | None = None
    max_length: int | None = None
    add_bos_token: bool | None = None
    cache_requests: CacheRequests = False
    log_samples: bool = False
    metadata: Mapping[str, Any] | None = None
    confirm_run_unsafe_code: bool = False
    perplexity: str | None = None
    text_field: str = "text"
    length: int | None = None
    stride: int | None = None
    bos: bool = False
    tokens: int | None = None
    per_document: bool = False
    by_position: bool = False
    seed: int = 0

    @property
    def text_batch_size(self) -> int:
        """Windows or documents of the text in a forward pass."""
        return self.batch_size if isinstance(self.batch_size, int) else BATCH

    def window(self, context: int | None) -> int:
        """Tokens of a window, for a model whose config says that it takes `context` tokens."""
        return self.length or min(WINDOW, context or WINDOW)

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> "EvaluationSettings":
        """The settings among a function's arguments, which have the names of the fields."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})


def limit_problem(limit: float | None) -> str | None:
    """What is wrong with a number of items, or a share of them; None: nothing.

    lm-eval takes 1.0 for one item, and cuts 2.5 to two.
    """
    if limit is None or (isinstance(limit, int) and limit >= 1):
        return None
    if isinstance(limit, float) and 0 < limit < 1:
        return None
    return f"expected a whole number of items, or a share of them below 1, found {limit}"


def batch_problem(size: int | str) -> str | None:
    """What is wrong with a batch size; None: nothing."""
    fits = size >= 1 if isinstance(size, int) else AUTO.fullmatch(size)
    return None if fits else f"expected a whole number, auto or auto:N, found {size!r}"
