"""The recipe's section on token importance: who matters in a sequence, and how much.

    token_importance: attention_concentration              # short for {name: ...}
    token_importance: {name: chunks, chunks: "0_31_32"}    # chunks 0 and 31 of 32

Sources: RSQ (arXiv 2503.01820), section 5.2 and appendix C.5 for `minimum`.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from compress.recipe.sections import Number, Patterns, Section, Seed, matches, one_of
from compress.recipe.source import FieldError
from compress.registry import TOKEN_IMPORTANCE

# Hard masks in the paper: the tokens they leave out count for nothing.
HARD_MASKS = ("first_n", "first_last_n", "chunks")
# Token scores that can be below zero, which weights cannot.
SIGNED_SCORES = ("activation_difference", "token_frequency", "dot")


def _text_in_quotes(value: object) -> object:
    """YAML reads 0_31_32 as a number in base 8, which cannot be told from others afterwards."""
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f'expected text in quotes, such as "0_31_32", found the number {value}')
    return value


TokenStrategyName = Annotated[str, one_of(TOKEN_IMPORTANCE)]
Chunks = Annotated[str | None, BeforeValidator(_text_in_quotes)]


class TokenImportance(Section):
    """Who matters in a sequence: scores, mapped into [minimum, maximum], raised to `power`.

    `minimum: null` is the paper's best: 0.01 with rotation, 0.1 without, 0 for the hard masks and
    where there is no such range. Formulas: `compress/importance/weighting.py`.
    """

    short_form = "name"
    name: TokenStrategyName = "attention_concentration"
    minimum: Number | None = Field(None, ge=0)
    maximum: Number = Field(1.0, gt=0)
    power: Literal[1, 2] = 1  # 1: weights r (the released code); 2: r^2 (the paper's text)
    chunks: Chunks = None  # of `chunks`: "0_31_32" is chunks 0 and 31 of 32; or first_half
    centroids: int = Field(100, ge=1)  # of `cluster`
    seed: Seed = 0  # of `cluster`
    scale: Literal["square", "sqrt"] | None = None  # of the scores; keeps their sign
    reverse: bool = False  # the lowest scores matter most
    # linear: scores by the number of queries that see a token, sqrt: by its root; none: r = score
    normalize: Literal["default", "linear", "sqrt", "none"] = "default"
    quantile: Number | None = Field(None, gt=0.5, lt=1)  # the range is from the 1-q to the q one
    mask: Number | None = Field(None, gt=0, lt=1)  # this share, the lowest, weighs 0, the rest 1
    truncate: Number | None = Field(None, gt=0, lt=1)  # this share, the lowest, weighs 0
    bins: int | None = Field(None, ge=2)  # so many weights, evenly spaced, for as many tokens each
    # sinks, with scores over 20 times the mean: clamp leaves them out of the range, drop weighs 0
    sinks: Literal["keep", "clamp", "drop"] = "keep"
    weight_cap: Number | None = Field(None, gt=1)  # the most a token may weigh; the mean is 1
    # least effective sample size, as a share of the tokens: mixes in equal weights, no more than so
    sample_size_floor: Number | None = Field(None, gt=0, le=1)
    modules: Patterns | None = Field(None, min_length=1)  # linears; others: all tokens alike

    @property
    def options(self) -> dict[str, object]:
        """What differs from the defaults, beyond the name, the range and the power."""
        plain = {"name", "minimum", "maximum", "power"}
        return self.model_dump(exclude=plain, exclude_defaults=True)

    def applies_to(self, module_name: str) -> bool:
        """Whether a linear's Hessian has the weights, by its full name."""
        return self.modules is None or any(matches(p, module_name) for p in self.modules)

    @property
    def parts(self) -> int:
        """How many chunks a window is cut into; 1 where it is not."""
        if self.chunks is None:
            return 1
        return 2 if self.chunks == "first_half" else int(self.chunks.rpartition("_")[2])

    @property
    def without_range(self) -> bool:
        """Whether minimum and maximum mean nothing."""
        return self.mask is not None or self.normalize == "none"

    @model_validator(mode="after")
    def _check_range(self) -> "TokenImportance":
        if self.minimum is not None and self.minimum > self.maximum:
            raise FieldError(
                ("minimum",), f"expected at most maximum ({self.maximum}), found {self.minimum}"
            )
        return self

    @model_validator(mode="after")
    def _check_strategy(self) -> "TokenImportance":
        """The options of one strategy are not given to another."""
        options = self.options
        if self.name == "uniform":
            _refuse(options, options, "uniform weighs all tokens alike")
        if self.name != "chunks":
            _refuse(options, ("chunks",), f"is for chunks, and name is {self.name}")
        elif self.chunks is None:
            raise FieldError(("chunks",), "expected which chunks, such as 0_31_32, found none")
        else:
            _check_chunks(self.chunks)
        if self.name != "cluster":
            _refuse(options, ("centroids", "seed"), f"is for cluster, and name is {self.name}")
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> "TokenImportance":
        """What would have no effect, or none that can be meant, is refused."""
        options = self.options
        given = [name for name in ("mask", "truncate", "bins") if name in options]
        if len(given) > 1:
            raise FieldError((given[1],), f"expected one of them, found {given[0]} as well")
        bounds = ("weight_cap", "sample_size_floor")
        if self.name in HARD_MASKS:
            ranked = ("scale", "normalize", "quantile", "mask", "truncate", "bins", "sinks")
            _refuse(options, ranked, f"{self.name} has two scores, 0 and 1")
            if not self.minimum:
                _refuse(options, bounds, f"the tokens of {self.name} weigh the same or nothing")
        if self.mask is not None:
            _refuse(options, ("quantile", *bounds), "mask gives weights of 0 and 1")
        if self.bins is not None:
            _refuse(options, ("quantile",), "bins goes by rank alone")
        if self.normalize == "none":
            reason = "with normalize none scores are weights, which have no range"
            _refuse(options, ("quantile", "bins"), reason)
            reason = "with normalize none scores are weights, which are never below 0"
            _refuse(options, ("reverse",), reason)
            if self.name in SIGNED_SCORES:
                raise FieldError(
                    ("normalize",), f"scores of {self.name} can be below 0, found none"
                )
        if self.without_range:
            fixed = {"minimum": (None, 0), "maximum": (1,)}
            fixed |= {"power": (1,)} if self.mask is not None else {}
            why = "mask" if self.mask is not None else "normalize none"
            for name, allowed in fixed.items():
                if getattr(self, name) not in allowed:
                    raise FieldError((name,), f"has no effect with {why}: leave it out")
        left = 1 - (self.truncate or 0)
        if self.weight_cap is not None and self.weight_cap * left < 1:
            raise FieldError(
                ("weight_cap",), f"expected at least {1 / left:.3g}, since truncate leaves {left:g}"
            )
        if self.sample_size_floor is not None and self.sample_size_floor > left:
            raise FieldError(
                ("sample_size_floor",), f"expected at most {left:g}, which truncate leaves"
            )
        return self


def _refuse(given: Iterable[str], fields: Iterable[str], why: str) -> None:
    """FieldError for the first of the fields that is given."""
    for name in fields:
        if name in given:
            raise FieldError((name,), f"{why}: leave it out")


def _check_chunks(text: str) -> None:
    """FieldError unless it is `first_half` or "a_b_..._P" with different a, b, ... below P."""
    if text == "first_half":
        return
    if re.fullmatch(r"[0-9]{1,9}(_[0-9]{1,9})+", text):
        *chosen, count = map(int, text.split("_"))
        if len(set(chosen)) == len(chosen) and max(chosen) < count:
            return
    raise FieldError(
        ("chunks",),
        f"expected first_half, or numbers of chunks and how many there are, such as 0_31_32, "
        f"found {text!r}",
    )
