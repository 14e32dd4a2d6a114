"""Which layers matter: one score per unit of the model, higher = keep more bits.

A unit is what is given one width as a whole: a decoder layer, or linears that engines fuse.

    layer_embedding_change   LIM = -cos(x, y), a layer's own input and output. Identity: -1
    outlier_weight_count     -ZD, ZD = share of the unit's weights with z > 1, z = (w - mean) / std
    weight_error             ||W - Q||^2 / ||W||^2 of the quantiser that will be used
    output_error             the solver's error with the calibration data, by width
    hidden_state_error       what a layer's output is off with this unit alone quantised, by width
    logit_divergence         KL of the logits with this unit alone quantised, by width
    position, random, reverse    what a score has to beat

LIM and ZD: "Variable Layerwise Quantization: A Simple and Effective Approach to Quantize LLMs",
arXiv 2406.17415, section 3.1. x and y are taken at the layer itself: the model's last hidden state
comes after the final norm, which would change the last layer's score.

The walk over the model measures what a strategy `needs` (`EmbeddingChange` takes the batches as
they pass) and hands it over as `UnitFacts`.

    scores = LAYER_IMPORTANCE["outlier_weight_count"](two_sided=False).scores(units)
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from compress.errors import CompressError, naming
from compress.registry import LAYER_IMPORTANCE

# Weights looked at in fp64 at a time: bounds the temporaries whatever the size of a matrix.
CHUNK = 1 << 22


@dataclass(frozen=True)
class UnitFacts:
    """What is known of one unit when its score is asked for.

    Attributes:
        name: of the unit; the key of its score.
        layer: index of the decoder layer that it is, or is a part of.
        weights: gives the weights [N, K] of its linears; read when asked for, so that one unit is
            in memory at a time.
        change: LIM of its layer, as `EmbeddingChange` gives it.
        errors: kind of error (`weight_error`, ...) -> width -> what the unit loses at that width.
    """

    name: str
    layer: int
    weights: Callable[[], Iterable[Tensor]] | None = None
    change: float | None = None
    errors: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


class LayerImportance(Protocol):
    """A strategy. `needs` is the field of UnitFacts that it reads, None if names are enough."""

    needs: str | None

    def scores(self, units: Iterable[UnitFacts]) -> dict[str, float]:
        """Unit name -> score, higher = keep more bits; in the order of the units, finite."""
        ...


class UnitByUnit:
    """A strategy whose score of a unit does not depend on the others."""

    def score(self, unit: UnitFacts) -> float:
        raise NotImplementedError

    def scores(self, units: Iterable[UnitFacts]) -> dict[str, float]:
        return {unit.name: _finite(unit.name, self.score(unit)) for unit in units}


def by_unit(strategy: LayerImportance) -> bool:
    """Whether it scores some of the units as it would all of them."""
    inner = strategy.of if isinstance(strategy, Reverse) else strategy
    return getattr(type(inner), "scores", None) is UnitByUnit.scores


def _finite(name: str, score: float) -> float:
    if not math.isfinite(score):
        raise CompressError(f"layer importance of {name}: expected a finite number, found {score}")
    return score


# From activations


class EmbeddingChange:
    """LIM of one layer, streamed: minus the cosine between its input and its output.

    average `token`: the mean over all tokens. `flattened`: each sample is one vector of all its
    tokens, and the mean is over samples; tokens of large norm then decide, above all the attention
    sink. With `sink` False the first token of each sample is left out. Batches are summed up in
    fp64, and their sums exactly: it does not matter in which order, or by whom (`taken`, `put`).

        change = EmbeddingChange()
        change.add_batch(x, layer(x), mask)
        change.score()                                  # from -1, an identity, to 1
    """

    def __init__(self, average: Literal["token", "flattened"] = "token", sink: bool = True):
        assert average in ("token", "flattened"), average
        self.flattened, self.sink = average == "flattened", sink
        self.totals: list[float] = []  # of each batch
        self.count = 0

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
        self.totals.append(float(_cosine(xy, xx, yy)[counted].sum()))
        self.count += int(counted.sum())

    def taken(self) -> tuple[list[float], int]:
        """What was found since the last call, for `put` elsewhere."""
        found, self.totals, self.count = (self.totals, self.count), [], 0
        return found

    def put(self, totals: Sequence[float], count: int) -> None:
        """Adds what another has found to what this one has."""
        self.totals += totals
        self.count += count

    def score(self) -> float:
        """LIM. Raises CompressError if no token counted or an activation is not finite."""
        if not self.count:
            raise CompressError(
                "layer_embedding_change: no token to look at: all were masked"
                + ("" if self.sink else " or the first of their sample")
            )
        total = math.fsum(self.totals)
        if not math.isfinite(total):
            raise CompressError(
                "layer_embedding_change: expected finite activations, found NaN or infinity"
            )
        return -total / self.count


def _cosine(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """xy / sqrt(xx yy); 1 for two zero vectors, which are unchanged, and 0 for one of them."""
    norms = (xx * yy).sqrt()
    cosine = (xy / norms).clamp(-1, 1)
    return torch.where(norms == 0, (xx == yy).double(), cosine)


@LAYER_IMPORTANCE.register("layer_embedding_change")
class LayerEmbeddingChange(UnitByUnit):
    """LIM: a layer that changes its input more matters more. Units of one layer share its score."""

    needs = "change"

    def score(self, unit: UnitFacts) -> float:
        assert unit.change is not None, f"{unit.name}: this importance needs UnitFacts.change"
        return unit.change


# From weights


@LAYER_IMPORTANCE.register("outlier_weight_count")
class OutlierWeightCount(UnitByUnit):
    """Minus ZD: the fewer of its weights stand out, the more a unit matters. Needs no data.

    Mean and standard deviation are those of all linears of the unit together, as in the paper,
    whose unit is the layer. `two_sided` counts |z| > 1, as some implementations do.
    """

    needs = "weights"

    def __init__(self, two_sided: bool = False):
        self.two_sided = two_sided

    def score(self, unit: UnitFacts) -> float:
        assert unit.weights is not None, f"{unit.name}: this importance needs UnitFacts.weights"
        with naming(unit.name):
            return -outlier_share(list(unit.weights()), self.two_sided)


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


class _Measured(UnitByUnit):
    """A strategy with an error for each width, which allocators can use as it is.

    The score is what narrowing the unit costs: the error at the narrowest width less that at the
    widest, or the error itself if there is one width only.
    """

    needs = "errors"
    kind: str

    def score(self, unit: UnitFacts) -> float:
        assert self.kind in unit.errors, f"{unit.name}: this importance needs UnitFacts.errors"
        errors = unit.errors[self.kind]
        narrow, wide = min(errors), max(errors)
        return errors[narrow] - (errors[wide] if wide != narrow else 0.0)


@LAYER_IMPORTANCE.register("weight_error")
class WeightError(_Measured):
    """sum ||W - Q||^2 / sum ||W||^2 over the unit's linears, of the solver that will be used."""

    kind = "weight_error"


@LAYER_IMPORTANCE.register("output_error")
class OutputError(_Measured):
    """The error tr((W-Q) H (W-Q)^T) / tr(W H W^T) that the solver reports, summed over linears."""

    kind = "output_error"


@LAYER_IMPORTANCE.register("hidden_state_error")
class HiddenStateError(_Measured):
    """The mean over tokens of ||y' - y||^2 / ||y||^2 with this unit alone quantised.

    y is the layer's output, which the next norm divides by its length: so a token counts by what
    the next layer sees of its error. In `output_error` the few tokens with very large states decide
    alone.
    """

    kind = "hidden_state_error"


@LAYER_IMPORTANCE.register("logit_divergence")
class LogitDivergence(_Measured):
    """The mean KL divergence of the logits when this unit alone is quantised, nats per token."""

    kind = "logit_divergence"


# Controls


@LAYER_IMPORTANCE.register("position")
class Position:
    """First and last: a layer's distance from the middle, 1 at both ends. Equal in each layer."""

    needs = None

    def scores(self, units: Iterable[UnitFacts]) -> dict[str, float]:
        layer_of = {unit.name: unit.layer for unit in units}
        first, last = min(layer_of.values()), max(layer_of.values())
        span = last - first
        return {
            name: abs(2 * layer - first - last) / span if span else 1.0
            for name, layer in layer_of.items()
        }


@LAYER_IMPORTANCE.register("random")
class Random(UnitByUnit):
    """A number from 0 to 1 that depends on the seed and the unit's name alone."""

    needs = None

    def __init__(self, seed: int = 0):
        self.seed = seed

    def score(self, unit: UnitFacts) -> float:
        return random.Random(f"{self.seed} {unit.name}").random()  # noqa: S311  not a secret


@LAYER_IMPORTANCE.register("reverse")
class Reverse:
    """Another importance with its sign changed: if that one means something, this does worse."""

    def __init__(self, of: LayerImportance):
        self.of, self.needs = of, of.needs

    def scores(self, units: Iterable[UnitFacts]) -> dict[str, float]:
        return {name: -score for name, score in self.of.scores(units).items()}
