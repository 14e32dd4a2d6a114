"""Recipes that write checkpoints, in a comparison: each is run and measured once, or found so.

    results = ResultComparison(recipe, "cpu", observer)
    facts = results.run(recipe, seed=0, folder=Path("out/name-0"))
    run = results.measure(recipe, 0, facts, drawn=False)

Calibration data are read once for all recipes that calibrate alike. Figures of a result are kept
beside its folder, with what they depend on.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.comparison.strategies import seeded
from compress.errors import UsageError
from compress.observer import Observer
from compress.storage.files import atomic_write

if TYPE_CHECKING:
    from compress.data.prompts import CalibrationData
    from compress.recipe.recipe import Recipe


class ResultComparison:
    """One model, compressed by one recipe after the other."""

    def __init__(
        self,
        recipe: "Recipe",
        device: str,
        observer: Observer,
        overwrite: bool = False,
        self_check: bool = True,
    ):
        """`recipe`: any of those that are compared; model and evaluation are the same in all."""
        from compress.models.pretrained import local_folder

        self.recipe, self.device, self.observer = recipe, device, observer
        self.overwrite, self.self_check = overwrite, self_check
        self.model = local_folder(recipe.model_location(), recipe.model.revision)
        self._data: dict[str, CalibrationData] = {}
        self._evaluator: Any = None

    def check(self, recipes: "Sequence[Recipe]") -> None:
        """UsageError for a recipe that does not fit the model; reads headers, not weights."""
        from compress.models.skeleton import Skeleton
        from compress.pipeline.inputs import RunInputs
        from compress.pipeline.plan import make_plan

        skeleton = Skeleton.open(self.model)
        for recipe in recipes:
            for problem in make_plan(RunInputs.of(recipe, skeleton)).problems:
                raise UsageError(f"{recipe.name}: {problem}")

    def run(self, recipe: "Recipe", seed: int, folder: Path) -> dict[str, Any]:
        """One result: {"folder", "bits", "bytes", "original", "seconds"}, made now or found."""
        from compress.pipeline.provenance import made_by
        from compress.pipeline.run import run

        drawn = seeded(recipe, seed).with_changes(name=f"{recipe.name}-{seed}", evaluate=None)
        if self.overwrite or not made_by(folder, drawn, self.model, self.device):
            # A result that is refused, because it is another recipe's, keeps its figures.
            if self.overwrite or not (folder / "modelpress.json").exists():
                _figures_file(folder).unlink(missing_ok=True)
            run(
                drawn, folder, device=self.device, overwrite=self.overwrite,
                windows=self._calibration(drawn), self_check=self.self_check,
                observer=self.observer,
            )  # fmt: skip
        facts = json.loads((folder / "modelpress.json").read_text())
        return {
            "folder": folder,
            "bits": facts["average_bits"],
            "bytes": facts["bytes"]["total"],
            "original": facts["bytes"]["original"],
            "seconds": sum(v for k, v in facts["seconds"].items() if k != "self_check"),
        }

    def measure(
        self, recipe: "Recipe", seed: int, facts: dict[str, Any], drawn: bool
    ) -> dict[str, Any]:
        """The run with its evaluation; `drawn`: the seed draws the items of a task."""
        run = {"name": recipe.name, "seed": seed, **facts, "folder": str(facts["folder"])}
        file = _figures_file(facts["folder"])
        conditions = self._conditions(recipe, facts["folder"])
        found = json.loads(file.read_text()) if file.is_file() else {}
        if found.get("conditions") != conditions:
            if self._evaluator is None:
                from compress.pipeline.evaluation import Evaluator

                self._evaluator = Evaluator.of_recipe(self.recipe, self.model, self.device)
            scores = self._evaluator.measure(facts["folder"], **({"seed": seed} if drawn else {}))
            found = {"conditions": conditions, "evaluation": scores}
            with atomic_write(file) as stream:
                stream.write(json.dumps(found).encode())
        return run | {"evaluation": found["evaluation"]}

    def _conditions(self, recipe: "Recipe", folder: Path) -> dict[str, Any]:
        """What figures depend on: plain JSON values."""
        from compress.pipeline.provenance import versions
        from compress.storage.safetensors import CheckpointReader

        assert recipe.evaluate is not None
        return {
            "result": CheckpointReader(folder).fingerprint(),
            "baseline": CheckpointReader(self.model).fingerprint(),
            "evaluate": recipe.evaluate.model_dump(mode="json"),
            "device": self.device,
            "versions": versions(),
        }

    def _calibration(self, recipe: "Recipe") -> "CalibrationData | None":
        """What the recipe calibrates on; None where the run is to draw its own few tokens."""
        from compress.data.prompts import calibration_data
        from compress.data.source import CalibrationSource
        from compress.models.skeleton import Skeleton

        if not recipe.calibrates:
            return None
        name = recipe.calibration.model_dump_json(exclude={"offload"})
        if name not in self._data:
            self.observer.stage("calibration data")
            skeleton = Skeleton.open(self.model)
            source = CalibrationSource.of(recipe, skeleton)
            self._data[name] = calibration_data(source, skeleton)
        return self._data[name]


def _figures_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")
