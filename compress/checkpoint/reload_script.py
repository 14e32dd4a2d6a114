"""Loads a checkpoint as a user would, with transformers alone, and compares its logits to a probe.

Run by `verify.py` in a fresh process. It must not import this project: what is checked is that the
folder stands on its own. One line of JSON on stdout, everything else on stderr.

    python -P reload_script.py FOLDER PROBE.safetensors [--dequantize]
"""

import argparse
import contextlib
import json
import sys

import torch
import transformers
from safetensors.torch import load_file


def compare(folder: str, probe: dict[str, torch.Tensor], dequantize: bool) -> dict:
    """The report: what did not load, and max |found - expected| / max |expected| of the logits."""
    config = transformers.AutoConfig.from_pretrained(folder)
    options = {}
    if dequantize:
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    architecture = (config.architectures or ["AutoModelForCausalLM"])[0]
    model, loading = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("probe")
    parser.add_argument("--dequantize", action="store_true")
    arguments = parser.parse_args()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print progress there too
            report = compare(arguments.folder, load_file(arguments.probe), arguments.dequantize)
    except Exception as error:  # the parent turns it into one line
        report = {"failure": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
