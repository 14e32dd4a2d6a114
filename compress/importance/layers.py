"""Which layers matter: one score per unit of the model, higher = keep more bits.

A unit is what is given one width as a whole: a decoder layer, or linears that engines fuse.

    layer_embedding_change   LIM = -cos(x, y), a layer's own input and output. Identity: -1
    outlier_weight_count     -ZD, ZD = share of the unit's weights with z > 1, z = (w - mean) / std
    weight_error             ||W - Q||^2 / ||W||^2 of the quantiser that will be used
    output_error             the solver's error with the calibration data, by width
    logit_divergence         KL of the logits with this unit alone quantised, by width
    position, random, reverse    what a score has to beat

LIM and ZD: "Variable Layerwise Quantization: A Simple and Effective Approach to Quantize LLMs",
arXiv 2406.17415, section 3.1. x and y are taken at the layer itself: the model's last hidden state
comes after the final norm, which would change the last layer's score.

Strategies walk over `UnitContext`s and call no more of them than they need, so that one unit is in
memory at a time. Where the caller owns the walk, `EmbeddingChange` takes the batches as they pass.

    scores = LAYER_IMPORTANCE["outlier_weight_count"](two_sided=False).scores(units)
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.registry import Registry

LAYER_IMPORTANCE = Registry("layer importance")

# Weights looked at in fp64 at a time: bounds the temporaries whatever the size of a matrix.
CHUNK = 1 << 22

# x, y [B, T, d] and mask [B, T] bool (False = does not count) or None for all tokens
Batch = tuple[Tensor, Tensor, Tensor | None]
# name of a linear, its weight W [N, K], bits -> the dequantised weight [N, K]
Quantise = Callable[[str, Tensor, int], Tensor]


@dataclass(frozen=True)
class UnitContext:
    """What a strategy may ask about one unit; each callable is paid for only where it is used.

    Attributes:
        name: of the unit; the key of its score.
        layer: index of the decoder layer that it is, or is a part of.
        weights: the names and weights [N, K] of its linears.
        activations: the batches of its layer's input and output.
        output_errors: bits -> error of the unit's outputs on the calibration data.
        divergences: bits -> mean KL(16-bit || model with this unit alone quantised), in nats.
    """

    name: str
    layer: int
    weights: Callable[[], Iterable[tuple[str, Tensor]]] | None = None
    activations: Callable[[], Iterable[Batch]] | None = None
    output_errors: Callable[[], Mapping[int, float]] | None = None
    divergences: Callable[[], Mapping[int, float]] | None = None

    def ask(self, what: str) -> Any:
        """The result of the callable `what`, which the caller must have given."""
        source = getattr(self, what)
        assert source is not None, f"{self.name}: this importance needs UnitContext.{what}"
        return source()


class LayerImportance(Protocol):
    """A strategy. `needs` is the field of UnitContext that it calls, None if names are enough."""

    needs: str | None

    def scores(self, units: Iterable[UnitContext]) -> dict[str, float]:
        """Unit name -> score, higher = keep more bits; in the order of the units, finite."""
        ...


class _UnitByUnit:
    """A strategy whose score of a unit does not depend on the others."""

    def score(self, unit: UnitContext) -> float:
        raise NotImplementedError

    def scores(self, units: Iterable[UnitContext]) -> dict[str, float]:
        return {unit.name: _finite(unit.name, self.score(unit)) for unit in units}


def _finite(name: str, score: float) -> float:
    if not math.isfinite(score):
        raise CompressError(f"layer importance of {name}: expected a finite number, found {score}")
    return score


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Puts the place in front of an error's line."""
    try:
        yield
    except CompressError as error:
        raise CompressError(f"{place}: {error}") from error


# From activations


class EmbeddingChange:
    """LIM of one layer, streamed: minus the cosine between its input and its output.

    average `token`: the mean over all tokens. `flattened`: each sample is one vector of all its
    tokens, and the mean is over samples; tokens of large norm then decide, above all the attention
    sink. With `sink` False the first token of each sample is left out. All sums are in fp64.

        change = EmbeddingChange()
        change.add_batch(x, layer(x), mask)
        change.score()                                  # from -1, an identity, to 1
    """

    def __init__(self, average: Literal["token", "flattened"] = "token", sink: bool = True):
        assert average in ("token", "flattened"), average
        self.flattened, self.sink = average == "flattened", sink
        self.total, self.count = 0.0, 0

    def add_batch(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Input and output [B, T, d] of the layer; mask [B, T] bool, False does not count."""
        counted = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        counted = counted.to(x.device)
        if not self.sink:
            counted = counted & (counted.cumsum(dim=-1) > 1)
        x, y = x.double(), y.double()
        xy, xx, yy = (
            (a * b).sum(dim=-1).masked_fill(~counted, 0.0) for a, b in ((x, y), (x, x), (y, y))
        )  # [B, T]
        if self.flattened:
            xy, xx, yy, counted = xy.sum(-1), xx.sum(-1), yy.sum(-1), counted.any(-1)
        self.total += float(_cosine(xy, xx, yy)[counted].sum())
        self.count += int(counted.sum())

    def score(self) -> float:
        """LIM. Raises CompressError if no token counted or an activation is not finite."""
        if not self.count:
            raise CompressError(
                "layer_embedding_change: no token to look at: all were masked"
                + ("" if self.sink else " or the first of their sample")
            )
        if not math.isfinite(self.total):
            raise CompressError(
                "layer_embedding_change: expected finite activations, found NaN or infinity"
            )
        return -self.total / self.count


def _cosine(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """xy / sqrt(xx yy); 1 for two zero vectors, which are unchanged, and 0 for one of them."""
    norms = (xx * yy).sqrt()
    cosine = (xy / norms).clamp(-1, 1)
    return torch.where(norms == 0, (xx == yy).double(), cosine)


@LAYER_IMPORTANCE.register("layer_embedding_change")
class LayerEmbeddingChange:
    """LIM: a layer that changes its input more matters more. The units of a layer share its score,
    for which the activations are asked once."""

    needs = "activations"

    def __init__(self, average: Literal["token", "flattened"] = "token", sink: bool = True):
        self.settings = (average, sink)

    def scores(self, units: Iterable[UnitContext]) -> dict[str, float]:
        by_layer: dict[int, float] = {}
        scores: dict[str, float] = {}
        for unit in units:
            if unit.layer not in by_layer:
                change = EmbeddingChange(*self.settings)
                for x, y, mask in unit.ask("activations"):
                    change.add_batch(x, y, mask)
                with _naming(f"layer {unit.layer}"):
                    by_layer[unit.layer] = change.score()
            scores[unit.name] = by_layer[unit.layer]
        return scores


# From weights


@LAYER_IMPORTANCE.register("outlier_weight_count")
class OutlierWeightCount(_UnitByUnit):
    """Minus ZD: the fewer of its weights stand out, the more a unit matters. Needs no data.

    Mean and standard deviation are those of all linears of the unit together, as in the paper,
    whose unit is the layer. `two_sided` counts |z| > 1, as some implementations do.
    """

    needs = "weights"

    def __init__(self, two_sided: bool = False):
        self.two_sided = two_sided

    def score(self, unit: UnitContext) -> float:
        with _naming(unit.name):
            return -outlier_share([W for _, W in unit.ask("weights")], self.two_sided)


def outlier_share(weights: list[Tensor], two_sided: bool = False) -> float:
    """ZD: the share of all these weights with z > 1, or |z| > 1 if two-sided.

    .1587 (.3173) for a Gaussian, .1216 (.2431) for a Laplacian. Raises CompressError where z is
    not defined: no weights, all of them equal, or one that is not finite.
    """

    def chunks() -> Iterator[Tensor]:
        return (c.double() for W in weights for c in W.flatten().split(CHUNK))

    count = sum(W.numel() for W in weights)
    mean = sum(float(c.sum()) for c in chunks()) / max(count, 1)
    std = math.sqrt(sum(float((c - mean).square().sum()) for c in chunks()) / max(count, 1))
    if not (math.isfinite(std) and std > 0):
        raise CompressError(
            f"expected finite weights that differ, found {count} with mean {mean} and standard "
            f"deviation {std}: outlier_weight_count has no z-score for them"
        )
    over = 0
    for chunk in chunks():
        distance = chunk - mean
        over += int(((distance.abs() if two_sided else distance) > std).sum())
    return over / count


# From errors, one per width


class _Measured(_UnitByUnit):
    """A strategy with an error for each width, which allocators can use as it is.

    The score is what narrowing the unit costs: the error at the narrowest width less that at the
    widest, or the error itself if there is one width only.
    """

    def errors(self, unit: UnitContext) -> Mapping[int, float]:
        raise NotImplementedError

    def score(self, unit: UnitContext) -> float:
        errors = self.errors(unit)
        narrow, wide = min(errors), max(errors)
        return errors[narrow] - (errors[wide] if wide != narrow else 0.0)


@LAYER_IMPORTANCE.register("weight_error")
class WeightError(_Measured):
    """What a quantiser loses of the unit's weights at each of `widths`. Needs no data by itself.

    `relative`: sum ||W - Q||^2 / sum ||W||^2 over the unit's linears; otherwise the numerator,
    in which large units count for more.
    """

    needs = "weights"

    def __init__(self, quantise: Quantise, widths: Iterable[int], relative: bool = True):
        self.quantise, self.widths, self.relative = quantise, tuple(widths), relative

    def errors(self, unit: UnitContext) -> dict[int, float]:
        lost, power = dict.fromkeys(self.widths, 0.0), 0.0
        for name, W in unit.ask("weights"):
            power += float(W.double().square().sum())
            for bits in self.widths:
                E = W.float() - self.quantise(name, W, bits).float()
                lost[bits] += float(E.double().square().sum())
        # A unit of zeros is exact at every width.
        per = power if self.relative and power > 0 else 1.0
        return {bits: _finite(unit.name, error / per) for bits, error in lost.items()}


def nearest(
    group_size: int | None,
    symmetric: bool = True,
    clip_search: str = "magnitude",
    scale_dtype: torch.dtype = torch.float32,
) -> Quantise:
    """Rounding to nearest as the solver `rtn` does it, for `weight_error`; None = one group a row.

    clip_search: `magnitude` or `none`, see `search_scale`.
    """
    from compress.quantization.grid import UniformGrid
    from compress.quantization.solvers import SOLVERS, SolverSettings

    solver = SOLVERS["rtn"](SolverSettings(clip_search=clip_search))

    def quantise(name: str, W: Tensor, bits: int) -> Tensor:
        grid = UniformGrid(bits, symmetric, scale_dtype)
        return solver.solve(W.float(), None, grid, group_size).weight()

    return quantise


@LAYER_IMPORTANCE.register("output_error")
class OutputError(_Measured):
    """The error tr((W-Q) H (W-Q)^T) that the solver reports for each width."""

    needs = "output_errors"

    def errors(self, unit: UnitContext) -> Mapping[int, float]:
        return unit.ask("output_errors")


@LAYER_IMPORTANCE.register("logit_divergence")
class LogitDivergence(_Measured):
    """The KL divergence of the logits when this unit alone is quantised, for each width."""

    needs = "divergences"

    def errors(self, unit: UnitContext) -> Mapping[int, float]:
        return unit.ask("divergences")


# Controls


@LAYER_IMPORTANCE.register("position")
class Position:
    """First and last: a layer's distance from the middle, 1 at both ends. Equal in each layer."""

    needs = None

    def scores(self, units: Iterable[UnitContext]) -> dict[str, float]:
        layer_of = {unit.name: unit.layer for unit in units}
        first, last = min(layer_of.values()), max(layer_of.values())
        span = last - first
        return {
            name: abs(2 * layer - first - last) / span if span else 1.0
            for name, layer in layer_of.items()
        }


@LAYER_IMPORTANCE.register("random")
class Random(_UnitByUnit):
    """A number from 0 to 1 that depends on the seed and the unit's name alone."""

    needs = None

    def __init__(self, seed: int = 0):
        self.seed = seed

    def score(self, unit: UnitContext) -> float:
        return random.Random(f"{self.seed} {unit.name}").random()  # noqa: S311  not a secret


@LAYER_IMPORTANCE.register("reverse")
class Reverse:
    """Another importance turned round: if that one means something, this must lose."""

    def __init__(self, of: LayerImportance):
        self.of, self.needs = of, of.needs

    def scores(self, units: Iterable[UnitContext]) -> dict[str, float]:
        return {name: -score for name, score in self.of.scores(units).items()}
