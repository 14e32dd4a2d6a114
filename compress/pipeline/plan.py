"""What a run will do, from the recipe, the config and the headers alone: no weight is read.

Where there are no headers either, as in a folder of config.json alone, they are what that would
make them, and the plan says so.

plan = make_plan(open_for_plan(recipe))
plan.problems            # what would make the run fail; empty if it can start
plan.bytes["total"]      # of the tensors that will be written
"""

import math
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from compress.allocation.allocate import Allocation, allocate, check_allocation, find_units
from compress.allocation.allocators import Unit
from compress.checkpoint.engines import Schemes
from compress.checkpoint.packed_formats import planned_bytes, planned_tensors
from compress.data.prompts import CalibrationData, ImagePrompts, calibration_data
from compress.data.text import DATASETS
from compress.data.windows import conversations_of, text_windows
from compress.errors import UsageError
from compress.eval.report import format_bytes, format_memory
from compress.eval.shown import Shown, shortened
from compress.memory import chosen_device, uncollected
from compress.models.fused import joined
from compress.models.pretrained import TOKENIZER_FILES
from compress.models.skeleton import Skeleton
from compress.observer import Observer
from compress.pipeline.inputs import RunInputs
from compress.pipeline.kept_layers import kept_problems
from compress.pipeline.memory_forecast import device_memory, host_memory
from compress.pipeline.plan_notes import (
    WHOLE_BYTE,
    absence_notes,
    evaluation_notes,
    find_problems,
    group_size_notes,
    ignored_notes,
    model_notes,
    same_text_notes,
    token_notes,
    untying_notes,
)
from compress.pipeline.pruning_forecast import PruningForecast, forecast
from compress.pipeline.source_check import SourceCheck
from compress.ranks import Ranks
from compress.recipe.recipe import Recipe
from compress.registry import LAYER_IMPORTANCE
from compress.scheme import PlannedModule, Scheme
from compress.storage.absent import holds_weights
from compress.storage.safetensors import header_bytes


@dataclass(repr=False)
class Plan(Shown):
    """The modules to be quantised and what the result will take. `problems` stop a run.

    Attributes:
        modules: the linears to be quantised, by their names in the result.
        schemes: every linear of the result; None: stays unquantised.
        layers: the source's decoder layers that the result has, in order.
        bytes: of the tensors: {"quantized", "other", "total"}.
        file_bytes: the same with the header of a safetensors file; what a budget bounds. Exact for
            one file; each further shard has a header of its own, of 100 bytes more.
        allocation: how widths were chosen, where the recipe asks for it and the scores were read.
        pruning: the visual-token strategy and its costs, as `pruning_forecast` tells.
        shared: whether the head has the codes of the embedding.
        table_formats: how the embedding and the head are stored, where they are quantised as such.
        ignored: what each pattern of `quantize.ignore` matches, by the names of the source.
        source_check: how far our forward is from that of transformers, where it was asked for.
        calibration: windows, tokens, and how many of them count, as `calibration_forecast` tells.
        source_bytes: of the source's tensors.
        time: seconds of layers and head on this machine, where they were asked for: {"seconds",
            "parts", "measuring"}, the last what it took to find out.
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
    pruning: PruningForecast | None = None
    multimodal: bool = False
    ignored: dict[str, list[str]] = field(default_factory=dict)
    shared: bool = False
    table_formats: dict[str, str] = field(default_factory=dict)
    source_check: SourceCheck | None = None
    calibration: dict[str, Any] | None = None
    source_bytes: int = 0
    time: dict[str, Any] | None = None

    def summary(self) -> dict[str, str]:
        """What a person wants to know first, as `repr` has it; lists are cut."""
        total = self.bytes["total"]
        kinds = ", ".join(
            f"{number} at {bits} bits"
            for bits, number in sorted(Counter(m.bits for m in self.modules).items())
        )
        ratio = f" ({self.source_bytes / total:.2f} x)" if self.source_bytes and total else ""
        return {
            "modules": kinds or "none",
            "average bits": f"{self.average_bits:.2f} over the quantised weights",
            "bytes": f"{format_bytes(self.source_bytes)} before, {format_bytes(total)} after"
            + ratio,
            "peak memory": format_memory(self.peak_memory),
            "problems": shortened(self.problems),
            "notes": shortened(self.notes),
        }

    def module(self, name: str) -> PlannedModule | None:
        """A module by its name in the result, if it is quantised."""
        return next((module for module in self.modules if module.name == name), None)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: the keys of the architecture, modules without their `symmetric`."""
        modules = [
            {key: value for key, value in module.as_dict().items() if key != "symmetric"}
            for module in self.modules
        ]
        return {
            "modules": modules,
            "average_bits": self.average_bits,
            "bytes": self.bytes,
            "source_bytes": self.source_bytes,
            "file_bytes": self.file_bytes,
            "peak_memory": self.peak_memory,
            "problems": self.problems,
            "notes": self.notes,
            "ignored": self.ignored,
            "allocation": None if self.allocation is None else asdict(self.allocation),
            "pruning": self.pruning,
            "calibration": self.calibration,
            "source_check": self.source_check,
            "time": self.time,
        }


def open_for_plan(recipe: Recipe, device: str = "cpu", check_source: bool = False) -> RunInputs:
    """What a plan reads. Weights may be missing, and those of a hub model are not fetched.

    They have to be there for `check_source` and for scores that are measured on them; otherwise
    UsageError names what needs them.
    """
    device = chosen_device(device) if device == "auto" else device  # cuda may be of another machine
    needs = "--check-source runs the model" if check_source else _measures(recipe)
    if needs is None:
        return RunInputs.foretell(recipe, device)
    folder = Path(recipe.model_location())
    if folder.is_dir() and not holds_weights(folder):
        raise UsageError(f"{needs}, and {folder} has no weights")
    return RunInputs.open(recipe, device)


def _measures(recipe: Recipe) -> str | None:
    """What the scores of an `allocate` section need the weights for, if they do."""
    section = recipe.allocate
    if section is None:
        return None
    score = section.importance
    read = [
        name for name in (score.base, score.weighted_by) if name and LAYER_IMPORTANCE[name].needs
    ]
    if section.method == "evolve":
        return "allocate.method: evolve runs the model"
    return f"allocate.importance: {read[0]} is measured on the model" if read else None


@uncollected()
def make_plan(inputs: RunInputs, allocation: Allocation | None = None) -> Plan:
    """The plan of a run. Never raises for what `problems` can say.

    Without the `allocation` that its `allocate` section asks for, every linear is planned at
    `quantize.bits`, and `problems` say whether the budget can be met at all.
    """
    recipe, skeleton = inputs.recipe, inputs.skeleton
    names = skeleton.linear_names()
    shapes = _shapes(skeleton, names)
    found = {name: recipe.quantize.scheme_for(name, shapes[name][1]) for name in names}
    if recipe.quantize.head is not None:
        found[skeleton.spec.head] = recipe.quantize.head.scheme(skeleton.config.hidden_size)
    removing = recipe.allocate is not None and recipe.allocate.method == "remove"
    widths = allocation.bits() if allocation and not removing else {}
    removed = allocation.removed() if allocation else []
    layers = [index for index in range(skeleton.num_layers) if index not in removed]
    named = _names_in_result(names, skeleton, layers)
    schemes = {
        named[name]: replace(scheme, bits=widths[name]) if scheme and widths.get(name) else scheme
        for name, scheme in found.items()
        if named[name]
    }
    scores = allocation.score_of() if allocation else {}
    modules, sized = [], []  # `sized`: those whose group size was left to us
    for name in names:
        if (scheme := schemes.get(named[name])) is not None:
            modules.append(PlannedModule(named[name], shapes[name], scheme, scores.get(name)))
            own = name == skeleton.spec.head and recipe.quantize.head is not None
            if not own and recipe.quantize.group_size_for(name) == "auto":
                sized.append(modules[-1])
    rotated = recipe.rotate.kind != "none"
    tables, shared = _tables(inputs, schemes, rotated)
    modules = [module for module in modules if module.name != skeleton.spec.head] + tables
    schemes |= {module.name: module.scheme for module in tables}
    formats = {m.name: m.format for m in tables} if recipe.quantize.has_tables else {}
    once = any(module.twin for module in tables)
    untied = skeleton.tied and not once and (rotated or schemes[skeleton.spec.head] is not None)
    itemsize = inputs.dtype.itemsize
    kept = _unquantised(skeleton, modules, layers, untied)
    packed = planned_bytes(modules, inputs.dtype)
    quantized = sum(packed.values())
    dtypes = {name: skeleton.stored_dtype(name, inputs.dtype) for name in kept}
    other = sum(math.prod(shape) * dtypes[name].itemsize for name, shape in kept.items())
    weights = sum(module.weights for module in modules if module.twin is None)
    pruning, problems, notes = forecast(inputs, len(layers))
    problems += kept_problems(skeleton, layers)
    host = host_memory(inputs, shapes)
    plan = Plan(
        modules=modules,
        average_bits=sum(m.bits * m.weights for m in modules if not m.twin) / max(weights, 1),
        bytes={"quantized": quantized, "other": other, "total": quantized + other},
        source_bytes=skeleton.reader.nbytes(),
        file_bytes=quantized + other + header_bytes(_written(inputs, modules, kept)),
        peak_memory={"host": host, "device": device_memory(inputs, shapes)},
        problems=find_problems(inputs, names, shapes, found, pruning is not None) + problems,
        notes=[
            *absence_notes(inputs),
            *ignored_notes(inputs, names),
            *group_size_notes(sized),
            *token_notes(inputs, shapes, found),
            *untying_notes(skeleton, packed, kept, itemsize, rotated) * untied,
            *model_notes(inputs, schemes, formats),
            *same_text_notes(inputs),
            *evaluation_notes(inputs, quantized + other, host),
            *notes,
        ],
        ignored=recipe.quantize.left_out(names),
        untied=untied,
        shared=shared,
        table_formats=formats,
        schemes=schemes,
        layers=layers,
        allocation=allocation,
        pruning=pruning,
        multimodal=skeleton.spec.vision is not None,
    )
    if recipe.allocate is not None and allocation is None and not plan.problems:
        units, fixed = _units(inputs, plan)
        problem = check_allocation(recipe.allocate, recipe.quantize, units, fixed)
        plan.problems += [problem] if problem else []
    return plan


def calibration_forecast(inputs: RunInputs) -> dict[str, Any] | None:
    """How much text a run will read, and how much of it counts.

    None where it reads none, or prompts whose length depends on their images. Conversations in a
    file are read for it. Of a hub dataset nothing is, so where loss_mask asks for an assistant's
    tokens their number is None. Raises UsageError for what cannot be read.
    """
    source, c = inputs.source, inputs.recipe.calibration
    if not source.used or source.images:
        return None
    here = Path(source.location).is_file()
    if (here or source.location in DATASETS) and (rows := conversations_of(source)) is not None:
        folder = inputs.skeleton.folder
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            facts = text_windows(source, inputs.skeleton).facts()
            return {name: value for name, value in facts.items() if name != "sha256"}
        most = min(c.samples, len(rows))  # config.json alone: nothing can be cut into tokens
        return {"windows": [most, c.length], "tokens": most * c.length, "counted_tokens": None}
    windows = c.samples * c.expansion
    tokens = windows * c.length
    counted = tokens if here or c.loss_mask == "all" else None
    return {"windows": [windows, c.length], "tokens": tokens, "counted_tokens": counted}


def allocated_plan(
    inputs: RunInputs,
    data: CalibrationData | None = None,
    work: Path | None = None,
    *,
    identity: str = "",
    resume: bool = True,
    observer: Observer | None = None,
    ranks: Ranks | None = None,
) -> Plan:
    """The plan with widths chosen as the `allocate` section says: reads weights, and text if asked.

    The same as `make_plan` where there is no such section, or where problems are in the way.
    `work` keeps what a killed run would otherwise measure again, and `ranks` share the scores, with
    one such folder for all; see `allocate`.
    """
    plan, section = make_plan(inputs), inputs.recipe.allocate
    if section is None or plan.problems:
        return plan
    units, fixed = _units(inputs, plan)
    if not section.reads_windows:
        data = None
    elif data is None:
        data = calibration_data(inputs.source, inputs.skeleton)
    if isinstance(data, ImagePrompts):
        raise UsageError("allocate: these scores are measured on text, not on prompts with images")
    with tempfile.TemporaryDirectory(prefix="modelpress-") as temporary:
        allocation = allocate(
            section,
            inputs.recipe.quantize,
            inputs.rotated_model(),
            units,
            fixed,
            data,
            work or Path(temporary),
            offload=inputs.source.settings.offload,
            identity=identity,
            resume=resume,
            observer=observer,
            ranks=ranks,
        )
    return make_plan(inputs, allocation)


def _units(inputs: RunInputs, plan: Plan) -> tuple[list[Unit], int]:
    """The units of `allocate`, and the bytes of the file that no width changes.

    The header is that of the widest: its numbers have the most digits.
    """
    recipe = inputs.recipe
    assert recipe.allocate is not None
    units = find_units(
        recipe.allocate, recipe.quantize, inputs.skeleton, plan.modules, inputs.dtype
    )
    free = {name for unit in units for name in unit.modules}
    changing = planned_bytes([m for m in plan.modules if m.name in free], inputs.dtype)
    widest = [
        replace(m, scheme=replace(m.scheme, bits=max(recipe.allocate.widths)))
        if m.name in free
        else m
        for m in plan.modules
    ]
    kept = _unquantised(inputs.skeleton, plan.modules, plan.layers, plan.untied)
    header = header_bytes(_written(inputs, widest, kept))
    return units, plan.bytes["total"] - sum(changing.values()) + header


def _tables(inputs: RunInputs, schemes: Schemes, rotated: bool) -> tuple[list[PlannedModule], bool]:
    """The embedding and the head, where they are quantised, and whether their codes are the same.

    An embedding that is tied to the head, and is not rotated, is one table with it; the file holds
    it once where its format has a place for such.
    """
    section, skeleton, spec = inputs.recipe.quantize, inputs.skeleton, inputs.skeleton.spec
    wanted = inputs.recipe.save.table_format
    shape = (skeleton.config.vocab_size, skeleton.config.hidden_size)

    def table(name: str, scheme: Scheme, twin: str | None = None) -> PlannedModule:
        packed = wanted == "pack-quantized" or (wanted == "auto" and scheme.bits != WHOLE_BYTE)
        format = "pack-quantized" if packed else "int-quantized"
        return PlannedModule(name, shape, scheme, format=format, twin=twin)

    own = schemes[spec.head]
    if section.embedding is None:
        if own is None:
            return [], False
        if section.head is None:
            return [PlannedModule(spec.head, shape, own)], False
        return [table(spec.head, own)], False
    embedding = table(spec.embedding, section.embedding.scheme(skeleton.config.hidden_size))
    if skeleton.tied and not rotated and own in (None, embedding.scheme):
        once = embedding.format == "int-quantized"
        twin = spec.embedding if once else None
        return [embedding, table(spec.head, embedding.scheme, twin)], True
    return [embedding, *([table(spec.head, own)] if own else [])], False


def _names_in_result(names: Iterable[str], skeleton: Skeleton, layers: list[int]) -> dict[str, str]:
    """Each name once some layers are left out; empty for one that is left out with them."""
    prefix, place = f"{skeleton.spec.layers}.", {index: i for i, index in enumerate(layers)}

    def renamed(name: str) -> str:
        if not name.startswith(prefix):
            return name
        index, _, inner = name.removeprefix(prefix).partition(".")
        return f"{prefix}{place[int(index)]}.{inner}" if int(index) in place else ""

    return {name: renamed(name) for name in names}


def _unquantised(
    skeleton: Skeleton, modules: list[PlannedModule], layers: list[int], untied: bool
) -> dict[str, tuple[int, ...]]:
    """The tensors that are written as they are: name in the result -> shape."""
    chosen = {f"{module.name}.weight" for module in modules}
    parameters: dict[str, torch.Tensor]
    parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
    parameters |= skeleton.buffers
    if skeleton.tied and not untied:
        parameters.pop(f"{skeleton.spec.head}.weight", None)
    named = _names_in_result(parameters, skeleton, layers)
    shapes = {named[name]: tuple(p.shape) for name, p in parameters.items()}
    kept = {name: shape for name, shape in shapes.items() if name and name not in chosen}
    for place, source in enumerate(layers):
        prefix = f"{skeleton.spec.layers}.{place}."
        wholes = [w.inside(prefix) for w in skeleton.written_wholes(source, bool(modules))]
        for name, whole in joined(kept, wholes).items():
            for part in (part for parts in whole.parts for part in parts):
                del kept[part]
            kept[name] = whole.whole_shape
    return kept


def _written(
    inputs: RunInputs, modules: list[PlannedModule], kept: dict[str, tuple[int, ...]]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of every tensor of the result, by the name that it has there."""
    skeleton = inputs.skeleton
    vision, written = {*skeleton.vision_names()}, skeleton.reader.written_name
    tensors = {
        written(name) if name in vision else name: (
            skeleton.stored_dtype(name, inputs.dtype),
            shape,
        )
        for name, shape in kept.items()
    }
    return tensors | planned_tensors(modules, inputs.dtype)


def _shapes(skeleton: Skeleton, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Of linears: outputs, inputs."""
    found = dict(skeleton.model.named_parameters(remove_duplicate=False))
    weights = {name: found[f"{name}.weight"].shape for name in names}
    return {name: (outputs, inputs) for name, (outputs, inputs) in weights.items()}
