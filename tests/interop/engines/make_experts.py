"""Makes tiny random models with experts, quantised, and what engines are asked of them.

    python tests/interop/engines/make_experts.py OUT [FAMILY ...]

It runs in the project's environment; OUT is as make.py writes it, with windows of random tokens.
What is asked is whether an engine finds each expert's matrices under the names that are written
here. FAMILY-16 is the model itself, unquantised: what an engine makes of that.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from sys import path

import asking
import torch

path.insert(0, str(Path(__file__).parents[2]))

from compress.pipeline.run import run
from compress.recipe.recipe import Recipe
from support.moe_families import write_mixture
from support.tiny_checkpoints import random_ids

# Sizes that vLLM's kernels on a CPU take: multiples of 32, heads of 32, experts of 64.
SIZES = {
    "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "head_dim": 32,
    "max_position_embeddings": 1024, "vocab_size": 320,
}  # fmt: skip
FAMILIES = ("qwen3_moe", "mixtral", "granitemoe", "granitemoe-16", "hunyuan_v1_moe",
            "ernie4_5_moe", "ernie4_5_moe-16", "lfm2_moe", "lfm2_moe-16", "llama4_text",
            "llama4_text-16")  # fmt: skip
CHANGED = {
    "mixtral": {"sliding_window": None},
    "llama4_text": {"attention_chunk_size": 128},  # blocks of vLLM's cache
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    given = parser.parse_args()
    (given.out / "checkpoints").mkdir(parents=True, exist_ok=True)
    ids = random_ids(asking.WINDOWS, 64).tolist()
    asked = {"windows": ids, "prompts": [window[:8] for window in ids[:4]]}
    (given.out / "asked.json").write_text(json.dumps(asked))
    for name in given.families:
        family, plain = name.removesuffix("-16"), name.endswith("-16")
        changes = SIZES | CHANGED.get(family, {})
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            model = write_mixture(Path(folder) / "model", family, **changes)
            if plain:
                shutil.copytree(model, given.out / "checkpoints" / f"{family}-16")
                continue
            quantize = {"method": "rtn", "bits": 4, "group_size": 32}
            recipe = Recipe.from_dict({"model": str(model), "quantize": quantize})
            run(recipe, given.out / "checkpoints" / family, self_check=False)


if __name__ == "__main__":
    main()
