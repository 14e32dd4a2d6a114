"""Measures results of the peers with modelpress' evaluator, and records them in peers.json.

    python tests/interop/board/measure.py MODEL TEXT BLIMP OUT [NAME ...]

It runs in the project's environment. MODEL is the 16-bit model, TEXT the folder that cut.py wrote,
BLIMP a folder of paradigms (blimp.py), OUT where the scripts of the peers wrote OUT/NAME and
OUT/NAME.json; without names, all that are not recorded yet. Each is measured as

    modelpress eval OUT/NAME --baseline MODEL --dense --perplexity TEXT/measured.txt --length 512
        --tokens 16384 --include-path TASKS --limit 100

does it, but the 16-bit model's figures are taken once. A GGUF file is expanded by the library gguf
through transformers, which gives rows of q and k their places back, and measured as fp32 weights:
what the file holds, without llama.cpp's rounding of activations to 8 bits.

peers.json has a row for each: the facts that its script told, and

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

RECORD = Path(__file__).with_name("peers.json")
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
        "blimp": {"value": scores["results"][blimp.GROUP]["acc"]},
    }
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


def record(row: dict[str, Any]) -> None:
    """Puts a row into peers.json, in the place of one of its name."""
    rows = json.loads(RECORD.read_text()) if RECORD.exists() else []
    rows = [other for other in rows if other["name"] != row["name"]] + [row]
    RECORD.write_text(json.dumps(sorted(rows, key=lambda r: r["name"]), indent=1) + "\n")


def recorded() -> set[str]:
    return {row["name"] for row in json.loads(RECORD.read_text())} if RECORD.exists() else set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for folder in ("model", "text", "blimp", "out"):
        parser.add_argument(folder, type=Path)
    parser.add_argument("names", nargs="*")
    asked = parser.parse_args()
    names = asked.names or sorted({file.stem for file in asked.out.glob("*.json")} - recorded())
    with tempfile.TemporaryDirectory() as scratch:
        blimp.write_tasks(asked.blimp, Path(scratch) / "tasks")
        settings = EvaluationSettings(
            tasks=[blimp.GROUP],
            include_path=Path(scratch) / "tasks",
            limit=ITEMS,
            perplexity=str(asked.text / "measured.txt"),
            length=LENGTH,
            tokens=TOKENS,
        )
        evaluator = Evaluator(settings, asked.model)
        for name in names:
            row = json.loads((asked.out / f"{name}.json").read_text())
            folder = asked.out / name
            for file in folder.glob("*.gguf"):
                folder = expand(file, asked.model, Path(scratch) / "dense")
            scores = evaluator.measure(folder, dense=True)
            conditions = {key: scores["conditions"][key] for key in ("dtype", "device", "lm_eval")}
            conditions |= {"torch": torch.__version__, "tokens": scores["kl"]["tokens"]}
            record(baseline_row(asked.model, scores, conditions))
            record(row | figures(scores) | {"measured": conditions})
            print(name, scores["perplexity"]["line"], scores["kl"]["line"], sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
