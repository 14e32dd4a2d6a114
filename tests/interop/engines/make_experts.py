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
from safetensors.torch import load_file, save_file

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
            "ernie4_5_moe", "lfm2_moe", "lfm2_moe-16", "llama4_text")  # fmt: skip
# As those that are published have it; README.md says what vLLM makes of others.
CHANGED = {
    "mixtral": {"sliding_window": None},
    "ernie4_5_moe": {"use_bias": False},
    "lfm2_moe": {"conv_bias": False, "tie_word_embeddings": True},
    "llama4_text": {"attention_chunk_size": 128, "floor_scale": 8192, "attn_scale": 0.1},
}
# Tensors by parts of their names, and numbers.
TIMES = {"moe_statics": 0.0, "expert_bias": 0.0, "lfm2_moe embed_tokens": 0.05}


def multiplied(folder: Path, family: str) -> Path:
    """The folder with some of its tensors multiplied by a number."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for parts, factor in TIMES.items():
        for name in tensors:
            if all(part in f"{family} {name}" for part in parts.split(" ")):
                tensors[name] = tensors[name] * factor
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


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
            model = multiplied(write_mixture(Path(folder) / "model", family, **changes), family)
            if plain:
                shutil.copytree(model, given.out / "checkpoints" / f"{family}-16")
                continue
            quantize = {"method": "rtn", "bits": 4, "group_size": 32}
            recipe = Recipe.from_dict({"model": str(model), "quantize": quantize})
            run(recipe, given.out / "checkpoints" / family, self_check=False)


if __name__ == "__main__":
    main()
