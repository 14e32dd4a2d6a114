"""What plans say of models that no machine here runs: the table of docs/scale.md.

    python tests/interop/scale/real_sizes.py TEXT.txt

Memory and bytes are those of `modelpress plan` from config.json alone, the GPU's by the same
forecast without one. Operations are counted from the shapes: one forward of all tokens, a Hessian
of each input and its factor, the column loop (N K^2) and the sweeps (2 N K^2 each).
"""

import argparse
import json
import tempfile
from pathlib import Path
from sys import path
from typing import Any

path.insert(0, str(Path(__file__).parents[2]))

from compress.pipeline.inputs import RunInputs
from compress.pipeline.plan import Plan, make_plan
from compress.pipeline.verify import reload_memory
from compress.recipe.recipe import Recipe, shipped_folder
from support.popular_models import config_of

MODELS = ("Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.1-405B", "Qwen3-235B-A22B")
RATE = 20e12  # operations a second in fp32


def plan_of(config: dict[str, Any], recipe: str, text: Path, offload: str) -> tuple[Plan, int, int]:
    """The plan, bytes of the self-check, and calibration tokens."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        settings = [f"calibration.dataset={text.absolute()}", f"calibration.offload={offload}"]
        chosen = Recipe.load(shipped_folder() / f"{recipe}.yaml", overrides=settings)
        inputs = RunInputs.foretell(chosen.with_changes(model={"path": folder}), "cuda")
        plan = make_plan(inputs)
        tokens = chosen.calibration.samples * chosen.calibration.length
        return plan, reload_memory(inputs.skeleton, plan.schemes), tokens


def operations(config: dict[str, Any], tokens: int, length: int, sweeps: int) -> float:
    d, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or d // heads
    groups = [((heads + 2 * config["num_key_value_heads"]) * size, d), (d, heads * size)]
    experts, chosen = config.get("num_experts", 1), config.get("num_experts_per_tok", 1)
    mlp = config["moe_intermediate_size" if experts > 1 else "intermediate_size"]
    inside = [(2 * mlp, d), (d, mlp)]
    total = 2.0 * length * heads * size * tokens
    for shapes, solved, seen in ((groups, 1, 1), (inside, experts, chosen)):
        total += sum(seen * tokens * (2 * N * K + K * K) for N, K in shapes)
        total += sum(solved * (K**3 / 3 + N * K * K * (1 + 2 * sweeps)) for N, K in shapes)
    return config["num_hidden_layers"] * total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path)
    text = parser.parse_args().text
    rows: dict[str, list[str]] = {}
    for name in MODELS:
        config = config_of(name)
        plan, check, tokens = plan_of(config, "rsq-w4", text, "disk")
        plain, in_ram = (
            plan_of(config, "gptq-w4", text, "disk")[0],
            plan_of(config, "rsq-w4", text, "ram")[0],
        )
        d = config["hidden_size"]
        waits = d if "num_experts" in config else config["intermediate_size"]
        work = operations(config, tokens, 2048, 5)
        gigabytes = {
            "source": plan.source_bytes,
            "result": plan.bytes["total"],
            "on the GPU of a rank": plan.peak_memory["device"],
            "host memory of a rank": plan.peak_memory["host"],
            "the same by `gptq-w4`": plain.peak_memory["host"],
            "host memory, activations in RAM, one rank": in_ram.peak_memory["host"],
            "activations on disk": 4 * tokens * (2 * d + waits),
            "self-check": check,
        }
        for key, value in gigabytes.items():
            rows.setdefault(f"{key}, GB", []).append(f"{value / 1e9:.3g}")
        rows.setdefault("operations, 10¹⁵", []).append(f"{work / 1e15:.3g}")
        for gpus in (1, 8, 32):
            hours = f"{work / RATE / gpus / 3600:.2g}"
            rows.setdefault(f"hours at 20 TFLOP/s, GPUs: {gpus}", []).append(hours)
    print("| | " + " | ".join(MODELS) + " |\n|---|" + "---:|" * len(MODELS))
    for key, cells in rows.items():
        print(f"| {key} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
