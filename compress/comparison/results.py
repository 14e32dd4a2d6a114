"""Recipes that write checkpoints, in a comparison: each is run and measured once, or found so.

    study = ResultComparison(recipe, "cpu", observer)
    runs = list(study.runs([Entry(recipe, 0, Path("out/name-0"))]))

Calibration data are read once for all recipes that calibrate alike. Figures of a result are kept
beside its folder. Ranks share each run, and measure a block of the results each.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from compress.comparison.study import (
    Entry,
    Run,
    conditions_of,
    keep,
    kept,
    seeded,
    shared_runs,
)
from compress.data.prompts import CalibrationData, calibration_data
from compress.errors import UsageError
from compress.eval.harness import DRAWN_TASKS
from compress.models.pretrained import local_folder
from compress.models.skeleton import Skeleton
from compress.observer import Observer
from compress.pipeline.evaluation import Evaluator, evaluated_texts
from compress.pipeline.inputs import RunInputs
from compress.pipeline.one_run import check_pruned
from compress.pipeline.plan import make_plan
from compress.pipeline.provenance import another, fingerprint, made_by
from compress.pipeline.run import run
from compress.ranks import Ranks
from compress.recipe.recipe import Recipe
from compress.recipe.sections import Evaluate
from compress.storage.lease import lease
from compress.storage.safetensors import CheckpointReader


def drawn_by_seed(section: Evaluate) -> bool:
    """Whether a task draws its items, so that each seed has its own."""
    return any(task in DRAWN_TASKS for task in section.tasks)


CHECKS = ("self_check", "source_check")  # stages that no method can be blamed for


def _checks(facts: Mapping[str, Any]) -> dict[str, bool]:
    """The checks of a result, and whether its run made them."""
    return {
        "self-check": bool(facts["self_check"]),
        "source check": "skipped" not in facts["source_check"],
    }


class ResultComparison:
    """One model, compressed by one recipe after the other."""

    def __init__(
        self,
        recipe: Recipe,
        device: str,
        observer: Observer,
        overwrite: bool = False,
        self_check: bool = True,
        check_source: bool = True,
        ranks: Ranks | None = None,
    ):
        """`recipe`: any of those that are compared; model and evaluation are the same in all."""
        self.recipe, self.device, self.observer = recipe, device, observer
        self.ranks = ranks or Ranks()
        self.overwrite, self.self_check, self.check_source = overwrite, self_check, check_source
        self.model = local_folder(recipe.model_location(), recipe.model.revision)
        self.skeleton = Skeleton.open(self.model)
        self._data: dict[str, CalibrationData] = {}
        self._evaluator: Evaluator | None = None

    def runs(self, entries: Sequence[Entry]) -> Iterator[Run]:
        """See `Study`: all results are made before the first is measured."""
        self._check({entry.recipe.name: entry.recipe for entry in entries}.values())
        for entry in entries:
            self.observer.stage(entry.title)
            self._make(entry)
        self.observer.stage("evaluation")
        self.ranks.wait()  # until the last result is in its place
        yield from shared_runs(entries, self._run, self.ranks)

    def _run(self, entry: Entry) -> Run:
        """What is said of the entry's result, with its figures."""
        facts = json.loads((entry.folder / "modelpress.json").read_text())
        return {
            "name": entry.recipe.name,
            "seed": entry.seed,
            "folder": str(entry.folder),
            "bits": facts["average_bits"],
            "bytes": facts["bytes"]["total"],
            "original": facts["bytes"]["original"],
            "unchecked": [name for name, done in _checks(facts).items() if not done],
            "calibration_tokens": (facts["calibration"] or {}).get("tokens", 0),
            "seconds": sum(v for k, v in facts["seconds"].items() if k not in CHECKS),
            "evaluation": self._measured(entry),
        }

    def _check(self, recipes: Iterable[Recipe]) -> None:
        """UsageError for a recipe that does not fit the model; reads headers, not weights."""
        for recipe in recipes:
            inputs = RunInputs.of(recipe, self.skeleton)
            for problem in make_plan(inputs).problems:
                raise UsageError(f"{recipe.name}: {problem}")
            check_pruned(recipe, inputs.source.images, self.ranks)

    def _make(self, entry: Entry) -> None:
        """The entry's result, if it is not there."""
        name, folder = f"{entry.recipe.name}-{entry.seed}", entry.folder
        recipe = seeded(entry.recipe, entry.seed).with_changes(name=name, evaluate=None)
        windows = self._calibration(recipe)
        inputs = RunInputs.of(recipe, self.skeleton, self.device)
        data = calibration_data(inputs.source, self.skeleton) if windows is None else windows
        with lease(folder) if self.ranks.first else nullcontext():
            if self.ranks.tell(lambda: self._is_made(folder, recipe, inputs, data)):
                return
            run(
                recipe,
                folder,
                device=self.device,
                overwrite=self.overwrite,
                windows=windows,
                self_check=self.self_check,
                check_source=self.check_source,
                observer=self.observer,
            )

    def _is_made(
        self, folder: Path, recipe: Recipe, inputs: RunInputs, data: CalibrationData
    ) -> bool:
        """Whether the folder holds the recipe's result; if not, its figures go."""
        with lease(folder) as held:
            if not self.overwrite and not held.abandoned:
                if made_by(folder, recipe, fingerprint(inputs, data)):
                    return True
                if (folder / "modelpress.json").exists():
                    raise UsageError(
                        f"{folder} holds a result that was made with another "
                        f"{another(folder, inputs, data)}: choose another --output, or replace it "
                        "with --overwrite"
                    )
        _figures_file(folder).unlink(missing_ok=True)
        return False

    def _measured(self, entry: Entry) -> dict[str, Any]:
        """The figures of the entry's result."""
        section = self.recipe.evaluate
        assert section is not None
        file = _figures_file(entry.folder)
        conditions = conditions_of(
            section,
            self.device,
            result=CheckpointReader(entry.folder).fingerprint(),
            baseline=self.skeleton.reader.fingerprint(),
            texts=evaluated_texts(section, self.recipe.resolve_path),
        )
        scores = kept(file, conditions, "evaluation")
        if scores is None:
            if self._evaluator is None:
                self._evaluator = Evaluator.of_section(
                    section,
                    self.recipe.resolve_path,
                    self.model,
                    self.device,
                    keep=entry.folder.parent,
                )
            seed = entry.seed if drawn_by_seed(section) else None
            files = entry.folder / "eval" if section.tasks else None
            scores = self._evaluator.measure(entry.folder, seed=seed, files=files, items=True)
            keep(file, conditions, "evaluation", scores)
        return scores

    def _calibration(self, recipe: Recipe) -> CalibrationData | None:
        """What the recipe calibrates on; None where the run is to draw its own few tokens."""
        if not recipe.calibrates:
            return None
        name = recipe.calibration.model_dump_json(exclude={"offload"})
        if name not in self._data:
            self.observer.stage("calibration data")
            source = RunInputs.of(recipe, self.skeleton).source
            self._data[name] = calibration_data(source, self.skeleton)
        return self._data[name]


def _figures_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")
