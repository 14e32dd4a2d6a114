"""Several recipes on one model, measured alike: one table, one plot of accuracy against size.

Each recipe is run with each seed, which draws both the calibration windows and the rotation. All
results, and the 16-bit model, are then evaluated on the same text and tasks in one process. With
several seeds a figure is their mean, and the error behind it their sample standard deviation; with
one seed it is the standard error over windows or items, which says nothing about the seed. A task
that draws its items draws them from the seed too, and the 16-bit model is then measured with each.

Recipes that only prune visual tokens change no weight: nothing is written for them but strategy and
evaluation (`compress.comparison.strategies`), and a second plot shows accuracy against tokens kept.

    comparison = compare([Recipe.load(n) for n in ("demo-gptq", "demo-lm")], "out", seeds=(0, 1, 2))
    print(comparison.markdown())
"""

import csv
import io
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.comparison.results import ResultComparison
from compress.comparison.strategies import (
    PruningComparison,
    kept_per_prompt,
    only_prunes,
    retained,
    seeded,
    unpruned_per_prompt,
)
from compress.errors import UsageError
from compress.observer import Observer
from compress.recipe.recipe import Recipe
from compress.recipe.sections import Evaluate

BASELINE = "16-bit"
ERROR = "_stderr"


@dataclass
class Comparison:
    """What `compare` gives.

    Attributes:
        rows: one for the 16-bit model and one a recipe, for `compress.eval.report.quality_table`.
        runs: every run's recipe, seed, bytes, seconds and evaluation.
        conditions: one line on how it was measured.
        plot: accuracy against bytes, or against visual tokens kept; None where matplotlib is
            missing or nothing can be drawn.
    """

    rows: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    conditions: str
    plot: Path | None = None
    warnings: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The table as Markdown, with its conditions."""
        from compress.eval.report import markdown_table

        return markdown_table(self.rows, self.conditions)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "rows": self.rows,
            "runs": self.runs,
            "conditions": self.conditions,
            "plot": None if self.plot is None else str(self.plot),
            "warnings": self.warnings,
        }


def compare(
    recipes: Sequence[Recipe],
    output: str | Path,
    seeds: Sequence[int] = (0,),
    *,
    device: str = "cpu",
    overwrite: bool = False,
    self_check: bool = True,
    observer: Observer | None = None,
) -> Comparison:
    """Runs and measures the recipes; results go to OUTPUT/NAME-SEED, the table to OUTPUT.

    What an earlier, interrupted comparison has finished with the same recipes is kept, results and
    their figures. `self_check`: as for `compress.run`, for each result.

    Raises:
        UsageError: the recipes differ in model or `evaluate`, share a name or settings, or one
            does not fit the model, as `plan` would say. Nothing has run then.
        CompressError: a run failed.
    """
    from compress.pipeline.evaluation import check_evaluation

    observer = observer or Observer()
    output = Path(output)
    section = _check_recipes(recipes, seeds)
    check_evaluation(recipes[0])
    runs = []
    if all(only_prunes(recipe) for recipe in recipes):
        study = PruningComparison(recipes[0], device, observer, overwrite)
        for recipe in recipes:
            for seed in seeds:
                observer.stage(f"{recipe.name}, seed {seed}")
                runs.append(study.run(recipe, seed, _folder(output, recipe, seed)))
                _tell(observer, runs[-1])
    else:
        results = ResultComparison(recipes[0], device, observer, overwrite, self_check)
        results.check(recipes)
        finished = []
        for recipe in recipes:
            for seed in seeds:
                observer.stage(f"{recipe.name}, seed {seed}")
                folder = _folder(output, recipe, seed)
                finished.append((recipe, seed, results.run(recipe, seed, folder)))
        observer.stage("evaluation")
        for recipe, seed, facts in finished:
            runs.append(results.measure(recipe, seed, facts, _drawn(section)))
            _tell(observer, runs[-1])
    comparison = Comparison(_rows(runs, section), runs, _conditions(section, runs, device))
    for warning in _unmet(runs):
        comparison.warnings.append(warning)
        observer.warning(warning)
    _plot(comparison, output / "comparison.png", observer)
    (output / "comparison.md").write_text(comparison.markdown())
    (output / "comparison.json").write_text(json.dumps(comparison.as_dict(), indent=2) + "\n")
    lines = [json.dumps(run) + "\n" for run in comparison.runs]
    (output / "comparison.jsonl").write_text("".join(lines))
    (output / "comparison.csv").write_text(_csv(comparison.runs))
    return comparison


def _folder(output: Path, recipe: Recipe, seed: int) -> Path:
    return output / folder_name(f"{recipe.name}-{seed}")


def folder_name(name: str) -> str:
    """A recipe's name, which may be any text, as the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "recipe"


def _csv(runs: list[dict[str, Any]]) -> str:
    """A line a run: what was set, its size, every figure, and each one's paired difference."""
    table = []
    for run in runs:
        scores = run["evaluation"]
        facts = ("name", "seed", "bits", "bytes", "seconds")
        row = {k: run[k] for k in facts if k in run} | kept_per_prompt(scores) | retained(scores)
        row |= {k: v for k, v in quality(scores).items() if k != "name"}
        difference = scores.get("difference", {})
        pairs = {"nll": difference.get("mean_nll")} | {
            f"{task} {metric}": found
            for task, metrics in difference.get("results", {}).items()
            for metric, found in metrics.items()
        }
        for key, found in pairs.items():
            if found is not None:
                row[f"{key} difference"] = found["value"]
                row[f"{key} difference_stderr"] = found["stderr"]
        table.append(row)
    columns = list(dict.fromkeys(key for row in table for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def quality(scores: dict[str, Any]) -> dict[str, Any]:
    """The figures of one evaluation by name, with their errors."""
    from compress.eval.report import quality_row

    return quality_row("", scores)


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
    model = first.model_location(), first.model.revision
    for recipe in recipes[1:]:
        if (recipe.model_location(), recipe.model.revision) != model:
            raise UsageError(
                f"{recipe.name} compresses {recipe.model.path}, {first.name} {first.model.path}: "
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


def _drawn(section: Evaluate) -> bool:
    """Whether a task draws its items, so that each seed has its own."""
    from compress.eval.harness import DRAWN_TASKS

    return any(task in DRAWN_TASKS for task in section.tasks)


def _tell(observer: Observer, run: dict[str, Any]) -> None:
    observer.module(f"{run['name']}, seed {run['seed']}", _figures(run["evaluation"]))


def _rows(runs: list[dict[str, Any]], section: Evaluate) -> list[dict[str, Any]]:
    """One for the 16-bit model and one a recipe: means over the seeds."""
    from compress.eval.report import quality_row

    first = runs[0]
    seeds = [run for run in runs if run["name"] == first["name"]] if _drawn(section) else [first]
    rows = [
        _mean_row([
            quality_row(
                BASELINE, run["evaluation"].get("baseline", {}),
                **({"bytes": run["original"]} if "original" in run else {}),
                **unpruned_per_prompt(run["evaluation"]),
            )
            for run in seeds
        ])
    ]  # fmt: skip
    for name in dict.fromkeys(run["name"] for run in runs):
        rows.append(
            _mean_row([
                quality_row(
                    name, run["evaluation"],
                    **{key: run[key] for key in ("bits", "bytes", "seconds") if key in run},
                    **kept_per_prompt(run["evaluation"]),
                )
                | (_retained_row(run["evaluation"]))
                for run in runs if run["name"] == name
            ])
        )  # fmt: skip
    return rows


def _retained_row(scores: dict[str, Any]) -> dict[str, Any]:
    """What pruning left of the accuracy; one seed has no error for it."""
    if "pruning" not in scores:
        return {}
    shares = retained(scores)
    return shares | {name + ERROR: None for name in shares}


def _unmet(runs: list[dict[str, Any]]) -> list[str]:
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


def _mean_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds; behind each measured figure their sample standard deviation."""
    if len(rows) == 1:
        return rows[0]
    merged: dict[str, Any] = {"name": rows[0]["name"]}
    for key in rows[0]:
        if key == "name" or key.endswith(ERROR) or not all(key in row for row in rows):
            continue
        values = [row[key] for row in rows]
        mean = statistics.fmean(values)
        merged[key] = int(mean) if key == "bytes" else mean
        if key + ERROR in rows[0]:
            merged[key + ERROR] = statistics.stdev(values)
    return merged


def _figures(scores: dict[str, Any]) -> dict[str, Any]:
    from compress.eval.report import quality_row

    row = quality_row("", scores)
    return {key: value for key, value in row.items() if key != "name" and not key.endswith(ERROR)}


def _conditions(section: Evaluate, runs: list[dict[str, Any]], device: str) -> str:
    """How it was measured, in one line."""
    scores = runs[0]["evaluation"]
    parts = []
    if section.perplexity is not None:
        p, text = section.perplexity, scores["perplexity"]
        parts.append(
            f"perplexity per token on {p.dataset} (held out): {text['tokens']} tokens, windows of "
            f"{text['length']}, stride {text['stride']}, {'BOS' if p.bos else 'no BOS'}"
        )
        if "kl" in scores:
            parts.append("kl: nats per token from the 16-bit model")
    if section.tasks:
        samples = scores["conditions"]["samples"]
        each = " a seed, drawn from it" if _drawn(section) else ""
        parts.append(", ".join(f"{task}: {count} items{each}" for task, count in samples.items()))
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    if len(seeds) > 1:
        of_baseline = "" if _drawn(section) else " (of the 16-bit model: standard error)"
        numbers = ", ".join(map(str, seeds))
        parts.append(f"± sample standard deviation over seeds {numbers}{of_baseline}")
    else:
        parts.append(f"± standard error over windows or items; seed {seeds[0]}")
    if "pruning" in scores:
        parts.append("kept: visual tokens, averaged over layers and images; kv_bytes and "
                     "prefill_flops: of a prompt")  # fmt: skip
    parts.append(f"{device}, {scores['conditions']['dtype']}")
    return "; ".join(parts)


def _plot(comparison: Comparison, path: Path, observer: Observer) -> None:
    from compress.eval.curves import plot_lines
    from compress.eval.report import plot_quality

    baseline, *rows = comparison.rows
    sized, kept = _lines(rows, "bytes"), _lines(rows, "kept")
    try:
        if any(len(line) > 1 for line in sized.values()):
            comparison.plot = plot_lines(sized, baseline, path, "bytes")
        elif sized:
            comparison.plot = plot_quality(comparison.rows, path)
        if kept:
            place = path if comparison.plot is None else path.with_stem(f"{path.stem}-kept")
            drawn = plot_lines(kept, baseline, place, "kept")
            comparison.plot = comparison.plot or drawn
    except UsageError as error:  # matplotlib is an extra: the table does without its picture
        comparison.warnings.append(f"no plot: {error}")
        observer.warning(comparison.warnings[-1])


def _lines(rows: list[dict[str, Any]], x: str) -> dict[str, list[dict[str, Any]]]:
    """Rows with `x`; those that differ in the number behind their last `=` alone are one line."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if x in row:
            lines.setdefault(re.sub(r" \w+=[\d.e-]+$", "", row["name"]), []).append(row)
    return lines
