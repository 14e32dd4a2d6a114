"""Files changed at random, and what the program may say of them: one line, or the right logits.

Hypothesis draws what is changed. In the suite the cases are the same every time; more of them, and
others each time:

    MODELPRESS_FUZZ=5000 pytest tests/cli/test_mutated_folders.py --hypothesis-seed=1

    folder = shutil.copytree(source, tmp / "model")
    mutate_json(folder / "config.json", data)
    refused = outcome(lambda: compress.load(folder))      # None: it was not
"""

import contextlib
import copy
import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import torch
from torch import Tensor

from compress.cli.main import explain, main

CASES = int(os.environ.get("MODELPRESS_FUZZ", "0"))
SECONDS = 60  # of one case, which takes a tenth: on a busy machine too
cases = hypothesis.settings(
    max_examples=CASES or 125,
    derandomize=not CASES,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)

# What people, programs and damage leave in JSON and YAML files.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 64, 65, 96, 1000, 10**9, 2**31,
    2**63, 10**30, 0.0, 0.5, 1.0, 1.5, -0.5, 1e-300, 1e308, float("inf"), float("nan"),
    "", " ", "none", "auto", "0", "4", "1e-2", "int", "group", "channel", "layer", "float16",
    "float32", "llama", "gptq", "pack-quantized", "\ud800", "ä\n\x00", "x" * 5000, "../..", "/",
    "re:.*", "re:(a+)+$", "re:[", "re:.*q_proj", "lm_head", "model.layers.0.self_attn.q_proj",
    [], [None], [0], [1, 2], ["x"], ["re:.*"], [[[]]], [0] * 3000, {}, {"a": 1}, {"": {}},
    {"bits": 4}, {"name": "x"},
]  # fmt: skip
# Names of exceptions, and what Python says of its own values.
INTERNAL = re.compile(
    r"\b(?!CompressError)[A-Z]\w*(Error|Exception|Interrupt)\b|Traceback|object has no"
    r"|object is not|not supported between|unsupported operand|must be (str|int|a real)"
    r"|invalid literal|positional argument|keyword argument|out of range|not subscriptable"
    r"|unhashable"
)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Each value below `tree`, as what holds it and its key there."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def mutated(tree: Any, data: st.DataObject) -> Any:
    """Plain values with one to three of them changed, moved, dropped or added."""
    root = [copy.deepcopy(tree)]
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 3]))):
        places = list(_places(root))[1:] or [(root, 0)]
        holder, key = data.draw(st.sampled_from(range(len(places))).map(places.__getitem__))
        value = holder[key]
        kind = data.draw(st.sampled_from(["put", "put", "near", "drop", "add", "swap", "wrap"]))
        if kind == "near" and isinstance(value, int | float):
            holder[key] = data.draw(st.sampled_from([value + 1, value - 1, -value, value * 2]))
        elif kind == "near" and isinstance(value, str) and value:
            at = data.draw(st.integers(0, len(value) - 1))
            holder[key] = (
                value[:at] + data.draw(st.sampled_from(["", "x", ".", "\n"])) + value[at + 1 :]
            )
        elif kind == "drop":
            del holder[key]
        elif kind == "add" and isinstance(holder, dict):
            holder[f"{key}{data.draw(st.sampled_from(['s', '_', '.x']))}"] = copy.deepcopy(value)
        elif kind == "swap":
            other, place = data.draw(st.sampled_from(range(len(places))).map(places.__getitem__))
            if place in other if isinstance(other, dict) else place < len(other):
                holder[key] = copy.deepcopy(other[place])
        elif kind == "wrap":
            holder[key] = data.draw(st.sampled_from([[value], {"value": value}, str(value)]))
        else:
            holder[key] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))
    return root[0] if root else None


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """Bytes of which some were lost, doubled, changed or put in."""
    start = data.draw(st.integers(0, max(len(content) - 1, 0)))
    end = start + data.draw(st.sampled_from([1, 1, 2, 8, 100]))
    kind = data.draw(st.sampled_from(["flip", "flip", "lose", "double", "insert", "cut", "append"]))
    if kind == "flip":
        bit = 1 << data.draw(st.integers(0, 7))
        return (
            content[:start]
            + bytes([content[start] ^ bit] if content else [])
            + content[start + 1 :]
        )
    if kind == "lose":
        return content[:start] + content[end:]
    if kind == "double":
        return content[:end] + content[start:]
    if kind == "insert":
        more = data.draw(
            st.sampled_from([b"\x00", b"\xff", b"{", b'"', b": ", b"\n", b"0", b"\xef\xbb\xbf"])
        )
        return content[:start] + more + content[start:]
    return content[:start] if kind == "cut" else content + content[start:end]


def mutate_json(path: Path, data: st.DataObject) -> None:
    """Changes a JSON file: its values, or now and then its bytes."""
    content = path.read_bytes()
    if data.draw(st.integers(0, 4)):
        content = json.dumps(mutated(json.loads(content), data)).encode()
    else:
        content = damaged(content, data)
    path.write_bytes(content)


# ---- what is said -------------------------------------------------------------------------------


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Fails if what is inside hangs."""

    def late(*_: object) -> None:
        raise AssertionError(f"not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _terminal() -> Iterator[io.TextIOWrapper]:
    """The text on stderr; both streams encode as a terminal's do."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield err


def _said(err: io.TextIOWrapper) -> list[str]:
    err.flush()
    return err.buffer.getvalue().decode().splitlines()  # type: ignore[attr-defined]


def told(*argv: object) -> str | None:
    """The line with which the command line refuses, None if it does not; checks both."""
    with in_time(), _terminal() as err:
        code = main([*map(str, argv)])
        lines = _said(err)
    errors = [line for line in lines if line.startswith("error: ")]
    assert code in (0, 1, 2) and bool(errors) == bool(code), (code, lines)
    for line in lines:
        _check(line)
    return errors[0] if errors else None


def outcome(action: Callable[[], object]) -> str | None:
    """The line and code to which the command line turns what `action` raises; None for nothing."""
    with in_time(), _terminal() as err:
        try:
            action()
            return None
        except Exception as error:
            code = explain(error, debug=False)
        lines = _said(err)
    assert code in (1, 2) and lines[-1].startswith("error: "), (code, lines)
    _check(lines[-1])
    return lines[-1]


def _check(line: str) -> None:
    assert len(line) < 2000 and not INTERNAL.search(line), line


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether logits agree to 1e-3 of the largest; NaN where NaN is."""
    size = expected.abs().nan_to_num(0.0, 0.0, 0.0).max()
    return torch.allclose(found, expected, rtol=0, atol=float(1e-3 * size) + 1e-6, equal_nan=True)
