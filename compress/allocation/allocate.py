"""Bit widths for a recipe with an `allocate` section: score the units, then spend the budget.

    units -> scores of `allocate.importance` -> predicted errors -> allocator -> width per linear

A budget that cannot be met is an error before any weight is read. Linears that an override gives a
width, or that are ignored, keep it; their bytes count. Scores that are not errors by width are
turned into predicted errors (`predict_errors`) for the allocators that need them.

    found = allocate(recipe.allocate, recipe.quantize, model, units, fixed_bytes, windows, work)
    found.bits()["model.layers.0.mlp.up_proj"]
"""

import hashlib
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from compress.allocation.allocators import (
    ALLOCATORS,
    NO_UNIT,
    Assignment,
    Budget,
    Unit,
    check_budget,
    keep_top,
    predict_errors,
    weighed,
)
from compress.allocation.scores import ACTIVATIONS, Scorer
from compress.allocation.search import EvolutionState
from compress.checkpoint.packed_formats import planned_bytes
from compress.data.windows import CalibrationWindows
from compress.models.skeleton import Skeleton, linear_in
from compress.observer import Observer
from compress.ranks import Ranks
from compress.recipe.quantize import Quantize
from compress.recipe.sections import MEASURED_SCORES, Allocate
from compress.registry import LAYER_IMPORTANCE
from compress.rotation.model import RotatedModel
from compress.scheme import PlannedModule
from compress.storage.files import changed, parse_size, read_sealed, write_sealed, writing


@dataclass(frozen=True)
class Allocation:
    """What was chosen, and why.

    Attributes:
        scores: unit -> importance, higher = keep more bits.
        widths: unit -> bits; 0 for a layer that is left out.
        modules: unit -> the full names of its linears.
        error: as measured by the score for each unit alone, summed; None if it measures none.
        fitness: the KL that `evolve` measured for the widths, in nats per token.
        average_bits: over the weights of the units.
    """

    scores: dict[str, float]
    widths: dict[str, int]
    modules: dict[str, tuple[str, ...]]
    error: float | None
    fitness: float | None
    average_bits: float

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> "Allocation":
        """From what `asdict` made of one, through JSON."""
        modules = {name: tuple(names) for name, names in found["modules"].items()}
        return cls(**found | {"modules": modules})

    def bits(self) -> dict[str, int]:
        """Width by full name of a linear."""
        return {m: self.widths[unit] for unit, names in self.modules.items() for m in names}

    def score_of(self) -> dict[str, float]:
        """Score by full name of a linear."""
        return {m: self.scores[unit] for unit, names in self.modules.items() for m in names}

    def removed(self) -> list[int]:
        """The decoder layers that are left out."""
        return [int(unit.rpartition(".")[2]) for unit, bits in self.widths.items() if bits == 0]


# ---- units and budget ---------------------------------------------------------------------------


def find_units(
    section: Allocate,
    quantize: Quantize,
    skeleton: Skeleton,
    modules: list[PlannedModule],
    scale: torch.dtype,
) -> list[Unit]:
    """The units of a plan at the recipe's own width, with their bytes at each candidate width."""
    spec = skeleton.spec
    if section.method == "remove":
        return _whole_layers(quantize, skeleton)
    planned = {module.name: module for module in modules}
    free = {name for name in planned if not quantize.has_own_width(name)}
    widths: list[int] = sorted(section.widths)
    units = []
    for index in range(skeleton.num_layers):
        prefix = f"{spec.layers}.{index}"
        kind = spec.layer(index)
        groups = [kind.linears] if section.unit == "layer" else kind.groups
        for group in groups:
            members = [f"{prefix}.{n}" for n in group if f"{prefix}.{n}" in free]
            name = prefix if section.unit == "layer" else f"{prefix}.{'+'.join(group)}"
            if not members:
                continue
            linears = [planned[name] for name in members]
            sizes = {
                bits: sum(planned_bytes(_at(linears, bits), scale).values()) for bits in widths
            }
            weights = sum(linear.weights for linear in linears)
            units.append(Unit(name, weights, sizes, modules=tuple(members), layer=index))
    return units


def _at(modules: list[PlannedModule], bits: int) -> list[PlannedModule]:
    """The linears at another width."""
    return [replace(m, scheme=replace(m.scheme, bits=bits)) for m in modules]


def _whole_layers(quantize: Quantize, skeleton: Skeleton) -> list[Unit]:
    """The decoder layers as what is left out or kept, whatever widths their linears have."""
    spec = skeleton.spec
    sizes = {0: 0, 16 if quantize.method == "none" else quantize.bits: 1}  # counted, not weighed
    units = []
    for index in range(skeleton.num_layers):
        prefix = f"{spec.layers}.{index}"
        names = tuple(f"{prefix}.{name}" for name in spec.layer(index).linears)
        weights = sum(linear_in(skeleton.model, name).weight.numel() for name in names)
        units.append(Unit(prefix, weights, sizes, modules=names, layer=index))
    return units


def budget_of(section: Allocate, fixed_bytes: int) -> Budget:
    """The budget of a section that does not count units instead."""
    return Budget(
        average_bits=section.average_bits,
        bytes=None if section.budget is None else parse_size(section.budget),
        error=section.maximum_kl,
        fixed_bytes=fixed_bytes,
    )


def check_allocation(
    section: Allocate, quantize: Quantize, units: list[Unit], fixed_bytes: int
) -> str | None:
    """Why the section cannot be followed, one line, or None; reads neither scores nor weights."""
    if not units:
        return NO_UNIT
    if quantize.method == "none" and section.importance.base in MEASURED_SCORES:
        return (
            f"allocate.importance: {section.importance.base} measures what quantising costs, but "
            "quantize.method is none"
        )
    for name in filter(None, (section.importance.base, section.importance.weighted_by)):
        needs = LAYER_IMPORTANCE[name].needs
        if name not in LAYER_IMPORTANCE.shipped and needs not in (None, "weights"):
            return (
                f"allocate.importance: {name} needs {needs}, a recipe's own may need weights alone"
            )
    if section.narrow is not None and section.narrow > len(units):
        return f"allocate.narrow: {section.narrow} of {len(units)} units"
    if section.method == "remove" and section.narrow == len(units):
        return f"allocate.narrow: removing all {len(units)} layers leaves no model"
    if section.narrow is not None:
        return None
    return check_budget(units, budget_of(section, fixed_bytes))


# ---- the whole ----------------------------------------------------------------------------------


def allocate(
    section: Allocate,
    quantize: Quantize,
    model: RotatedModel,
    units: list[Unit],
    fixed_bytes: int,
    windows: CalibrationWindows | None,
    work: Path,
    *,
    offload: Literal["auto", "ram", "disk"] = "auto",
    identity: str = "",
    resume: bool = True,
    observer: Observer | None = None,
    ranks: Ranks | None = None,
) -> Allocation:
    """Scores the units and chooses their widths.

    Args:
        model: whose scales will be stored in its dtype.
        units: of `find_units`; `fixed_bytes`: what is written whatever the widths.
        windows: needed where the section `reads_windows`; its first `samples` are used.
        offload: where the activations of measured scores go.
        work: a folder, in which scores, the candidates and the state of `evolve`, and the finished
            allocation are kept, and found again under the same `identity`.
        resume: use what is kept; otherwise it is measured again.
        ranks: share the windows, the candidates' solutions and the fitness of `evolve`; the first
            one writes, and all get the same. None: there is one.

    Raises:
        UsageError: the budget cannot be met.
        CompressError: a score that is not finite, a Hessian that cannot be factored, a full disk.
    """
    mark = hashlib.sha256(f"{identity} {section!r}".encode()).hexdigest()
    folder, ranks = work / f"allocation-{mark[:16]}", ranks or Ranks()

    def opened() -> None:
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        for left in folder.glob(f"{ACTIVATIONS}-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)

    with writing(folder):
        ranks.tell(opened)
        scorer = Scorer(section, quantize, model, units, windows, folder, offload, observer, ranks)
        return _allocated(section, units, fixed_bytes, scorer, mark)


def _allocated(
    section: Allocate, units: list[Unit], fixed_bytes: int, scorer: Scorer, mark: str
) -> Allocation:
    kept, ranks = scorer.work / "allocation.json", scorer.ranks
    if (found := ranks.tell(lambda: read_sealed(kept))) is not None:
        return Allocation.of_json(found)
    scored = _kept_scores(scorer, units)
    chosen = _choose(section, weighed(scored), fixed_bytes, scorer, mark)
    allocation = Allocation(
        scores={unit.name: unit.score for unit in scored},
        widths=chosen.widths,
        modules={unit.name: unit.modules for unit in units},
        error=_error(scored, chosen.widths),
        fitness=chosen.fitness,
        average_bits=chosen.average_bits,
    )
    ranks.meet()  # nobody reads the candidates any more
    if ranks.first:
        write_sealed(kept, asdict(allocation))
        scorer.drop_candidates()
    return allocation


def _error(units: list[Unit], widths: dict[str, int]) -> float | None:
    """What the units lose alone at these widths, summed, as it was measured; None if it was not."""
    errors = [(unit.errors or {}).get(widths[unit.name]) for unit in units]
    known = [error for error in errors if error is not None]
    return math.fsum(known) if len(known) == len(units) else None


def _kept_scores(scorer: Scorer, units: list[Unit]) -> list[Unit]:
    """The units with their scores; those of an earlier process, where it has written them."""
    file = scorer.work / "scores.json"

    def left() -> dict[str, Any] | None:
        if (known := read_sealed(file)) is None:
            return None
        found = scorer.candidates()
        for name in sorted({*found, *known["candidates"]}):
            if found.get(name) != known["candidates"].get(name):
                raise changed(scorer.work / "candidates" / name)
        return known["units"]

    def written(scored: list[Unit]) -> dict[str, Any]:
        scores = {u.name: [u.score, u.errors and list(u.errors.items()), u.factor] for u in scored}
        write_sealed(file, {"units": scores, "candidates": scorer.candidates()})
        return scores

    known = scorer.ranks.tell(left)
    if known is None:
        scored = scorer.scored()
        known = scorer.ranks.tell(lambda: written(scored))
    pairs = [(unit, *known[unit.name]) for unit in units]
    return [
        replace(u, score=score, errors=errors and dict(errors), factor=factor)
        for u, score, errors, factor in pairs
    ]


def _choose(
    section: Allocate, units: list[Unit], fixed_bytes: int, scorer: Scorer, mark: str
) -> Assignment:
    if section.narrow is not None:
        if section.method == "remove":  # no width, so no error that was measured for it
            units = [replace(unit, errors=None) for unit in units]
        return keep_top(units, len(units) - section.narrow)
    budget = budget_of(section, fixed_bytes)
    if section.method != "top_n" and units[0].errors is None:
        units = predict_errors(units)
    if section.method != "evolve":
        assert section.method is not None, "the section resolves it"
        return ALLOCATORS[section.method](units, budget)
    state = scorer.work / "evolve.json"
    scorer.observer.stage("evolve")

    def save(values: EvolutionState) -> None:
        if scorer.ranks.first:
            write_sealed(state, values)
        history = values["history"]
        scorer.observer.generation(len(history) - 1, section.generations, history[-1])

    with torch.no_grad():
        return ALLOCATORS["evolve"](
            units,
            budget,
            fitness=scorer.fitness(),
            generations=section.generations,
            offspring=section.offspring,
            seed=section.seed,
            identity=mark,
            state=scorer.ranks.tell(lambda: read_sealed(state)),
            save=save,
        )
