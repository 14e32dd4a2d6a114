"""What a run will do, from the recipe, the config and the headers alone: no weight is read.

plan = make_plan(inputs)
plan.problems            # what would make the run fail; empty if it can start
plan.bytes["total"]      # of the tensors that will be written
"""

import math
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from compress.allocation.allocate import Allocation, allocate, check_allocation, find_units
from compress.allocation.allocators import Unit
from compress.checkpoint.engines import Schemes, plan_notes
from compress.checkpoint.packed_formats import planned_bytes, planned_tensors
from compress.data.prompts import CalibrationData, ImagePrompts, calibration_data
from compress.errors import UsageError, did_you_mean
from compress.eval.report import format_bytes
from compress.eval.settings import WINDOW
from compress.models.skeleton import Skeleton, linear_in
from compress.observer import Observer
from compress.pipeline.inputs import RunInputs
from compress.pipeline.memory_forecast import host_memory, second_hessians
from compress.pipeline.pruning_forecast import PruningForecast, forecast
from compress.pipeline.source_check import SourceCheck
from compress.recipe.sections import AUTO_SIZES, matches
from compress.rotation.rotate import head_rotation_skipped
from compress.scheme import PlannedModule, Scheme
from compress.storage.safetensors import header_bytes

WHOLE_BYTE = 8  # bits
LISTED = 8  # linears that a pattern's note names; `ignored` has them all


@dataclass
class Plan:
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
            "file_bytes": self.file_bytes,
            "peak_memory": self.peak_memory,
            "problems": self.problems,
            "notes": self.notes,
            "ignored": self.ignored,
            "allocation": None if self.allocation is None else asdict(self.allocation),
            "pruning": self.pruning,
            "source_check": self.source_check,
        }


def make_plan(inputs: RunInputs, allocation: Allocation | None = None) -> Plan:
    """The plan of a run. Never raises for what `problems` can say.

    Without the `allocation` that its `allocate` section asks for, every linear is planned at
    `quantize.bits`, and `problems` say whether the budget can be met at all.
    """
    recipe, skeleton = inputs.recipe, inputs.skeleton
    names = skeleton.linear_names()
    shapes = {name: _shape(skeleton, name) for name in names}
    found = {name: recipe.quantize.scheme_for(name, shapes[name][1]) for name in names}
    if recipe.quantize.head is not None:
        found[skeleton.spec.head] = recipe.quantize.head.scheme(skeleton.config.hidden_size)
    removing = recipe.allocate is not None and recipe.allocate.method == "remove"
    widths = allocation.bits() if allocation and not removing else {}
    removed = allocation.removed() if allocation else []
    layers = [index for index in range(skeleton.num_layers) if index not in removed]
    named = {name: _name_in_result(name, skeleton, layers) for name in names}
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
    other = sum(map(math.prod, kept.values())) * itemsize
    weights = sum(module.weights for module in modules if module.twin is None)
    pruning, problems, notes = forecast(inputs, len(layers))
    plan = Plan(
        modules=modules,
        average_bits=sum(m.bits * m.weights for m in modules if not m.twin) / max(weights, 1),
        bytes={"quantized": quantized, "other": other, "total": quantized + other},
        file_bytes=quantized + other + header_bytes(_written(inputs, modules, kept)),
        peak_memory={"host": host_memory(inputs, shapes), "device": 0},
        problems=_problems(inputs, names, shapes, found, pruning is not None) + problems,
        notes=[
            *_left_out(inputs, names),
            *_group_sizes(sized),
            *_token_notes(inputs, shapes, found),
            *_untying(skeleton, packed, kept, itemsize) * untied,
            *_notes(inputs, schemes, formats),
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


def allocated_plan(
    inputs: RunInputs,
    data: CalibrationData | None = None,
    work: Path | None = None,
    *,
    identity: str = "",
    resume: bool = True,
    observer: Observer | None = None,
) -> Plan:
    """The plan with widths chosen as the `allocate` section says: reads weights, and text if asked.

    The same as `make_plan` where there is no such section, or where problems are in the way.
    `work` keeps what a killed run would otherwise measure again; see `allocate`.
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


def _name_in_result(name: str, skeleton: Skeleton, layers: list[int]) -> str:
    """A linear's name once some layers are left out; empty for one that is left out with them."""
    prefix = f"{skeleton.spec.layers}."
    if not name.startswith(prefix):
        return name
    index, _, inner = name.removeprefix(prefix).partition(".")
    return f"{prefix}{layers.index(int(index))}.{inner}" if int(index) in layers else ""


def _unquantised(
    skeleton: Skeleton, modules: list[PlannedModule], layers: list[int], untied: bool
) -> dict[str, tuple[int, ...]]:
    """The tensors that are written as they are: name in the result -> shape."""
    chosen = {f"{module.name}.weight" for module in modules}
    parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
    if skeleton.tied and not untied:
        parameters.pop(f"{skeleton.spec.head}.weight", None)
    named = ((_name_in_result(name, skeleton, layers), p) for name, p in parameters.items())
    return {name: tuple(p.shape) for name, p in named if name and name not in chosen}


def _written(
    inputs: RunInputs, modules: list[PlannedModule], kept: dict[str, tuple[int, ...]]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of every tensor of the result, by the name that it has there."""
    skeleton = inputs.skeleton
    vision, written = {*skeleton.vision_names()}, skeleton.reader.written_name
    tensors = {
        written(name) if name in vision else name: (inputs.dtype, shape)
        for name, shape in kept.items()
    }
    return tensors | planned_tensors(modules, inputs.dtype)


def _shape(skeleton: Skeleton, name: str) -> tuple[int, int]:
    linear = linear_in(skeleton.model, name)
    return linear.out_features, linear.in_features


def _problems(
    inputs: RunInputs,
    names: list[str],
    shapes: dict[str, tuple[int, int]],
    schemes: dict[str, Scheme | None],
    pruned: bool,
) -> list[str]:
    recipe, skeleton, source = inputs.recipe, inputs.skeleton, inputs.source
    problems = []
    if unknown := skeleton.left.unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        problems.append(
            f"{skeleton.folder}: {skeleton.reader.entry(unknown[0]).file.name} holds "
            f"{skeleton.reader.written_name(unknown[0])!r}{more}, which belongs to no part of the "
            f"model that config.json describes: correct config.json, or leave such tensors out"
        )
    for pattern in recipe.quantize.unmatched(names):
        problems.append(
            f"quantize: {pattern!r} matches no linear of this model{did_you_mean(pattern, names)}"
        )
    if recipe.quantize.method == "gptq":
        weighable = _weighable(inputs, schemes)
        for pattern in recipe.quantize.token_importance.modules or ():
            if not any(matches(pattern, name) for name in weighable):
                problems.append(
                    f"quantize.token_importance.modules: {pattern!r} matches no quantised linear "
                    f"of a decoder layer{did_you_mean(pattern, weighable)}"
                )
    misfits: dict[tuple[str, int, int], list[str]] = {}
    fitted = {name: (shapes[name][1], scheme) for name, scheme in schemes.items()}
    if table := recipe.quantize.embedding:
        hidden = skeleton.config.hidden_size
        fitted[skeleton.spec.embedding] = hidden, table.scheme(hidden)
    for name, (columns, scheme) in fitted.items():
        if scheme and scheme.group_size and columns % scheme.group_size:
            key = _group_size_key(inputs, name)
            misfits.setdefault((key, scheme.group_size, columns), []).append(name)
    for (key, size, columns), found in misfits.items():
        fitting = ["auto", *(str(s) for s in (256, 128, 64, 32, 16) if columns % s == 0)]
        problems.append(
            f"{key}: {size} does not divide the {columns} inputs of {found[0]}"
            + (f" and {len(found) - 1} more" if len(found) > 1 else "")
            + f": use {' or '.join([*fitting, 'channel'])}"
        )
    for table in (recipe.quantize.embedding, recipe.quantize.head):
        if table and table.bits != WHOLE_BYTE and recipe.save.table_format == "int-quantized":
            problems.append(
                f"save.table_format: int-quantized takes a byte for a code, expected 8 bits, found "
                f"{table.bits}: use pack-quantized"
            )
            break
    none = not any(schemes.values()) and recipe.quantize.embedding is None
    if recipe.quantize.method != "none" and none:
        problems.append("quantize: every linear is ignored; method none would say so")
    context = getattr(skeleton.config, "max_position_embeddings", None)
    images = source.used and source.images
    if images and recipe.reads_windows:
        problems.append(
            "allocate: these scores are measured on text, and calibration.dataset holds prompts "
            "with images: name a text, or use outlier_weight_count or position"
        )
    windows = source.used and not images
    if windows and context and recipe.calibration.length > context:
        problems.append(
            f"calibration.length: {recipe.calibration.length} tokens are more than the model's "
            f"context of {context}"
        )
    measured = recipe.evaluate.perplexity if recipe.evaluate else None
    if measured and measured.stride:
        window = (measured.length or min(WINDOW, context or WINDOW)) - measured.bos
        if measured.stride > window:
            problems.append(
                f"evaluate.perplexity.stride: {measured.stride} does not fit windows of {window} "
                f"text tokens: expected 1 to {window}"
            )
    if images and pruned and recipe.quantize.target.name == "full_precision":
        problems.append(
            "quantize.target: full_precision needs every token in both models, and visual tokens "
            "of the calibration prompts are pruned: use quantized, or calibrate on text"
        )
    return problems


def _group_size_key(inputs: RunInputs, name: str) -> str:
    """The key of the recipe that gives a linear or a table its group size."""
    section, spec = inputs.recipe.quantize, inputs.skeleton.spec
    if name == spec.embedding:
        return "quantize.embedding.group_size"
    if name == spec.head and section.head is not None:
        return "quantize.head.group_size"
    index = next((i for i, o in enumerate(section.overrides) if matches(o.match, name)), None)
    if index is None or section.overrides[index].group_size is None:
        return "quantize.group_size"
    return f"quantize.overrides[{index}].group_size"


def _left_out(inputs: RunInputs, names: list[str]) -> list[str]:
    """A line for each pattern of `ignore`: how many linears it matches, and which."""
    notes = []
    for pattern, found in inputs.recipe.quantize.left_out(names).items():
        if found != [pattern]:
            shown = found if len(found) <= LISTED else [*found[: LISTED - 1], "...", found[-1]]
            count = f"{len(found)} of {len(names)} linears"
            notes.append(f"quantize.ignore: {pattern!r} matches {count}: {', '.join(shown)}")
    return notes


def _weighable(inputs: RunInputs, schemes: dict[str, Scheme | None]) -> list[str]:
    """The quantised linears, whose Hessians may have token weights."""
    spec = inputs.skeleton.spec
    kinds = (f"{spec.layers}.", spec.head)
    return [name for name, scheme in schemes.items() if scheme and name.startswith(kinds)]


def _token_notes(
    inputs: RunInputs, shapes: dict[str, tuple[int, int]], schemes: dict[str, Scheme | None]
) -> list[str]:
    """How tokens are weighed, where a recipe asks for more than a strategy and its range."""
    section = inputs.recipe.quantize.token_importance
    if inputs.recipe.quantize.method != "gptq" or not section.options:
        return []
    options = ", ".join(f"{k} {v}" for k, v in section.options.items() if k != "modules")
    notes = [f"token_importance: {section.name}" + (f", {options}" if options else "")]
    if section.modules is not None:
        names = _weighable(inputs, schemes)
        chosen = sum(map(section.applies_to, names))
        notes.append(f"token_importance.modules: weights for {chosen} of {len(names)} linears")
        if more := second_hessians(inputs, shapes):
            notes[-1] += (
                f"; groups of a layer that share an input but not the weights: {len(more)}, "
                f"a second Hessian for each, at most {format_bytes(max(more))} at a time"
            )
    return notes


def _group_sizes(modules: list[PlannedModule]) -> list[str]:
    """What `group_size: auto` has chosen, where it is not one size for all; and whole rows."""
    found: dict[int | None, list[PlannedModule]] = {}
    for module in modules:
        found.setdefault(module.scheme.group_size, []).append(module)
    rows = found.pop(None, [])
    sizes = [f"{size} for {_linears(found[size])}" for size in AUTO_SIZES if size in found]
    notes = [f"quantize.group_size: auto is {', '.join(sizes)}"] if len(sizes) > 1 else []
    if rows:
        sizes = list(map(str, AUTO_SIZES))
        notes.append(
            f"quantize.group_size: auto is channel, one scale a row, for {_linears(rows)}: none of "
            f"{', '.join(sizes)} divides the {rows[0].shape[1]} inputs of {rows[0].name}"
        )
    return notes


def _linears(modules: list[PlannedModule]) -> str:
    return "1 linear" if len(modules) == 1 else f"{len(modules)} linears"


def _untying(
    skeleton: Skeleton,
    packed: dict[str, int],
    kept: dict[str, tuple[int, ...]],
    itemsize: int,
) -> list[str]:
    """What a second table adds to the file; `packed` in bytes, `kept` in shapes."""
    head = f"{skeleton.spec.head}."
    added = sum(size for name, size in packed.items() if name.startswith(head))
    shapes = (shape for name, shape in kept.items() if name.startswith(head))
    added += sum(map(math.prod, shapes)) * itemsize
    return [
        f"embedding and head share one tensor in this model; they will be untied, which adds "
        f"{format_bytes(added)}"
    ]


def _notes(inputs: RunInputs, schemes: Schemes, formats: dict[str, str]) -> list[str]:
    notes = []
    if inputs.skeleton.said_tied and not inputs.skeleton.tied:
        notes.append(
            "config.json says that embedding and head share one tensor, but the file has a head of "
            "its own, as transformers uses it: the head is kept, tie_word_embeddings becomes false"
        )
    if buffers := inputs.skeleton.left.buffers:
        more = f" and {len(buffers) - 1} more" if len(buffers) > 1 else ""
        notes.append(f"{buffers[0]}{more} left out: transformers computes such buffers itself")
    skipped = head_rotation_skipped(inputs.recipe.rotate.kind, inputs.skeleton.head_dim)
    if skipped:
        notes.append(skipped)
    return notes + plan_notes(schemes, formats)
