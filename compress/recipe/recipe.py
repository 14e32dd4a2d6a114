"""The recipe: everything that decides the bytes of a compressed model, and how it is measured.

A YAML file, one class per section. Every key has a default, the paper's where there is one, and
unknown keys are errors that name the file, the line and the field. What is automatic is resolved
when the recipe is read, so `dump` writes a recipe that makes the same bytes again.

    model: meta-llama/Llama-3.2-1B      # short for model: {path: ...}
    quantize: {bits: 4}

The sections are in `sections.py` and, those with most keys, in files of their own.

    recipe = Recipe.load("recipes/demo-lm.yaml", overrides=["quantize.bits=4"])
"""

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import yaml
from pydantic import PrivateAttr, ValidationError, model_validator

from compress.errors import RecipeError, did_you_mean
from compress.recipe.pruning import PruneVisualTokens
from compress.recipe.quantize import Quantize
from compress.recipe.sections import Allocate, Calibration, Evaluate, Model, Rotate, Save, Section
from compress.recipe.source import FieldError, Source
from compress.recipe.token_importance import HARD_MASKS, TokenImportance


class Recipe(Section):
    """A whole recipe. `evaluate: null` measures nothing."""

    name: str = "recipe"
    model: Model = Model()
    calibration: Calibration = Calibration()
    rotate: Rotate = Rotate()
    allocate: Allocate | None = None
    quantize: Quantize = Quantize()
    prune_visual_tokens: PruneVisualTokens | None = None
    save: Save = Save()
    evaluate: Evaluate | None = None

    _folder: Path | None = PrivateAttr(None)  # of the file it was read from

    @model_validator(mode="after")
    def _resolve(self) -> "Recipe":
        """Replaces what is automatic by what it means for this recipe."""
        quantize, importance = self.quantize, self.quantize.token_importance
        changes: dict[str, object] = {}
        if quantize.method == "rsq":
            if self.rotate.kind == "none":
                raise FieldError(("quantize", "method"), "rsq rotates, but rotate.kind is none")
            if importance.name == "uniform":
                raise FieldError(
                    ("quantize", "method"), "rsq weights tokens, but token_importance is uniform"
                )
            changes["method"] = "gptq"
        if self.allocate and quantize.method == "none" and self.allocate.method != "remove":
            raise FieldError(("allocate",), "chooses bit widths, but quantize.method is none")
        if quantize.method == "rtn" and quantize.clip_search == "hessian":
            if "clip_search" in quantize.model_fields_set:
                raise FieldError(
                    ("quantize", "clip_search"),
                    "hessian needs calibration, which rtn does not do: use magnitude or none",
                )
            changes["clip_search"] = "magnitude"
        self._check_tokens(importance)
        if quantize.target.name == "full_precision" and quantize.method in ("rtn", "none"):
            raise FieldError(
                ("quantize", "target"),
                f"full_precision needs calibration, which {quantize.method} does not do: use gptq",
            )
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

    def _check_tokens(self, importance: TokenImportance) -> None:
        """FieldError for parts of a window, or clusters of its tokens, that it has too few for."""
        length = self.calibration.length
        if importance.parts > length:
            raise FieldError(
                ("quantize", "token_importance", "chunks"),
                f"expected at most calibration.length ({length}) of them, found {importance.parts}",
            )
        if importance.name == "cluster" and importance.centroids >= length:
            raise FieldError(
                ("quantize", "token_importance", "centroids"),
                f"expected fewer than calibration.length ({length}), found {importance.centroids}",
            )

    def _best_minimum(self) -> float:
        """RSQ section 5.2 (rotated) and appendix C.5 (not rotated)."""
        importance = self.quantize.token_importance
        if importance.name in HARD_MASKS or importance.without_range:
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
        A path among `evaluate.tasks` is taken from `overrides` alone.
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
        recipe = cls._validated(source, file.resolve().parent)
        _refuse_task_files(recipe, source)
        return recipe

    @classmethod
    def of(
        cls, given: "Recipe | str | Path | Mapping[str, object]", model: str | Path | None = None
    ) -> "Recipe":
        """A recipe, the name of a shipped one, a file, or plain values; `model` replaces its model.

        Raises RecipeError for what is none of these.
        """
        if isinstance(given, str | Path):
            return cls.load(given, model=None if model is None else str(model))
        recipe = given if isinstance(given, Recipe) else cls.from_dict(given)
        return recipe if model is None else recipe.with_changes(model={"path": str(model)})

    @classmethod
    def from_dict(cls, data: Mapping[str, object], source: str = "recipe") -> "Recipe":
        """A recipe from plain values; RecipeError with `source` as the place."""
        return cls._validated(Source(dict(data), {(): source}))

    @classmethod
    def _validated(cls, source: Source, folder: Path | None = None) -> "Recipe":
        try:
            recipe = cls.model_validate(source.data)
        except ValidationError as error:
            raise RecipeError(source.one_line(error, cls)) from error
        recipe._folder = folder
        pruning = recipe.prune_visual_tokens
        if pruning is not None and pruning.strategy is not None and pruning.strategy.file:
            # The file's settings decide the bytes, so the recipe holds them, not the file's name.
            found = recipe.resolve_path(pruning.strategy.file)
            object.__setattr__(recipe, "prune_visual_tokens", pruning.read(found))
        return recipe

    def with_changes(self, **sections: object) -> "Recipe":
        """This recipe with other values: a section's mapping changes the keys it names."""
        data = self.model_dump()
        for name, value in sections.items():
            if isinstance(value, Mapping):
                value = {**(data[name] or {}), **value}
            data[name] = value
        return self._validated(Source(data, {(): "recipe"}), self._folder)

    def dump(self) -> str:
        """The resolved recipe as YAML, every default written; loads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True, width=100)

    def resolve_path(self, path: str) -> str:
        """A model or data file as somewhere to read it from; a name that is no file is a hub id.

        A relative path is looked up from the current folder, the recipe's folder and its parent;
        `recipes/...` also beside the shipped recipes. Raises RecipeError for a path that does not
        exist and cannot be a hub id (`name` or `owner/name`).
        """
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

    @property
    def reads_windows(self) -> bool:
        """Whether choosing widths reads calibration text."""
        return self.allocate is not None and self.allocate.reads_windows

    @property
    def calibrates(self) -> bool:
        """Whether the run reads calibration data at all."""
        return self.quantize.method == "gptq" or self.reads_windows

    def model_location(self) -> str:
        """The folder or hub id of the model. Raises RecipeError if the recipe names none."""
        if self.model.path is None:
            raise RecipeError(
                f"recipe {self.name!r} names no model: give --model, or model: in the recipe"
            )
        return self.resolve_path(self.model.path)


def _refuse_task_files(recipe: Recipe, source: Source) -> None:
    """RecipeError for a path among the tasks of a recipe's file: what lies there may run code."""
    for i, task in enumerate(recipe.evaluate.tasks if recipe.evaluate else ()):
        path = task.endswith((".yaml", ".yml")) or "/" in task or "\\" in task
        if path and source.in_file(("evaluate", "tasks", i)):
            raise RecipeError(
                f"{source.place(('evaluate', 'tasks', i))}: evaluate.tasks[{i}]: expected the name "
                f"of a task, found the path {task!r}: a task's file can run code, so it is taken "
                f"from the command line alone (--set 'evaluate.tasks=[{task}]')"
            )


def shipped_folder() -> Path:
    """The folder of the recipes that come with the package."""
    return Path(str(files("compress.recipes")))


def shipped_recipes() -> list[tuple[str, str, Path]]:
    """Name (`smollm2/rsq`), first comment line and file of every shipped recipe, sorted by name."""
    found, top = [], shipped_folder()
    for path in sorted(top.rglob("*.yaml")):
        name = path.relative_to(top).with_suffix("").as_posix()
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found.append((name, first.removeprefix("#").strip(), path))
    return sorted(found)


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
