"""Several recipes on one model, measured alike: one table, one plot of accuracy against size.

Each recipe is run with each seed, which draws both the calibration windows and the rotation. All
results, and the 16-bit model, are then evaluated on the same text and tasks in one process. With
several seeds a figure is their mean, and the error behind it their sample standard deviation; with
one seed it is the standard error over windows or items, which says nothing about the seed. A task
that draws its items draws them from the seed too, and the 16-bit model is then measured with each.

Recipes that only prune visual tokens change no weight: nothing is written for them but strategy and
evaluation (`compress.comparison.strategies`), and a second plot shows accuracy against tokens kept.

    comparison = compare(["demo-gptq", "demo-lm"], "out", seeds=(0, 1, 2))
    print(comparison.markdown())
"""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.comparison.compute import unequal
from compress.comparison.pairs import (
    PairedDifference,
    difference_rows,
    differences_of,
    pairing_line,
)
from compress.comparison.results import ResultComparison, drawn_by_seed
from compress.comparison.strategies import PruningComparison, only_prunes
from compress.comparison.study import Entry, Run, Study, seeded
from compress.comparison.table import (
    conditions_line,
    csv_of,
    position_rows,
    positions_line,
    rows_of,
)
from compress.errors import UsageError, unknown
from compress.eval.curves import plot_lines
from compress.eval.harness import DRAWN_TASKS
from compress.eval.markup import in_markdown
from compress.eval.page import write_comparison
from compress.eval.progress import telling
from compress.eval.report import FRONT_LINE, Row, marked, plot_quality
from compress.eval.tables import markdown_table
from compress.memory import chosen_device
from compress.models.pretrained import local_folder
from compress.observer import Observer
from compress.pipeline.evaluation import check_evaluation
from compress.pipeline.notebook import observer_here
from compress.pipeline.one_run import check_shared
from compress.ranks import together
from compress.recipe.recipe import Recipe
from compress.recipe.sections import Evaluate
from compress.storage.files import atomic_write, folder_name
from compress.storage.lease import lease


@dataclass
class Comparison:
    """What `compare` gives.

    Attributes:
        rows: one for the 16-bit model and one a recipe, for `compress.eval.tables.quality_table`.
        runs: every run's recipe, seed, bytes, seconds and evaluation.
        conditions: one line on how it was measured.
        differences: of each recipe from one of them, paired (`compress.comparison.pairs`).
        plot: accuracy against bytes, or against visual tokens kept; None where matplotlib is
            missing or nothing can be drawn.
    """

    rows: list[Row]
    runs: list[Run]
    conditions: str
    plot: Path | None = None
    differences: list[PairedDifference] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The table as Markdown, its conditions and warnings, and the others below it."""
        table = markdown_table(self.rows, self.conditions)
        table += "".join(f"\nwarning: {in_markdown(text)}\n" for text in self.warnings)
        return "\n".join([table, *(markdown_table(rows, line) for rows, line in self.others)])

    @property
    def others(self) -> list[tuple[list[Row], str]]:
        """The tables below the first one, each with its line: by position, and of differences."""
        found = [(self.positions, positions_line(self.runs))] if self.positions else []
        if self.differences:
            found.append((difference_rows(self.differences), self.pairing))
        return found

    @property
    def positions(self) -> list[Row]:
        """A row a recipe and a column a stretch of positions, where that was asked for."""
        return position_rows(self.runs)

    @property
    def pairing(self) -> str:
        """How the differences were taken, in one line; "" where there are none."""
        return pairing_line(self.differences)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return vars(self) | {
            "rows": [row.as_dict() for row in self.rows],
            "plot": None if self.plot is None else str(self.plot),
            "differences": [found.as_dict() for found in self.differences],
        }

    def write(self, folder: Path) -> None:
        """The table as Markdown and JSON, the runs as lines of JSON and as CSV."""
        files = {
            "comparison.md": self.markdown(),
            "comparison.json": json.dumps(self.as_dict(), indent=2) + "\n",
            "comparison.jsonl": "".join(json.dumps(run) + "\n" for run in self.runs),
            "comparison.csv": csv_of(self.runs),
        }
        for name, text in files.items():
            with atomic_write(folder / name) as file:
                file.write(text.encode())
        self.page(folder / "comparison.html")

    def page(self, path: Path) -> Path:
        """The page: figures, plot, differences with their intervals."""
        with tempfile.TemporaryDirectory() as folder:
            drawn: list[Path] = []
            if self.plot is not None:  # or the warnings say why there is none
                drawn = _draw(self.rows, Path(folder) / "plot.svg")
            return write_comparison(
                path,
                {
                    "title": "Comparison of " + ", ".join(row.name for row in self.rows[1:]),
                    "rows": self.rows,
                    "conditions": self.conditions,
                    "positions": self.positions,
                    "positions_line": positions_line(self.runs),
                    "differences": [found.as_dict() for found in self.differences],
                    "pairing": self.pairing,
                    "runs": self.runs,
                    "warnings": self.warnings,
                    "plots": [f.read_text(encoding="utf-8") for f in drawn if f.is_file()],
                },
            )


def compare(
    recipes: Sequence[Recipe | str | Path | Mapping[str, object]],
    output: str | Path,
    seeds: Sequence[int] = (0,),
    *,
    against: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    self_check: bool = True,
    check_source: bool = True,
    deterministic: bool = False,
    observer: Observer | None = None,
) -> Comparison:
    """Runs and measures the recipes; results go to OUTPUT/NAME-SEED, the table to OUTPUT.

    What an earlier, interrupted comparison has finished with the same recipes is kept, results and
    their figures. `against` names the recipe that the others are paired with, the first one if
    it is absent. `self_check`, `check_source`, `deterministic`: as for `compress.run`, for each
    result.

    Started by torchrun, the ranks share each run, and measure some of the results each; of what
    only prunes each rank settles and measures some. All return the same; the first one writes.

    Raises:
        UsageError: no recipe is named `against`, or they differ in model or `evaluate`, share a
            name or settings, or one does not fit the model, as `plan` would say, or another
            process writes to `output`. Nothing has run then.
        CompressError: a run failed.
    """
    observer = observer or observer_here()
    device = chosen_device(device)
    chosen = [Recipe.of(recipe) for recipe in recipes]
    output = Path(output)
    section = _check_recipes(chosen, seeds)
    against = _reference(chosen, against)
    entries = [
        Entry(recipe, seed, output / folder_name(f"{recipe.name}-{seed}"))
        for recipe in chosen
        for seed in seeds
    ]
    with ExitStack() as held:  # the results as well: what is measured is what was made
        ranks = held.enter_context(together(device, deterministic=deterministic))
        if ranks.first:
            check_evaluation(section, chosen[0].resolve_path)
            local_folder(chosen[0].model_location(), chosen[0].model.revision)
            for folder in (output, *(entry.folder for entry in entries)):
                held.enter_context(lease(folder))
        check_shared(output, ranks)
        ranks.check_alike(_mark(entries), "list of recipes and seeds")
        study: Study
        if all(only_prunes(recipe) for recipe in chosen):
            study = PruningComparison(chosen[0], device, observer, overwrite, ranks)
        else:
            study = ResultComparison(
                chosen[0], device, observer, overwrite, self_check, check_source, ranks
            )
        runs: list[Run] = []
        held.enter_context(telling(observer.progress))
        for entry, run in zip(entries, study.runs(entries), strict=True):
            runs.append(run)
            observer.module(entry.title, Row.of(entry.recipe.name, run["evaluation"]).values)
        rows = marked(rows_of(runs, drawn_by_seed(section)))
        conditions = conditions_line(section, runs, device)
        if any(row.front for row in rows):
            conditions += f"; {FRONT_LINE}"
        comparison = Comparison(
            rows, runs, conditions, differences=differences_of(runs, against, DRAWN_TASKS)
        )
        wanted = {"self-check": self_check, "source check": check_source}
        left_out = _left_out(runs, [check for check, asked in wanted.items() if asked])
        for warning in [*unequal(chosen, runs), *_unmet(runs), *left_out]:
            comparison.warnings.append(warning)
            observer.warning(warning)
        if ranks.first:
            _plot(comparison, output / "comparison.png", observer)
            comparison.write(output)
    return comparison


def _mark(entries: Sequence[Entry]) -> str:
    """Tells one comparison from another."""
    return json.dumps([[e.recipe.model_dump_json(), e.seed, str(e.folder)] for e in entries])


def _check_recipes(recipes: Sequence[Recipe], seeds: Sequence[int]) -> Evaluate:
    if not recipes or not seeds:
        raise UsageError("nothing to compare: give at least one recipe and one seed")
    if len(set(seeds)) != len(seeds):
        raise UsageError(f"seeds: expected each once, found {', '.join(map(str, seeds))}")
    first = recipes[0]
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two recipes are named {name!r}: give each its own `name`")
        if Path(name).name != name:
            raise UsageError(f"recipe name {name!r}: expected one that can name a folder")
    _check_distinct(recipes, seeds[0])
    for recipe in recipes[1:]:
        if _model_of(recipe) != _model_of(first):
            raise UsageError(
                f"{recipe.name} compresses {_model_of(recipe)}, {first.name} {_model_of(first)}: "
                "a comparison is on one model (--model)"
            )
        if recipe.evaluate != first.evaluate:
            raise UsageError(
                f"{recipe.name} and {first.name} differ in their `evaluate` section: "
                "a comparison measures all alike"
            )
    if first.evaluate is None or not (first.evaluate.tasks or first.evaluate.perplexity):
        raise UsageError(f"{first.name} evaluates nothing: set evaluate.tasks or .perplexity")
    return first.evaluate


def _reference(recipes: Sequence[Recipe], against: str | None) -> str:
    """The name of the recipe that the others are paired with."""
    names = [recipe.name for recipe in recipes]
    if against is None:
        return names[0]
    if against not in names:
        raise UsageError(unknown("recipe in --against", against, names))
    return against


def _model_of(recipe: Recipe) -> str:
    revision = recipe.model.revision
    return recipe.model_location() + (f" at revision {revision}" if revision else "")


def _check_distinct(recipes: Sequence[Recipe], seed: int) -> None:
    """Each recipe has a folder of its own, and settings of its own once a seed is set in it."""
    folders: dict[str, str] = {}
    settings: dict[str, str] = {}
    for recipe in recipes:
        other = folders.setdefault(folder_name(recipe.name).lower(), recipe.name)
        if other != recipe.name:
            raise UsageError(
                f"recipes {other!r} and {recipe.name!r} would share a folder: rename one of them"
            )
        drawn = seeded(recipe, seed).model_dump_json(exclude={"name"})
        other = settings.setdefault(drawn, recipe.name)
        if other != recipe.name:
            raise UsageError(
                f"recipes {other!r} and {recipe.name!r} are the same once each seed is set: vary "
                "something else, and give --seeds the seeds"
            )


def _left_out(runs: Sequence[Run], checks: Sequence[str]) -> list[str]:
    """A line for each of these checks that kept results were made without."""
    lines = []
    for check in checks:
        names = [f"{r['name']}, seed {r['seed']}" for r in runs if check in r.get("unchecked", ())]
        if names:
            lines.append(
                f"kept from runs without {check}: {'; '.join(names)}; --overwrite makes them anew"
            )
    return lines


def _unmet(runs: Sequence[Run]) -> list[str]:
    """A line for each recipe whose method cannot keep as little as was asked."""
    lines = []
    for run in {run["name"]: run for run in runs if run.get("asked") is not None}.values():
        kept = run["evaluation"]["pruning"]["average_kept"]
        lines.append(
            f"{run['name']}: {run['strategy']['method']} with stages "
            f"{run['strategy']['stages']} keeps at least {kept:.1%} of the visual tokens on "
            f"average, not {run['asked']:.1%}: measured at that"
        )
    return lines


def _plot(comparison: Comparison, path: Path, observer: Observer) -> None:
    try:
        comparison.plot = next(iter(_draw(comparison.rows, path)), None)
    except UsageError as error:  # no matplotlib: the table does without its picture
        comparison.warnings.append(f"no plot: {error}")
        observer.warning(comparison.warnings[-1])


def _draw(rows: Sequence[Row], path: Path) -> list[Path]:
    """Accuracy against bytes, and against visual tokens kept where some were pruned."""
    baseline, *others = rows
    sized, kept = _lines(others, "bytes"), _lines(others, "kept")
    drawn = []
    if any(len(line) > 1 for line in sized.values()):
        drawn.append(plot_lines(sized, baseline, path, "bytes"))
    elif sized:
        drawn.append(plot_quality(rows, path))
    if kept:
        place = path.with_stem(f"{path.stem}-kept") if drawn else path
        drawn.append(plot_lines(kept, baseline, place, "kept"))
    return drawn


def _lines(rows: Sequence[Row], x: str) -> dict[str, list[Row]]:
    """Rows with `x`; those that differ in the number behind their last `=` alone are one line."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if x in row.values:
            lines.setdefault(re.sub(r" \w+=[\d.e-]+$", "", row.name), []).append(row)
    return lines
