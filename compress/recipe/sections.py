"""The sections of a recipe: what each key is, its default, and what may stand there.

Every key has a default, the paper's where there is one; unknown keys are errors. Sources: RSQ
(arXiv 2503.01820) for rotation and token importance, section 5.2 and appendix C.5 for `minimum`;
GPTQ (arXiv 2210.17323) for damping and act-order; arXiv 2406.17415 for `allocate`.

    Quantize(bits=3).scheme_for("model.layers.0.mlp.up_proj", inputs=576)    # Scheme(3, 64)
"""

import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from compress.eval.settings import WINDOW, EvaluationSettings
from compress.recipe.expressions import check_pattern, check_patterns, compiled
from compress.recipe.source import FieldError
from compress.registry import LAYER_IMPORTANCE, TOKEN_IMPORTANCE, Registry
from compress.scheme import Scheme

# Hard masks in the paper: the tokens they leave out count for nothing.
HARD_MASKS = ("first_n", "first_last_n", "chunks")
# Token scores that can be below zero, which weights cannot.
SIGNED_SCORES = ("activation_difference", "token_frequency", "dot")
# Of the correction towards the 16-bit model's output: keeps three quarters of what it gains, and a
# quarter of what it learns of the calibration windows alone; measured in docs/rsq.md.
TARGET_STRENGTH = 0.5
# Layer scores that are an error for each width.
MEASURED_SCORES = ("weight_error", "output_error", "logit_divergence")
AUTO_SIZES = (128, 64, 32)  # of `group_size: auto`: every engine runs these, and whole rows


def matches(pattern: str, name: str) -> bool:
    """Whether a full module name is `pattern`, or matches its regular expression `re:...`.

    The expression must match from the start of the name, as in compressed-tensors.
    """
    if pattern.startswith("re:"):
        return compiled(pattern[3:]).match(name) is not None
    return pattern == name


def _check_pattern(pattern: str) -> str:
    check_pattern(pattern)
    return pattern


def _check_patterns(patterns: list[str]) -> list[str]:
    check_patterns(patterns)
    return patterns


def _one_of(registry: Registry) -> AfterValidator:
    """A name that the registry knows: shipped, or registered by somebody else."""

    def check(name: str) -> str:
        if name not in registry.names():
            raise ValueError(registry.unknown(name))
        return name

    return AfterValidator(check)


def _text_in_quotes(value: object) -> object:
    """YAML reads 0_31_32 as a number in base 8, which cannot be told from others afterwards."""
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f'expected text in quotes, such as "0_31_32", found the number {value}')
    return value


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


TokenStrategyName = Annotated[str, _one_of(TOKEN_IMPORTANCE)]
LayerStrategyName = Annotated[str, _one_of(LAYER_IMPORTANCE)]
Chunks = Annotated[str | None, BeforeValidator(_text_in_quotes)]
Pattern = Annotated[str, AfterValidator(_check_pattern)]
Patterns = Annotated[list[Pattern], AfterValidator(_check_patterns)]
# Lax, because YAML reads `1e-2` (no point) as text.
Number = Annotated[float, Field(strict=False, allow_inf_nan=False)]
GroupSize = Annotated[int | str, PlainValidator(_check_group_size)]
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
    # hessian: error weighted by diag(H), gptq's default; magnitude: |e|^2.4, rtn's default
    clip_search: Literal["hessian", "magnitude", "none"] = "hessian"
    refine_sweeps: int = Field(5, ge=0)  # coordinate descent after the column loop
    damping: Number = Field(0.01, ge=0)  # share of mean(diag H) that is added to the diagonal
    act_order: bool = False
    target: Target = Target()
    token_importance: TokenImportance = TokenImportance()
    # null leaves them in 16 bits. Where both are one table (tied, not rotated) `embedding` is for
    # the head too. `head` wins over `ignore` and `overrides`.
    embedding: Table | None = None
    head: Table | None = None
    ignore: Patterns = ["lm_head"]
    overrides: list[Override] = []

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
    # Of a quantised embedding, and of the head beside it. int-quantized: 8 bits, which transformers
    # reads, and both in one table where they are tied; pack-quantized: any width, which vLLM reads,
    # each on its own. auto: int-quantized for 8 bits.
    table_format: Literal["auto", "int-quantized", "pack-quantized"] = "auto"
    shard_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*[KMG]B$")] = "5GB"


class Perplexity(Section):
    """Perplexity on a dataset's held-out part.

    `length: null` is 2048 or the model's context where that is shorter; `stride: null` is length:
    windows do not overlap.
    """

    short_form = "dataset"
    dataset: str = "wikitext2"
    text_field: str = EvaluationSettings.text_field
    length: int | None = Field(EvaluationSettings.length, ge=2)
    stride: int | None = Field(EvaluationSettings.stride, ge=1)
    bos: bool = EvaluationSettings.bos
    tokens: int | None = Field(EvaluationSettings.tokens, ge=2)  # only the text's first so many
    per_document: bool = EvaluationSettings.per_document  # cut to length, instead of one stream

    @model_validator(mode="after")
    def _check_stride(self) -> "Perplexity":
        longest = self.length or WINDOW
        if self.stride is not None and self.stride > longest:
            # Tokens between two windows would never be predicted.
            raise FieldError(
                ("stride",), f"expected at most length ({longest}), found {self.stride}"
            )
        return self


class Evaluate(Section):
    """What is measured afterwards. `baseline` measures the uncompressed model beside it."""

    tasks: list[str] = []
    perplexity: Perplexity | None = None
    baseline: bool = True
    limit: int | None = Field(None, ge=1)  # examples per task
    batch_size: int = Field(EvaluationSettings.batch_size, ge=1)
    # Of what a task draws: examples in front of its items, or the items themselves.
    seed: Seed = EvaluationSettings.seed

    def settings(self, dataset: str | None) -> EvaluationSettings:
        """The section as `compress.eval` takes it; `dataset`: where its text is to be read."""
        text = self.perplexity.model_dump(exclude={"dataset"}) if self.perplexity else {}
        shared = self.model_dump(exclude={"perplexity", "baseline"})
        return EvaluationSettings(perplexity=dataset, **shared, **text)
