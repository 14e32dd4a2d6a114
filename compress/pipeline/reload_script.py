"""Loads a checkpoint as a user would, with transformers alone, and compares its logits to a probe.

Run by `verify.py` in a fresh process. It must not import this project: what is checked is that the
folder stands on its own. One line of JSON on stdout, everything else on stderr.

    python -P reload_script.py FOLDER PROBE.safetensors [--dequantize] [--table NAME]

What transformers leaves packed until the first forward becomes dense a decoder layer at a time.

transformers makes no room for an embedding whose codes are packed in words. `--table` names it: the
library compressed-tensors then makes it dense, and transformers reads all the rest. The same goes
for packed experts of the types of `TOGETHER`, which transformers reads as one tensor of all alone.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.base import decompress_module
from compressed_tensors.quantization import QuantizationScheme
from safetensors import safe_open
from safetensors.torch import load_file

EXPERTS = ".experts."
# By model type: the linears of an expert, the two tensors of all experts in the experts' block, and
# whether these are [E, K, N] and not [E, N, K], and have gate and up in turns.
NAMES = ("gate_proj", "up_proj", "down_proj")
WHOLES = ("experts.gate_up_proj", "experts.down_proj")
TOGETHER = {
    "granitemoe": (
        ("w1", "w3", "w2"),
        ("input_linear.weight", "output_linear.weight"),
        False,
        False,
    ),
    "gpt_oss": (NAMES, WHOLES, True, True),
    "qwen3_vl_moe": (NAMES, WHOLES, True, False),
}


def compare(
    folder: str, probe: dict[str, torch.Tensor], dequantize: bool, table: str | None = None
) -> dict:
    """The report: what did not load, and max |found - expected| / max |expected| of the logits."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    options = {"output_loading_info": True, "dtype": torch.float32}
    architecture = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    if dequantize:
        # From memory, with scales in fp32: else transformers rounds each weight to the 16 bits of
        # its scale, as it does for those who load the folder.
        quantization = transformers.CompressedTensorsConfig(dequantize=True)
        options |= {"state_dict": with_wide_scales(folder), "quantization_config": quantization}
        model, loading = architecture.from_pretrained(
            None, config=config, trust_remote_code=False, **options
        )
    elif table or has_experts(folder):
        # Scales in fp32, as above: transformers always makes experts dense.
        tensors = with_wide_scales(folder)
        if config.model_type in TOGETHER:
            with_experts_together(tensors, config)
        options["state_dict"] = with_dense_table(tensors, config, table) if table else tensors
        model, loading = architecture.from_pretrained(
            None, config=config, trust_remote_code=False, **options
        )
    else:
        model, loading = architecture.from_pretrained(folder, trust_remote_code=False, **options)
    report = {key: sorted(map(str, loading[key])) for key in loading if loading[key]}
    if report:
        return {"loading": report}
    expected = probe.pop("logits").float()
    one_at_a_time(model)
    with torch.no_grad():
        found = model.eval()(**probe, use_cache=False).logits.float()
    if found.shape != expected.shape:
        return {"shapes": [list(found.shape), list(expected.shape)]}
    largest = torch.stack(expected.aminmax()).abs().max()  # with no copy of all logits
    error = found.sub_(expected).abs_().max() / largest
    return {"relative_error": error.item(), "tokens": probe["input_ids"].numel()}


def one_at_a_time(model: Any) -> None:
    """Makes each decoder layer dense when it runs, and drops it after that; so the embedding.

    Where transformers has left packed what the library decompresses in the first forward: this does
    it by the same function, which would otherwise make the whole model dense before.
    """
    if not hasattr(model, "ct_decompress_hook"):
        return
    model.ct_decompress_hook.remove()
    lists = (m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))
    parts = [model.get_input_embeddings(), *next(lists)]
    inside = {module for part in parts for module in part.modules()}
    alone = [module for module in model.modules() if module not in inside]
    for part in parts:
        part.register_forward_pre_hook(lambda part, *_: decompressed(part.modules()))
        part.register_forward_hook(lambda part, *_: dropped(part))
    for module in alone:
        module.register_forward_pre_hook(lambda module, *_: decompressed([module]))


def decompressed(modules: Iterable[torch.nn.Module]) -> None:
    for module in modules:
        decompress_module(module)


def dropped(part: torch.nn.Module) -> None:
    part.to("meta")


def has_experts(folder: str) -> bool:
    """Whether the folder's tensors are in part those of experts."""
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if any(EXPERTS in name for name in tensors.keys()):  # noqa: SIM118
                return True
    return False


def with_wide_scales(folder: str) -> dict[str, torch.Tensor]:
    """The folder's tensors, scales in fp32."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return {n: t.float() if n.endswith(".weight_scale") else t for n, t in tensors.items()}


def with_dense_table(
    tensors: dict[str, torch.Tensor], config: Any, name: str
) -> dict[str, torch.Tensor]:
    """The tensors, the embedding dense; `config` no longer says that it is packed."""
    groups = config.quantization_config["config_groups"]
    own = next(key for key, group in groups.items() if name in group["targets"])
    tensors[f"{name}.weight"] = dense(tensors, groups[own], name)
    targets = [t for t in groups[own]["targets"] if t not in (name, "Embedding")]
    groups |= {own: groups[own] | {"targets": targets}}
    if not targets:
        del groups[own]
    return tensors


def with_experts_together(tensors: dict[str, torch.Tensor], config: Any) -> None:
    """Makes packed experts dense, and two tensors, and two of biases, of all those of a layer."""
    blocks = {n.partition(EXPERTS)[0] for n in tensors if n.endswith("_packed") and EXPERTS in n}
    if not blocks:
        return
    linears, wholes, turned, in_turns = TOGETHER[config.model_type]
    groups = config.quantization_config["config_groups"].values()
    named = [g for g in groups if any(EXPERTS.strip(".") in target for target in g["targets"])]
    scheme = (named or [g for g in groups if "Linear" in g["targets"]])[0]
    for block in blocks:
        places = {n.removeprefix(block + EXPERTS).partition(".")[0] for n in tensors if block in n}
        numbers = sorted(int(place) for place in places if place.isdecimal())
        for whole, parts in zip(wholes, (linears[:2], linears[2:]), strict=True):
            for key in ("weight", "bias"):
                shares = []
                for number in numbers:
                    names = [f"{block}{EXPERTS}{number}.{part}" for part in parts]
                    if key == "bias" and f"{names[0]}.bias" not in tensors:
                        continue
                    rows = [
                        dense(tensors, scheme, n) if key == "weight" else tensors.pop(f"{n}.bias")
                        for n in names
                    ]
                    share = torch.stack(rows, 1).flatten(0, 1) if in_turns else torch.cat(rows)
                    shares.append(share.T if turned and share.ndim > 1 else share)
                if shares:
                    tensors[f"{block}.{whole}{'_bias' * (key == 'bias')}"] = torch.stack(shares)


def dense(tensors: dict[str, torch.Tensor], group: dict[str, Any], name: str) -> torch.Tensor:
    """The weight of a packed module, whose packed tensors are taken out."""
    parts = {n.rpartition(".")[2]: n for n in tensors if n.rpartition(".")[0] == name}
    packed = {k: tensors.pop(n) for k, n in parts.items() if k.startswith("weight_")}
    scheme = QuantizationScheme.model_validate(group)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.decompress(packed, scheme)["weight"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("probe")
    parser.add_argument("--dequantize", action="store_true")
    parser.add_argument("--table")
    arguments = parser.parse_args()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print progress there too
            probe = load_file(arguments.probe)
            report = compare(arguments.folder, probe, arguments.dequantize, arguments.table)
    except Exception as error:  # the parent turns it into one line
        report = {"failure": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
