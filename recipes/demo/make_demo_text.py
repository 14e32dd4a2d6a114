"""Makes the documents of `demo_text`: source text for rolling perplexity, and to hide keys in.

    python recipes/demo/make_demo_text.py       # writes eval/tasks/demo_text/documents.jsonl

Text: the held-out modules of the standard library of the running interpreter that `demo_code` is
made of. A document is a run of whole lines of one module, of 4,000 characters at most and 2,000 at
least. Documents are in random order, so that the first N are a fair sample. The same Python version
and seed give the same file.
"""

import argparse
import json
import random
import sysconfig
from pathlib import Path

from compress.data.stdlib import stdlib_files
from compress.recipes.demo.make_demo_code import NOT_CODE

DOCUMENTS = Path(__file__).parents[2] / "eval" / "tasks" / "demo_text" / "documents.jsonl"
LONGEST, SHORTEST = 4000, 2000  # characters


def documents_of(text: str) -> list[str]:
    """A module in parts of whole lines; those that are too short are left out."""
    parts = [""]
    for line in text.splitlines(keepends=True):
        if len(parts[-1]) + len(line) > LONGEST:
            parts.append("")
        parts[-1] += line
    return [part for part in parts if SHORTEST <= len(part) <= LONGEST]


def make_documents(count: int, seed: int) -> list[dict[str, str]]:
    """`count` documents of all held-out modules, in random order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in stdlib_files("held_out"):
        module = path.relative_to(root).as_posix()
        if not module.startswith(NOT_CODE):
            parts = documents_of(path.read_text(encoding="utf-8"))
            found += [{"text": part, "module": module} for part in parts]
    random.Random(seed).shuffle(found)  # noqa: S311
    return found[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=DOCUMENTS)
    args = parser.parse_args()
    documents = make_documents(args.count, args.seed)
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    args.output.write_text("".join(lines), encoding="utf-8")
    print(f"{len(documents)} documents of {len({d['module'] for d in documents})} modules")


if __name__ == "__main__":
    main()
