"""Runs a model folder as a user would, with transformers alone, and keeps its logits for probes.

Used by `source_check.py`: as a module where the model is small, else as a script in a process of
its own, where the weights of named modules stay on disk (accelerate's offload) until their module
is at work. It must not import this project: what it gives is what our own reading of the folder is
compared with.

    python -P source_script.py FOLDER AutoModelForCausalLM --probes TEXT.safetensors \
        --places '{"model.layers": "disk", "model.norm": "cpu"}' --offload DIR
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

LOGITS = "logits"  # the tensor that a probe's file gets


def source_logits(
    folder: str,
    kind: str,
    probes: Sequence[dict[str, torch.Tensor]],
    places: dict[str, str] | None = None,
    offload: str | None = None,
) -> list[torch.Tensor]:
    """Logits [B, T, V] in fp32 on the CPU, for each probe: the arguments of a forward.

    kind: the class of transformers that opens the folder. places: where the weights of each module
    are kept, "cpu" or "disk", all of them in memory if it is None; offload: a folder for what
    accelerate keeps of those on disk. ValueError if the files lack tensors.
    """
    placed: dict[str, Any] = {}
    if places is not None:
        placed = {"device_map": places, "offload_folder": offload}
    loaded: Any = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, **placed
    )
    model, report = loaded
    if report["missing_keys"]:  # transformers makes up what a file lacks
        raise ValueError(
            f"the files lack {', '.join(sorted(map(str, report['missing_keys']))[:3])}"
        )
    with torch.no_grad():
        found = [model.eval()(**probe, use_cache=False).logits.float() for probe in probes]
    return [logits.cpu() for logits in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("kind")
    parser.add_argument("--places", required=True, type=json.loads)
    parser.add_argument("--offload", required=True)
    parser.add_argument("--probes", nargs="+", required=True, type=Path)
    arguments = parser.parse_args()
    report = {}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print progress there too
            probes = [load_file(path) for path in arguments.probes]
            found = source_logits(
                arguments.folder, arguments.kind, probes, arguments.places, arguments.offload
            )
        for path, logits in zip(arguments.probes, found, strict=True):
            save_file({LOGITS: logits.contiguous()}, path)
    except Exception as error:  # the parent turns it into one line
        report = {"failure": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
