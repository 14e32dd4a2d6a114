"""Compares the answers of engines with modelpress's own, and records them in results.json.

    python tests/interop/engines/record.py OUT [OUT ...]

It runs in the project's environment. OUT is a folder that make.py or make_experts.py wrote, in
which engines have answered. A row of results.json, and of the table that is printed:

    engine, versions, checkpoint, format
    kind         the `model_type`
    modules      as `inspect` has them: the embedding, the head, and of the layers the first alone
    refused      what the engine said in place of an answer; without it
    perplexity   [its own, ours] at the places it told of
    places, top1 how many these are, and the share at which the likeliest token is the same
    nats         the largest difference of a token's log probability
    tokens       [those equal to ours before the first that differs, all] of greedy ones
"""

import json
import math
import re
import sys
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

from compress.checkpoint.inspect import inspect

RESULTS = Path(__file__).with_name("results.json")
ENGINES = {
    "vllm": "vLLM",
    "vllm-unpacked": "vLLM, products replaced",
    "gptqmodel": "GPTQModel",
    "llamacpp": "llama.cpp",
    "openvino": "OpenVINO GenAI",
    "transformers": "transformers",
}
LATER = re.compile(r"\.(layers|blk|experts)\.[1-9]")
SAID = 300  # letters of what an engine says that are kept
ANSWERS = Path("answers")


def row(out: Path, engine: str, name: str) -> dict[str, Any]:
    """What one engine made of one checkpoint."""
    answer = json.loads((out / ANSWERS / engine / f"{name}.json").read_text())
    folder = out / "checkpoints" / name
    held, config = inspect(folder), folder / "config.json"
    kind = json.loads(config.read_text())["model_type"] if config.exists() else ""
    found: dict[str, Any] = {
        "engine": ENGINES[engine],
        "versions": answer["versions"],
        "checkpoint": name,
        "format": held["format"],
        "kind": kind,
        "modules": [m for m in held["modules"] if not LATER.search(m["name"])],
    }
    if "refused" in answer:
        said = " ".join(answer["refused"].split())
        return found | {"refused": said if len(said) <= SAID else f"... {said[-SAID:]}"}
    ours = json.loads((out / ANSWERS / "modelpress" / f"{name}.json").read_text())
    pairs = [
        (float(a), float(b), x == y)
        for theirs, nats, chosen, own in zip(
            answer["nll"], ours["nll"], answer["top1"], ours["top1"], strict=True
        )  # an engine may tell of the last places of a window alone
        for a, b, x, y in zip(
            theirs, nats[-len(theirs) :], chosen, own[-len(theirs) :], strict=True
        )
    ]
    same = [
        len([*takewhile(lambda both: both[0] == both[1], zip(a, b, strict=False))])
        for a, b in zip(answer["generated"], ours["generated"], strict=False)
    ]
    return found | {
        "perplexity": [
            round(math.exp(sum(nats) / len(pairs)), 4)
            for nats in list(zip(*pairs, strict=True))[:2]
        ],
        "places": len(pairs),
        "top1": round(sum(pair[2] for pair in pairs) / len(pairs), 5),
        "nats": float(f"{max(abs(a - b) for a, b, _ in pairs):.1e}"),
        "tokens": [sum(same), sum(map(len, answer["generated"]))],
    }


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    start = f"{row['engine']:24} {row['checkpoint']:20} "
    if "refused" in row:
        return start + f"refused: {row['refused'][-90:]}"
    theirs, ours = row["perplexity"]
    tokens = "{} of {}".format(*row["tokens"]) if row["tokens"][1] else "-"
    return start + (
        f"perplexity {theirs:9.4f} {ours:9.4f}   top-1 {row['top1']:8.3%}   "
        f"nats {row['nats']:.0e}   tokens {tokens}"
    )


def main() -> None:
    rows = [
        row(out, engine, answer.stem)
        for out in map(Path, sys.argv[1:])
        for engine in ENGINES
        for answer in sorted((out / ANSWERS / engine).glob("*.json"))
    ]
    key = itemgetter("engine", "checkpoint")
    made = {key(row): row for row in rows}
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [made.pop(key(row), row) for row in known]
    rows += made.values()
    RESULTS.write_text(json.dumps(rows, separators=(",", ":")).replace('{"engine"', '\n{"engine"'))
    print(*map(line, rows), sep="\n")


if __name__ == "__main__":
    main()
