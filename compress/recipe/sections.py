"""The sections of a recipe: what each key is, its default, and what may stand there.

Every key has a default, the paper's where there is one; unknown keys are errors. The larger
sections are in files of their own: `quantize.py`, `token_importance.py` and `pruning.py`. Sources:
RSQ (arXiv 2503.01820) for rotation; arXiv 2406.17415 for `allocate`.

    Calibration(samples=128)
    Rotate.model_validate("random")    # Rotate(kind="random"): a bare string is the short form
"""

from pathlib import PurePath
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from compress.eval.settings import (
    WINDOW,
    CacheRequests,
    EvaluationSettings,
    batch_problem,
    limit_problem,
)
from compress.recipe.expressions import check_pattern, check_patterns, compiled
from compress.recipe.source import FieldError
from compress.registry import LAYER_IMPORTANCE, Registry

HEAD = "lm_head"  # what its last name is in every family

# Layer scores that are an error for each width.
MEASURED_SCORES = ("weight_error", "output_error", "hidden_state_error", "logit_divergence")


def matches(pattern: str, name: str) -> bool:
    """Whether a full module name is `pattern`, or matches its regular expression `re:...`.

    The expression must match from the start of the name, as in compressed-tensors. `lm_head` is the
    head of any model, also where it is inside another module.
    """
    if pattern.startswith("re:"):
        return compiled(pattern[3:]).match(name) is not None
    return pattern in (name, name.rpartition(".")[2] if pattern == HEAD else name)


def _check_pattern(pattern: str) -> str:
    check_pattern(pattern)
    return pattern


def _check_patterns(patterns: list[str]) -> list[str]:
    check_patterns(patterns)
    return patterns


def one_of(registry: Registry) -> AfterValidator:
    """A name that the registry knows: shipped, or registered by somebody else."""

    def check(name: str) -> str:
        if name not in registry.names():
            raise ValueError(registry.unknown(name))
        return name

    return AfterValidator(check)


LayerStrategyName = Annotated[str, one_of(LAYER_IMPORTANCE)]
Pattern = Annotated[str, AfterValidator(_check_pattern)]
Patterns = Annotated[list[Pattern], AfterValidator(_check_patterns)]
# Lax, because YAML reads `1e-2` (no point) as text.
Number = Annotated[float, Field(strict=False, allow_inf_nan=False)]
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
    # Key or column of the text; rows without it that have messages or conversations (ShareGPT) are
    # put into the model's chat template, a conversation a window.
    text_field: str = "text"
    # Of conversations: whose tokens count in Hessians and in token importance, beside the first.
    loss_mask: Literal["all", "assistant"] = "all"
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


class LayerScore(Section):
    """How much a layer matters: higher = keep more bits (see `compress.importance.layers`)."""

    short_form = "name"
    name: LayerStrategyName = "layer_embedding_change"
    of: LayerStrategyName | None = None  # of `reverse`: the score that it turns round
    # Of a measured score: another one, mapped onto [minimum, 1], which multiplies its errors.
    weighted_by: LayerStrategyName | None = None
    minimum: Number = Field(0.1, ge=0, le=1)  # of weighted_by
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
        if self.weighted_by is not None and not self.measured:
            raise FieldError(
                ("weighted_by",),
                f"multiplies measured errors, those of {', '.join(MEASURED_SCORES)}; "
                f"{self.name} has none",
            )
        if self.weighted_by == "reverse" or self.weighted_by in MEASURED_SCORES:
            raise FieldError(("weighted_by",), f"expected a plain score, found {self.weighted_by}")
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
        if self.maximum_kl is not None and self.importance.weighted_by is not None:
            raise FieldError(
                ("maximum_kl",),
                "bounds a predicted KL, which allocate.importance.weighted_by is not",
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
    by_position: bool = EvaluationSettings.by_position  # also by the tokens in front

    @model_validator(mode="after")
    def _check_stride(self) -> "Perplexity":
        longest = self.length or WINDOW
        if self.stride is not None and self.per_document:
            raise FieldError(("stride",), "documents are not cut in windows: leave it out")
        if self.stride is not None and self.stride > longest:
            # Tokens between two windows would never be predicted.
            raise FieldError(
                ("stride",), f"expected at most length ({longest}), found {self.stride}"
            )
        whole = self.length is not None and not self.per_document
        if whole and self.tokens is not None and self.tokens + self.bos < longest:
            raise FieldError(
                ("length",),
                f"expected at most tokens ({self.tokens}), found {self.length}: no "
                "window would be whole",
            )
        return self


class Evaluate(Section):
    """What is measured afterwards. `baseline` measures the uncompressed model beside it."""

    tasks: list[str] = []
    perplexity: Perplexity | None = None
    baseline: bool = True
    limit: int | float | None = None  # examples per task, or a share of them below 1
    batch_size: int | str = EvaluationSettings.batch_size  # auto, auto:N: of the tasks
    num_fewshot: int | None = Field(EvaluationSettings.num_fewshot, ge=0)
    # A name where the model has several; null: where it takes images and has one.
    apply_chat_template: bool | str | None = EvaluationSettings.apply_chat_template
    system_instruction: str | None = EvaluationSettings.system_instruction
    fewshot_as_multiturn: bool | None = EvaluationSettings.fewshot_as_multiturn
    gen_kwargs: dict[str, JsonValue] | None = None
    max_length: int | None = Field(EvaluationSettings.max_length, ge=2)
    add_bos_token: bool | None = EvaluationSettings.add_bos_token
    cache_requests: CacheRequests = EvaluationSettings.cache_requests
    log_samples: bool = EvaluationSettings.log_samples  # every prompt and answer, into OUT/eval
    # Of tasks that are made for a model, as ruler.
    metadata: dict[str, JsonValue] | None = None
    # Of what a task draws: examples in front of its items, or the items themselves.
    seed: Seed = EvaluationSettings.seed

    @model_validator(mode="after")
    def _check_values(self) -> "Evaluate":
        if reason := limit_problem(self.limit):
            raise FieldError(("limit",), reason)
        if reason := batch_problem(self.batch_size):
            raise FieldError(("batch_size",), reason)
        if self.fewshot_as_multiturn and self.apply_chat_template in (False, None):
            raise FieldError(
                ("fewshot_as_multiturn",), "makes turns: set apply_chat_template as well"
            )
        return self

    def settings(self, dataset: str | None) -> EvaluationSettings:
        """The section as `compress.eval` takes it; `dataset`: where its text is to be read."""
        text = self.perplexity.model_dump(exclude={"dataset"}) if self.perplexity else {}
        shared = self.model_dump(exclude={"perplexity", "baseline"})
        return EvaluationSettings(perplexity=dataset, **shared, **text)
