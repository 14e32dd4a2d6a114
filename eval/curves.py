"""Quality against what a model costs: one line a method, one panel a metric.

The cost is the bytes of the checkpoint, or the share of visual tokens kept: the average over the
layers that was measured, not the one that was asked for, because a method that prunes in the
language model only cannot keep less than what lies before it.

    plot_lines({"random": rows, "fastv": rows}, baseline_row, "kept.png", "kept")
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import UsageError
from compress.eval.report import (
    COLOURS,
    Row,
    blank_figure,
    columns_of,
    in_picture,
    ring_front,
    save_figure,
)

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes

MARKERS = "osD^vP*X<>"
ACCURACIES = ("acc", "exact_match")


@dataclass(frozen=True)
class Cost:
    """An axis: the rows' value times `factor`, and the metrics that are drawn unless others are."""

    label: str
    factor: float
    metrics: tuple[str, ...]


COSTS = {
    "kept": Cost("visual tokens kept, average over layers, measured (%)", 100, ACCURACIES),
    "bytes": Cost("tensors of the checkpoint (MB)", 1e-6, ("perplexity", "acc")),
}


def plot_lines(lines: Mapping[str, Sequence[Row]], baseline: Row, path: str | Path, x: str) -> Path:
    """Draws the metrics of a cost over it, with error bars, and the baseline as a line.

    Args:
        lines: by label, rows, each with `x`.
        baseline: the row of the model as it was.
        path: of the picture; its suffix says the format (png, svg, pdf).
        x: one of COSTS.

    Raises:
        UsageError: matplotlib is not installed, or no row has one of the metrics.
    """
    cost = COSTS[x]
    rows = [row for line in lines.values() for row in line]
    columns = columns_of(rows)
    metrics = [c for c in columns if c.split(" ")[-1] in cost.metrics]
    metrics = [m for m in metrics if any(row.values.get(m) is not None for row in rows)]
    if not metrics:
        raise UsageError(
            f"nothing to plot over {x}: no row has {' or '.join(cost.metrics)}; columns are "
            f"{', '.join(columns)}"
        )
    figure = blank_figure(7.2 * len(metrics), 5)
    for i, metric in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), i + 1)
        _draw_baseline(axes, metric, baseline)
        for number, (label, line) in enumerate(lines.items()):
            drawn = [row for row in line if row.values.get(metric) is not None]
            points = sorted(drawn, key=lambda row: row.number(x))
            places = [cost.factor * row.number(x) for row in points]
            _draw_line(axes, metric, label, points, places, number)
        if x == "bytes":
            drawn = [row for row in rows if row.values.get(metric) is not None]
            where = [(cost.factor * row.number(x), row.number(metric)) for row in drawn]
            ring_front(axes, drawn, where, label=True)
        if x == "kept":
            _logarithmic(axes, sorted({round(cost.factor * row.number(x)) for row in rows}))
        axes.set_xlabel(cost.label)
        lower = metric == "perplexity"
        if lower:
            axes.set_yscale("log")
            for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatted("{x:g}")  # 12, not 1.2 x 10^1
        axes.set_ylabel(f"{metric} ({'lower' if lower else 'higher'} is better)")
        axes.grid(alpha=0.25, which="both")
        axes.legend(fontsize=8)
    return save_figure(figure, path)


def _draw_baseline(axes: "Axes", metric: str, baseline: Row) -> None:
    value, error = baseline.values.get(metric), baseline.errors.get(metric)
    if value is None:
        return
    axes.axhline(value, color="black", linestyle="--", linewidth=1, label=baseline.name)
    if error:
        axes.axhspan(value - error, value + error, color="black", alpha=0.08)


def _draw_line(
    axes: "Axes", metric: str, label: str, points: Sequence[Row], places: list[float], number: int
) -> None:
    if not points:
        return
    errors = [row.errors.get(metric) or 0 for row in points]
    axes.errorbar(
        places,
        [row.number(metric) for row in points],
        yerr=errors if any(errors) else None,
        label=in_picture(label),
        marker=MARKERS[number % len(MARKERS)],
        # Colours come round before markers do: the second round is dashed.
        color=COLOURS[number % len(COLOURS)],
        linestyle="-" if number < len(COLOURS) else ":",
        markersize=5,
        capsize=3,
        linewidth=1.2,
    )


def _logarithmic(axes: "Axes", ticks: list[int]) -> None:
    from matplotlib.ticker import NullLocator  # slow to import

    axes.set_xscale("log")
    shown = _apart(ticks)
    axes.set_xticks(shown, [str(tick) for tick in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def _apart(ticks: list[int]) -> list[int]:
    """Of rising ticks those that have room on a logarithmic axis."""
    shown: list[int] = []
    for tick in ticks:
        if not shown or tick >= 1.15 * shown[-1]:
            shown.append(tick)
    return shown
