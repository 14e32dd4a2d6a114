"""The recipe: everything that decides the bytes of a compressed model, and how it is measured.

A YAML file, one class per section. Every key has a default, the paper's where there is one, and
unknown keys are errors that name the file, the line and the field. What is automatic is resolved
when the recipe is read, so `dump` writes a recipe that makes the same bytes again.

    model: meta-llama/Llama-3.2-1B      # short for model: {path: ...}
    quantize: {bits: 4}

Sources: RSQ (arXiv 2503.01820) for rotation and token importance, section 5.2 and appendix C.5 for
`minimum`; GPTQ (arXiv 2210.17323) for damping and act-order.

    recipe = Recipe.load("recipes/demo-lm.yaml", overrides=["quantize.bits=4"])
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from compress.calibration.text import DATASETS
from compress.errors import RecipeError, did_you_mean
from compress.recipe_source import FieldError, Source

# The strategies of `compress.importance.tokens`: named here, so that a recipe needs no torch.
TOKEN_STRATEGIES = (
    "uniform",
    "attention_concentration",
    "activation_norm",
    "activation_difference",
    "token_frequency",
    "token_similarity",
    "first_n",
    "first_last_n",
)
# Hard masks in the paper: the tokens they leave out count for nothing.
HARD_MASKS = ("first_n", "first_last_n")


def matches(pattern: str, name: str) -> bool:
    """Whether a full module name is `pattern`, or matches its regular expression `re:...`.

    The expression must match from the start of the name, as in compressed-tensors.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern == name


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


def _check_strategy(name: str) -> str:
    if name not in TOKEN_STRATEGIES:
        # Slow import, and only needed for a strategy that somebody else has registered.
        from compress.importance.tokens import TOKEN_IMPORTANCE

        if name not in TOKEN_IMPORTANCE:
            known = ", ".join(TOKEN_IMPORTANCE)
            near = did_you_mean(name, TOKEN_IMPORTANCE)
            raise ValueError(f"unknown strategy {name!r}{near}: expected one of {known}")
    return name


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
    def _expand_short_form(cls, data: Any) -> Any:
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
    """The text whose activations decide the rounding. Not read by `rtn` and `none`."""

    dataset: str = "wikitext2"  # a name of DATASETS, FILE.txt, FILE.jsonl or a hub id
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
    name: Annotated[str, AfterValidator(_check_strategy)] = "attention_concentration"
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


@dataclass(frozen=True)
class Scheme:
    """How one linear is quantised. `group_size` None: one scale per output channel."""

    bits: int
    group_size: int | None
    symmetric: bool
    grid: str


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
        return Scheme(bits, None if size == "channel" else size, symmetric, self.grid)

    def unmatched(self, module_names: Iterable[str]) -> list[str]:
        """The patterns of `ignore` and `overrides` that name none of the modules: likely typos."""
        names = list(module_names)
        patterns = [*self.ignore, *(o.match for o in self.overrides)]
        return [p for p in patterns if not any(matches(p, name) for name in names)]


class Save(Section):
    """How the result is written. Sizes are decimal, as transformers counts them."""

    format: Literal["compressed-tensors"] = "compressed-tensors"
    shard_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*[KMG]B$")] = "5GB"

    @property
    def shard_bytes(self) -> int:
        return int(self.shard_size[:-2]) * {"K": 10**3, "M": 10**6, "G": 10**9}[self.shard_size[-2]]


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


class Recipe(Section):
    """A whole recipe. `evaluate: null` measures nothing."""

    name: str = "recipe"
    model: Model = Model()
    calibration: Calibration = Calibration()
    rotate: Rotate = Rotate()
    quantize: Quantize = Quantize()
    save: Save = Save()
    evaluate: Evaluate | None = None

    _folder: Path | None = PrivateAttr(None)  # of the file it was read from

    @model_validator(mode="after")
    def _resolve(self) -> "Recipe":
        """Replaces what is automatic by what it means for this recipe."""
        quantize, importance = self.quantize, self.quantize.token_importance
        changes: dict[str, Any] = {}
        if quantize.method == "rsq":
            if self.rotate.kind == "none":
                raise FieldError(("quantize", "method"), "rsq rotates, but rotate.kind is none")
            if importance.name == "uniform":
                raise FieldError(
                    ("quantize", "method"), "rsq weights tokens, but token_importance is uniform"
                )
            changes["method"] = "gptq"
        if quantize.method == "rtn" and quantize.clip_search == "hessian":
            if "clip_search" in quantize.model_fields_set:
                raise FieldError(
                    ("quantize", "clip_search"),
                    "hessian needs calibration, which rtn does not do: use magnitude or none",
                )
            changes["clip_search"] = "magnitude"
        if importance.minimum is None:
            minimum = self._best_minimum()
            if minimum > importance.maximum:
                raise FieldError(
                    ("quantize", "token_importance", "maximum"),
                    f"is below the automatic minimum ({minimum}): give minimum as well",
                )
            changes["token_importance"] = importance.model_copy(update={"minimum": minimum})
        if changes:
            # A frozen model is still being built here, and sections may be shared: copy, then set.
            object.__setattr__(self, "quantize", quantize.model_copy(update=changes))
        return self

    def _best_minimum(self) -> float:
        """RSQ section 5.2 (rotated) and appendix C.5 (not rotated)."""
        if self.quantize.token_importance.name in HARD_MASKS:
            return 0.0
        return 0.1 if self.rotate.kind == "none" else 0.01

    def __eq__(self, other: object) -> bool:
        """Same settings; where a recipe was read from does not count."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    @classmethod
    def load(
        cls, path: str | Path, overrides: Sequence[str] = (), model: str | None = None
    ) -> "Recipe":
        """Reads a recipe file, or a shipped recipe by its bare name.

        `model` replaces `model.path`; `overrides` are `section.key=value` and win over all.
        Raises RecipeError, one line: file and line (or the override), field, expected, found.
        """
        file = _find_recipe(path)
        source = Source.read(file)
        source.data.setdefault("name", file.stem)
        if model is not None:
            named = source.data.get("model")
            before = named.get("path") if isinstance(named, dict) else named
            source.put(("model", "path"), model, "--model", cls)
            if model != before:  # a revision belongs to the model that the file named
                source.data["model"].pop("revision", None)
        for assignment in overrides:
            source.assign(assignment, cls)
        recipe = cls._validated(source)
        recipe._folder = file.resolve().parent
        return recipe

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "recipe") -> "Recipe":
        """A recipe from plain values; RecipeError with `source` as the place."""
        return cls._validated(Source(dict(data), {(): source}))

    @classmethod
    def _validated(cls, source: Source) -> "Recipe":
        try:
            return cls.model_validate(source.data)
        except ValidationError as error:
            raise RecipeError(source.one_line(error, cls)) from error

    def with_changes(self, **sections: Any) -> "Recipe":
        """This recipe with other values: a section's mapping changes the keys it names."""
        data = self.model_dump()
        for name, value in sections.items():
            data[name] = data[name] | value if isinstance(value, Mapping) else value
        changed = self.from_dict(data)
        changed._folder = self._folder
        return changed

    def dump(self) -> str:
        """The resolved recipe as YAML, every default written; loads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True, width=100)

    def resolve_path(self, path: str) -> str:
        """A model or data file as somewhere to read it from; a name that is no file is a hub id.

        A relative path is looked up from the current folder, the recipe's folder and its parent;
        `recipes/...` also beside the shipped recipes. Raises RecipeError for a path that does not
        exist and cannot be a hub id (`name` or `owner/name`).
        """
        if path in DATASETS:
            return path
        given = Path(path).expanduser()
        if given.exists():
            return str(given)
        folders = [self._folder, self._folder.parent] if self._folder else []
        if given.parts[:1] == ("recipes",):
            folders.append(shipped_folder().parent)
        for folder in folders:
            if (folder / given).exists():
                return str(folder / given)
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
            places = ", ".join(map(str, dict.fromkeys([Path.cwd(), *folders])))
            raise RecipeError(f"{path!r} does not exist in {places}, and is not a hub id")
        return path

    def model_location(self) -> str:
        """The folder or hub id of the model. Raises RecipeError if the recipe names none."""
        if self.model.path is None:
            raise RecipeError(
                f"recipe {self.name!r} names no model: give --model, or model: in the recipe"
            )
        return self.resolve_path(self.model.path)


def shipped_folder() -> Path:
    """The folder of the recipes that come with the package."""
    import compress.recipes

    return Path(compress.recipes.__file__).parent


def shipped_recipes() -> list[tuple[str, str, Path]]:
    """Name, first comment line and file of every shipped recipe, sorted by name."""
    found = []
    for path in sorted(shipped_folder().glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found.append((path.stem, first.removeprefix("#").strip(), path))
    return found


def _find_recipe(path: str | Path) -> Path:
    file = Path(path).expanduser()
    if file.is_file():
        return file
    shipped = {name: found for name, _, found in shipped_recipes()}
    if str(path) in shipped:
        return shipped[str(path)]
    kind = "is a folder" if file.is_dir() else "no such file"
    raise RecipeError(
        f"{path}: {kind}{did_you_mean(file.stem, shipped)}: "
        f"expected a YAML file or one of {', '.join(shipped)}"
    )
