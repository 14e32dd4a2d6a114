"""The commands and the code of README and docs, and how each is made small enough for a test.

commands(path) and code(path, "yaml") read a document; replaced(), small() and write_small_recipes()
cut down what its commands ask for.
"""

import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from compress.recipe.recipe import shipped_recipes

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAMS = (
    "modelpress",
    "make",
    "pip",
    "python",
    "lm_eval",
    "vllm",
    "ollama",
    "llama-cli",
    "torchrun",
    "accelerate",
)


@dataclass(frozen=True)
class Block:
    """A block of code: its language ("" where none is said), its text, its first line's number."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    """One command of a document: its words, comment left out, and the line it begins at."""

    words: tuple[str, ...]
    line: int

    def __str__(self) -> str:
        return f"line {self.line}: {shlex.join(self.words)}"


def blocks(document: Path) -> Iterator[Block]:
    """Fenced blocks, and indented ones below an empty line."""
    lines = document.read_text().splitlines()
    at = 0
    while at < len(lines):
        start, line = at, lines[at]
        at += 1
        if fence := re.fullmatch(r"(`{3,})(\w*)", line):
            while lines[at] != fence[1]:
                at += 1
            yield Block(fence[2], "\n".join(lines[start + 1 : at]), start + 2)
            at += 1
        elif line.startswith("    ") and start and not lines[start - 1]:
            while at < len(lines) and lines[at].startswith("    "):
                at += 1
            yield Block("", "\n".join(each[4:] for each in lines[start:at]), start + 1)


def code(document: Path, language: str) -> list[Block]:
    return [block for block in blocks(document) if block.language == language]


def commands(document: Path) -> list[Command]:
    """Every command in the order in which a reader meets them."""
    found = []
    for block in blocks(document):
        if block.language not in ("", "sh", "bash", "console"):
            continue
        lines = iter(enumerate(block.text.splitlines(), block.line))
        for number, line in lines:
            if line.split(" ", 1)[0] not in PROGRAMS:
                continue
            while line.endswith("\\"):
                line = line[:-1] + next(lines)[1]
            found.append(Command(tuple(shlex.split(line, comments=True)), number))
    return found


def replaced(words: Sequence[str], stand_ins: Mapping[str, str]) -> list[str]:
    """The words with what stands in for models, texts and tasks that are not here.

    What is replaced is a whole word, or what follows `=` or a comma in one.
    """
    parts = "|".join(re.escape(name) for name in sorted(stand_ins, key=len, reverse=True))
    whole = re.compile(rf"(?<![^=,])({parts})(?![^,])")
    return [whole.sub(lambda found: stand_ins[found[1]], word) for word in words]


KEPT = {"--seeds": 1, "--vary": 2}  # of a list's elements
FEW = {
    "--tokens": "64",
    "--length": "32",
    "--limit": "2",
    "--num-fewshot": "1",
    "--shapes": "64x128",
    "--rounds": "1",
    "--prompts": "4",
    "--new-tokens": "2",
    "--repeats": "1",
}
SMALLER: dict[str, tuple[str, ...]] = {
    "bench kernels": ("--shapes=64x128", "--m=1", "--rounds=1"),
    "bench compiled": ("--bits=4", "--group-size=64", "--dtype=fp16"),
    "bench model": ("--prompts=4", "--new-tokens=2", "--repeats=1"),
    "eval": ("--limit=2",),
    "eval --perplexity": ("--limit=2", "--tokens=64", "--length=32"),
    "lm-eval": ("--limit=2", f"--include_path={ROOT / 'eval/tasks'}"),
    "compare": ("--no-self-check",),
    "generate": ("--max-tokens=2",),
}


def small(words: Sequence[str]) -> list[str]:
    """The command with one seed, two values, few tokens; else what it says itself is kept."""
    cut = list(words)
    for at, (before, word) in enumerate(itertools.pairwise(words), 1):
        if before in KEPT:
            cut[at] = ",".join(word.split(",")[: KEPT[before]])
        elif before == "--set":
            cut[at] = re.sub(r"^(calibration\.(samples|length))=.*", r"\1=32", word)
        else:
            cut[at] = FEW.get(before, word)
    command = " ".join(words[1:3]) if words[1] == "bench" else words[1]
    if command == "eval" and "--perplexity" in words:
        command += " --perplexity"
    more = SMALLER.get(command, ())
    return cut + [each for each in more if each.partition("=")[0] not in words]


def write_small_recipes(folder: Path, model: str, text: str) -> None:
    """The shipped recipes under their names, with little to calibrate on and to measure.

    Those of language models are for `model` and `text`; samples keep their ratios.
    """
    for name, _, file in shipped_recipes():
        recipe = yaml.safe_load(file.read_text())
        calibration = recipe.setdefault("calibration", {})
        calibration["samples"] = max(2, calibration.get("samples", 128) // 16)
        evaluate = recipe.get("evaluate") or {}
        evaluate |= {"limit": 2} if "tasks" in evaluate else {}
        if "perplexity" in evaluate:
            evaluate["perplexity"] |= {"dataset": text, "length": 32, "tokens": 64}
        if "prune_visual_tokens" in recipe:
            pruning = recipe["prune_visual_tokens"]
            pruning |= {"search": {"samples": 2, "trials": 2}} if "search" in pruning else {}
        else:
            recipe["model"] = model
            calibration |= {"dataset": text, "length": 32}
        where = folder / f"{name}.yaml"
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(yaml.safe_dump(recipe, sort_keys=False))
