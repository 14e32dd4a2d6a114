"""What the two kinds of comparison share: entries go in, runs with their figures come out.

    study: Study = ResultComparison(recipe, "cpu", observer)      # or PruningComparison
    for run in study.runs([Entry(recipe, seed=0, folder=Path("out/name-0"))]): ...

Figures are kept on disk with what they depend on, and taken again only where that has changed. Of
several ranks each takes those of a block of entries, as one process takes them.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

from compress.pipeline.provenance import versions
from compress.ranks import Ranks
from compress.recipe.recipe import Recipe
from compress.recipe.sections import Evaluate
from compress.storage.files import write_json

LAYOUT = 2  # of kept figures; those that have less are taken again


@dataclass(frozen=True)
class Entry:
    """A recipe under one seed, and the folder for what comes of it."""

    recipe: Recipe
    seed: int
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.recipe.name}, seed {self.seed}"


class Run(TypedDict):
    """An entry that was measured, in JSON. Sizes are of results, a strategy of what only prunes."""

    name: str
    seed: int
    folder: str
    seconds: float  # of making it
    bits: NotRequired[float]  # average over the quantised weights
    bytes: NotRequired[int]
    original: NotRequired[int]  # bytes before
    unchecked: NotRequired[list[str]]  # checks that its run has left out
    calibration_tokens: NotRequired[int]  # of all windows, expanded; 0: it calibrates nothing
    strategy: NotRequired[dict[str, Any]]
    asked: NotRequired[float | None]  # the share to keep, where no strategy keeps so little
    evaluation: dict[str, Any]  # as `compress.evaluate` gives it


class Study(Protocol):
    """One kind of comparison, of recipes on one model."""

    def runs(self, entries: Sequence[Entry]) -> Iterator[Run]:
        """Each entry, in order: made and measured now, or found as an earlier call left it.

        All ranks are given all of them. Raises UsageError, before anything is made, for an entry
        that does not fit the model.
        """
        ...


def shared_runs(
    entries: Sequence[Entry], run: Callable[[Entry], Run], ranks: Ranks
) -> Iterator[Run]:
    """`run` of each entry, in order; each rank does a block of them, and all are told of all."""
    if ranks.size == 1:
        yield from map(run, entries)
        return
    own = [run(entries[number]) for number in ranks.share(len(entries))]
    ranks.wait()  # a search may take one of them long
    for found in ranks.collect(own):
        yield from found


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with this seed for all that it draws.

    Calibration, rotation, clusters of tokens, a random order of layers, an evolving allocation, a
    pruning strategy and its search.
    """
    changes: dict[str, Any] = {"calibration": {"seed": seed}, "rotate": {"seed": seed}}
    tokens = recipe.quantize.token_importance
    if tokens.name == "cluster":
        changes["quantize"] = {"token_importance": tokens.model_dump() | {"seed": seed}}
    if recipe.allocate is not None:
        changes["allocate"] = {"seed": seed}
        importance = recipe.allocate.importance
        if "random" in (importance.base, importance.weighted_by):
            score = importance.model_dump() | {"seed": seed}
            changes["allocate"]["importance"] = score
    section = recipe.prune_visual_tokens
    if section is not None:
        parts: dict[str, Any] = {}
        if section.strategy is not None and section.strategy.method == "random":
            parts["strategy"] = section.strategy.model_dump() | {"seed": seed}
        if section.search is not None:
            parts["search"] = section.search.model_dump() | {"seed": seed}
        changes["prune_visual_tokens"] = parts
    return recipe.with_changes(**changes)


def conditions_of(
    section: Evaluate, device: str, **fingerprints: str | dict[str, str]
) -> dict[str, Any]:
    """What figures depend on: plain JSON values. `fingerprints`: of models, and of data."""
    return fingerprints | {
        "evaluate": section.model_dump(mode="json"),
        "device": device.partition(":")[0],  # which of several GPUs does not matter
        "versions": versions(),
        "layout": LAYOUT,
    }


def kept(file: Path, conditions: dict[str, Any], name: str) -> Any:
    """What `keep` wrote under these conditions; None for others, and for a file cut short."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found.get(name) if found.get("conditions") == conditions else None


def keep(file: Path, conditions: dict[str, Any], name: str, value: Any) -> None:
    write_json(file, {"conditions": conditions, name: value})
