"""Writes a large random model, shard by shard, that no machine has to hold whole.

    python tests/interop/scale/make_large.py OUT --type llama --set num_hidden_layers=28 ...
    python tests/interop/scale/make_large.py OUT --type mixtral --set num_local_experts=8 ...

Weights are bf16, normal, of the size that transformers initialises with, and repeat themselves
every 100 million numbers; norms are ones. The tokenizer is one of bytes. A shard holds a layer.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from sys import path

import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig

path.insert(0, str(Path(__file__).parents[2]))

from compress.models.skeleton import Skeleton
from support.tiny_checkpoints import byte_tokenizer

REPEATED = 100_000_007  # a prime, so that no two tensors are alike


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="llama")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    settings = {k: yaml.safe_load(v) for k, _, v in (s.partition("=") for s in arguments.set)}
    config = AutoConfig.for_model(arguments.type, **settings)
    config.architectures = [f"{arguments.type.capitalize()}ForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(arguments.out)
    byte_tokenizer().save_pretrained(arguments.out)
    skeleton = Skeleton.foretell(arguments.out)
    reader = skeleton.reader
    shards: dict[str, list[str]] = defaultdict(list)
    for name in reader.names:
        inside = name.removeprefix(f"{skeleton.spec.layers}.")
        shards[inside.partition(".")[0] if inside != name else name].append(name)
    values = torch.randn(REPEATED, generator=torch.Generator().manual_seed(0))
    values = values.mul_(config.initializer_range).bfloat16()
    at, index, total = 0, {}, 0
    for number, names in enumerate(shards.values(), 1):
        file, tensors = f"model-{number:05d}-of-{len(shards):05d}.safetensors", {}
        for name in names:
            shape = reader.shape(name)
            size = torch.Size(shape).numel()
            if len(shape) == 1:
                tensor = torch.ones(shape, dtype=torch.bfloat16)
            else:
                tensor = values[(torch.arange(at, at + size) % REPEATED)].view(shape)
                at += size
            tensors[reader.written_name(name)] = tensor
            index[reader.written_name(name)] = file
            total += 2 * size
        save_file(tensors, arguments.out / file, metadata={"format": "pt"})
    whole = {"metadata": {"total_size": total}, "weight_map": index}
    (arguments.out / "model.safetensors.index.json").write_text(json.dumps(whole, indent=1))
    print(f"{total / 2e9:.2f} billion parameters, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
