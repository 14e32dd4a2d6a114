"""Runs as tables: a mean over seeds a recipe for people, a line a run for spreadsheets.

rows = rows_of(runs, drawn=False)      # the 16-bit model's first
conditions_line(section, runs, "cpu")
"""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

from compress.comparison.results import drawn_by_seed
from compress.comparison.study import Run
from compress.data.text import measured_text
from compress.eval.report import ERROR, FLIPS, NLL, Row, paired_differences
from compress.recipe.sections import Evaluate

BASELINE = "16-bit"
COSTS = ("kv_bytes", "prefill_flops")  # of pruning visual tokens, summed over prompts


def rows_of(runs: Sequence[Run], drawn: bool) -> list[Row]:
    """One for the 16-bit model and one a recipe: means over the seeds.

    `drawn`: each seed draws its own items, so that the 16-bit model was measured with each.
    """
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run["name"], []).append(run)
    first = next(iter(by_name.values()))
    baseline = mean_row([_baseline_row(run) for run in (first if drawn else first[:1])])
    return [baseline, *(mean_row([_row(run) for run in group]) for group in by_name.values())]


def _baseline_row(run: Run) -> Row:
    scores = run["evaluation"]
    facts = {"bytes": run["original"]} if "original" in run else {}
    return Row.of(BASELINE, scores.get("baseline", {}), **facts, **kept_per_prompt(scores, True))


def _row(run: Run) -> Row:
    scores = run["evaluation"]
    facts = {
        key: run[key] for key in ("bits", "bytes", "calibration_tokens", "seconds") if key in run
    }
    row = Row.of(run["name"], scores, **facts, **kept_per_prompt(scores))
    if "pruning" in scores:
        for column, share in retained(scores).items():
            row.put(column, share, None)  # one seed has no error for it
    return row


def mean_row(rows: Sequence[Row]) -> Row:
    """The mean over seeds; behind each measured figure their sample standard deviation."""
    first, *others = rows
    if not others:
        return first
    columns = {
        column: [row.number(column) for row in rows]
        for column in first.values
        if all(column in row.values for row in others)
    }
    means: dict[str, float | None] = {
        column: statistics.fmean(values) for column, values in columns.items()
    }
    for whole in ("bytes", "calibration_tokens"):
        if whole in columns:
            means[whole] = int(statistics.fmean(columns[whole]))
    measured = [column for column in columns if column in first.errors]
    return Row(first.name, means, {c: statistics.stdev(columns[c]) for c in measured})


def position_rows(runs: Sequence[Run]) -> list[Row]:
    """One a recipe, a column a stretch of positions: its KL, or without a 16-bit model perplexity.

    [] where `by_position` was not asked for.
    """
    by_name: dict[str, list[Row]] = {}
    for run in runs:
        row = Row(run["name"], {})
        for stretch in run["evaluation"].get("by_position") or []:
            found = stretch.get("kl") or {"value": stretch["perplexity"], "stderr": None}
            row.put(f"{stretch['first']} – {stretch['last']}", found["value"], found["stderr"])
        if row.values:
            by_name.setdefault(run["name"], []).append(row)
    return [mean_row(group) for group in by_name.values()]


def positions_line(runs: Sequence[Run]) -> str:
    """What `position_rows` are, in one line; "" where there are none."""
    stretches = runs[0]["evaluation"].get("by_position")
    if not stretches:
        return ""
    what = "kl, nats per token" if "kl" in stretches[0] else "perplexity"
    return f"{what}, by the tokens in front of a prediction, BOS included"


def kept_per_prompt(scores: dict[str, Any], unpruned: bool = False) -> dict[str, float]:
    """The averages of an evaluation's `pruning`: share kept, KV bytes and FLOPs of a prompt.

    `unpruned`: had nothing been pruned.
    """
    pruning = scores.get("pruning")
    if not pruning or not pruning["prompts"]:
        return {}
    kept, end = (1.0, "_unpruned") if unpruned else (pruning["average_kept"], "")
    return {"kept": kept, **{name: pruning[name + end] / pruning["prompts"] for name in COSTS}}


def retained(scores: dict[str, Any]) -> dict[str, float]:
    """Of each task the share of the baseline's first metric that is left: `TASK retained`."""
    left = {}
    for task, metrics in scores.get("results", {}).items():
        before = scores.get("baseline", {}).get("results", {}).get(task, {})
        metric = next(iter(metrics), None)
        if metric is not None and before.get(metric) and math.isfinite(before[metric]):
            left[f"{task} retained"] = metrics[metric] / before[metric]
    return left


def csv_of(runs: Sequence[Run]) -> str:
    """A line a run: what was set, its size, every figure, and each one's paired difference."""
    table = []
    for run in runs:
        scores = run["evaluation"]
        facts = ("name", "seed", "bits", "bytes", "calibration_tokens", "seconds")
        given = dict(run)
        row = {key: given[key] for key in facts if key in given}
        row |= kept_per_prompt(scores) | retained(scores) | Row.of(run["name"], scores).as_dict()
        paired = paired_differences(scores)
        if NLL in paired:
            paired = {"nll": paired.pop(NLL)} | paired
        for column, difference in paired.items():
            row[f"{column} difference"] = difference["value"]
            row[f"{column} difference{ERROR}"] = difference["stderr"]
            row |= {f"{column} {FLIPS[key]}": difference[key] for key in FLIPS if key in difference}
        table.append(row)
    columns = list(dict.fromkeys(key for row in table for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def conditions_line(section: Evaluate, runs: Sequence[Run], device: str) -> str:
    """How it was measured, in one line."""
    scores, drawn = runs[0]["evaluation"], drawn_by_seed(section)
    parts = []
    if section.perplexity is not None:
        p, text = section.perplexity, scores["perplexity"]
        cut = f"windows of {text['length']}, stride {text['stride']}"
        if p.per_document:
            cut = f"{text['windows']} documents of at most {text['length']}"
        parts.append(
            f"perplexity per token on {measured_text(p.dataset)}: {text['tokens']} tokens, {cut}, "
            f"{'BOS' if p.bos else 'no BOS'}"
        )
        if "kl" in scores:
            parts.append("kl: nats per token from the 16-bit model")
    if section.tasks:
        samples = scores["conditions"]["samples"]
        each = " a seed, drawn from it" if drawn else ""
        parts.append(", ".join(f"{task}: {count} items{each}" for task, count in samples.items()))
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    if len(seeds) > 1:
        of_baseline = "" if drawn else " (of the 16-bit model: standard error)"
        numbers = ", ".join(map(str, seeds))
        parts.append(f"± sample standard deviation over seeds {numbers}{of_baseline}")
    else:
        parts.append(f"± standard error over windows or items; seed {seeds[0]}")
    if "pruning" in scores:
        parts.append(
            "kept: visual tokens, averaged over layers and images; kv_bytes and prefill_flops: of "
            "a prompt"
        )
    parts.append(f"{device}, {scores['conditions']['dtype']}")
    return "; ".join(parts)
