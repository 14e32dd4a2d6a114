"""Makes the checkpoints that engines are asked about, and what each of them is asked.

    python tests/interop/engines/make.py MODEL TEXT OUT [NAME ...]

It runs in the project's environment. MODEL is a 16-bit model, TEXT a file; without names, all that
OUT/checkpoints does not hold yet. Every checkpoint is rounded to nearest: what is asked is whether
an engine reads it as we do, not how good it is. OUT/asked.json holds

    windows      the first 8 windows of 512 tokens of the text
    prompts      four beginnings, as tokens
"""

import argparse
import json
import shutil
from pathlib import Path

import asking
from transformers import AutoTokenizer

from compress.checkpoint.export import export
from compress.pipeline.run import run
from compress.recipe.recipe import Recipe

W4 = {"method": "rtn", "bits": 4, "group_size": 64, "clip_search": "none"}
TABLES = {"embedding": {"bits": 8}, "head": {"bits": 8}}
ROTATED = {"rotate": "hadamard"}
WORDS = {"save": {"table_format": "pack-quantized"}}
DOWN8 = {"overrides": [{"match": r"re:.*down_proj$", "bits": 8}]}
# Sections of a recipe; a checkpoint that a name of EXPORTS begins with is made from one of these.
CHECKPOINTS = {
    "w4": {"quantize": W4},
    "w4-asymmetric": {"quantize": W4 | {"symmetric": False}},
    "w4-groups-192": {"quantize": W4 | {"group_size": 192}},
    "w8": {"quantize": W4 | {"bits": 8}},
    "w8-channel": {"quantize": W4 | {"bits": 8, "group_size": "channel"}},
    "w3": {"quantize": W4 | {"bits": 3}},
    "w4-w8": {"quantize": W4 | DOWN8},
    "w4-torn": {"quantize": W4 | {"overrides": [{"match": "re:.*q_proj$", "bits": 8}]}},
    "w4-tables": {"quantize": W4 | TABLES},
    "w4-tables-words": {"quantize": W4 | TABLES} | WORDS,
    "w4-head": {"quantize": W4 | {"head": {"bits": 8}}} | ROTATED,
    "w4-head-words": {"quantize": W4 | {"head": {"bits": 8}}} | ROTATED | WORDS,
}
# Name: the checkpoint it is made from, the format, and what `export` is told.
EXPORTS = {
    "gptq-w4": ("w4", "gptq", {}),
    "gptq-w4-asymmetric": ("w4-asymmetric", "gptq", {}),
    "gptq-w8": ("w8", "gptq", {}),
    "gptq-w3": ("w3", "gptq", {}),
    "gptq-w4-w8": ("w4-w8", "gptq", {}),
    "gptq-w4-torn": ("w4-torn", "gptq", {}),
    "gptq-w4-head": ("w4-head", "gptq", {}),
    "gguf-w4": ("w4-tables", "gguf", {}),
    "gguf-w4-16": ("w4", "gguf", {"keep_embeddings": True}),
    "gguf-w8": ("w8", "gguf", {}),
    "gguf-w4-w8": ("w4-w8", "gguf", {}),
    "gguf-w4-head": ("w4-head", "gguf", {}),
}


def checkpoint(name: str, model: Path, folder: Path) -> None:
    """Writes folder/NAME, and first the one it is exported from, if that is not there."""
    if (folder / name).exists():
        return
    if name in CHECKPOINTS:
        recipe = {"model": str(model)} | CHECKPOINTS[name]
        run(Recipe.from_dict(recipe), folder / name, self_check=False)
        return
    source, format, options = EXPORTS[name]
    checkpoint(source, model, folder)
    rounded = export(folder / source, format, folder / name, round_scales=True, **options)
    print(name, *rounded.notes, sep="\n    ", flush=True)
    if format == "gguf":  # its tokenizer is in the file; ours is asked by ids alone
        for file in (folder / source).glob("tokenizer*"):
            shutil.copy(file, folder / name)


def asked(model: Path, text: Path) -> dict[str, list[list[int]]]:
    """The windows and the prompts, as tokens of this model."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
    starts = range(0, asking.WINDOWS * asking.LENGTH, asking.LENGTH)
    return {
        "windows": [ids[start : start + asking.LENGTH] for start in starts],
        "prompts": [tokenizer(prompt)["input_ids"] for prompt in asking.PROMPTS],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", default=[*CHECKPOINTS, *EXPORTS])
    given = parser.parse_args()
    (given.out / "checkpoints").mkdir(parents=True, exist_ok=True)
    (given.out / "asked.json").write_text(json.dumps(asked(given.model, given.text)))
    for name in given.names:
        checkpoint(name, given.model, given.out / "checkpoints")


if __name__ == "__main__":
    main()
