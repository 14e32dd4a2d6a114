"""Measures what each layer loses at each width, on the model itself, with one layer in memory.

Every window goes through the 16-bit layers once. On the way a layer's change of its input is taken
(LIM), its linears are quantised at every candidate width by the recipe's own solver, and the errors
noted; the layer is left as it was, so each unit is measured alone:

    weight_error       sum ||W - Q||^2 / sum ||W||^2 over the unit's linears
    output_error       sum over them of tr((W-Q) H (W-Q)^T) / tr(W H W^T), H token-weighted
    hidden_state_error mean over tokens of ||y' - y||^2 / ||y||^2, y the layer's output, y' the same
                       with this unit alone at that width
    logit_divergence   mean KL(16-bit || model with this unit alone at that width), nats per token

For the divergence, each (unit, width) has activations of its own from its layer on, which travel
along, so that a layer is still read once: units * widths * tokens * d * 4 bytes, on disk where
`calibration.offload` says so.

Of several ranks each has its own batches and solves some of the candidates. Hessians are summed up
over the ranks, and every rank ends with the same scores.

    found = ScoreWalk(recipe.allocate, recipe.quantize, model, windows, units, folder).run(True)
    found.changes[layer], found.errors["weight_error"]["model.layers.0"][3]
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.allocation.allocators import Unit
from compress.data.activations import TOKENS_PER_BATCH, ActivationStore
from compress.data.windows import CalibrationWindows
from compress.errors import naming
from compress.eval.divergence import token_divergence
from compress.eval.windows import scored_chunks
from compress.importance.layers import EmbeddingChange
from compress.importance.tokens import count_tokens
from compress.models.skeleton import linear_in
from compress.observer import Observer
from compress.quantization.grid import UniformGrid
from compress.quantization.hessian import Hessian
from compress.quantization.inside import replaced
from compress.quantization.rounding import quadratic
from compress.quantization.shares import Piece
from compress.quantization.sharing import shares_of
from compress.quantization.solvers import QuantizedLinear, make_solver, some_rows
from compress.quantization.token_weights import TokenWeigher
from compress.ranks import Ranks
from compress.recipe.quantize import Quantize
from compress.recipe.sections import Allocate
from compress.rotation.model import RotatedModel
from compress.scheme import Scheme

MANY = 4  # candidates a rank, of which one more or less matters little
# Full name of a linear -> its dequantised weight, put in its place for a while.
Replaced = Mapping[str, Tensor]


@dataclass
class Scores:
    """What the walk has found: `changes` layer -> LIM; `errors` kind -> unit -> width -> error."""

    changes: dict[int, float] = field(default_factory=dict)
    errors: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)


@contextmanager
def gathering(
    layer: nn.Module,
    hessians: Mapping[tuple[str, ...], Hessian],
    weights: Mapping[tuple[str, ...], Tensor | None],
) -> Iterator[None]:
    """Adds what each group's linears read in a forward pass to the group's Hessian."""

    def adding(H: Hessian, w: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: H.add_batch(args[0], w)

    hooks = [
        layer.get_submodule(group[0]).register_forward_pre_hook(adding(H, weights[group]))
        for group, H in hessians.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class ScoreWalk:
    """One pass over the layers; what it measures depends on what is asked of `run`."""

    def __init__(
        self,
        section: Allocate,
        quantize: Quantize,
        model: RotatedModel,
        windows: CalibrationWindows,
        units: Sequence[Unit],
        folder: Path | None,
        observer: Observer | None = None,
        ranks: Ranks | None = None,
    ):
        """`folder`: where this rank's activations go, None for memory."""
        self.section, self.quantize, self.model, self.units = section, quantize, model, units
        self.skeleton, self.spec, self.device = model.skeleton, model.spec, model.device
        self.widths: list[int] = sorted(section.widths)
        self.folder = folder
        self.observer = observer or Observer()
        self.ranks = ranks or Ranks()
        self.shares = shares_of(self.ranks, folder, quantize.refine_sweeps)
        batches = windows.batches(TOKENS_PER_BATCH)
        share = self.ranks.share(len(batches))
        self.batches = batches[share.start : share.stop]
        self.counted = int(windows.mask.sum())  # tokens of all ranks
        # None where layers of a 16-bit model are removed: only their changes are measured.
        self.solver = make_solver(quantize)
        counts = count_tokens(windows.input_ids, windows.mask, self.skeleton.config.vocab_size)
        masked = self.counted < windows.mask.numel()
        self.weigher = TokenWeigher(quantize.token_importance, self.batches, counts, masked)

    def run(
        self,
        errors: bool,
        divergence: bool = False,
        hidden: bool = False,
        keep: Callable[[int, int, dict[str, QuantizedLinear]], None] | None = None,
    ) -> Scores:
        """Walks once.

        Args:
            errors: quantise every unit at every width and note weight and output errors.
            divergence: also the KL of the logits; implies `errors`.
            hidden: also what each layer's output is off; implies `errors`.
            keep: given layer, width and that layer's quantised linears by relative name.
        """
        scores = Scores()
        with torch.no_grad():
            x = self._store("x")
            for embedded in self.model.embed(ids for ids, _ in self.batches):
                x.append(embedded)
            variants: dict[tuple[str, int], ActivationStore] = {}
            for index in range(self.skeleton.num_layers):
                self.observer.layers(index, self.skeleton.num_layers)
                with self.model.layer(index) as layer:
                    for store in variants.values():
                        self._advance(layer, index, store)
                    if errors or divergence or hidden:
                        solved = self._candidates(layer, index, x, scores)
                        if keep is not None:
                            for bits in self.widths:
                                keep(index, bits, {n: found[bits] for n, found in solved.items()})
                        if hidden:
                            errors_of = self._hidden_errors(layer, index, x, solved)
                            scores.errors.setdefault("hidden_state_error", {}).update(errors_of)
                        if divergence:
                            variants |= self._variants(layer, index, x, solved)
                        del solved
                    scores.changes[index] = self._change(layer, index, x)
            if divergence:
                scores.errors["logit_divergence"] = self._divergences(x, variants)
        self.observer.layers(self.skeleton.num_layers, self.skeleton.num_layers)
        return scores

    def _store(self, name: str) -> ActivationStore:
        return ActivationStore(self.folder, name, summed=False)

    def _advance(self, layer: nn.Module, index: int, store: ActivationStore) -> None:
        for i in range(len(store)):
            x = store[i].to(self.device)
            store[i] = self.model.forward(layer, index, x)

    def _change(self, layer: nn.Module, index: int, x: ActivationStore) -> float:
        """Moves the activations through the layer; minus the cosine of before and after."""
        importance = self.section.importance
        change = EmbeddingChange(importance.average, importance.sink)
        for i, (_, mask) in enumerate(self.batches):
            before = x[i].to(self.device)
            after = self.model.forward(layer, index, before)
            change.add_batch(before, after, mask)
            x[i] = after
        for totals, count in self.ranks.collect(change.taken()):
            change.put(totals, count)
        with naming(f"layer {index}"):
            return change.score()

    # ---- candidates -----------------------------------------------------------------------------

    def _schemes(self, unit: Unit) -> dict[str, Scheme]:
        """The unit's linears that are quantised, by full name."""
        found = {
            name: self.quantize.scheme_for(name, linear_in(self.skeleton.model, name).in_features)
            for name in unit.modules
        }
        return {name: scheme for name, scheme in found.items() if scheme}

    def _units_of(self, index: int) -> list[Unit]:
        return [unit for unit in self.units if unit.layer == index]

    def _candidates(
        self, layer: nn.Module, index: int, x: ActivationStore, scores: Scores
    ) -> dict[str, dict[int, QuantizedLinear]]:
        """The layer's linears at every width, by relative name; their errors go to `scores`."""
        prefix = f"{self.spec.layers}.{index}."
        schemes = {
            name.removeprefix(prefix): scheme
            for unit in self._units_of(index)
            for name, scheme in self._schemes(unit).items()
        }
        solved: dict[str, dict[int, QuantizedLinear]] = {name: {} for name in schemes}
        lost: dict[tuple[str, int], float] = {}  # ||W - Q||^2
        output: dict[tuple[str, int], float] = {}  # the relative error
        power: dict[str, float] = {}  # ||W||^2
        hessians = self._hessians(layer, index, x, schemes)
        for group, H in hessians.items():
            inside = {name: schemes[name] for name in group if name in schemes}
            with naming(f"{prefix}{group[0]}"):
                found = self._at_every_width(layer, inside, H)
            for (name, bits), linear in found.items():
                W = linear_in(layer, name).weight
                power[name] = float(W.double().square().sum())
                lost[name, bits] = float((W - linear.weight()).double().square().sum())
                relative = linear.relative_error()
                assert relative is not None, "error and power are there"
                output[name, bits] = relative
                solved[name][bits] = linear
        for unit in self._units_of(index):
            names = [name.removeprefix(prefix) for name in self._schemes(unit)]
            total = sum(power[name] for name in names) or 1.0
            scores.errors.setdefault("weight_error", {})[unit.name] = {
                bits: sum(lost[name, bits] for name in names) / total for bits in self.widths
            }
            scores.errors.setdefault("output_error", {})[unit.name] = {
                bits: sum(output[name, bits] for name in names) for bits in self.widths
            }
        return solved

    def _at_every_width(
        self, layer: nn.Module, schemes: Mapping[str, Scheme], H: Hessian
    ) -> dict[tuple[str, int], QuantizedLinear]:
        """Linears that share an input, by name and width, each with its error. Ends H."""
        solver = self.solver
        assert solver is not None, "`check_allocation` refuses to measure what is not quantised"
        weights = {name: linear_in(layer, name).weight for name in schemes}
        columns, device = next(iter(weights.values())).shape[1], H.lower.device
        count, ranks = len(schemes) * len(self.widths), self.ranks.size
        divides = count % ranks > 0 and count < MANY * ranks  # or whole ones keep all busy

        def pieces(rows: slice) -> list[slice]:
            return self.shares.parts(rows, columns, device) if divides else [rows]

        cut = [
            ((name, bits), Piece(replace(scheme, bits=bits), rows, alternative=False))
            for name, scheme in schemes.items()
            for bits in self.widths
            for rows in pieces(slice(0, len(weights[name])))
        ]

        def solve(numbers: Iterable[int]) -> dict[int, QuantizedLinear]:
            mine = list(numbers)
            if not mine:
                return {}
            matrix = H.matrix()
            statistics = solver.prepare(matrix) if solver.needs_hessian else None
            found = {}
            for number in mine:
                (name, bits), piece = cut[number]
                grid = UniformGrid(bits, piece.scheme.symmetric, self.model.dtype)
                W = weights[name][piece.rows]
                found[number] = solver.solve(W, statistics, grid, piece.scheme.group_size)
                if statistics is None:
                    _add_errors(found[number], W, matrix)
            return found

        parts: dict[tuple[str, int], list[QuantizedLinear]] = {}
        results = self.shares.solved([piece for _, piece in cut], columns, solve, device)
        for (key, _), part in zip(cut, results, strict=True):
            assert part is not None, "a solver finds something for all rows"
            parts.setdefault(key, []).append(part)
        return {key: QuantizedLinear.join(each) for key, each in parts.items()}

    def _hessians(
        self, layer: nn.Module, index: int, x: ActivationStore, schemes: Mapping[str, Scheme]
    ) -> dict[tuple[str, ...], Hessian]:
        """The Hessian of each group's input in the 16-bit model, token-weighted.

        A group that the token weights are for in part is two groups.
        """
        weighted = {
            part: on
            for group in self.spec.layer(index).groups
            for part, on in self.weigher.parts(f"{self.spec.layers}.{index}.", group)
            if any(name in schemes for name in part)
        }
        hessians = {
            group: self.shares.hessian(linear_in(layer, group[0]).in_features, self.device)
            for group in weighted
        }
        spec = self.spec.layer(index)
        norm = layer.get_submodule(spec.input_norm) if spec.input_norm else nn.Identity()
        for i in range(len(x)):
            z = x[i].to(self.device)
            inputs = self.skeleton.layer_inputs(index, z)
            w = self.weigher.weights(i, z, norm(z), layer, spec, inputs)
            alike = self.weigher.uniform(i, z)
            weights = {group: w if on else alike for group, on in weighted.items()}
            with gathering(layer, hessians, weights):
                self.model.forward(layer, index, z)
        for H in hessians.values():
            self.shares.complete(H)
        return hessians

    # ---- one unit at a time ---------------------------------------------------------------------

    def _variants(
        self,
        layer: nn.Module,
        index: int,
        x: ActivationStore,
        solved: Mapping[str, Mapping[int, QuantizedLinear]],
    ) -> dict[tuple[str, int], ActivationStore]:
        """The layer's outputs with one unit at one width, for each of them."""
        variants: dict[tuple[str, int], ActivationStore] = {}
        for unit, bits, weights in self._alone(index, solved):
            store = self._store(f"variant-{index}-{len(variants)}")
            with replaced(layer, weights):
                self._outputs(layer, index, x, store)
            variants[unit.name, bits] = store
        return variants

    def _alone(
        self, index: int, solved: Mapping[str, Mapping[int, QuantizedLinear]]
    ) -> Iterator[tuple[Unit, int, Replaced]]:
        """Each unit of the layer at each width, and its weights there, by relative name."""
        prefix = f"{self.spec.layers}.{index}."
        for unit in self._units_of(index):
            names = [name.removeprefix(prefix) for name in self._schemes(unit)]
            for bits in self.widths:
                yield unit, bits, {name: solved[name][bits].weight() for name in names}

    def _outputs(
        self, layer: nn.Module, index: int, x: ActivationStore, store: ActivationStore
    ) -> None:
        """Appends what the layer makes of each batch."""
        for i in range(len(x)):
            store.append(self.model.forward(layer, index, x[i].to(self.device)))

    def _hidden_errors(
        self,
        layer: nn.Module,
        index: int,
        x: ActivationStore,
        solved: Mapping[str, Mapping[int, QuantizedLinear]],
    ) -> dict[str, dict[int, float]]:
        """Of each unit at each width: how far the layer's outputs are off, relative to each."""
        outputs = self._store("y")
        self._outputs(layer, index, x, outputs)
        errors: dict[str, dict[int, float]] = {}
        for unit, bits, weights in self._alone(index, solved):
            with replaced(layer, weights):
                own = [
                    self._hidden_error(layer, index, x[i].to(self.device), outputs[i], mask)
                    for i, (_, mask) in enumerate(self.batches)
                ]
            mean = whole_sum(self.ranks, own) / max(1, self.counted)
            errors.setdefault(unit.name, {})[bits] = mean
        return errors

    def _hidden_error(
        self, layer: nn.Module, index: int, x: Tensor, y: Tensor, mask: Tensor
    ) -> float:
        """sum over counted tokens of ||y' - y||^2 / ||y||^2; a token of zeros is not off."""
        y = y.to(self.device)
        lost = (self.model.forward(layer, index, x) - y).square().sum(-1, dtype=torch.float64)
        power = y.square().sum(-1, dtype=torch.float64)
        relative = lost / power.clamp_min(torch.finfo(torch.float32).tiny)
        return float(relative[mask.to(self.device)].sum())

    def _divergences(
        self, x: ActivationStore, variants: Mapping[tuple[str, int], ActivationStore]
    ) -> dict[str, dict[int, float]]:
        errors: dict[str, dict[int, float]] = {unit.name: {} for unit in self.units}
        masks = [mask.to(self.device) for _, mask in self.batches]
        V = self.skeleton.config.vocab_size
        with self.model.logits() as head:
            for (name, bits), store in variants.items():
                own = [
                    divergence(head, x[i].to(self.device), store[i].to(self.device), mask, V)
                    for i, mask in enumerate(masks)
                ]
                errors[name][bits] = whole_sum(self.ranks, own) / max(1, self.counted)
        return errors


def whole_sum(ranks: Ranks, own: Sequence[float]) -> float:
    """The sum of what all ranks have, exact, so that it does not matter who has what."""
    return math.fsum(value for values in ranks.collect(list(own)) for value in values)


def _add_errors(linear: QuantizedLinear, W: Tensor, H: Tensor) -> None:
    """Notes the errors of a linear that was found without H; in parts, as solvers do it."""
    lost = (W - linear.weight(), W)
    linear.error, linear.power = (
        torch.cat([quadratic(H, part.T.contiguous()) for part in some_rows(rows)]) for rows in lost
    )


def divergence(
    head: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, mask: Tensor, vocabulary: int
) -> float:
    """sum over counted tokens of KL(head(x) || head(y)), nats; x, y [B, T, d], mask [B, T].

    Logits [tokens, vocabulary] of a few tokens at a time: of whole windows they would take more
    memory than the layers.
    """
    total = 0.0
    for row, at in scored_chunks(mask, vocabulary):
        kl = token_divergence(head(x[row, at]), head(y[row, at]))
        total += float(kl.double().sum())
    return total
