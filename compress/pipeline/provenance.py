"""Where a checkpoint comes from: versions, hashes of what went in, and what the run has seen.

fingerprint(inputs, data)    # equal for runs that give the same bytes
made_by(out / "modelpress.json", recipe, model)   # whether that run has made this folder
"""

import hashlib
import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.data.prompts import CalibrationData
from compress.pipeline.inputs import RunInputs
from compress.pipeline.result import RunResult
from compress.recipe.recipe import Recipe
from compress.storage.safetensors import CheckpointReader


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
    result: RunResult, inputs: RunInputs, data: CalibrationData | None
) -> dict[str, Any]:
    """modelpress.json: what was done, from what, and what it took. `data`: None if unused."""
    plan, recipe, skeleton = result.plan, inputs.recipe, inputs.skeleton
    return {
        "versions": versions(),
        "device": inputs.device,
        "model": {
            "path": recipe.model.path,
            "revision": recipe.model.revision,
            "fingerprint": skeleton.reader.fingerprint(),
        },
        "calibration": None if data is None else data.facts(),
        "seeds": {"calibration": recipe.calibration.seed, "rotate": recipe.rotate.seed},
        "average_bits": plan.average_bits,
        "allocation": None if plan.allocation is None else asdict(plan.allocation),
        "pruning": result.pruning,
        "bytes": {"original": skeleton.reader.nbytes()} | plan.bytes,
        "layers": result.layers,
        "self_check": result.self_check,
        "source_check": result.source_check,
        "seconds": {name: round(value, 2) for name, value in result.seconds.items()},
        "peak_memory": result.peak_memory,
        "warnings": result.warnings,
    }


def made_by(folder: Path, recipe: Recipe, model: Path, device: str) -> bool:
    """Whether `folder` holds what the recipe would make of this model with these versions."""
    file = folder / "modelpress.json"
    written = folder / "recipe.yaml"
    if not (file.is_file() and written.is_file()) or written.read_text() != recipe.dump():
        return False
    facts = json.loads(file.read_text())
    same_model = facts["model"]["fingerprint"] == CheckpointReader(model).fingerprint()
    return same_model and facts["versions"] == versions() and facts["device"] == device
