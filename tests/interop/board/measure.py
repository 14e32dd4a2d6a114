"""Measures results of the peers and of modelpress with one evaluator, and records them.

    python tests/interop/board/measure.py MODEL TEXT BLIMP OUT [NAME ...]

It runs in the project's environment. MODEL is the 16-bit model, TEXT the folder that cut.py wrote,
BLIMP a folder of paradigms (blimp.py), OUT where the scripts of the peers wrote OUT/NAME and
OUT/NAME.json, or where `modelpress compare --output OUT` or `run` wrote OUT/NAME; without names,
all that are not recorded yet. Peers go to peers.json, results of modelpress to ours.json. Each is
measured as

    modelpress eval OUT/NAME --baseline MODEL --dense --perplexity TEXT/measured.txt --length 512
        --tokens 16384 --include-path TASKS --limit 100

does it, but the 16-bit model's figures are taken once, and without BLIMP (`--limit 0`) those that
`modelpress compare` has measured on the same text are taken from OUT/NAME.json. A GGUF file is
expanded by the library gguf through transformers, which gives rows of q and k their places back,
and measured as fp32 weights: what the file holds, without llama.cpp's rounding of activations to 8
bits.

Both have a row for each: the facts that its script told, or modelpress.json, and

    perplexity       per token
    nll              nats a token above the 16-bit model, paired window by window: value, stderr
    kl               nats a token, of the 16-bit model against it: value, stderr
    top1             share of tokens at which the likeliest is the same: value, stderr
    blimp            value, and difference to the 16-bit model, paired item by item: value, stderr
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import blimp
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.eval.settings import EvaluationSettings
from compress.pipeline.evaluation import Evaluator
from compress.recipe.recipe import Recipe

PEERS, OURS = (Path(__file__).with_name(name) for name in ("peers.json", "ours.json"))
LENGTH, TOKENS, ITEMS = 512, 16384, 100


def expand(file: Path, model: Path, folder: Path) -> Path:
    """A GGUF file as a folder of fp32 weights, with the config and tokenizer of the model."""
    dense = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = dense.state_dict()
    head, embedding = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
    if source.config.tie_word_embeddings and not torch.equal(head, embedding):
        raise SystemExit(f"{file}: its head is not its embedding, though the model ties them")
    source.load_state_dict(weights)
    source.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def figures(scores: dict[str, Any]) -> dict[str, Any]:
    """The row's figures out of an evaluation's."""
    found = {
        "perplexity": scores["perplexity"]["value"],
        "nll": _estimate(scores["difference"]["mean_nll"]),
        "kl": {"value": scores["kl"]["mean"], "stderr": scores["kl"]["stderr"]},
        "top1": {"value": scores["kl"]["top1_agreement"], "stderr": scores["kl"]["top1_stderr"]},
    }
    if "results" not in scores:
        return found
    found["blimp"] = {"value": scores["results"][blimp.GROUP]["acc"]}
    found["blimp"]["difference"] = _estimate(scores["difference"]["results"][blimp.GROUP]["acc"])
    return found


def _estimate(given: dict[str, float]) -> dict[str, float]:
    return {key: given[key] for key in ("value", "stderr")}


def baseline_row(model: Path, scores: dict[str, Any], conditions: dict[str, Any]) -> dict[str, Any]:
    """The 16-bit model's own row."""
    return {
        "name": "16-bit",
        "bits": 16,
        "bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "perplexity": scores["baseline"]["perplexity"]["value"],
        "blimp": {"value": scores["baseline"]["results"][blimp.GROUP]["acc"]},
        "measured": conditions,
    }


def record(file: Path, row: dict[str, Any]) -> None:
    """Puts a row into a file of them, in the place of one of its name."""
    rows = [other for other in recorded(file) if other["name"] != row["name"]] + [row]
    file.write_text(json.dumps(sorted(rows, key=lambda r: r["name"]), indent=1) + "\n")


def recorded(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text()) if file.exists() else []


def our_facts(folder: Path) -> dict[str, Any]:
    """What a result of modelpress says of itself, in the keys that the peers' scripts use."""
    told = json.loads((folder / "modelpress.json").read_text())
    recipe = Recipe.load(folder / "recipe.yaml")
    return {
        "name": folder.name,
        "recipe": recipe.name,
        "seed": recipe.calibration.seed,
        "bits": recipe.quantize.bits if recipe.allocate is None else recipe.allocate.average_bits,
        "average_bits": told["average_bits"],
        "versions": told["versions"],
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "seconds": sum(told["seconds"].values()),
        "peak_memory": told["peak_memory"]["host"],
    }


def compared(file: Path, text: Path) -> dict[str, Any] | None:
    """What `modelpress compare` has measured of a result, if it was on the same windows."""
    told = json.loads(file.read_text()) if file.exists() else {}
    scores = told.get("evaluation")
    if scores is None or "kl" not in scores:
        return None
    measured = str(text.absolute()) in scores["local"] and scores["kl"]["length"] == LENGTH
    return scores if measured and scores["kl"]["tokens"] == TOKENS - TOKENS // LENGTH else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for folder in ("model", "text", "blimp", "out"):
        parser.add_argument(folder, type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--limit", type=int, default=ITEMS, help="items of BLiMP; 0: none of it")
    asked = parser.parse_args()
    made = {file.stem for file in asked.out.glob("*.json")} - {"comparison"}
    made |= {file.parent.name for file in asked.out.glob("*/modelpress.json")}
    known = {row["name"] for file in (PEERS, OURS) for row in recorded(file)}
    names = asked.names or sorted(made - known)
    with tempfile.TemporaryDirectory() as scratch:
        blimp.write_tasks(asked.blimp, Path(scratch) / "tasks")
        settings = EvaluationSettings(
            tasks=[blimp.GROUP] if asked.limit else [],
            include_path=Path(scratch) / "tasks",
            limit=asked.limit or None,
            perplexity=str(asked.text / "measured.txt"),
            length=LENGTH,
            tokens=TOKENS,
        )
        evaluator = Evaluator(settings, asked.model)
        for name in names:
            folder, file = asked.out / name, PEERS
            if (folder / "modelpress.json").exists():
                row, file = our_facts(folder), OURS
            else:
                row = json.loads((asked.out / f"{name}.json").read_text())
            for gguf in folder.glob("*.gguf"):
                folder = expand(gguf, asked.model, Path(scratch) / "dense")
            known = compared(asked.out / f"{name}.json", asked.text / "measured.txt")
            if known is None or asked.limit:
                known = evaluator.measure(folder, dense=True)
            scores = known
            told = scores["conditions"]
            conditions = {key: told[key] for key in ("dtype", "device", "lm_eval") if key in told}
            conditions |= {"torch": torch.__version__, "tokens": scores["kl"]["tokens"]}
            if asked.limit:
                record(PEERS, baseline_row(asked.model, scores, conditions))
            record(file, row | figures(scores) | {"measured": conditions})
            print(name, scores["perplexity"]["line"], scores["kl"]["line"], sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
