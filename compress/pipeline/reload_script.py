"""Loads a checkpoint as a user would, with transformers alone, and compares its logits to a probe.

Run by `verify.py` in a fresh process. It must not import this project: what is checked is that the
folder stands on its own. One line of JSON on stdout, everything else on stderr.

    python -P reload_script.py FOLDER PROBE.safetensors [--dequantize] [--table NAME]

transformers makes no room for an embedding whose codes are packed in words. `--table` names it: the
library compressed-tensors then makes it dense, and transformers reads all the rest.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors import safe_open
from safetensors.torch import load_file

EXPERTS = ".experts."


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
        options["state_dict"] = (
            with_dense_table(folder, config, table) if table else with_wide_scales(folder)
        )
        model, loading = architecture.from_pretrained(
            None, config=config, trust_remote_code=False, **options
        )
    else:
        model, loading = architecture.from_pretrained(folder, trust_remote_code=False, **options)
    report = {key: sorted(map(str, loading[key])) for key in loading if loading[key]}
    if report:
        return {"loading": report}
    expected = probe.pop("logits").float()
    with torch.no_grad():
        found = model.eval()(**probe).logits.float()
    if found.shape != expected.shape:
        return {"shapes": [list(found.shape), list(expected.shape)]}
    error = (found - expected).abs().max() / expected.abs().max()
    return {"relative_error": error.item(), "tokens": probe["input_ids"].numel()}


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


def with_dense_table(folder: str, config: Any, name: str) -> dict[str, torch.Tensor]:
    """The folder's tensors, the embedding dense; `config` no longer says that it is packed."""
    tensors = with_wide_scales(folder)
    parts = {n.rpartition(".")[2]: n for n in tensors if n.rpartition(".")[0] == name}
    packed = {key: tensors.pop(n) for key, n in parts.items()}
    groups = config.quantization_config["config_groups"]
    own = next(key for key, group in groups.items() if name in group["targets"])
    scheme = QuantizationScheme.model_validate(groups[own])
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    tensors[f"{name}.weight"] = compressor.decompress(packed, scheme)["weight"]
    targets = [t for t in groups[own]["targets"] if t not in (name, "Embedding")]
    groups |= {own: groups[own] | {"targets": targets}}
    if not targets:
        del groups[own]
    return tensors


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
