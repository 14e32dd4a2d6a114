"""The strategy: which method prunes visual tokens, where, and how many it keeps.

Stage s sits before decoder layer `stages[s]` (0: before the language model) and keeps the share
`ratios[s]` of the visual tokens that are still there. Over the layers that average is

    R = (l_0 + sum_s L_s * prod_{i<=s} ratios_i) / L

where l_0 layers lie before the first stage and L_s from stage s to the next (arXiv 2508.05211,
equation 5). Recycled and protected tokens count as kept.

    strategy = PruneStrategy.for_budget("vflowopt", keep=0.25, layers=28)
    strategy.save("strategy.json"); PruneStrategy.load("strategy.json")
"""

import json
import math
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate, pairwise, product
from operator import mul
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compress.errors import RecipeError, UsageError, unknown
from compress.recipe.sections import Number, Seed
from compress.recipe.source import YAML_BYTES, FieldError, Source

Method = Literal[
    "vflowopt", "random", "uniform", "pooling", "fastv", "visionzip", "divprune", "pyramiddrop"
]
METHODS: tuple[str, ...] = get_args(Method)
# These rank by the attention of the decoder layer before the stage: there is none before layer 0.
LANGUAGE_ATTENTION = ("fastv", "pyramiddrop")
# These look at image features as the language model gets them, so only before it.
BEFORE_LANGUAGE_MODEL = ("pooling", "visionzip", "divprune")
VOTER_THRESHOLD = 5.0
# The cell of the strategy that the authors publish for 25 % of the tokens, in grids of 27 x 27;
# at 50 and 10 % they have 11.757 and 17.387 (their code; the paper gives none).
PUBLISHED_CELL = 15.581
# Settings that only some methods read; elsewhere they must stay at their defaults.
OPTIONS = {
    "voter_threshold": ("vflowopt",),
    "voter_quantile": ("vflowopt",),
    "vote": ("vflowopt",),
    "entropy_weight": ("vflowopt",),
    "cell": ("vflowopt",),
    "vit_layer": ("vflowopt", "visionzip"),
    "seed": ("random",),
}

# Names in JSON that earlier versions saved: strategies, trials of a search.
NEW_NAMES = {"threshold": "voter_threshold", "alpha": "entropy_weight"}

# Shares are products of ratios: whole numbers of tokens come out with an error of this size.
ROUNDING = 1e-6

Saved = TypeVar("Saved", dict[str, Any], list[str], object)
Ratio = Annotated[float, Field(strict=False, gt=0, le=1)]
Layer = Annotated[int, Field(ge=0)]


class PruneStrategy(BaseModel):
    """One setting of a pruning method. Frozen; equal settings are equal objects."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    method: Method = "vflowopt"
    stages: Annotated[tuple[Layer, ...], Field(strict=False, min_length=1)] = (0,)
    ratios: Annotated[tuple[Ratio, ...], Field(strict=False, min_length=1)] = (0.5,)
    # t: a voter receives more than t x the mean attention
    voter_threshold: Number = Field(VOTER_THRESHOLD, ge=0)
    # in its place: the share of the patches that do not vote, 0.97 for the upper 3 %; null: t
    voter_quantile: Number | None = Field(None, ge=0, lt=1)
    vote: Literal["mean", "sum"] = "mean"  # over the voters; the paper's text sums
    # alpha, the weight of the entropy term; 0 in the published settings
    entropy_weight: Number = Field(0.0, ge=0)
    cell: Number | None = Field(None, gt=0)  # side of a recycling cell in tokens; null: none
    vit_layer: int | None = None  # null: the layer that makes the features (its last global one)
    positions: Literal["original", "renumbered"] = "original"  # of what is left, for RoPE
    protect_newlines: bool = True  # the row separators of any-resolution images
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> "PruneStrategy":
        if len(self.ratios) != len(self.stages):
            raise FieldError(
                ("ratios",),
                f"expected one ratio per stage ({len(self.stages)}), found {len(self.ratios)}",
            )
        if any(a >= b for a, b in pairwise(self.stages)):
            raise FieldError(("stages",), f"expected rising layers, found {list(self.stages)}")
        if self.ranks_by_language_attention and self.stages[0] == 0:
            raise FieldError(
                ("stages",),
                f"{self.method} ranks by a decoder layer's attention: expected stages from 1 on",
            )
        if self.method in BEFORE_LANGUAGE_MODEL and self.stages != (0,):
            raise FieldError(
                ("stages",), f"{self.method} works before the language model: expected [0]"
            )
        for name, methods in OPTIONS.items():
            default = type(self).model_fields[name].default
            if self.method not in methods and getattr(self, name) != default:
                raise FieldError((name,), f"{self.method} does not read it: leave it out")
        if self.voter_quantile is not None and self.voter_threshold != VOTER_THRESHOLD:
            raise FieldError(
                ("voter_quantile",), "stands in the place of voter_threshold: leave one of them out"
            )
        if self.cell is not None and self.stages[0] != 0:
            raise FieldError(("cell",), "recycling happens before the language model: add stage 0")
        return self

    @classmethod
    def for_budget(cls, method: str, keep: float, layers: int, **settings: Any) -> "PruneStrategy":
        """A strategy that keeps the share `keep` of the visual tokens, averaged over `layers`.

        Stages are the papers' unless `settings` has them: VFlowOpt before the language model and at
        two thirds of its depth (9 and 18 of 28, 10 and 20 of 32), FastV at layer 2, PyramidDrop at
        the quarters, the others before the language model. Ratios are equal for PyramidDrop; for
        VFlowOpt the later ones are 0.9, as long as the first then stays below 1.

        Raises UsageError for a budget that these stages cannot meet.
        """
        if method not in METHODS:
            raise UsageError(unknown("pruning method", method, METHODS))
        stages = tuple(settings.pop("stages", _default_stages(method, layers)))
        later = 0.9 if method == "vflowopt" else None

        def ratios(x: float) -> tuple[float, ...]:
            return (x,) * len(stages) if later is None else (x, *(later,) * (len(stages) - 1))

        if keep == 1:
            found: tuple[float, ...] = (1.0,) * len(stages)
        else:
            if later is not None and average_kept(stages, ratios(1.0), layers) < keep:
                later = None  # a large budget: equal ratios reach it
            found = ratios(_solve(lambda x: average_kept(stages, ratios(x), layers), keep, stages))
        return cls(method=cast(Method, method), stages=stages, ratios=found, **settings)

    @property
    def ranks_by_language_attention(self) -> bool:
        """Whether each stage asks what the decoder layer before it attends to."""
        return self.method in LANGUAGE_ATTENTION

    def average_kept(self, layers: int) -> float:
        """R: the share of visual tokens kept, averaged over a model's `layers` (equation 5)."""
        return average_kept(self.stages, self.ratios, layers)

    def counts(self, tokens: int, layers: int) -> tuple[int, ...]:
        """How many of an image's `tokens` are left after each stage, in a model of `layers`.

        Each is its share, rounded up or down so that the sum over layers comes closest to the
        budget; of equally close ones, those nearest to the shares. One is left in any case.
        """
        return _whole_tokens(self.stages, self.ratios, tokens, layers)

    def stage_without(self, tokens: int) -> int | None:
        """The first stage whose share of an image's `tokens` is none, though one is left there."""
        shares = enumerate(accumulate(self.ratios, mul))
        return next((stage for stage, x in shares if tokens * x < 0.5 - ROUNDING), None)

    def check_tokens(self, tokens: int) -> None:
        """UsageError if a stage's share of an image with so many `tokens` is none."""
        stage = self.stage_without(tokens)
        if stage is not None:
            share = math.prod(self.ratios[: stage + 1])
            raise UsageError(
                f"stage {stage} keeps {share:.4g} of an image with {tokens} visual tokens, which "
                "is none: raise the ratios"
            )

    def save(self, path: str | Path) -> None:
        """Writes JSON with every setting; `load` gives an equal strategy."""
        text = json.dumps(self.model_dump(mode="json"), indent=2)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "PruneStrategy":
        """Reads `save`'s JSON. Raises RecipeError: file, field, what was expected and found."""
        try:
            with Path(path).open("rb") as file:
                text = file.read(YAML_BYTES + 1)
            if len(text) > YAML_BYTES:
                raise ValueError(f"expected at most {YAML_BYTES:,} bytes")
            data = json.loads(text.decode())
        except (OSError, ValueError, RecursionError) as error:
            raise RecipeError(f"{path}: cannot be read as JSON: {error}") from error
        if not isinstance(data, dict):
            raise RecipeError(f"{path}: expected a JSON object with the settings of a strategy")
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "strategy") -> "PruneStrategy":
        """A strategy from plain values; RecipeError with `source` as the place."""
        data = with_new_names(data)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(Source(data, {(): source}).one_line(error, cls)) from error


def with_new_names(saved: Saved) -> Saved:
    """Plain values of saved JSON with today's names, as keys and in lists of names."""
    if isinstance(saved, dict):
        names = {old: new for old, new in NEW_NAMES.items() if new not in saved}
        return {names.get(key, key): with_new_names(value) for key, value in saved.items()}
    if isinstance(saved, list):
        return [NEW_NAMES.get(v, v) if isinstance(v, str) else with_new_names(v) for v in saved]
    return saved


def average_kept(stages: tuple[int, ...], ratios: tuple[float, ...], layers: int) -> float:
    """Equation 5 for stages that may start after layer 0. UsageError beyond the last layer."""
    if stages[-1] >= layers:
        raise UsageError(
            f"a stage before decoder layer {stages[-1]} needs a deeper model: it has {layers}"
            f" layers, 0 to {layers - 1}"
        )
    spans = [b - a for a, b in pairwise((*stages, layers))]
    shares = accumulate(ratios, mul)
    return (stages[0] + sum(n * share for n, share in zip(spans, shares, strict=True))) / layers


@lru_cache(maxsize=1024)  # images of one size come again and again
def _whole_tokens(
    stages: tuple[int, ...], ratios: tuple[float, ...], tokens: int, layers: int
) -> tuple[int, ...]:
    exact = [tokens * share for share in accumulate(ratios, mul)]
    spans = [b - a for a, b in pairwise((*stages, layers))]
    choices = [
        sorted({max(math.floor(n + ROUNDING), 1), max(math.ceil(n - ROUNDING), 1)}) for n in exact
    ]

    def distance(counts: tuple[int, ...]) -> tuple[float, float]:
        misses = [count - n for count, n in zip(counts, exact, strict=True)]
        total = sum(span * miss for span, miss in zip(spans, misses, strict=True))
        return round(abs(total), 6), sum(miss * miss for miss in misses)

    falling = (c for c in product(*choices) if all(a >= b for a, b in pairwise(c)))
    return min(falling, key=distance)


def _default_stages(method: str, layers: int) -> tuple[int, ...]:
    if method == "vflowopt":
        third = layers // 3
        return (0, third, 2 * third) if third else (0,)
    if method == "fastv":
        return (min(2, layers - 1),)
    if method == "pyramiddrop":
        return tuple(sorted({max(1, layers * i // 4) for i in (1, 2, 3)}))
    return (0,)


def _solve(average: Callable[[float], float], keep: float, stages: tuple[int, ...]) -> float:
    """The x in (0, 1] with average(x) = keep, for a rising function, by bisection."""
    least, most = average(0.0), average(1.0)
    if not least < keep <= most * (1 + 1e-12):
        raise UsageError(
            f"stages {list(stages)} keep between {least:.4g} and {most:.4g} of the visual tokens "
            f"on average, not {keep:.4g}: choose another budget or earlier stages"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if average(middle) < keep else (low, middle)
    return high
