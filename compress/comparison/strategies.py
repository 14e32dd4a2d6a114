"""Strategies of visual-token pruning on one model: found and measured without writing checkpoints.

What only prunes leaves every weight as it is, so `compare` hands such recipes to here:
the model is loaded once, each recipe's strategy is settled (searched, if it says so), applied,
measured and taken off again. Of each recipe and seed the folder keeps

    recipe.yaml, pruning.json      the strategy, as `compress.load` and search-pruning know it
    trials.jsonl                   of its search
    basis.json                     hashes of the model and the prompts that it was settled on
    measured.json                  the evaluation
    visual-tokens-N.png            what it prunes of the first images

and what is there already is not done again.

    study = PruningComparison(recipes[0], "cpu", observer)
    runs = list(study.runs([Entry(recipe, 0, Path("out/prune-random-0"))]))
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from compress.comparison.study import (
    Entry,
    Run,
    conditions_of,
    keep,
    kept,
    seeded,
    shared_runs,
)
from compress.data.samples import in_batches, read_samples, sample_digests
from compress.data.source import CalibrationSource
from compress.errors import UsageError
from compress.models.pretrained import local_folder
from compress.models.skeleton import Skeleton
from compress.models.vision import Inputs
from compress.observer import Observer
from compress.pipeline.evaluation import Evaluator, evaluated_texts, load_measured
from compress.pipeline.inputs import RunInputs
from compress.pruning.families import tower_of
from compress.pruning.saved import apply_strategy, stop_pruning
from compress.pruning.search import search_as_told
from compress.pruning.tower_cache import OutputCache, tower_cached
from compress.ranks import Ranks
from compress.recipe.pruning import PruneVisualTokens
from compress.recipe.recipe import Recipe
from compress.recipe.strategy import PruneStrategy
from compress.storage.files import read_json, write_json, write_text
from compress.storage.lease import WORK_FOLDER

BASIS = "basis.json"


def only_prunes(recipe: Recipe) -> bool:
    """Whether the recipe prunes visual tokens and changes no weight."""
    return (
        recipe.prune_visual_tokens is not None
        and recipe.quantize.method == "none"
        and recipe.rotate.kind == "none"
        and recipe.allocate is None
    )


class PruningComparison:
    """One loaded model, under one strategy after the other."""

    def __init__(
        self,
        recipe: Recipe,
        device: str,
        observer: Observer,
        overwrite: bool = False,
        ranks: Ranks | None = None,
    ):
        """`recipe`: any of those that are compared; model and evaluation are the same in all."""
        self.device, self.observer, self.overwrite = device, observer, overwrite
        self.ranks = ranks or Ranks()
        folder = local_folder(recipe.model_location(), recipe.model.revision)
        self.model, self.processor = load_measured(folder, device, prune=False)
        tower_of(self.model)  # refuses a text model
        self.layers = len(self.model.model.get_decoder().layers)
        self.skeleton = Skeleton.open(folder)
        assert recipe.evaluate is not None
        resolve = recipe.resolve_path
        self.evaluator = Evaluator.of_section(recipe.evaluate, resolve, folder, device)
        self._samples: dict[tuple[str, int, int], list[Inputs]] = {}
        self._tower = OutputCache()

    def runs(self, entries: Sequence[Entry]) -> Iterator[Run]:
        """See `Study`: each entry's strategy is settled and measured before the next one's."""
        yield from shared_runs(entries, self.run, self.ranks)

    def run(self, entry: Entry) -> Run:
        """Settles and measures one recipe under one seed, or reads what is there.

        Raises UsageError if the folder holds the result of another recipe.
        """
        self.observer.stage(entry.title)
        recipe, seed, folder = seeded(entry.recipe, entry.seed), entry.seed, entry.folder
        section = recipe.prune_visual_tokens
        assert section is not None and recipe.evaluate is not None
        source = RunInputs.of(recipe, self.skeleton).source
        prompts = sample_digests(source.location) if source.images else {}
        basis = {"model": self.skeleton.reader.fingerprint()} | prompts
        file, begun = folder / "measured.json", self._begin(recipe, folder, basis)
        texts = evaluated_texts(recipe.evaluate, recipe.resolve_path)
        conditions = conditions_of(recipe.evaluate, self.device, basis=basis, texts=texts)
        found = kept(file, conditions, "run") if begun else None
        if found is not None:
            return found
        with self._same_pictures(section):
            started = time.perf_counter()
            strategy, asked = self._settle(section, source, folder / "trials.jsonl")
            searched = time.perf_counter() - started
            strategy.save(folder / "pruning.json")
            apply_strategy(self.model, strategy, self.processor)
            try:
                scores = self.evaluator.measure_loaded(
                    self.model,
                    self.processor,
                    str(folder),
                    seed=seed,
                    pictures=folder,
                    items=True,
                )
            finally:
                stop_pruning(self.model)
        run: Run = {
            "name": recipe.name,
            "seed": seed,
            "folder": str(folder),
            "seconds": searched,
            "strategy": strategy.model_dump(mode="json"),
            "asked": asked,
            "evaluation": scores,
        }
        keep(file, conditions, "run", run)
        return run

    def _begin(self, recipe: Recipe, folder: Path, basis: dict[str, str]) -> bool:
        """Prepares the folder; whether it was begun by this very recipe.

        Trials on another `basis`, hashes of the model and of the prompts, are thrown away.
        """
        text = recipe.with_changes(evaluate=None).dump()
        file = folder / "recipe.yaml"
        if file.is_file() and file.read_text(encoding="utf-8") == text and not self.overwrite:
            if read_json(folder / BASIS) != basis:
                (folder / "trials.jsonl").unlink(missing_ok=True)
                write_json(folder / BASIS, basis)
            return True
        if folder.exists() and any(path.name != WORK_FOLDER for path in folder.iterdir()):
            if not self.overwrite:
                raise UsageError(
                    f"{folder} holds the result of another recipe: choose another --output, or "
                    "replace it with --overwrite"
                )
            for name in ("trials.jsonl", "measured.json"):
                (folder / name).unlink(missing_ok=True)
        write_json(folder / BASIS, basis)
        write_text(file, text)
        return False

    def _same_pictures(self, section: PruneVisualTokens) -> AbstractContextManager[None]:
        """All recipes are asked about the same pictures: the tower need not look at them again."""
        if section.strategy is not None and section.strategy.vit_layer is not None:
            return contextlib.nullcontext()
        return tower_cached(self.model, self._tower)

    def _settle(
        self, section: PruneVisualTokens, source: CalibrationSource, trials: Path
    ) -> tuple[PruneStrategy, float | None]:
        """The section's strategy on this model; with it the budget that was asked for, if no
        strategy of this method meets it and the nearest is taken instead."""
        if section.search is not None:
            start = section.strategy_for(self.layers)
            prompts = self._prompts(source, section.search.samples, section.search.seed)
            found = search_as_told(section, start, self.model, prompts, trials, self.processor)
            return found.strategy, None
        try:
            strategy = section.strategy_for(self.layers)
            strategy.check_tokens(self._visual_tokens(source))
        except UsageError:
            nearest = self._least(section, source)
            if nearest is None:
                raise
            return nearest, section.keep
        return strategy, None

    def _least(self, section: PruneVisualTokens, source: CalibrationSource) -> PruneStrategy | None:
        """Of a method that ranks inside the language model, the strategy that keeps least: all
        tokens before its first stage, and one in the end. None for others: they can keep less."""
        given = section.strategy
        if given is None or given.ratios is not None or not section.ranks_by_language_attention:
            return None
        assert section.keep is not None
        options = given.options() | ({"stages": section.stages} if section.stages else {})
        whole = PruneStrategy.for_budget(given.method, 1.0, self.layers, **options)
        stages = len(whole.stages)
        ratio = (1 / self._visual_tokens(source)) ** (1 / stages)
        least = PruneStrategy(**whole.model_dump() | {"ratios": (ratio,) * stages})
        return least if least.average_kept(self.layers) > section.keep else None

    def _visual_tokens(self, source: CalibrationSource) -> int:
        """Of the smallest image of the calibration prompts, or of the tower's own size."""
        if source.images:
            token = self.model.config.image_token_id
            prompts = self._prompts(source, 1, source.settings.seed)
            return min(int((p["input_ids"] == token).sum(dim=1).min()) for p in prompts)
        vision = self.model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def _prompts(self, source: CalibrationSource, count: int, seed: int) -> list[Inputs]:
        """So many calibration prompts, those of equal shapes as a batch; read once."""
        key = (source.location, count, seed)
        if key not in self._samples:
            prompts = read_samples(source.location, self.processor, count, seed)
            self._samples[key] = in_batches(prompts)
        return self._samples[key]
