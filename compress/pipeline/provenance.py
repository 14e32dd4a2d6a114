"""Where a checkpoint comes from: versions, hashes of what went in, and what the run has seen.

fingerprint(inputs, data)    # equal for runs that give the same bytes
made_by(folder, recipe, mark)   # whether that run has made this folder
"""

import hashlib
import json
import os
import sys
import warnings
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.data.prompts import CalibrationData, ImagePrompts
from compress.errors import RecipeError
from compress.kernels.cpu import native
from compress.loading.processor import check_cpu_level
from compress.pipeline.inputs import RunInputs
from compress.pipeline.plan import Plan
from compress.pipeline.result import RunResult
from compress.pipeline.token_sample import token_sample
from compress.quantization.grid import MAGNITUDE_BITS
from compress.recipe.recipe import Recipe
from compress.storage.files import read_json


def versions() -> dict[str, str]:
    """Versions of everything that can change the bytes of a result."""
    names = ("modelpress", "torch", "transformers", "safetensors", "compressed-tensors")
    python = ".".join(map(str, sys.version_info[:3]))
    return {name: version(name) for name in names} | {"python": python}


def fingerprint(inputs: RunInputs, data: CalibrationData) -> str:
    """SHA-256 of what a run that continues must share with the one that was killed."""
    settings = inputs.recipe.model_dump(exclude={"evaluate", "name"})
    settings["calibration"].pop("offload")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(inputs.skeleton.reader.fingerprint().encode())
    digest.update(json.dumps(versions(), sort_keys=True).encode())
    digest.update(inputs.device.encode())
    digest.update(data.digest())
    return digest.hexdigest()


def provenance(
    result: RunResult, inputs: RunInputs, data: CalibrationData, mark: str
) -> dict[str, Any]:
    """modelpress.json: what was done, from what, and what it took. `mark`: the fingerprint."""
    used = inputs.source.used or isinstance(data, ImagePrompts)
    plan, recipe, skeleton = result.plan, inputs.recipe, inputs.skeleton
    sample = token_sample(data, skeleton, result.layers)
    return {
        "fingerprint": mark,
        "versions": versions(),
        "device": inputs.device,
        **_cpu_kernels(inputs, plan),
        "model": {
            "path": recipe.model.path,
            "revision": recipe.model.revision,
            "fingerprint": skeleton.reader.fingerprint(),
        },
        "local": local_names(recipe),
        "calibration": data.facts() if used else None,
        "seeds": {"calibration": recipe.calibration.seed, "rotate": recipe.rotate.seed},
        "average_bits": plan.average_bits,
        "allocation": None if plan.allocation is None else asdict(plan.allocation),
        "pruning": result.pruning,
        "bytes": {"original": skeleton.reader.nbytes()} | plan.bytes,
        "layers": result.layers,
        **({} if sample is None else {"token_sample": sample}),
        "rounded_to_nearest": result.rounded_to_nearest,
        "self_check": result.self_check,
        "source_check": result.source_check,
        "seconds": {name: round(value, 2) for name, value in result.seconds.items()},
        "peak_memory": result.peak_memory,
        **({"evaluation_memory": measured} if (measured := result.evaluation_memory) else {}),
        "warnings": result.warnings,
    }


def _cpu_kernels(inputs: RunInputs, plan: Plan) -> dict[str, str]:
    """What searched scales and rounded weights on a CPU, in the process that ends the run."""
    return {"cpu_kernels": native.reason()} if _has_loops(inputs, plan) else {}


def slow_without_kernels(inputs: RunInputs, plan: Plan) -> list[str]:
    """That this CPU has no compiled kernels, where a run wants them: to be said before it works.

    Raises UsageError for a MODELPRESS_CPU that names no level of this processor.
    """
    if not _has_loops(inputs, plan) or os.environ.get("MODELPRESS_NATIVE") == "0":
        return []
    check_cpu_level()
    with warnings.catch_warnings():  # said below, and in each run
        warnings.simplefilter("ignore")
        missing = native.kernels() is None
    if not missing:
        return []
    why = native.reason().partition(": ")[2]
    return [f"slower than with compiled kernels: {why}; MODELPRESS_NATIVE=0 hides this"]


def _has_loops(inputs: RunInputs, plan: Plan) -> bool:
    """Whether scales are searched or weights rounded in order, on a CPU."""
    quantize = inputs.recipe.quantize
    if inputs.device != "cpu" or quantize.method == "none":
        return False
    if quantize.method != "rtn":
        return True
    widths = [scheme.bits for scheme in plan.schemes.values() if scheme is not None]
    least = 0 if inputs.recipe.allocate is not None else min(widths, default=MAGNITUDE_BITS)
    searched = quantize.clip_search == "hessian" or least < MAGNITUDE_BITS
    return quantize.clip_search != "none" and searched


def local_names(recipe: Recipe) -> list[str]:
    """The model and the texts that a recipe names and that are files or folders here: the others
    are known to the hub, or ship with modelpress."""
    named = [recipe.model.path, recipe.calibration.dataset]
    if recipe.evaluate is not None and recipe.evaluate.perplexity is not None:
        named.append(recipe.evaluate.perplexity.dataset)
    found = (name for name in named if name is not None and _is_here(recipe, name))
    return list(dict.fromkeys(found))


def _is_here(recipe: Recipe, name: str) -> bool:
    try:
        return Path(recipe.resolve_path(name)).exists()
    except RecipeError:  # a text that this run had no need of
        return False


def made_by(folder: Path, recipe: Recipe, mark: str) -> bool:
    """Whether `folder` holds what the recipe makes; `mark`: the fingerprint of that run."""
    written = folder / "recipe.yaml"
    if not written.is_file() or written.read_text(encoding="utf-8") != recipe.dump():
        return False
    return (folder / "config.json").is_file() and marked(folder) == mark


def marked(folder: Path) -> str | None:
    """The fingerprint of the run that has made a folder; None where nothing says so."""
    return (read_json(folder / "modelpress.json") or {}).get("fingerprint")


def another(folder: Path, inputs: RunInputs, data: CalibrationData) -> str:
    """What it was that made the result in `folder` another one, in a few words."""
    facts = read_json(folder / "modelpress.json") or {}
    expected = {
        "weights of the model": (
            (facts.get("model") or {}).get("fingerprint"),
            inputs.skeleton.reader.fingerprint(),
        ),
        "calibration data": (
            (facts.get("calibration") or {}).get("sha256"),
            data.facts()["sha256"] if inputs.source.used else None,
        ),
        "versions": (facts.get("versions"), versions()),
        "device": (facts.get("device"), inputs.device),
    }
    return next((name for name, (was, now) in expected.items() if was != now), "recipe")
