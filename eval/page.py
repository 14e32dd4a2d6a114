"""The pages of a run and of a comparison: one HTML file each, to be read anywhere, by day or night.

A page needs no other file and no network, fits a phone, and follows the reader's colour scheme.
That of a run takes one dict, of which every key but `name` may be missing:

    name         of the model; base_model: what it was made of
    recipe       the resolved recipe, nested
    provenance   versions, seeds, hashes, times, peak memory, nested; `allocation` has the scores of
                 layers, `calibration` what was calibrated on
    layers       [{"name", "bits", "group_size", "error", "effective_sample_size", "seconds"}, ...]
                 one entry a quantised linear, in the order of the model; further keys are shown too
    modules      [{"name", "shape", "bits", "group_size", "symmetric"}, ...] as `inspect` lists them
    bits         {"average", "engines": [(engine, how it loads)]}
    token_sample {"tokens": [text of each], "weights": {layer: [weight of each]}} of a text
    evaluation   of the model, as `evaluate_model` returns it; `pruning` of a model that prunes
                 visual tokens, with the files of its pictures; `earlier`: others, newest first;
                 `before_export`, the format of the checkpoint that was measured in its place
    export       of an export: {"differs": [what it does not hold as that checkpoint did]}
    baseline     {"results", "perplexity"}; absent, `evaluation["baseline"]` is taken
    bytes        {"original", "total", ...}: numbers of bytes

    write_report("out/report.html", {"name": "demo", "layers": layers, "evaluation": scores})
"""

import base64
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from compress.eval.report import (
    COLOURS,
    FLIPS,
    NLL,
    NORMAL_95,
    ON_FRONT,
    Facts,
    Row,
    columns_of,
    conditions_of,
    error_plot,
    flatten,
    format_bytes,
    format_difference,
    format_number,
    judged,
    measured_before,
    paired_differences,
    told_apart,
    warnings_of,
)
from compress.eval.tables import position_lines

LAYER_COLUMNS = ("name", "bits", "group_size", "error", "effective_sample_size", "seconds")
FULL_SHADE = 4  # times the mean weight: the strongest colour of a token
SCALE_BITS = 16  # of the scale of a group, in the bytes of a layer
SHARES = ("acc", "acc_norm", "exact_match")  # metrics that are shares of items
LOADING = "loading in "  # begins the plan's notes on engines


def write_report(path: str | Path, result: Mapping[str, Any]) -> Path:
    """The page of a run.

    Args:
        path: of the file; its folder is made if need be.
        result: see the file's head. What is missing is left out of the page.
    """
    layers = list(result.get("layers") or [])
    evaluation = result.get("evaluation") or {}
    baseline = result.get("baseline") or evaluation.get("baseline") or {}
    evaluations = [(evaluation, baseline)] if evaluation else []
    evaluations += [(e, e.get("baseline") or {}) for e in result.get("earlier") or []]
    provenance = result.get("provenance") or {}
    name = result.get("name") or "model"
    return _write(
        path,
        "run.html.jinja",
        title=f"{name}: compression report",
        name=name,
        base_model=result.get("base_model"),
        verdict=_verdict(result, [of for of, _ in evaluations]),
        cards=_cards(result, evaluations),
        engines=(result.get("bits") or {}).get("engines") or [],
        # What engines load it is a table of its own.
        warnings=[w for w in provenance.get("warnings") or [] if not w.startswith(LOADING)],
        sizes=_sizes(result.get("bytes") or {}),
        bytes=_layer_bytes(result.get("modules") or []),
        before_export=measured_before(result),
        measured=[
            {
                "how": told_apart(scores),
                "of": "before export" if scores.get("before_export") else "this model",
                "rows": (lines := _quality(scores, before)),
                "flipped": any(line["flips"] for line in lines),
                "conditions": _conditions(scores),
                "positions": position_lines(scores.get("by_position") or []),
            }
            for scores, before in evaluations
        ],
        plot=error_plot(layers),
        importance=_importance(layers, provenance),
        sample=_token_panels(result.get("token_sample") or {}),
        full_shade=FULL_SHADE,
        pictures=_pictures(evaluation),
        layer_columns=_layer_columns(layers),
        layers=layers,
        calibration=list(flatten({"": provenance.get("calibration") or {}})),
        recipe=_as_yaml(result.get("recipe") or {}),
        rounded=sum(bool(layer.get("rounded_to_nearest")) for layer in layers),
        provenance=list(flatten({k: v for k, v in provenance.items() if k != "warnings"})),
    )


def write_comparison(path: str | Path, facts: Mapping[str, Any]) -> Path:
    """The page of a comparison.

    Args:
        path: of the file.
        facts: {"title", "rows": [Row], "conditions", "differences": [{"name", "of", "value",
            "stderr", and of tasks "right_to_wrong", "wrong_to_right", "mcnemar_p"}], "pairing",
            "runs", "warnings", "plots": [SVG as text], "positions": [Row] by stretches of positions
            and "positions_line", or neither}.
    """
    rows: Sequence[Row] = facts["rows"]
    columns, positions = columns_of(rows), facts.get("positions") or []
    differences = _scaled(facts.get("differences") or [])
    return _write(
        path,
        "comparison.html.jinja",
        title=facts["title"],
        verdict=_best(rows),
        warnings=facts.get("warnings") or [],
        columns=columns,
        rows=[
            {
                "name": row.name,
                "front": ON_FRONT if row.front else "",
                "cells": [row.cell(column) for column in columns],
            }
            for row in rows
        ],
        conditions=facts["conditions"],
        stretches=columns_of(positions),
        positions=[
            {"name": row.name, "cells": [row.cell(column) for column in columns_of(positions)]}
            for row in positions
        ],
        positions_line=facts.get("positions_line") or "",
        differences=differences,
        flipped=any(row["flips"] for row in differences),
        pairing=facts.get("pairing") or "",
        runs=facts.get("runs") or [],
        plots=[_inline(svg) for svg in facts.get("plots") or []],
    )


def _write(path: str | Path, template: str, **facts: Any) -> Path:
    from jinja2 import Environment, FileSystemLoader  # only a run writes pages

    # autoescape: names and recipes are other people's text
    loader = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = pages.get_template(template).render(number=format_number, **facts)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def _inline(svg: str) -> Any:
    """A picture that this library has drawn, as part of a page."""
    from markupsafe import Markup  # comes with jinja2

    return Markup(svg[svg.index("<svg") :])  # noqa: S704  drawn from figures, its texts escaped


def _as_yaml(recipe: Facts) -> str:
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True) if recipe else ""


# ---- the first screen ---------------------------------------------------------------------------


def _verdict(result: Facts, evaluations: Sequence[Facts]) -> str:
    """What came of it, in a sentence or two: the size, and what it cost with its interval.

    evaluations: the newest first; the cost is of the first that knows it.
    """
    sizes, average = result.get("bytes") or {}, (result.get("bits") or {}).get("average")
    parts = []
    if sizes.get("original") and sizes.get("total"):
        text = f"{sizes['original'] / sizes['total']:.2f} times smaller"
        parts.append(f"{text}, at {format_number(average)} bits a weight" if average else text)
    differences = (paired_differences(evaluation).get(NLL) for evaluation in evaluations)
    if nll := next(filter(None, differences), None):
        low, middle, high = (
            100 * math.expm1(nll["value"] + side * NORMAL_95 * (nll.get("stderr") or 0))
            for side in (-1, 0, 1)
        )
        interval = f" (95 % interval {low:+.1f} to {high:+.1f} %)" if nll.get("stderr") else ""
        parts.append(f"perplexity {middle:+.1f} % against 16 bits{interval}")
    elif not evaluations and parts:
        parts.append("what that cost was not measured")
    sentence = "; ".join(parts)
    return f"{sentence[:1].upper()}{sentence[1:]}." if parts else ""


def _cards(result: Facts, evaluations: Sequence[tuple[Facts, Facts]]) -> list[dict[str, str]]:
    """The few numbers that people look for first: of each kind the newest.

    evaluations: each with its baseline's figures, the newest first.
    """
    sizes = result.get("bytes") or {}
    cards = []

    def card(label: str, value: str, note: str = "") -> None:
        cards.append({"label": label, "value": value, "note": note})

    if sizes.get("total"):
        note = f"{format_bytes(sizes['original'])} before" if sizes.get("original") else ""
        card("weights", format_bytes(sizes["total"]), note)
    for evaluation, baseline in evaluations:
        if text := evaluation.get("perplexity"):
            before = (baseline.get("perplexity") or {}).get("value")
            note = f"{format_number(before)} in 16 bits" if before else ""
            card("perplexity", format_number(text["value"]), note)
            break
    if kl := next((of["kl"] for of, _ in evaluations if of.get("kl")), None):
        card("KL to 16 bits", format_number(kl["mean"], kl.get("stderr")), "nats a token")
        if kl.get("top1_agreement") is not None:
            card("same first token", f"{100 * kl['top1_agreement']:.1f} %", "as in 16 bits")
    shown: set[str] = set()
    for evaluation, _ in evaluations:
        paired = paired_differences(evaluation)
        for task, metrics in (evaluation.get("results") or {}).items():
            metric = next((m for m in metrics if m in SHARES), None)
            if metric is None or task in shown:
                continue
            shown.add(task)
            note = ""
            if estimate := paired.get(f"{task} {metric}", {}):
                difference = format_difference(estimate["value"], estimate.get("stderr"))
                words = f": {said}" if (said := judged(estimate)) else ""
                note = f"{difference} against 16 bits{words}"
            card(f"{task} {metric}", format_number(metrics[metric]), note)
    return cards


# ---- tables and charts --------------------------------------------------------------------------


def _sizes(sizes: Facts) -> list[tuple[str, str]]:
    shown = [(key, format_bytes(value)) for key, value in sizes.items() if value is not None]
    if sizes.get("original") and sizes.get("total"):
        shown.append(("smaller by", f"{sizes['original'] / sizes['total']:.2f} x"))
    return shown


def _quality(evaluation: Facts, baseline: Facts) -> list[dict[str, Any]]:
    """One line a metric: the model, the baseline, the paired difference, and its interval."""
    ours, theirs = Row.of("", evaluation), Row.of("", baseline)
    paired = paired_differences(evaluation)
    for part, row in ((evaluation, ours), (baseline, theirs)):
        if NLL in paired:
            text = part.get("perplexity") or {}
            row.put(NLL, text.get("mean_nll"), text.get("stderr"))
    lines = []
    for column in columns_of([ours, theirs]):
        difference = paired.get(column, {})
        value, error = difference.get("value"), difference.get("stderr")
        lines.append(
            {
                "metric": column,
                "model": ours.cell(column),
                "baseline": theirs.cell(column),
                "difference": format_difference(value, error),
                "flips": _flips(difference),
                "range": None if value is None else _range(value, error),
            }
        )
    return lines


def _range(value: float, error: float | None, reach: float | None = None) -> dict[str, Any] | None:
    """Where an interval is drawn, in per cent of its cell: no difference is in the middle.

    reach: the farthest that the cell goes; None: what this interval needs.
    """
    if not math.isfinite(value):
        return None
    half = NORMAL_95 * (error or 0)
    reach = reach or (abs(value) + half) or 1.0
    low, middle, high = (50 + 46 * x / reach for x in (value - half, value, value + half))
    return {
        "zero": 50,
        "low": round(low, 2),
        "middle": round(middle, 2),
        "width": round(high - low, 2),
        "label": f"from {value - half:.4g} to {value + half:.4g}",
    }


def _scaled(differences: Sequence[Facts]) -> list[dict[str, Any]]:
    """Differences with intervals on one scale for each figure that they are of."""
    reach: dict[str, float] = {}
    for found in differences:
        far = abs(found["value"]) + NORMAL_95 * (found.get("stderr") or 0)
        reach[found["of"]] = max(reach.get(found["of"], 0.0), far)
    return [
        {
            "name": found["name"],
            "of": {"nll": "NLL", "kl": "KL"}.get(found["of"], found["of"]),
            "text": format_difference(found["value"], found.get("stderr")),
            "flips": _flips(found),
            "range": _range(found["value"], found.get("stderr"), reach[found["of"]]),
        }
        for found in differences
    ]


def _flips(difference: Facts) -> list[str]:
    """How many items changed each way, and McNemar's p; [] where answers are not right or wrong."""
    if difference.get("mcnemar_p") is None:
        return []
    lost, gained, p = (format_number(difference[key]) for key in FLIPS)
    return [f"{lost} / {gained}", p]


def _conditions(evaluation: Facts) -> list[tuple[str, str]]:
    lines = [
        (part, evaluation[part]["line"])
        for part in ("perplexity", "kl")
        if (evaluation.get(part) or {}).get("line")
    ]
    pruning = {k: v for k, v in (evaluation.get("pruning") or {}).items() if k != "pictures"}
    return [
        *lines,
        *conditions_of(evaluation),
        *flatten({"pruning": pruning} if pruning else {}),
        *(("warning of lm-eval", warning) for warning in warnings_of(evaluation)),
    ]


def _layer_bytes(modules: Sequence[Facts]) -> dict[str, Any] | None:
    """Bytes of the matrices of each decoder layer, stacked by width; None without layers."""
    layers: dict[int, dict[float, float]] = {}
    for module in modules:
        index = re.search(r"\.(\d+)\.", module["name"])
        if index is None or module.get("bits") is None:
            continue
        rows, columns = module["shape"][0], module["shape"][-1]
        bits = module["bits"]
        if module.get("symmetric") is not None:
            bits += SCALE_BITS / (module.get("group_size") or columns)
        of_layer = layers.setdefault(int(index[1]), {})
        of_layer[module["bits"]] = of_layer.get(module["bits"], 0) + rows * columns * bits / 8
    if not layers:
        return None
    widths = sorted({bits for of in layers.values() for bits in of})
    colours = {bits: COLOURS[i % len(COLOURS)] for i, bits in enumerate(widths)}
    most = max(sum(of.values()) for of in layers.values())
    return {
        "most": format_bytes(most),
        "bars": [
            {
                "title": f"layer {index}: {format_bytes(sum(of.values()))}",
                "parts": [
                    {"height": round(100 * of[bits] / most, 2), "colour": colours[bits]}
                    for bits in sorted(of)
                ],
            }
            for index, of in sorted(layers.items())
        ],
        "legend": [{"label": f"{bits:g} bits", "colour": colours[bits]} for bits in widths],
    }


def _importance(layers: Sequence[Facts], provenance: Facts) -> list[dict[str, Any]]:
    """Bars by layer: the scores that widths were chosen by, and how many tokens count in effect."""
    charts = []
    if scores := ((provenance.get("allocation") or {}).get("scores") or {}):
        charts.append(_bars("Importance of each unit, by which widths were chosen", scores))
    sizes: dict[str, float] = {}
    for row in layers:
        index = re.search(r"\.(\d+)\.", str(row.get("name", "")))
        if index and row.get("effective_sample_size") is not None:
            sizes.setdefault(f"layer {index[1]}", row["effective_sample_size"])
    if len(set(sizes.values())) > 1:
        charts.append(_bars("Effective sample size of each layer, tokens of a window", sizes, True))
    return charts


def _token_panels(sample: Facts) -> list[dict[str, Any]]:
    """A text once for each layer, every token with its weight and its shade from 0 to 1."""
    tokens = sample.get("tokens") or []
    panels = []
    for layer, weights in (sample.get("weights") or {}).items():
        panels.append(
            {
                "layer": layer,
                "most": format_number(max(weights, default=0.0)),
                "tokens": [
                    {
                        "text": _visible(text),
                        "shade": f"{min(max(weight, 0.0) / FULL_SHADE, 1.0):.2f}",
                        "title": format_number(weight),
                    }
                    for text, weight in zip(tokens, weights, strict=False)
                ],
            }
        )
    return panels if tokens else []


def _visible(text: str) -> str:
    """Line ends as a sign that can be shaded, and one line end only; tabs as spaces."""
    return re.sub(r"\n+", lambda ends: "↵" * len(ends[0]) + "\n", text.replace("\t", "    "))


def _bars(title: str, values: Mapping[str, float], from_zero: bool = False) -> dict[str, Any]:
    """A bar for each value: from the lowest, or from zero, to the highest."""
    low = 0.0 if from_zero else min(values.values())
    span = (max(values.values()) - low) or 1.0
    names = list(values)
    return {
        "title": title,
        "first": names[0],
        "last": names[-1],
        "low": format_number(min(values.values())),
        "high": format_number(max(values.values())),
        "bars": [
            {
                "height": round(4 + 96 * (value - low) / span, 2),
                "title": f"{name}: {format_number(value)}",
            }
            for name, value in values.items()
        ],
    }


def _pictures(evaluation: Facts) -> list[str]:
    """The PNG files that the evaluation of a pruning model names, as data URIs."""
    files = (evaluation.get("pruning") or {}).get("pictures") or []
    contents = [base64.b64encode(Path(f).read_bytes()).decode() for f in files if Path(f).is_file()]
    return [f"data:image/png;base64,{content}" for content in contents]


def _layer_columns(layers: Sequence[Facts]) -> list[str]:
    """The usual columns that any layer has, then whatever else is there."""
    keys = dict.fromkeys(key for layer in layers for key in layer)
    return [c for c in LAYER_COLUMNS if c in keys] + [k for k in keys if k not in LAYER_COLUMNS]


# ---- comparisons --------------------------------------------------------------------------------


def _best(rows: Sequence[Row]) -> str:
    """The nearest to 16 bits of those that are smaller, in a sentence."""
    measured = [row for row in rows if row.front and row.values.get("kl") is not None]
    if not measured:
        return ""
    best = min(measured, key=lambda row: row.number("kl"))
    size = f" at {format_bytes(best.number('bytes'))}" if best.values.get("bytes") else ""
    return f"Nearest to 16 bits: {best.name}{size}, KL {best.cell('kl')} nats a token."
