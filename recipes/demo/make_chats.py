"""Makes conversations to calibrate a chat model on, where there is no network.

    python recipes/demo/make_chats.py chats.jsonl
    modelpress run smollm2/gptq --set calibration.dataset=chats.jsonl \\
        --set calibration.loss_mask=assistant

Somebody asks what a function or class of Python's standard library does, and the assistant answers
with its docstring: read from the source, nothing is imported. Modules are those of `python-stdlib`
that no task asks about. Conversations are in random order; the same Python version and seed give
the same file.
"""

import argparse
import ast
import inspect
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from compress.data.stdlib import stdlib_files

LONGEST, SHORTEST = 1600, 200  # characters of an answer


def answers(text: str, module: str) -> Iterator[tuple[str, str]]:
    """What is asked of a module's source, and what its docstrings say."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            told = inspect.cleandoc(ast.get_docstring(node) or "")
            if SHORTEST <= len(told) <= LONGEST:
                yield f"What does `{module}.{node.name}` of Python do?", told


def make_chats(count: int, seed: int) -> list[dict[str, list[dict[str, str]]]]:
    """`count` conversations, or as many as there are: rows with `messages`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in stdlib_files("train"):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for question, answer in answers(path.read_text(encoding="utf-8"), module):
            roles = (("user", question), ("assistant", answer))
            found.append({"messages": [{"role": role, "content": said} for role, said in roles]})
    random.Random(seed).shuffle(found)  # noqa: S311
    return found[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rows = make_chats(asked.count, asked.seed)
    asked.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} conversations in {asked.output}")


if __name__ == "__main__":
    main()
