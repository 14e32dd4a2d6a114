"""The self-check of a written checkpoint: reload it elsewhere, and compare its logits.

The model in memory writes a probe: a prompt, with an image if the model is multimodal, and its
logits for it. A fresh Python process that knows only torch, transformers and safetensors loads the
folder in fp32 on the CPU and runs the same prompt, no visual tokens pruned; packed decoder layers
are dense one at a time. A key that is missing or left over, or a relative error max|a-b| / max|b|
above the tolerance, is a CheckpointError: a checkpoint that differs from the model that was
measured is not a result.

    write_probe(path, inputs, model(**inputs).logits)
    reload_and_compare(folder, path)["relative_error"]
"""

import re
from collections import Counter
from pathlib import Path

from torch import Tensor

from compress.checkpoint.engines import Schemes, must_dequantize_on_load
from compress.checkpoint.packed import EMBEDDING
from compress.checkpoint.quantization_config import read_config
from compress.errors import CheckpointError
from compress.models.config_values import without_names
from compress.models.skeleton import Skeleton
from compress.pipeline.script_process import reported
from compress.storage.safetensors import CheckpointReader, save_tensors

SCRIPT = Path(__file__).with_name("reload_script.py")


def write_probe(path: str | Path, inputs: dict[str, Tensor], logits: Tensor) -> None:
    """Writes the arguments of a forward, token ids [B, T] and for a multimodal model its images,
    and the logits [B, T, V] that the model gave for them, in fp32."""
    save_tensors(path, inputs | {"logits": logits.float()})


def reload_and_compare(
    folder: str | Path, probe_path: str | Path, tolerance: float = 1e-4
) -> dict[str, float | int]:
    """Loads `folder` in a fresh process and compares its logits to those of the probe.

    Returns {"relative_error", "tolerance", "tokens"}; relative_error is max|a-b| / max|b|. Raises
    CheckpointError if the folder does not load, if keys are missing or left over, or if the error
    is above the tolerance (a NaN always is).
    """
    folder = Path(folder)
    section = read_config(folder).get("quantization_config") or {}
    table = packed_table(CheckpointReader(folder))
    report = _run(folder, Path(probe_path), must_dequantize_on_load(section), table)
    if "failure" in report:
        reason = without_names(report["failure"])
        raise CheckpointError(f"{folder} does not load in transformers: {reason}")
    if "loading" in report:
        faults = "; ".join(
            f"{kind.replace('_', ' ')}: {', '.join(names[:3])}"
            + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            for kind, names in report["loading"].items()
        )
        raise CheckpointError(f"{folder} does not load whole in transformers: {faults}")
    if "shapes" in report:
        found, expected = report["shapes"]
        raise CheckpointError(f"{folder} gives logits of shape {found}, expected {expected}")
    error = report["relative_error"]
    if not error <= tolerance:
        raise CheckpointError(
            f"{folder}, reloaded, gives other logits than the model that was written: "
            f"relative error {error:.3g}, tolerance {tolerance:.3g}"
        )
    return {"relative_error": error, "tolerance": tolerance, "tokens": report["tokens"]}


def reload_memory(skeleton: Skeleton, schemes: Schemes) -> int:
    """Bytes of the weights that `reload_and_compare` holds at a time.

    In fp32: what is not packed, tables, and the largest of packed decoder layers. All of it where
    transformers makes a model dense as it loads it, which it does with experts and zero points.
    `schemes`: of every linear of the result.
    """
    whole = any(kind.experts for kind in skeleton.spec.kinds)
    whole = whole or any(scheme and not scheme.symmetric for scheme in schemes.values())
    inside = re.compile(rf"{re.escape(skeleton.spec.layers)}\.(\d+)\.")
    dense, layers = 0.0, Counter[str]()
    for name, parameter in skeleton.model.named_parameters():
        scheme, place = schemes.get(name.removesuffix(".weight")), inside.match(name)
        if whole or scheme is None or place is None:
            dense += 4 * parameter.numel()
        else:
            dense += parameter.numel() * scheme.bits / 8
            layers[place[1]] += 4 * parameter.numel()
    return round(dense) + max(layers.values(), default=0)


def packed_table(reader: CheckpointReader) -> str | None:
    """The embedding, where its codes are packed in words."""
    end = f"{EMBEDDING}.weight_packed"
    found = next((name for name in reader.names if name.endswith(end)), None)
    return None if found is None else found.removesuffix(".weight_packed")


def _run(folder: Path, probe: Path, dequantize: bool, table: str | None) -> dict:
    arguments = [str(folder.resolve()), str(probe.resolve())]
    arguments += ["--dequantize"] if dequantize else []
    arguments += [] if table is None else ["--table", table]
    return reported(SCRIPT, arguments)
