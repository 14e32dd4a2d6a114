"""The recipe's section on quantisation: which weights become which integers, and how.

Sources: GPTQ (arXiv 2210.17323) for damping and act-order.

    Quantize(bits=3).scheme_for("model.layers.0.mlp.up_proj", inputs=576)    # Scheme(3, 64)
"""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, PlainValidator, field_validator, model_validator
from pydantic_core import PydanticCustomError

from compress.recipe.expressions import check_patterns
from compress.recipe.sections import Number, Pattern, Patterns, Section, matches
from compress.recipe.source import FieldError
from compress.recipe.token_importance import TokenImportance
from compress.scheme import Scheme

# Of the correction towards the 16-bit model's output: keeps three quarters of what it gains, and a
# quarter of what it learns of the calibration windows alone; measured in docs/rsq.md.
TARGET_STRENGTH = 0.5
AUTO_SIZES = (128, 64, 32)  # of `group_size: auto`: every engine runs these, and whole rows


def _check_group_size(size: object) -> int | str:
    """Inputs that share a scale, `channel` for all of them, which -1 means too, or `auto`."""
    if size in ("auto", "channel") or (type(size) is int and size > 0):
        return size
    if type(size) is int and size == -1:
        return "channel"
    raise PydanticCustomError("group_size", "expected a number of inputs, 'channel' or 'auto'")


def auto_group_size(inputs: int) -> int | None:
    """The largest of AUTO_SIZES that divides a linear's inputs; None, a scale a row, if none does.

    The linears of a layer that engines run as one have the same inputs, hence the same size.
    """
    return next((size for size in AUTO_SIZES if inputs % size == 0), None)


GroupSize = Annotated[int | str, PlainValidator(_check_group_size)]


class Target(Section):
    """What a quantised linear is to give for its input x: W x, or the 16-bit model's W x0."""

    short_form = "name"
    name: Literal["quantized", "full_precision"] = "quantized"
    # full_precision: 0 leaves the weights as they are, 1 is the whole correction, as published
    strength: Number = Field(TARGET_STRENGTH, ge=0, le=1)

    @model_validator(mode="after")
    def _check_strength(self) -> "Target":
        if self.name != "full_precision" and self.strength != TARGET_STRENGTH:
            raise FieldError(("strength",), f"is for full_precision, and name is {self.name}")
        return self


# What becomes of an expert that few tokens reach; `quantization/experts.py` says what each means.
Policy = Literal["all_tokens", "rtn", "shared_hessian"]


class Experts(Section):
    """How the experts of a layer are quantised, beyond what is said of all linears."""

    # times the token's weight: what the router multiplies the expert's output by
    routing_weight: bool = False
    least_rows: int = Field(32, ge=1)  # calibration tokens; with fewer, `policy`
    policy: Policy = "all_tokens"


class Override(Section):
    """Other settings for the modules that `match` names; what is not given stays as it is."""

    match: Pattern
    bits: Literal[2, 3, 4, 5, 6, 8, 16] | None = None  # 16 leaves the module unquantised
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    ignore: bool = False  # the same as bits: 16

    @model_validator(mode="after")
    def _check_effect(self) -> "Override":
        if (self.bits, self.group_size, self.symmetric, self.ignore) == (None, None, None, False):
            raise FieldError(("match",), "expected bits, group_size, symmetric or ignore beside it")
        return self


class Table(Section):
    """How the embedding or the head is quantised: symmetrically, in rows of the vocabulary."""

    bits: Literal[2, 3, 4, 5, 6, 8] = 8
    group_size: GroupSize = "channel"

    def scheme(self, inputs: int) -> Scheme:
        """The same for rows of so many numbers, as plans and solvers take it."""
        size = auto_group_size(inputs) if self.group_size == "auto" else self.group_size
        return Scheme(self.bits, size if isinstance(size, int) else None)


class Quantize(Section):
    """Which weights become which integers. `method: none` writes the rotated 16-bit model."""

    method: Literal["gptq", "rtn", "rsq", "none"] = "gptq"
    grid: Literal["uniform"] = "uniform"
    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    # inputs that share a scale: any number that divides them, `channel` (or -1) for all, or `auto`
    group_size: GroupSize = "auto"
    symmetric: bool = True
    # hessian: error weighted by diag(H), gptq's default; magnitude: |e|^2.4, rtn's default, which
    # is as none from 8 bits on
    clip_search: Literal["hessian", "magnitude", "none"] = "hessian"
    refine_sweeps: int = Field(5, ge=0)  # coordinate descent after the column loop
    damping: Number = Field(0.01, ge=0)  # share of mean(diag H) that is added to the diagonal
    act_order: bool = False
    target: Target = Target()
    token_importance: TokenImportance = TokenImportance()
    experts: Experts = Experts()
    # null leaves them in 16 bits. Where both are one table (tied, not rotated) `embedding` is for
    # the head too. `head` wins over `ignore` and `overrides`.
    embedding: Table | None = None
    head: Table | None = None
    ignore: Patterns = Field(["lm_head"])
    overrides: list[Override] = Field([])

    @field_validator("overrides")
    @classmethod
    def _check_overrides(cls, overrides: list[Override]) -> list[Override]:
        check_patterns(override.match for override in overrides)
        return overrides

    @model_validator(mode="after")
    def _check_tables(self) -> "Quantize":
        for name in ("embedding", "head"):
            if self.method == "none" and getattr(self, name) is not None:
                raise FieldError((name,), "method none quantises nothing: leave it out")
        return self

    @property
    def has_tables(self) -> bool:
        """Whether the embedding or the head has a section of its own."""
        return self.embedding is not None or self.head is not None

    def scheme_for(self, module_name: str, inputs: int) -> Scheme | None:
        """The scheme of a linear by its full name and width; None if it stays unquantised.

        `ignore` comes before `overrides`; the first override that matches is the only one used.
        """
        if not self.quantises(module_name):
            return None
        hit = self._override(module_name)
        bits = hit.bits if hit and hit.bits is not None else self.bits
        symmetric = hit.symmetric if hit and hit.symmetric is not None else self.symmetric
        asked = self.group_size_for(module_name)
        size = asked if isinstance(asked, int) else None
        return Scheme(bits, auto_group_size(inputs) if asked == "auto" else size, symmetric)

    def quantises(self, module_name: str) -> bool:
        """Whether a linear has a scheme."""
        hit = self._override(module_name)
        left = hit is not None and (hit.ignore or hit.bits == 16)
        ignored = any(matches(p, module_name) for p in self.ignore)
        return not (left or ignored or self.method == "none")

    def _override(self, module_name: str) -> Override | None:
        return next((o for o in self.overrides if matches(o.match, module_name)), None)

    def group_size_for(self, module_name: str) -> int | str:
        """What the recipe asks of a linear by its full name: a number, `channel` or `auto`."""
        hit = self._override(module_name)
        return hit.group_size if hit and hit.group_size is not None else self.group_size

    def has_own_width(self, module_name: str) -> bool:
        """Whether an override says how many bits this linear has, so that nothing else may."""
        hit = self._override(module_name)
        return hit is not None and (hit.ignore or hit.bits is not None)

    def left_out(self, module_names: Iterable[str]) -> dict[str, list[str]]:
        """What each pattern of `ignore` matches of the modules; nothing where no method is."""
        names = list(module_names) if self.method != "none" else []
        return {p: found for p in self.ignore if (found := [n for n in names if matches(p, n)])}

    def unmatched(self, module_names: Iterable[str]) -> list[str]:
        """The patterns of `ignore` and `overrides` that name none of the modules: likely typos."""
        names = list(module_names)
        patterns = [*self.ignore, *(o.match for o in self.overrides)]
        return [p for p in patterns if not any(matches(p, name) for name in names)]
