"""Strategies of visual-token pruning on one model: found and measured without writing checkpoints.

What only prunes leaves every weight as it is, so `compare` hands such recipes to here:
the model is loaded once, each recipe's strategy is settled (searched, if it says so), applied,
measured and taken off again. Of each recipe and seed the folder keeps

    recipe.yaml, pruning.json      the strategy, as `compress.load` and search-pruning know it
    trials.jsonl                   of its search
    measured.json                  the evaluation
    visual-tokens-N.png            what it prunes of the first images

and what is there already is not done again.

    study = PruningComparison(recipes[0], device="cpu", observer=observer)
    run = study.run(recipe, seed=0, folder=Path("out/prune-random-0"))
"""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.text import locate
from compress.errors import UsageError
from compress.observer import Observer
from compress.pruning.tower_cache import OutputCache, tower_cached
from compress.storage.files import atomic_write

if TYPE_CHECKING:
    from compress.recipe.recipe import Recipe
    from compress.recipe.strategy import PruneStrategy


def only_prunes(recipe: "Recipe") -> bool:
    """Whether the recipe prunes visual tokens and changes no weight."""
    return (
        recipe.prune_visual_tokens is not None
        and recipe.quantize.method == "none"
        and recipe.rotate.kind == "none"
        and recipe.allocate is None
    )


def seeded(recipe: "Recipe", seed: int) -> "Recipe":
    """The recipe with this seed for all that it draws.

    Calibration, rotation, a random order of layers, an evolving allocation, a pruning strategy and
    its search.
    """
    changes: dict[str, Any] = {"calibration": {"seed": seed}, "rotate": {"seed": seed}}
    if recipe.allocate is not None:
        changes["allocate"] = {"seed": seed}
        if recipe.allocate.importance.base == "random":
            score = recipe.allocate.importance.model_dump() | {"seed": seed}
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


class PruningComparison:
    """One loaded model, under one strategy after the other."""

    def __init__(self, recipe: "Recipe", device: str, observer: Observer, overwrite: bool = False):
        """`recipe`: any of those that are compared; model and evaluation are the same in all."""
        import torch

        from compress.loading.load import fastest_packing, load
        from compress.models.pretrained import local_folder
        from compress.pipeline.evaluation import Evaluator
        from compress.pruning.families import family_of
        from compress.storage.safetensors import CheckpointReader

        self.device, self.observer, self.overwrite = device, observer, overwrite
        self.source = local_folder(recipe.model_location(), recipe.model.revision)
        dtype = None if device.startswith("cuda") else torch.float32
        packed = fastest_packing(self.source, device)
        self.model, self.processor = load(self.source, device, dtype, prune=False, packed=packed)
        family_of(self.model)  # refuses a text model
        self.layers = len(self.model.model.language_model.layers)
        self.fingerprint = CheckpointReader(self.source).fingerprint()
        self.evaluator = Evaluator.of_recipe(recipe, self.source, device)
        self._samples: dict[tuple, list[Any]] = {}
        self._tower = OutputCache()

    def run(self, recipe: "Recipe", seed: int, folder: Path) -> dict[str, Any]:
        """Settles and measures one recipe under one seed, or reads what is there.

        Returns {"name", "seed", "folder", "seconds", "strategy", "asked", "evaluation"}; `asked` is
        the recipe's `keep` where no strategy of this method can keep so little.

        Raises UsageError if the folder holds the result of another recipe.
        """
        from compress.pruning.saved import apply_strategy, stop_pruning

        recipe = seeded(recipe, seed)
        begun = self._begin(recipe, folder)
        conditions = self._conditions(recipe)
        found = _read(folder / "measured.json") if begun else None
        if found is not None and found["conditions"] == conditions:
            return found["run"]
        with self._same_pictures(recipe):
            started = time.perf_counter()
            strategy, asked = self.strategy(recipe, folder)
            searched = time.perf_counter() - started
            strategy.save(folder / "pruning.json")
            apply_strategy(self.model, strategy, self.processor)
            try:
                scores = self.evaluator.measure_loaded(
                    self.model, self.processor, str(folder), seed=seed, pictures=folder
                )
            finally:
                stop_pruning(self.model)
        run = {
            "name": recipe.name,
            "seed": seed,
            "folder": str(folder),
            "seconds": searched,
            "strategy": strategy.model_dump(mode="json"),
            "asked": asked,
            "evaluation": scores,
        }
        _write(folder / "measured.json", {"conditions": conditions, "run": run})
        return run

    def _same_pictures(self, recipe: "Recipe") -> Any:
        """All recipes are asked about the same pictures: the tower need not look at them again."""
        section = recipe.prune_visual_tokens
        if section.strategy is not None and section.strategy.vit_layer is not None:
            return contextlib.nullcontext()
        return tower_cached(self.model, self._tower)

    def strategy(self, recipe: "Recipe", folder: Path) -> tuple["PruneStrategy", float | None]:
        """The recipe's strategy on this model; with it the budget that was asked for, if no
        strategy of this method meets it and the nearest is taken instead."""
        section = recipe.prune_visual_tokens
        assert section is not None
        if section.search is not None:
            from compress.pruning.search import search_strategy

            found = search_strategy(
                self.model, self._prompts(recipe, section.search.samples, section.search.seed),
                section.keep,
                start=section.strategy_for(self.layers), variables=section.search.variables,
                trials=section.search.trials, sampler=section.search.sampler,
                seed=section.search.seed, path=folder / "trials.jsonl", processor=self.processor,
            )  # fmt: skip
            return found.strategy, None
        try:
            strategy = section.strategy_for(self.layers)
            strategy.counts(self._visual_tokens(recipe), self.layers)
        except UsageError:
            nearest = self._least(recipe)
            if nearest is None:
                raise
            return nearest, section.keep
        return strategy, None

    def _least(self, recipe: "Recipe") -> "PruneStrategy | None":
        """Of a method that ranks inside the language model, the strategy that keeps least: all
        tokens before its first stage, and one in the end. None for others: they can keep less."""
        from compress.recipe.strategy import LANGUAGE_ATTENTION, PruneStrategy

        section = recipe.prune_visual_tokens
        given = section.strategy
        if given is None or given.method not in LANGUAGE_ATTENTION or given.ratios is not None:
            return None
        options = given.options() | ({"stages": section.stages} if section.stages else {})
        whole = PruneStrategy.for_budget(given.method, 1.0, self.layers, **options)
        stages = len(whole.stages)
        ratio = (1 / self._visual_tokens(recipe)) ** (1 / stages)
        least = PruneStrategy(**whole.model_dump() | {"ratios": (ratio,) * stages})
        return least if least.average_kept(self.layers) > section.keep else None

    def _visual_tokens(self, recipe: "Recipe") -> int:
        """Of the smallest image of the calibration prompts, or of the tower's own size."""
        from compress.data.samples import DEMO_SCENES
        from compress.data.source import has_images

        dataset = recipe.calibration.dataset
        if dataset == DEMO_SCENES or (
            dataset.endswith(".jsonl") and has_images(locate(recipe, dataset))
        ):
            token = self.model.config.image_token_id
            prompts = self._prompts(recipe, 1, recipe.calibration.seed)
            return min(int((p["input_ids"] == token).sum(dim=1).min()) for p in prompts)
        vision = self.model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def _prompts(self, recipe: "Recipe", count: int, seed: int) -> list[Any]:
        """So many calibration prompts, those of equal shapes as a batch; read once."""
        from compress.data.samples import in_batches, read_samples

        path = locate(recipe, recipe.calibration.dataset)
        key = (path, count, seed)
        if key not in self._samples:
            self._samples[key] = in_batches(read_samples(path, self.processor, count, seed))
        return self._samples[key]

    def _begin(self, recipe: "Recipe", folder: Path) -> bool:
        """Prepares the folder; whether it was begun by this very recipe."""
        text = recipe.with_changes(evaluate=None).dump()
        file = folder / "recipe.yaml"
        if file.is_file() and file.read_text(encoding="utf-8") == text and not self.overwrite:
            return True
        if folder.exists() and any(folder.iterdir()):
            if not self.overwrite:
                raise UsageError(
                    f"{folder} holds the result of another recipe: choose another --output, or "
                    "replace it with --overwrite"
                )
            for name in ("trials.jsonl", "measured.json"):
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as written:
            written.write(text.encode())
        return False

    def _conditions(self, recipe: "Recipe") -> dict[str, Any]:
        """What a measurement depends on beside the recipe that is written in the folder."""
        from compress.pipeline.provenance import versions

        assert recipe.evaluate is not None
        return {
            "evaluate": recipe.evaluate.model_dump(mode="json"),
            "model": self.fingerprint,
            "device": self.device,
            "versions": versions(),
        }


def kept_per_prompt(scores: dict[str, Any]) -> dict[str, float]:
    """The averages of an evaluation's `pruning`: share kept, FLOPs and KV bytes of a prompt."""
    pruning = scores.get("pruning")
    if not pruning or not pruning["prompts"]:
        return {}
    return {
        "kept": pruning["average_kept"],
        "kv_bytes": pruning["kv_bytes"] / pruning["prompts"],
        "prefill_flops": pruning["prefill_flops"] / pruning["prompts"],
    }


def unpruned_per_prompt(scores: dict[str, Any]) -> dict[str, float]:
    """The same figures had nothing been pruned."""
    pruning = scores.get("pruning")
    if not pruning or not pruning["prompts"]:
        return {}
    return {
        "kept": 1.0,
        "kv_bytes": pruning["kv_bytes_unpruned"] / pruning["prompts"],
        "prefill_flops": pruning["prefill_flops_unpruned"] / pruning["prompts"],
    }


def retained(scores: dict[str, Any]) -> dict[str, float]:
    """Of each task the share of the baseline's first metric that is left: `TASK retained`."""
    left = {}
    for task, metrics in scores.get("results", {}).items():
        before = scores.get("baseline", {}).get("results", {}).get(task, {})
        metric = next(iter(metrics), None)
        if metric is not None and before.get(metric) and math.isfinite(before[metric]):
            left[f"{task} retained"] = metrics[metric] / before[metric]
    return left


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file, None if there is none or a kill has cut it short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _write(path: Path, value: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())
