"""What the model is asked before its bits are shared out: scores, errors, the fitness of `evolve`.

scorer = Scorer(recipe, skeleton, units, windows, work, torch.bfloat16, "cpu", observer)
units = scorer.scored()              # with scores, and errors by width where they are measured
fitness = scorer.fitness()           # widths -> KL in nats per token
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.allocation.allocators import Unit
from compress.allocation.score_walk import (
    Model16,
    Scores,
    ScoreWalk,
    UnitModules,
    divergence,
    replaced,
)
from compress.data.activations import activations_on_disk
from compress.data.windows import CalibrationWindows
from compress.importance.layers import LAYER_IMPORTANCE, UnitContext
from compress.models.skeleton import Skeleton
from compress.observer import Observer
from compress.recipe.sections import MEASURED_SCORES

if TYPE_CHECKING:
    from compress.quantization.solvers import QuantizedLinear
    from compress.recipe.recipe import Recipe
    from compress.scheme import Scheme


def needs_windows(recipe: "Recipe") -> bool:
    """Whether the scores read calibration text."""
    section = recipe.allocate
    if section is None:
        return False
    walked = ("layer_embedding_change", *MEASURED_SCORES)
    return section.method == "evolve" or section.importance.base in walked


class Scorer:
    """What the strategies of `importance/layers.py` and `evolve` ask about a model."""

    def __init__(
        self,
        recipe: "Recipe",
        skeleton: Skeleton,
        units: list[Unit],
        windows: CalibrationWindows | None,
        work: Path,
        storage: torch.dtype,
        device: str,
        observer: Observer | None,
    ):
        self.recipe, self.skeleton, self.units = recipe, skeleton, units
        self.work, self.storage, self.device = work, storage, device
        self.observer = observer or Observer()
        self.windows = windows and windows.first(recipe.allocate.samples)

    def scored(self) -> list[Unit]:
        """The units with their scores, and their errors where the strategy measures them."""
        score = self.recipe.allocate.importance
        evolving = self.recipe.allocate.method == "evolve"
        self.observer.stage("layer scores")
        found = Scores()
        if needs_windows(self.recipe):
            errors = evolving or score.base in MEASURED_SCORES
            found = self._walk(errors, score.base == "logit_divergence", evolving)
        contexts = [self._context(unit) for unit in self.units]
        strategy = self._strategy(found)
        scores = strategy.scores(contexts)
        errors_of = found.errors.get(score.base, {}) if score.measured else {}
        return [
            replace(unit, score=scores[unit.name], errors=errors_of.get(unit.name))
            for unit in self.units
        ]

    def _strategy(self, found: Scores) -> Any:
        score = self.recipe.allocate.importance
        options = {
            "layer_embedding_change": {},
            "outlier_weight_count": {"two_sided": score.two_sided},
            "random": {"seed": score.seed},
        }
        if score.base == "layer_embedding_change":
            base: Any = _Known({u.name: found.changes[_layer_of(u)] for u in self.units})
        elif score.base in found.errors:
            base = _Known(
                {name: errors[min(errors)] - (errors[max(errors)] if len(errors) > 1 else 0.0)
                 for name, errors in found.errors[score.base].items()}
            )  # fmt: skip
        else:
            base = LAYER_IMPORTANCE[score.base](**options.get(score.base, {}))
        return LAYER_IMPORTANCE["reverse"](base) if score.name == "reverse" else base

    def _context(self, unit: Unit) -> UnitContext:
        def weights() -> list[tuple[str, Tensor]]:
            return [(n, self.skeleton.reader.tensor(f"{n}.weight")) for n in unit.modules]

        return UnitContext(unit.name, _layer_of(unit), weights=weights)

    def _walk(self, errors: bool, divergence: bool, keep: bool) -> Scores:
        assert self.windows is not None
        d = self.skeleton.config.hidden_size
        widths = sorted(self.recipe.allocate.widths)
        variants = len(self.units) * len(widths) if divergence else 0
        nbytes = self.windows.input_ids.numel() * d * 4 * (1 + variants)
        on_disk = activations_on_disk(self.recipe.calibration.offload, nbytes)
        folder = self.work / "scores" if on_disk else None
        if folder:
            folder.mkdir(exist_ok=True)
        modules = [UnitModules(u.name, _layer_of(u), self._schemes(u)) for u in self.units]
        walk = ScoreWalk(
            self.recipe, self.skeleton, self.windows, modules, widths, folder,
            self.device, self.observer, self.storage,
        )  # fmt: skip
        try:
            return walk.run(errors, divergence, self._keep if keep else None)
        finally:
            if folder:  # far more than the run itself needs
                shutil.rmtree(folder, ignore_errors=True)

    def _schemes(self, unit: Unit) -> "dict[str, Scheme]":
        found = {name: self.recipe.quantize.scheme_for(name) for name in unit.modules}
        return {name: scheme for name, scheme in found.items() if scheme}

    # ---- evolve ---------------------------------------------------------------------------------

    def _candidate(self, layer: int, bits: int) -> Path:
        return self.work / "candidates" / f"{layer:05d}-{bits}.safetensors"

    def _keep(self, layer: int, bits: int, linears: "dict[str, QuantizedLinear]") -> None:
        from compress.storage.safetensors import save_tensors

        path = self._candidate(layer, bits)
        path.parent.mkdir(exist_ok=True)
        tensors = {}
        for name, linear in linears.items():
            tensors |= {f"{name}.codes": linear.codes, f"{name}.scale": linear.scale}
            if linear.zero is not None:
                tensors[f"{name}.zero"] = linear.zero
        save_tensors(path, tensors)

    def drop_candidates(self) -> None:
        """Frees the disk of every linear at every width, once nothing is measured any more."""
        shutil.rmtree(self.work / "candidates", ignore_errors=True)

    def fitness(self) -> Callable[[dict[str, int]], float]:
        """KL(16-bit || model at these widths) on the windows, nats per token; a layer at a time."""
        assert self.windows is not None
        model = Model16(self.recipe, self.skeleton, self.device)
        embedded = model.embed(self.windows.input_ids).to(self.device)
        mask = self.windows.mask.to(self.device)
        V = self.skeleton.config.vocab_size
        by_layer: dict[int, list[Unit]] = {}
        for unit in self.units:
            by_layer.setdefault(_layer_of(unit), []).append(unit)

        def forward(widths: dict[str, int] | None) -> Tensor:
            x = embedded
            for index in range(self.skeleton.num_layers):
                with model.layer(index) as layer:
                    weights = {} if widths is None else self._weights(by_layer, index, widths)
                    with replaced(layer, weights):
                        x = torch.cat([model.forward(layer, index, part) for part in x.split(4)])
            return x

        reference = forward(None)

        def measure(widths: dict[str, int]) -> float:
            with model.head() as head:
                total = divergence(head, reference, forward(widths), mask, V)
            return total / max(1, int(mask.sum()))

        return measure

    def _weights(
        self, by_layer: dict[int, list[Unit]], index: int, widths: dict[str, int]
    ) -> dict[str, Tensor]:
        """The dequantised weights of a layer at these widths, by relative name."""
        from safetensors import safe_open

        from compress.quantization.solvers import QuantizedLinear

        prefix = f"{self.skeleton.spec.layers}.{index}."
        weights = {}
        for unit in by_layer.get(index, []):
            with safe_open(self._candidate(index, widths[unit.name]), "pt") as file:
                names = set(file.keys())
                for name in (m.removeprefix(prefix) for m in unit.modules):
                    zero = file.get_tensor(f"{name}.zero") if f"{name}.zero" in names else None
                    linear = QuantizedLinear(
                        file.get_tensor(f"{name}.codes"), file.get_tensor(f"{name}.scale"), zero
                    )
                    weights[name] = linear.weight().to(self.device)
        return weights


class _Known:
    """A layer importance whose scores are there already."""

    needs = None

    def __init__(self, found: dict[str, float]):
        self.found = found

    def scores(self, units: list[UnitContext]) -> dict[str, float]:
        return {unit.name: self.found[unit.name] for unit in units}


def _layer_of(unit: Unit) -> int:
    return next(int(part) for part in unit.name.split(".") if part.isdecimal())
