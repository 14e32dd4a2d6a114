"""The sections of a recipe: what each key is, its default, and what may stand there.

Every key has a default, the paper's where there is one; unknown keys are errors. Sources: RSQ
(arXiv 2503.01820) for rotation and token importance, section 5.2 and appendix C.5 for `minimum`;
GPTQ (arXiv 2210.17323) for damping and act-order; arXiv 2406.17415 for `allocate`.

    Quantize(bits=3, group_size=64).scheme_for("model.layers.0.mlp.up_proj")
"""

import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from compress.eval.settings import EvaluationSettings
from compress.recipe.expressions import check_expression
from compress.recipe.source import FieldError
from compress.registry import LAYER_IMPORTANCE, TOKEN_IMPORTANCE, Registry
from compress.scheme import Scheme

# Hard masks in the paper: the tokens they leave out count for nothing.
HARD_MASKS = ("first_n", "first_last_n")
# Of the correction towards the 16-bit model's output: keeps three quarters of what it gains, and a
# quarter of what it learns of the calibration windows alone; measured in docs/rsq.md.
TARGET_STRENGTH = 0.5
# Layer scores that are an error for each width.
MEASURED_SCORES = ("weight_error", "output_error", "logit_divergence")


def matches(pattern: str, name: str) -> bool:
    """Whether a full module name is `pattern`, or matches its regular expression `re:...`.

    The expression must match from the start of the name, as in compressed-tensors.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern == name


def _check_pattern(pattern: str) -> str:
    if pattern.startswith("re:"):
        check_expression(pattern[3:], pattern)
    return pattern


def _one_of(registry: Registry) -> AfterValidator:
    """A name that the registry knows: shipped, or registered by somebody else."""

    def check(name: str) -> str:
        if name not in registry.names():
            raise ValueError(registry.unknown(name))
        return name

    return AfterValidator(check)


TokenStrategyName = Annotated[str, _one_of(TOKEN_IMPORTANCE)]
LayerStrategyName = Annotated[str, _one_of(LAYER_IMPORTANCE)]
Pattern = Annotated[str, AfterValidator(_check_pattern)]
# Lax, because YAML reads `1e-2` (no point) as text.
Number = Annotated[float, Field(strict=False, allow_inf_nan=False)]
GroupSize = Literal[32, 64, 128, 256, "channel"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """A part of the recipe: no unknown keys, no silent conversion of types, no later change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    short_form: ClassVar[str | None] = None  # the key that a bare string stands for

    @model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, data: object) -> object:
        if cls.short_form and isinstance(data, str | PurePath):
            return {cls.short_form: str(data)}
        return data


class Model(Section):
    """The model that is compressed: a folder or a hub id. `--model` wins over `path`."""

    short_form = "path"
    path: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of tensors left unquantised


class Calibration(Section):
    """The data whose activations decide the rounding. Not read by `rtn` and `none`.

    For a multimodal model a FILE.jsonl may hold prompts with images (`compress.data.samples`);
    those are as long as they are, and `length`, `bos` and `expansion` are for text.
    """

    # A name of DATASETS, FILE.txt, FILE.jsonl or a hub id; with images FILE.jsonl or demo-scenes.
    dataset: str = "wikitext2"
    text_field: str = "text"
    samples: int = Field(256, ge=1)
    length: int = Field(2048, ge=2)  # tokens per window
    bos: bool = False
    expansion: int = Field(1, ge=1)  # RSQ figure 1: circular shifts of each window
    offload: Literal["auto", "ram", "disk"] = "auto"
    seed: Seed = 0

    @model_validator(mode="after")
    def _check_expansion(self) -> "Calibration":
        if self.expansion > self.length:
            raise FieldError(
                ("expansion",),
                f"expected at most length ({self.length}) shifts, found {self.expansion}",
            )
        return self


class Rotate(Section):
    """The orthogonal matrix that is folded into the weights before they are quantised."""

    short_form = "kind"
    kind: Literal["hadamard", "random", "none"] = "hadamard"
    seed: Seed = 0


class TokenImportance(Section):
    """Who matters in a sequence: scores, mapped into [minimum, maximum], raised to `power`.

    `minimum: null` is the paper's best: 0.01 with rotation, 0.1 without, 0 for the hard masks.
    """

    short_form = "name"
    name: TokenStrategyName = "attention_concentration"
    minimum: Number | None = Field(None, ge=0)
    maximum: Number = Field(1.0, gt=0)
    power: Literal[1, 2] = 1  # 1: weights r (the released code); 2: r^2 (the paper's text)

    @model_validator(mode="after")
    def _check_range(self) -> "TokenImportance":
        if self.minimum is not None and self.minimum > self.maximum:
            raise FieldError(
                ("minimum",), f"expected at most maximum ({self.maximum}), found {self.minimum}"
            )
        return self


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


class Quantize(Section):
    """Which weights become which integers. `method: none` writes the rotated 16-bit model."""

    method: Literal["gptq", "rtn", "rsq", "none"] = "gptq"
    grid: Literal["uniform"] = "uniform"
    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    group_size: GroupSize = 128
    symmetric: bool = True
    # hessian: error weighted by diag(H), gptq's default; magnitude: |e|^2.4, rtn's default
    clip_search: Literal["hessian", "magnitude", "none"] = "hessian"
    refine_sweeps: int = Field(5, ge=0)  # coordinate descent after the column loop
    damping: Number = Field(0.01, ge=0)  # share of mean(diag H) that is added to the diagonal
    act_order: bool = False
    target: Target = Target()
    token_importance: TokenImportance = TokenImportance()
    ignore: list[Pattern] = ["lm_head"]
    overrides: list[Override] = []

    def scheme_for(self, module_name: str) -> Scheme | None:
        """The scheme of a linear by its full name; None if it stays unquantised.

        `ignore` comes before `overrides`; the first override that matches is the only one used.
        """
        if self.method == "none" or any(matches(p, module_name) for p in self.ignore):
            return None
        hit = next((o for o in self.overrides if matches(o.match, module_name)), None)
        if hit and (hit.ignore or hit.bits == 16):
            return None
        bits = hit.bits if hit and hit.bits is not None else self.bits
        size = hit.group_size if hit and hit.group_size is not None else self.group_size
        symmetric = hit.symmetric if hit and hit.symmetric is not None else self.symmetric
        return Scheme(bits, None if size == "channel" else size, symmetric)

    def has_own_width(self, module_name: str) -> bool:
        """Whether an override says how many bits this linear has, so that nothing else may."""
        hit = next((o for o in self.overrides if matches(o.match, module_name)), None)
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


class LayerScore(Section):
    """How much a layer matters: higher = keep more bits (see `compress.importance.layers`)."""

    short_form = "name"
    name: LayerStrategyName = "layer_embedding_change"
    of: LayerStrategyName | None = None  # of `reverse`: the score that it turns round
    average: Literal["token", "flattened"] = "token"  # layer_embedding_change
    sink: bool = True  # layer_embedding_change: count each window's first token
    two_sided: bool = False  # outlier_weight_count: |z| > 1 instead of z > 1
    seed: Seed = 0  # random

    @model_validator(mode="after")
    def _check_reverse(self) -> "LayerScore":
        if (self.name == "reverse") != (self.of is not None):
            raise FieldError(("of",), "is the score that `reverse` turns round, and of it alone")
        if self.of == "reverse":
            raise FieldError(("of",), "expected a score, found reverse")
        return self

    @property
    def base(self) -> str:
        """The score itself, whichever way round."""
        return self.of or self.name

    @property
    def measured(self) -> bool:
        """Whether it gives an error for each width, not one number."""
        return self.name in MEASURED_SCORES


class Allocate(Section):
    """Which layer gets how many bits, within one budget.

    `method: null` is top_n for two widths and knapsack for more; `remove` leaves the least
    important layers out and keeps `quantize.bits` for the rest.
    """

    importance: LayerScore = LayerScore()
    method: Literal["top_n", "knapsack", "greedy", "evolve", "remove"] | None = None
    widths: list[Literal[2, 3, 4, 5, 6, 8]] = Field([4, 2], min_length=1)
    average_bits: Number | None = Field(None, gt=0)  # over the weights, scales not counted
    budget: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?[KMG]B$")] | None = None  # of the file
    maximum_kl: Number | None = Field(None, gt=0)  # predicted; needs importance: logit_divergence
    narrow: int | None = Field(None, ge=0)  # so many units at the narrower width, or removed
    unit: Literal["layer", "fused_group"] = "layer"
    samples: int = Field(32, ge=1)  # calibration windows that a measured score is taken on
    generations: int = Field(50, ge=1)  # evolve
    offspring: int = Field(8, ge=1)
    seed: Seed = 0

    @property
    def reads_windows(self) -> bool:
        """Whether the scores, or the search for widths, read calibration text."""
        walked = ("layer_embedding_change", *MEASURED_SCORES)
        return self.method == "evolve" or self.importance.base in walked

    @model_validator(mode="after")
    def _check(self) -> "Allocate":
        bounds = ("average_bits", "budget", "maximum_kl", "narrow")
        given = [name for name in bounds if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise FieldError(("average_bits",), f"expected one of {', '.join(bounds)}: {found}")
        if len(set(self.widths)) != len(self.widths):
            raise FieldError(("widths",), f"expected each once, found {self.widths}")
        if self.method is None:
            wide = len(self.widths) > 2 or self.maximum_kl is not None
            object.__setattr__(self, "method", "knapsack" if wide else "top_n")
        if self.method == "top_n" and len(self.widths) != 2:
            raise FieldError(("widths",), f"top_n chooses between two, found {self.widths}")
        if self.narrow is not None and self.method not in ("top_n", "remove"):
            raise FieldError(("narrow",), "is for top_n and remove: give average_bits or budget")
        if self.method == "remove" and (self.narrow is None or self.unit != "layer"):
            raise FieldError(("method",), "remove takes whole layers, and `narrow` of them")
        if self.maximum_kl is not None and self.importance.name != "logit_divergence":
            raise FieldError(
                ("maximum_kl",), "bounds a predicted KL, so importance must be logit_divergence"
            )
        if self.maximum_kl is not None and self.method == "evolve":
            raise FieldError(("maximum_kl",), "is predicted, evolve measures: use knapsack")
        return self


class Save(Section):
    """How the result is written. Sizes are decimal, as transformers counts them."""

    format: Literal["compressed-tensors"] = "compressed-tensors"
    shard_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*[KMG]B$")] = "5GB"


class Perplexity(Section):
    """Perplexity on a dataset's held-out part. `stride: null` = length: windows do not overlap."""

    short_form = "dataset"
    dataset: str = "wikitext2"
    text_field: str = "text"
    length: int = Field(2048, ge=2)
    stride: int | None = Field(None, ge=1)
    bos: bool = False
    tokens: int | None = Field(None, ge=2)  # only the first so many tokens of the text
    per_document: bool = False  # each document on its own, cut to length, not one stream

    @model_validator(mode="after")
    def _check_stride(self) -> "Perplexity":
        if self.stride is not None and self.stride > self.length:
            # Tokens between two windows would never be predicted.
            raise FieldError(
                ("stride",), f"expected at most length ({self.length}), found {self.stride}"
            )
        return self


class Evaluate(Section):
    """What is measured afterwards. `baseline` measures the uncompressed model beside it."""

    tasks: list[str] = []
    perplexity: Perplexity | None = None
    baseline: bool = True
    limit: int | None = Field(None, ge=1)  # examples per task
    batch_size: int = Field(8, ge=1)
    seed: Seed = 0  # of what a task draws: examples in front of its items, or the items themselves

    def settings(self, dataset: str | None) -> EvaluationSettings:
        """The section as `compress.eval` takes it; `dataset`: where its text is to be read."""
        text = self.perplexity.model_dump(exclude={"dataset"}) if self.perplexity else {}
        shared = self.model_dump(exclude={"perplexity", "baseline"})
        return EvaluationSettings(perplexity=dataset, **shared, **text)
