"""Accuracy against the visual tokens that are kept: one line a method, one panel a metric.

The share kept is the average over decoder layers that was measured, not the one that was asked for:
a method that prunes inside the language model only cannot keep less than what lies before it.

    plot_kept({"random": rows, "fastv": rows}, baseline_row, "kept.png")
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import UsageError
from compress.eval.report import COLOURS, ERROR, Row, columns_of

MARKERS = "osD^vP*X<>"
ACCURACIES = ("acc", "exact_match")


def plot_kept(
    lines: Mapping[str, Sequence[Row]],
    baseline: Row,
    path: str | Path,
    metrics: Sequence[str] | None = None,
) -> Path:
    """Draws the rows' metrics over their `kept`, with error bars, and the baseline as a line.

    Args:
        lines: by label, rows as `report.quality_row` makes them, with `kept` in (0, 1].
        baseline: the unpruned model's row.
        path: of the picture; its suffix says the format (png, svg, pdf).
        metrics: columns to draw; None for the accuracy of each task.

    Raises:
        UsageError: matplotlib is not installed, or no row has one of the metrics.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator
    except ImportError:
        raise UsageError("plots need matplotlib: pip install 'modelpress[eval]'") from None
    rows = [row for line in lines.values() for row in line]
    columns = columns_of(rows)
    if metrics is None:
        metrics = [c for c in columns if c.split(" ")[-1] in ACCURACIES]
    metrics = [m for m in metrics if any(row.get(m) is not None for row in rows)]
    if not metrics:
        raise UsageError(
            f"nothing to plot over the tokens kept: no row has an accuracy; columns are "
            f"{', '.join(columns)}"
        )
    figure = Figure(figsize=(7.2 * len(metrics), 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for i, metric in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), i + 1)
        _draw_baseline(axes, metric, baseline)
        for number, (label, line) in enumerate(lines.items()):
            _draw_line(axes, metric, label, line, number)
        ticks = sorted({round(100 * row["kept"]) for row in rows})
        axes.set_xscale("log")
        axes.set_xticks(_apart(ticks), [str(tick) for tick in _apart(ticks)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("visual tokens kept, average over layers, measured (%)")
        axes.set_ylabel(f"{metric} (higher is better)")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw_baseline(axes: Any, metric: str, baseline: Row) -> None:
    value, error = baseline.get(metric), baseline.get(metric + ERROR)
    if value is None:
        return
    axes.axhline(value, color="black", linestyle="--", linewidth=1, label="unpruned")
    if error:
        axes.axhspan(value - error, value + error, color="black", alpha=0.08)


def _draw_line(axes: Any, metric: str, label: str, rows: Sequence[Row], number: int) -> None:
    points = sorted((row for row in rows if row.get(metric) is not None), key=lambda r: r["kept"])
    if not points:
        return
    errors = [row.get(metric + ERROR) or 0 for row in points]
    axes.errorbar(
        [100 * row["kept"] for row in points],
        [row[metric] for row in points],
        yerr=errors if any(errors) else None,
        label=label,
        marker=MARKERS[number % len(MARKERS)],
        # Colours come round before markers do: the second round is dashed.
        color=COLOURS[number % len(COLOURS)],
        linestyle="-" if number < len(COLOURS) else ":",
        markersize=5,
        capsize=3,
        linewidth=1.2,
    )


def _apart(ticks: list[int]) -> list[int]:
    """Of rising ticks those that have room on a logarithmic axis."""
    shown: list[int] = []
    for tick in ticks:
        if not shown or tick >= 1.15 * shown[-1]:
            shown.append(tick)
    return shown
