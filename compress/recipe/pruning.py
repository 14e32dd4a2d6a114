"""The recipe's section on visual tokens: which are pruned, and whether a search decides it.

    prune_visual_tokens:
      keep: 0.25                   # share of the visual tokens, averaged over decoder layers
      stages: [0, 9, 18]           # null: the method's own
      strategy: {method: vflowopt, voter_quantile: 0.97}       # or FILE.json of search-pruning
      search: {samples: 30, trials: 50}                        # null: none

A strategy is `PruneStrategy`, settled once the depth of the model is known:

    strategy = section.strategy_for(layers=28)
"""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from compress.errors import UsageError
from compress.recipe.sections import Number, Section, Seed
from compress.recipe.source import FieldError
from compress.recipe.strategy import (
    LANGUAGE_ATTENTION,
    PUBLISHED_CELL,
    Layer,
    Method,
    PruneStrategy,
    Ratio,
)

# Given ratios may miss a given `keep` by the rounding of a person who wrote three digits.
KEEP_TOLERANCE = 2e-3


def _default(name: str) -> Any:
    return PruneStrategy.model_fields[name].default


class StrategySettings(Section):
    """How tokens are chosen. `ratios: null`: what `keep` asks for. `file` stands alone."""

    short_form = "file"
    file: str | None = None  # JSON that `modelpress search-pruning` wrote; read with the recipe
    method: Method = "vflowopt"
    ratios: Annotated[list[Ratio], Field(min_length=1)] | None = None  # kept at each stage
    voter_threshold: Number = Field(_default("voter_threshold"), ge=0)
    voter_quantile: Number | None = Field(None, ge=0, lt=1)  # in its place; null: voter_threshold
    vote: Literal["mean", "sum"] = "mean"
    entropy_weight: Number = Field(_default("entropy_weight"), ge=0)
    # side of a recycling cell in tokens, null: none; absent: VFlowOpt's at stage 0
    cell: Number | None = Field(None, gt=0)
    vit_layer: int | None = None
    positions: Literal["original", "renumbered"] = "original"
    protect_newlines: bool = True
    seed: Seed = 0

    @model_validator(mode="after")
    def _check_file(self) -> "StrategySettings":
        if self.file is not None and len(self.model_fields_set) > 1:
            raise FieldError(("file",), "holds a whole strategy: leave out the keys beside it")
        return self

    def options(self) -> dict[str, Any]:
        """Keyword arguments of PruneStrategy, but for method, stages and ratios."""
        return self.model_dump(exclude={"file", "method", "ratios"})

    @classmethod
    def of(cls, strategy: PruneStrategy) -> "StrategySettings":
        """The settings of a strategy, without its stages."""
        return cls(**strategy.model_dump(exclude={"stages"}) | {"ratios": list(strategy.ratios)})


class PruningSearch(Section):
    """The strategy is searched before anything is quantised, on prompts of `calibration`."""

    samples: int = Field(30, ge=1)
    trials: int = Field(50, ge=1)
    seed: Seed = 0
    sampler: Literal["tpe", "gp"] = "tpe"
    # null: all that the strategy reads
    variables: list[Literal["ratios", "voter_threshold", "entropy_weight", "cell"]] | None = None


class PruneVisualTokens(Section):
    """Which visual tokens the language model sees; the strategy is saved with the checkpoint."""

    keep: Annotated[float, Field(strict=False, gt=0, le=1)] | None = None
    stages: Annotated[list[Layer], Field(min_length=1)] | None = None
    strategy: StrategySettings | None = None
    search: PruningSearch | None = None

    @model_validator(mode="after")
    def _check(self) -> "PruneVisualTokens":
        given = self.strategy or StrategySettings()
        if (
            given.method == "vflowopt"
            and given.file is None
            and "cell" not in given.model_fields_set
            and (self.stages or [0])[0] == 0
        ):
            given = given.model_copy(update={"cell": PUBLISHED_CELL})
            # A frozen model is still being built here.
            object.__setattr__(self, "strategy", given)
        if self.search is not None and (self.keep is None or self.keep == 1):
            raise FieldError(("keep",), "is the budget of the search: expected a share below 1")
        if given.file is not None:
            if self.stages is not None:
                raise FieldError(("stages",), "the strategy's file has its own: leave them out")
            return self
        if given.ratios is None and self.keep is None:
            raise FieldError(("keep",), "expected a share of visual tokens, or strategy.ratios")
        if given.ratios is not None and self.stages is None and len(given.ratios) > 1:
            raise FieldError(
                ("stages",), f"expected the layers that the {len(given.ratios)} ratios are for"
            )
        # Deep enough for every stage; `keep` is another matter, it depends on the real depth.
        deep = 1 + max([32, *(self.stages or ())])
        try:
            self._strategy(1.0, deep)
        except ValidationError as error:
            cause = error.errors(include_url=False)[0].get("ctx", {}).get("error")
            if not isinstance(cause, FieldError):
                raise
            own = cause.field == ("stages",)
            raise FieldError(
                cause.field if own else ("strategy", *cause.field), str(cause)
            ) from None
        return self

    def _strategy(self, keep: float, layers: int) -> PruneStrategy:
        given = self.strategy or StrategySettings()
        options = given.options()
        if given.ratios is not None:
            stages = tuple(self.stages or (0,))
            return PruneStrategy(
                method=given.method, stages=stages, ratios=tuple(given.ratios), **options
            )
        if self.stages is not None:
            options["stages"] = tuple(self.stages)
        return PruneStrategy.for_budget(given.method, keep, layers, **options)

    def strategy_for(self, layers: int) -> PruneStrategy:
        """The strategy for a model with so many decoder layers; where there is a search, its start.

        Raises UsageError for a budget that its stages cannot meet, or that its ratios do not.
        """
        section = self.read()
        strategy = section._strategy(1.0 if section.keep is None else section.keep, layers)
        kept = strategy.average_kept(layers)
        wanted = kept if section.search is not None or section.keep is None else section.keep
        if not math.isclose(kept, wanted, rel_tol=0, abs_tol=KEEP_TOLERANCE):
            raise UsageError(
                f"keep is {wanted:.4g}, but ratios {list(strategy.ratios)} before layers "
                f"{list(strategy.stages)} of {layers} keep {kept:.4g}: leave one out"
            )
        return strategy

    @property
    def ranks_by_language_attention(self) -> bool:
        """As the strategy's, which is known before the model's depth is."""
        given = self.read().strategy or StrategySettings()
        return given.method in LANGUAGE_ATTENTION

    def read(self, path: str | None = None) -> "PruneVisualTokens":
        """The section with the settings of its strategy's file in place of the file's name.

        `path`: where the file lies; None: as the recipe says. Raises RecipeError if it cannot be
        read.
        """
        if self.strategy is None or self.strategy.file is None:
            return self
        strategy = PruneStrategy.load(path or self.strategy.file)
        settings = StrategySettings.of(strategy)
        changes = {"strategy": settings, "stages": list(strategy.stages)}
        return self.model_copy(update=changes)
