"""What a run will do, from the recipe, the config and the headers alone: no weight is read.

    plan = make_plan(recipe, skeleton)
    plan.problems            # what would make the run fail; empty if it can start
    plan.bytes["total"]      # of the tensors that will be written

Memory is an estimate of the peak on the host: one layer, the statistics of its widest linear, the
batch in flight, the activations of all calibration windows unless they go to disk, and the fixed
cost of Python, torch and transformers.
"""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch

from compress.calibration.activations import activations_on_disk
from compress.errors import did_you_mean

if TYPE_CHECKING:
    from compress.models.skeleton import Skeleton
    from compress.recipe import Recipe, Scheme

FIXED_MEMORY = 500 * 10**6  # Python, torch and transformers, measured on Linux with CPU torch
TOKENS_PER_BATCH = 1024  # calibration tokens that go through a layer at once
SOLVER_COPIES = 3  # of a Hessian while it is factored; as many of a group's weights


@dataclass(frozen=True)
class PlannedModule:
    """One linear: its weight's shape (out, in), its width and its group size (None: a row)."""

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int | None
    symmetric: bool = True
    score: float | None = None

    def packed_bytes(self, scale_bytes: int) -> int:
        """Bytes of its tensors in a compressed-tensors file."""
        N, K = self.shape
        groups = K // (self.group_size or K)
        packed = N * -(-K * self.bits // 32) * 4 + N * groups * scale_bytes + 16
        return packed if self.symmetric else packed + -(-N * self.bits // 32) * groups * 4

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass
class Plan:
    """The modules to be quantised and what the result will take. `problems` stop a run."""

    modules: list[PlannedModule]
    average_bits: float
    bytes: dict[str, int]
    peak_memory: dict[str, int]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    untied: bool = False

    def as_dict(self) -> dict:
        """For `--json`: the keys of the architecture, modules without their `symmetric`."""
        modules = [
            {k: v for k, v in asdict(module).items() if k != "symmetric"} for module in self.modules
        ]
        return {
            "modules": modules,
            "average_bits": self.average_bits,
            "bytes": self.bytes,
            "peak_memory": self.peak_memory,
            "problems": self.problems,
            "notes": self.notes,
        }


def storage_dtype(recipe: "Recipe", skeleton: "Skeleton") -> torch.dtype:
    """The dtype of unquantised tensors and scales in the output."""
    name = recipe.model.dtype
    return skeleton.dtype if name == "auto" else getattr(torch, name)


def make_plan(recipe: "Recipe", skeleton: "Skeleton") -> Plan:
    """The plan of a recipe for an opened model. Never raises for what `problems` can say."""
    names = skeleton.linear_names()
    shapes = {name: _shape(skeleton, name) for name in names}
    schemes = {name: recipe.quantize.scheme_for(name) for name in names}
    modules = [
        PlannedModule(name, shapes[name], scheme.bits, scheme.group_size, scheme.symmetric)
        for name, scheme in schemes.items()
        if scheme is not None
    ]
    rotated = recipe.rotate.kind != "none"
    untied = skeleton.tied and (rotated or schemes[skeleton.spec.head] is not None)
    itemsize = storage_dtype(recipe, skeleton).itemsize
    quantized = sum(module.packed_bytes(itemsize) for module in modules)
    chosen = {f"{module.name}.weight" for module in modules}
    parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
    head = f"{skeleton.spec.head}.weight"
    if skeleton.tied and not untied:
        parameters.pop(head, None)
    other = sum(p.numel() * itemsize for name, p in parameters.items() if name not in chosen)
    weights = sum(module.weights for module in modules)
    return Plan(
        modules=modules,
        average_bits=sum(m.bits * m.weights for m in modules) / weights if weights else 0.0,
        bytes={"quantized": quantized, "other": other, "total": quantized + other},
        peak_memory={"host": _peak_memory(recipe, skeleton, shapes), "device": 0},
        problems=_problems(recipe, skeleton, names, shapes, schemes),
        notes=_notes(recipe, skeleton, modules, untied),
        untied=untied,
    )


def _shape(skeleton: "Skeleton", name: str) -> tuple[int, int]:
    out_features, in_features = skeleton.model.get_submodule(name).weight.shape
    return out_features, in_features


def _problems(
    recipe: "Recipe",
    skeleton: "Skeleton",
    names: list[str],
    shapes: dict[str, tuple[int, int]],
    schemes: dict[str, "Scheme | None"],
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
    if needs_calibration(recipe) and context and recipe.calibration.length > context:
        problems.append(
            f"calibration.length: {recipe.calibration.length} tokens are more than the model's "
            f"context of {context}"
        )
    return problems


def needs_calibration(recipe: "Recipe") -> bool:
    """Whether the run reads calibration text."""
    return recipe.quantize.method == "gptq"


def _notes(
    recipe: "Recipe", skeleton: "Skeleton", modules: list[PlannedModule], untied: bool
) -> list[str]:
    from compress.rotation.rotate import head_rotation_skipped

    notes = []
    if untied:
        notes.append("embedding and head share one tensor in this model; they will be untied")
    skipped = head_rotation_skipped(recipe.rotate.kind, skeleton.head_dim)
    if skipped:
        notes.append(skipped)
    schemes = {(m.bits, m.group_size, m.symmetric) for m in modules}
    if any(not symmetric for _, _, symmetric in schemes):
        notes.append(
            "asymmetric weights: vLLM loads them; transformers only with "
            "CompressedTensorsConfig(dequantize=True)"
            + (" and not with several widths" if len(schemes) > 1 else "")
        )
    odd = sorted({bits for bits, _, _ in schemes} - {4, 8})
    if odd:
        widths = ", ".join(map(str, odd))
        notes.append(f"{widths}-bit weights: vLLM needs the `humming` package, SGLang has none")
    return notes + _split_fusions(skeleton, modules)


def _split_fusions(skeleton: "Skeleton", modules: list[PlannedModule]) -> list[str]:
    """vLLM runs q/k/v and gate/up as one matrix each, which then must share one scheme."""
    schemes = {m.name: (m.bits, m.group_size, m.symmetric) for m in modules}
    for i in range(skeleton.num_layers):
        for group in skeleton.spec.groups:
            members = [f"{skeleton.spec.layers}.{i}.{name}" for name in group]
            if len({schemes.get(name) for name in members}) > 1:
                return [f"{', '.join(members)} differ in scheme; vLLM fuses them and will refuse"]
    return []


def _peak_memory(recipe: "Recipe", skeleton: "Skeleton", shapes: dict[str, tuple[int, int]]) -> int:
    spec, hidden = skeleton.spec, skeleton.config.hidden_size
    inside = [shapes[f"{spec.layers}.0.{name}"] for name in spec.linears]
    layer = sum(N * K for N, K in inside)
    bytes_per_weight = 4 + (16 if recipe.rotate.kind != "none" else skeleton.dtype.itemsize)
    widest = max(K for _, K in inside)
    vocabulary = skeleton.config.vocab_size * hidden * 4
    total = FIXED_MEMORY + max(layer * bytes_per_weight, vocabulary)
    if not needs_calibration(recipe):
        return total
    tokens = recipe.calibration.samples * recipe.calibration.expansion * recipe.calibration.length
    activations = tokens * (hidden + widest) * 4
    batch = max(TOKENS_PER_BATCH, recipe.calibration.length) * (hidden + 3 * widest) * 4
    solver = SOLVER_COPIES * 4 * (widest**2 + max(N * K for N, K in inside))
    on_disk = activations_on_disk(recipe.calibration.offload, activations)
    return total + max(batch, solver) + (0 if on_disk else activations)
