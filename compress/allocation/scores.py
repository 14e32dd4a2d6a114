"""Measures a model before its bits are shared out: scores, errors, the fitness of `evolve`.

scorer = Scorer(recipe.allocate, recipe.quantize, model, units, windows, work, "auto")
units = scorer.scored()              # with scores, and errors by width where they are measured
fitness = scorer.fitness()           # widths -> KL in nats per token
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from safetensors import safe_open
from torch import Tensor

from compress.allocation.allocators import Unit, mapped
from compress.allocation.score_walk import (
    Scores,
    ScoreWalk,
    divergence,
    replaced,
    whole_sum,
)
from compress.data.activations import activations_on_disk
from compress.data.windows import CalibrationWindows
from compress.importance.layers import LayerImportance, UnitFacts, by_unit
from compress.observer import Observer
from compress.quantization.solvers import QuantizedLinear
from compress.ranks import Ranks
from compress.recipe.quantize import Quantize
from compress.recipe.sections import MEASURED_SCORES, Allocate
from compress.registry import LAYER_IMPORTANCE
from compress.rotation.model import RotatedModel
from compress.storage.files import file_digest
from compress.storage.safetensors import save_tensors

ACTIVATIONS = "scores"  # folders of the activations, one a rank
WINDOWS = 4  # that go through a layer at once in the fitness of `evolve`


def copies_of_states(section: Allocate, units: int) -> int:
    """How often the walk holds the hidden states of all its tokens, at most."""
    if section.importance.base == "logit_divergence":
        return 1 + units * len(section.widths)
    return 2 if section.importance.base == "hidden_state_error" else 1


class Scorer:
    """Answers what the strategies of `importance/layers.py` and `evolve` ask about a model."""

    def __init__(
        self,
        section: Allocate,
        quantize: Quantize,
        model: RotatedModel,
        units: list[Unit],
        windows: CalibrationWindows | None,
        work: Path,
        offload: Literal["auto", "ram", "disk"],
        observer: Observer | None = None,
        ranks: Ranks | None = None,
    ):
        """`work`: a folder for candidates, and for activations where `offload` sends them there.

        `ranks`: call all methods together, and all have the same answers.
        """
        self.section, self.quantize, self.model, self.units = section, quantize, model, units
        self.skeleton, self.work, self.offload = model.skeleton, work, offload
        self.observer, self.ranks = observer or Observer(), ranks or Ranks()
        self.windows = windows and windows.first(section.samples)

    def scored(self) -> list[Unit]:
        """The units with their scores, and their errors where the strategy measures them."""
        score = self.section.importance
        evolving = self.section.method == "evolve"
        self.observer.stage("layer scores")
        found = Scores()
        if self.section.reads_windows:
            errors = evolving or score.base in MEASURED_SCORES
            found = self._walk(errors, evolving)
        scores = self._scores(self._importance(score.base, score.name == "reverse"), found)
        factors = [1.0] * len(scores)
        if score.weighted_by is not None:
            plain = self._scores(self._importance(score.weighted_by), found)
            factors = mapped(list(plain.values()), score.minimum)
        errors_of = found.errors.get(score.base, {}) if score.measured else {}
        return [
            replace(unit, score=scores[unit.name], errors=errors_of.get(unit.name), factor=factor)
            for unit, factor in zip(self.units, factors, strict=True)
        ]

    def _scores(self, strategy: LayerImportance, found: Scores) -> dict[str, float]:
        """Unit name -> score, in the order of the units.

        Where a unit's score does not depend on the others, each rank reads the weights of some.
        """
        if not by_unit(strategy):
            facts = (self._facts(unit, found) for unit in self.units)
            return self.ranks.tell(lambda: strategy.scores(facts))
        share = self.ranks.share(len(self.units))
        mine = (self._facts(self.units[i], found) for i in share)
        parts = self.ranks.collect(strategy.scores(mine))
        return {name: score for part in parts for name, score in part.items()}

    def _importance(self, name: str, reverse: bool = False) -> LayerImportance:
        """The strategy of this name, with the section's options."""
        score = self.section.importance
        options: dict[str, dict[str, int]] = {
            "outlier_weight_count": {"two_sided": score.two_sided},
            "random": {"seed": score.seed},
        }
        strategy = LAYER_IMPORTANCE[name](**options.get(name, {}))
        return LAYER_IMPORTANCE["reverse"](strategy) if reverse else strategy

    def _facts(self, unit: Unit, found: Scores) -> UnitFacts:
        def weights() -> Iterator[Tensor]:
            return (self.skeleton.reader.tensor(f"{name}.weight") for name in unit.modules)

        errors = {kind: of[unit.name] for kind, of in found.errors.items()}
        return UnitFacts(unit.name, unit.layer, weights, found.changes.get(unit.layer), errors)

    def _walk(self, errors: bool, keep: bool) -> Scores:
        assert self.windows is not None
        d = self.skeleton.config.hidden_size
        copies = copies_of_states(self.section, len(self.units))
        nbytes = self.windows.input_ids.numel() * d * 4 * copies
        on_disk = activations_on_disk(self.offload, nbytes)
        folder = self.work / f"{ACTIVATIONS}-{self.ranks.rank}" if on_disk else None
        if folder:
            folder.mkdir(exist_ok=True)
        walk = ScoreWalk(
            self.section,
            self.quantize,
            self.model,
            self.windows,
            self.units,
            folder,
            self.observer,
            self.ranks,
        )
        try:
            base = self.section.importance.base
            return walk.run(
                errors,
                divergence=base == "logit_divergence",
                hidden=base == "hidden_state_error",
                keep=self._keep if keep and self.ranks.first else None,
            )
        finally:
            if folder:  # far more than the run itself needs
                shutil.rmtree(folder, ignore_errors=True)

    # ---- evolve ---------------------------------------------------------------------------------

    def _candidate(self, layer: int, bits: int) -> Path:
        return self.work / "candidates" / f"{layer:05d}-{bits}.safetensors"

    def _keep(self, layer: int, bits: int, linears: dict[str, QuantizedLinear]) -> None:
        path = self._candidate(layer, bits)
        path.parent.mkdir(exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, linear in linears.items():
            tensors |= {f"{name}.codes": linear.codes, f"{name}.scale": linear.scale}
            if linear.zero is not None:
                tensors[f"{name}.zero"] = linear.zero
        save_tensors(path, tensors)

    def candidates(self) -> dict[str, str]:
        """The files that are kept of the candidates: name -> sha256."""
        files = sorted((self.work / "candidates").glob("*.safetensors"))
        return {file.name: file_digest(file) for file in files}

    def drop_candidates(self) -> None:
        """Removes the candidates of every linear, once nothing is measured any more."""
        shutil.rmtree(self.work / "candidates", ignore_errors=True)

    def fitness(self) -> Callable[[dict[str, int]], float]:
        """KL(16-bit || model at these widths) on the windows, nats per token; a layer at a time."""
        assert self.windows is not None
        model = self.model
        ids, mask = (t.split(WINDOWS) for t in (self.windows.input_ids, self.windows.mask))
        share = self.ranks.share(len(ids))
        embedded = [x.to(model.device) for x in model.embed(ids[i] for i in share)]
        masks = [mask[i].to(model.device) for i in share]
        counted = max(1, int(self.windows.mask.sum()))
        V = self.skeleton.config.vocab_size
        by_layer: dict[int, list[Unit]] = {}
        for unit in self.units:
            by_layer.setdefault(unit.layer, []).append(unit)

        def forward(widths: dict[str, int] | None) -> list[Tensor]:
            x = embedded
            for index in range(self.skeleton.num_layers):
                with model.layer(index) as layer:
                    weights = {} if widths is None else self._weights(by_layer, index, widths)
                    with replaced(layer, weights):
                        x = [model.forward(layer, index, part) for part in x]
            return x

        reference = forward(None)

        def measure(widths: dict[str, int]) -> float:
            pairs = zip(reference, forward(widths), masks, strict=True)
            with model.logits() as head:
                own = [divergence(head, x, y, mask, V) for x, y, mask in pairs]
            return whole_sum(self.ranks, own) / counted

        return measure

    def _weights(
        self, by_layer: dict[int, list[Unit]], index: int, widths: dict[str, int]
    ) -> dict[str, Tensor]:
        """The dequantised weights of a layer at these widths, by relative name."""
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
                    weights[name] = linear.weight().to(self.model.device)
        return weights
