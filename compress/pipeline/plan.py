"""What a run will do, from the recipe, the config and the headers alone: no weight is read.

plan = make_plan(recipe, skeleton)
plan.problems            # what would make the run fail; empty if it can start
plan.bytes["total"]      # of the tensors that will be written
"""

import json
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.allocation.allocate import Allocation, allocate, check_allocation, find_units
from compress.allocation.scores import needs_windows
from compress.data.prompts import (
    CalibrationData,
    ImagePrompts,
    image_dataset,
    recipe_data,
)
from compress.errors import UsageError, did_you_mean
from compress.pipeline.memory_forecast import host_memory
from compress.pipeline.pruning_forecast import forecast
from compress.scheme import PlannedModule, Scheme

if TYPE_CHECKING:
    from compress.models.skeleton import Skeleton
    from compress.observer import Observer
    from compress.recipe.recipe import Recipe


@dataclass
class Plan:
    """The modules to be quantised and what the result will take. `problems` stop a run.

    Attributes:
        modules: the linears to be quantised, by their names in the result.
        schemes: every linear of the result; None: stays unquantised.
        layers: the source's decoder layers that the result has, in order.
        bytes: of the tensors: {"quantized", "other", "total"}.
        file_bytes: the same with the header of a safetensors file, to 0.5 %; what a budget bounds.
        allocation: how widths were chosen, where the recipe asks for it and the scores were read.
        pruning: the visual-token strategy and its costs, as `pruning_forecast` tells.
    """

    modules: list[PlannedModule]
    average_bits: float
    bytes: dict[str, int]
    peak_memory: dict[str, int]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    untied: bool = False
    schemes: dict[str, Scheme | None] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)
    file_bytes: int = 0
    allocation: Allocation | None = None
    pruning: dict[str, Any] | None = None
    multimodal: bool = False

    def as_dict(self) -> dict:
        """For `--json`: the keys of the architecture, modules without their `symmetric`."""
        modules = [
            {key: value for key, value in module.as_dict().items() if key != "symmetric"}
            for module in self.modules
        ]
        return {
            "modules": modules,
            "average_bits": self.average_bits,
            "bytes": self.bytes,
            "file_bytes": self.file_bytes,
            "peak_memory": self.peak_memory,
            "problems": self.problems,
            "notes": self.notes,
            "allocation": None if self.allocation is None else asdict(self.allocation),
            "pruning": self.pruning,
        }


def storage_dtype(recipe: "Recipe", skeleton: "Skeleton") -> torch.dtype:
    """The dtype of unquantised tensors and scales in the output."""
    name = recipe.model.dtype
    return skeleton.dtype if name == "auto" else getattr(torch, name)


def make_plan(recipe: "Recipe", skeleton: "Skeleton", allocation: Allocation | None = None) -> Plan:
    """The plan of a recipe for an opened model. Never raises for what `problems` can say.

    Without the `allocation` that its `allocate` section asks for, every linear is planned at
    `quantize.bits`, and `problems` say whether the budget can be met at all.
    """
    names = skeleton.linear_names()
    shapes = {name: _shape(skeleton, name) for name in names}
    found = {name: recipe.quantize.scheme_for(name) for name in names}
    widths = allocation.bits() if allocation and recipe.allocate.method != "remove" else {}
    removed = allocation.removed() if allocation else []
    layers = [index for index in range(skeleton.num_layers) if index not in removed]
    named = {name: _name_in_result(name, skeleton, layers) for name in names}
    schemes = {
        named[name]: replace(scheme, bits=widths[name]) if scheme and widths.get(name) else scheme
        for name, scheme in found.items()
        if named[name]
    }
    scores = allocation.score_of() if allocation else {}
    modules = [
        PlannedModule(named[name], shapes[name], scheme, scores.get(name))
        for name in names
        if (scheme := schemes.get(named[name])) is not None
    ]  # fmt: skip
    rotated = recipe.rotate.kind != "none"
    untied = skeleton.tied and (rotated or schemes[skeleton.spec.head] is not None)
    dtype = storage_dtype(recipe, skeleton)
    kept = _unquantised(skeleton, modules, layers, untied)
    quantized = sum(module.packed_bytes(dtype.itemsize) for module in modules)
    other = sum(n for n in kept.values()) * dtype.itemsize
    weights = sum(module.weights for module in modules)
    pruning, problems, notes = forecast(recipe, skeleton, len(layers), dtype.itemsize)
    memory = host_memory(recipe, skeleton, shapes, needs_calibration(recipe))
    plan = Plan(
        modules=modules,
        average_bits=sum(m.bits * m.weights for m in modules) / weights if weights else 0.0,
        bytes={"quantized": quantized, "other": other, "total": quantized + other},
        file_bytes=quantized + other + _header_bytes(modules, kept),
        peak_memory={"host": memory, "device": 0},
        problems=_problems(recipe, skeleton, names, shapes, found) + problems,
        notes=_notes(recipe, skeleton, modules, untied, len(layers)) + notes,
        untied=untied,
        schemes=schemes,
        layers=layers,
        allocation=allocation,
        pruning=pruning,
        multimodal=skeleton.spec.vision is not None,
    )
    if recipe.allocate is not None and allocation is None and not plan.problems:
        units, fixed = _units(recipe, skeleton, plan)
        problem = check_allocation(recipe, units, fixed)
        plan.problems += [problem] if problem else []
    return plan


def allocated_plan(
    recipe: "Recipe",
    skeleton: "Skeleton",
    data: CalibrationData | None = None,
    work: Path | None = None,
    *,
    identity: str = "",
    resume: bool = True,
    device: str = "cpu",
    observer: "Observer | None" = None,
) -> Plan:
    """The plan with widths chosen as the `allocate` section says: reads weights, and text if asked.

    The same as `make_plan` where there is no such section, or where problems are in the way.
    `work` keeps what a killed run would otherwise measure again; see `allocate`.
    """
    plan = make_plan(recipe, skeleton)
    if recipe.allocate is None or plan.problems:
        return plan
    units, fixed = _units(recipe, skeleton, plan)
    if not needs_windows(recipe):
        data = None
    elif data is None:
        data = recipe_data(recipe, skeleton, calibrated=True)
    if isinstance(data, ImagePrompts):
        raise UsageError("allocate: these scores are measured on text, not on prompts with images")
    with tempfile.TemporaryDirectory(prefix="modelpress-") as temporary:
        allocation = allocate(
            recipe, skeleton, units, fixed, data, work or Path(temporary),
            storage=storage_dtype(recipe, skeleton), identity=identity, resume=resume,
            device=device, observer=observer,
        )  # fmt: skip
    return make_plan(recipe, skeleton, allocation)


def _units(recipe: "Recipe", skeleton: "Skeleton", plan: Plan) -> tuple[list[Any], int]:
    """The units of `allocate`, and the bytes of the file that no width changes."""
    itemsize = storage_dtype(recipe, skeleton).itemsize
    units = find_units(recipe, skeleton, plan.modules, itemsize)
    free = {name for unit in units for name in unit.modules}
    changing = sum(m.packed_bytes(itemsize) for m in plan.modules if m.name in free)
    return units, plan.file_bytes - changing


def _name_in_result(name: str, skeleton: "Skeleton", layers: list[int]) -> str:
    """A linear's name once some layers are left out; empty for one that is left out with them."""
    prefix = f"{skeleton.spec.layers}."
    if not name.startswith(prefix):
        return name
    index, _, inner = name.removeprefix(prefix).partition(".")
    return f"{prefix}{layers.index(int(index))}.{inner}" if int(index) in layers else ""


def _unquantised(
    skeleton: "Skeleton", modules: list[PlannedModule], layers: list[int], untied: bool
) -> dict[str, int]:
    """The tensors that are written as they are: name in the result -> numbers in it."""
    chosen = {f"{module.name}.weight" for module in modules}
    parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
    if skeleton.tied and not untied:
        parameters.pop(f"{skeleton.spec.head}.weight", None)
    named = ((_name_in_result(name, skeleton, layers), p) for name, p in parameters.items())
    return {name: p.numel() for name, p in named if name and name not in chosen}


def _header_bytes(modules: list[PlannedModule], kept: dict[str, int]) -> int:
    """What naming the tensors takes in a safetensors file: a JSON object with an entry for each."""
    entry = {"dtype": "BF16", "shape": [1024, 1024], "data_offsets": [10**7, 10**7]}
    names = list(kept)
    for module in modules:
        keys = ["weight_packed", "weight_scale", "weight_shape"]
        names += [f"{module.name}.{key}" for key in keys]
        names += [] if module.scheme.symmetric else [f"{module.name}.weight_zero_point"]
    return len(json.dumps(dict.fromkeys(names, entry), separators=(",", ":"))) + 8


def _shape(skeleton: "Skeleton", name: str) -> tuple[int, int]:
    out_features, in_features = skeleton.model.get_submodule(name).weight.shape
    return out_features, in_features


def _problems(
    recipe: "Recipe",
    skeleton: "Skeleton",
    names: list[str],
    shapes: dict[str, tuple[int, int]],
    schemes: dict[str, Scheme | None],
) -> list[str]:
    problems = []
    for pattern in recipe.quantize.unmatched(names):
        problems.append(
            f"quantize: {pattern!r} matches no linear of this model{did_you_mean(pattern, names)}"
        )
    misfits: dict[tuple[int, int], list[str]] = {}
    for name, scheme in schemes.items():
        if scheme and scheme.group_size and shapes[name][1] % scheme.group_size:
            misfits.setdefault((scheme.group_size, shapes[name][1]), []).append(name)
    for (size, columns), found in misfits.items():
        fitting = [str(s) for s in (256, 128, 64, 32) if columns % s == 0]
        problems.append(
            f"quantize.group_size: {size} does not divide the {columns} inputs of {found[0]}"
            + (f" and {len(found) - 1} more" if len(found) > 1 else "")
            + f": use {' or '.join([*fitting, 'channel'])}"
        )
    if recipe.quantize.method != "none" and not any(schemes.values()):
        problems.append("quantize: every linear is ignored; method none would say so")
    context = getattr(skeleton.config, "max_position_embeddings", None)
    images = needs_calibration(recipe) and image_dataset(recipe, skeleton)
    if images and needs_windows(recipe):
        problems.append(
            "allocate: these scores are measured on text, and calibration.dataset holds prompts "
            "with images: name a text, or use outlier_weight_count or position"
        )
    windows = needs_calibration(recipe) and not images
    if windows and context and recipe.calibration.length > context:
        problems.append(
            f"calibration.length: {recipe.calibration.length} tokens are more than the model's "
            f"context of {context}"
        )
    return problems


def needs_calibration(recipe: "Recipe") -> bool:
    """Whether the run reads calibration text."""
    return recipe.quantize.method == "gptq" or needs_windows(recipe)


def _notes(
    recipe: "Recipe",
    skeleton: "Skeleton",
    modules: list[PlannedModule],
    untied: bool,
    num_layers: int,
) -> list[str]:
    from compress.rotation.rotate import head_rotation_skipped

    notes = []
    if untied:
        notes.append("embedding and head share one tensor in this model; they will be untied")
    skipped = head_rotation_skipped(recipe.rotate.kind, skeleton.head_dim)
    if skipped:
        notes.append(skipped)
    schemes = {module.scheme for module in modules}
    if any(not scheme.symmetric for scheme in schemes):
        notes.append(
            "asymmetric weights: vLLM loads them; transformers only with "
            "CompressedTensorsConfig(dequantize=True)"
            + (" and not with several widths" if len(schemes) > 1 else "")
        )
    odd = sorted({scheme.bits for scheme in schemes} - {4, 8})
    if odd:
        widths = ", ".join(map(str, odd))
        notes.append(f"{widths}-bit weights: vLLM needs the `humming` package, SGLang has none")
    return notes + _split_fusions(skeleton, modules, num_layers)


def _split_fusions(
    skeleton: "Skeleton", modules: list[PlannedModule], num_layers: int
) -> list[str]:
    """vLLM runs q/k/v and gate/up as one matrix each, which then must share one scheme."""
    schemes = {module.name: module.scheme for module in modules}
    for i in range(num_layers):
        for group in skeleton.spec.groups:
            members = [f"{skeleton.spec.layers}.{i}.{name}" for name in group]
            if len({schemes.get(name) for name in members}) > 1:
                return [f"{', '.join(members)} differ in scheme; vLLM fuses them and will refuse"]
    return []
