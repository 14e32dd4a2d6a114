"""Makes the items of `demo_code`: pick the true next line of Python source among four.

    python recipes/demo/make_demo_code.py       # writes eval/tasks/demo_code/items.jsonl

Text: the held-out modules of the standard library of the running interpreter, less those that are
tables of data or specific to one machine. An item is

    context     8 to 15 lines, at most 600 characters, from the start of a line to the end of one
    choices     the next line that is not blank, and three other lines of the same file
    answer      where the true line stands among the choices

The three others are code lines of like length at the same depth of indentation, so that neither
form nor length gives the answer away. All four are indented: a tokenizer that joins a line end to
what is before it then shifts at most the indentation, which they share, out of what is scored. No
choice occurs in the context, all four differ after stripping, and none is too short to mean much.
Comments and lines inside strings are context only. Items are in random order, so that the first N
are a fair sample. The same Python version and seed give the same file.
"""

import argparse
import io
import json
import random
import sysconfig
import tokenize
from pathlib import Path
from typing import Any

from compress.data.stdlib import stdlib_files

ITEMS = Path(__file__).parents[2] / "eval" / "tasks" / "demo_code" / "items.jsonl"
CONTEXT_LINES = (8, 15)
CONTEXT_CHARACTERS = 600
SHORTEST = 10  # characters of a stripped choice: leaves out `return`, `else:`, `pass`
LONGEST = 100
LENGTH_RATIO = 1.6  # of a distractor to the true line, either way
SPACING = 16  # lines between the true lines of two items, so that no two share any of their context
# Tables, where the next line cannot be known, and a module that names the machine it was built on.
NOT_CODE = ("encodings/", "html/entities.py", "_compat_pickle.py", "config-")


def code_lines(text: str) -> dict[int, str]:
    """The lines of code by number (from 0): not blank, not a comment, not inside a string."""
    lines = text.split("\n")
    code: set[int] = set()
    inside: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        first, last = token.start[0] - 1, token.end[0] - 1
        if token.type == tokenize.STRING and last > first:
            inside.update(range(first, last + 1))
        elif token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING):
            code.add(first)
    return {n: lines[n] for n in sorted(code - inside)}


def context_before(lines: list[str], n: int) -> list[str] | None:
    """The lines before line n, as many as the limits allow; None if they are too few."""
    fewest, most = CONTEXT_LINES
    first = n
    while first > 0 and n - first < most:
        if sum(len(line) + 1 for line in lines[first - 1 : n]) > CONTEXT_CHARACTERS:
            break
        first -= 1
    while first < n and not lines[first].strip():
        first += 1
    return lines[first:n] if n - first >= fewest else None


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def choose_distractors(
    gold: str, candidates: list[str], context: str, draw: random.Random
) -> list[str] | None:
    """Three lines that could stand where `gold` stands, by their form; None if there are not."""
    low, high = len(gold.strip()) / LENGTH_RATIO, len(gold.strip()) * LENGTH_RATIO
    unlike = {gold.strip()}
    fitting = []
    for line in candidates:
        bare = line.strip()
        if indentation(line) != indentation(gold):
            continue
        if bare in unlike or bare in context or not low <= len(bare) <= high:
            continue
        unlike.add(bare)
        fitting.append(line)
    return draw.sample(fitting, 3) if len(fitting) >= 3 else None


def items_of(module: str, text: str, draw: random.Random) -> list[dict[str, Any]]:
    """All items of one file, in random order, their true lines at least `SPACING` apart."""
    if "\t" in text or "\f" in text:
        return []  # indentation by tabs is not comparable with the others
    lines = text.split("\n")
    code = code_lines(text)
    fitting = {
        n: line
        for n, line in code.items()
        if SHORTEST <= len(line.strip()) <= LONGEST and indentation(line) > 0
    }
    order = list(fitting)
    draw.shuffle(order)
    items: list[dict[str, Any]] = []
    for n in order:
        if any(abs(n + 1 - item["line"]) < SPACING for item in items):
            continue
        before, gold = context_before(lines, n), lines[n]
        if before is None:
            continue
        context = "".join(line + "\n" for line in before)
        others = choose_distractors(gold, list(fitting.values()), context, draw)
        if others is None or gold.strip() in context:
            continue
        four = [gold, *others]
        draw.shuffle(four)
        items.append(
            {
                "context": context,
                "choices": four,
                "answer": four.index(gold),
                "module": module,
                "line": n + 1,
            }
        )
    return items


def make_items(count: int, seed: int) -> list[dict[str, Any]]:
    """`count` items from all held-out modules, in random order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    items = []
    for path in stdlib_files("held_out"):
        module = path.relative_to(root).as_posix()
        if not module.startswith(NOT_CODE):
            # Each file has its own draw: what one file holds does not change another's items.
            draw = random.Random(f"{seed}:{module}")  # noqa: S311
            items += items_of(module, path.read_text(encoding="utf-8"), draw)
    random.Random(seed).shuffle(items)  # noqa: S311
    return items[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ITEMS)
    args = parser.parse_args()
    items = make_items(args.count, args.seed)
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    args.output.write_text("".join(lines), encoding="utf-8")
    print(f"{len(items)} items from {len({item['module'] for item in items})} modules")


if __name__ == "__main__":
    main()
