"""What was measured, for people: numbers as text, rows, pictures.

A `Row` is a model in a table, made of what `evaluate_model` returns.

    row = Row.of("RSQ", scores, bytes=1_900_000)
    row.cell("perplexity")  # "9.28 ± 0.33"
"""

import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError, import_package

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ERROR = "_stderr"
NLL = "mean NLL (nats per token)"
MISSING = "–"
NORMAL_95 = 1.96  # standard errors to either side
# Of items that are right or wrong, in what order they are told.
FLIPS = {
    "right_to_wrong": "right to wrong",
    "wrong_to_right": "wrong to right",
    "mcnemar_p": "McNemar p",
}
ON_FRONT = "◆"
FRONT_LINE = (
    f"{ON_FRONT}, ringed in the picture: no other recipe is both smaller and nearer to 16 bits, "
    "errors aside"
)
LAYER_COLUMNS = ("name", "bits", "group_size", "error", "effective_sample_size", "seconds")
# Okabe and Ito's colours, told apart with every kind of colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

Facts = Mapping[str, Any]


# ---------------------------------------------------------------------------- numbers as text


def format_bytes(count: float) -> str:
    """Decimal units, as file systems and model hubs print them: `1.90 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def format_memory(peak: Mapping[str, int]) -> str:
    """Peak memory of the host, and of the device if it was used."""
    host, device = format_bytes(peak.get("host", 0)), peak.get("device", 0)
    return f"{host} host, {format_bytes(device)} device" if device else f"{host} host"


def format_seconds(seconds: float) -> str:
    """A stretch of time to come: `42 s`, `3 min`, `2 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def format_number(value: Any, error: float | None = None) -> str:
    """A value, to the second digit of its error if there is one: `0.525 ± 0.025`."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if error is not None and math.isfinite(error) and error > 0 and math.isfinite(value):
        digits = max(0, 1 - math.floor(math.log10(error)))
        return f"{value:.{digits}f} ± {error:.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def format_difference(value: float | None, error: float | None = None) -> str:
    """A difference with its sign, as `format_number` has it: `+0.040 ± 0.028`."""
    text = format_number(value, error)
    return f"+{text}" if value is not None and value > 0 else text


# ---------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Row:
    """A model in a table: what it takes, and figures with their errors.

    Attributes:
        values: by column, in order: bytes, bits, seconds, then `perplexity`, `kl`, `TASK METRIC`.
        errors: of those that are measured; None where one item or one window gives none.
        front: whether no other row is both smaller and nearer to 16 bits; None: nobody has asked.
    """

    name: str
    values: dict[str, float | None]
    errors: dict[str, float | None] = field(default_factory=dict)
    front: bool | None = None

    @classmethod
    def of(cls, name: str, evaluation: Facts, **facts: float) -> "Row":
        """From the result of `evaluate_model`, or from its `baseline` part.

        `facts` are put first: bytes, bits, seconds. A model that prunes visual tokens has `kept`,
        the share of them that its layers saw on average.
        """
        row = cls(name, dict(facts))
        if pruning := evaluation.get("pruning"):
            row.values.setdefault("kept", pruning["average_kept"])
        if text := evaluation.get("perplexity"):
            row.put("perplexity", text["value"], text.get("value_stderr"))
        if kl := evaluation.get("kl"):
            row.put("kl", kl["mean"], kl.get("stderr"))
        for task, metrics in (evaluation.get("results") or {}).items():
            for metric, value in metrics.items():
                if metric.endswith(ERROR):
                    row.errors[f"{task} {metric.removesuffix(ERROR)}"] = value
                else:
                    row.values[f"{task} {metric}"] = value
        return row

    def put(self, column: str, value: float | None, error: float | None) -> None:
        self.values[column], self.errors[column] = value, error

    def number(self, column: str) -> float:
        """A figure that is known to be there."""
        value = self.values[column]
        assert value is not None, f"{self.name} has no {column}"
        return value

    def cell(self, column: str) -> str:
        """A figure as text, with its error."""
        value = self.values.get(column)
        if column in ("bytes", "kv_bytes") and value is not None:
            return format_bytes(value)
        if column == "difference":
            return format_difference(value, self.errors.get(column))
        return format_number(value, self.errors.get(column))

    @property
    def title(self) -> str:
        """The name, marked where no other row is both smaller and better."""
        return f"{self.name} {ON_FRONT}" if self.front else self.name

    def as_dict(self) -> dict[str, Any]:
        """Flat, for JSON: the error of `x` is `x_stderr`, behind it."""
        flat: dict[str, Any] = {"name": self.name}
        for column, value in self.values.items():
            flat[column] = value
            if column in self.errors:
                flat[column + ERROR] = self.errors[column]
        return flat if self.front is None else flat | {"pareto_front": self.front}


def marked(rows: Sequence[Row]) -> list[Row]:
    """The rows, those that have bytes and a distance to 16 bits with `front`.

    By KL where it was measured, else by perplexity; rows without either are not asked, nor is the
    16-bit model, whose KL nobody measures.
    """
    y = next((c for c in ("kl", "perplexity") if any(c in row.values for row in rows)), None)
    points = {
        i: (row.number("bytes"), row.number(y))
        for i, row in enumerate(rows)
        if y and row.values.get("bytes") is not None and row.values.get(y) is not None
    }
    if y == "perplexity":  # the 16-bit model has one too: it is not among the recipes
        points.pop(0, None)
    beaten = {
        i: any(a <= size and b <= loss and (a, b) != (size, loss) for a, b in points.values())
        for i, (size, loss) in points.items()
    }
    return [replace(row, front=not beaten[i]) if i in beaten else row for i, row in enumerate(rows)]


def columns_of(rows: Sequence[Row]) -> list[str]:
    """All columns, in order of first appearance."""
    return list(dict.fromkeys(column for row in rows for column in row.values))


def paired_differences(evaluation: Facts) -> dict[str, Facts]:
    """Model minus baseline by column, {"value", "stderr", "count"} each; that of the text last."""
    difference = evaluation.get("difference") or {}
    paired = {
        f"{task} {metric}": estimate
        for task, metrics in (difference.get("results") or {}).items()
        for metric, estimate in metrics.items()
    }
    return paired | ({NLL: nll} if (nll := difference.get("mean_nll")) else {})


def interval(estimate: Facts) -> tuple[float, float] | None:
    """The ends of a difference's 95 % interval; None where it has no error."""
    value, error = estimate["value"], estimate.get("stderr")
    if error is None or not math.isfinite(error):
        return None
    return value - NORMAL_95 * error, value + NORMAL_95 * error


def judged(estimate: Facts) -> str:
    """What an interval says of a loss, with the interval; "" where answers are not right or wrong,
    and where there is no interval."""
    if "mcnemar_p" not in estimate or (ends := interval(estimate)) is None:
        return ""
    if not (estimate["right_to_wrong"] or estimate["wrong_to_right"]):
        return "no item changed"
    low, high = ends
    kind = "significant loss" if high < 0 else "significant gain" if low > 0 else ""
    return f"{kind or 'no significant loss'}, 95 % interval {low:+.3f} to {high:+.3f}"


def not_seen(estimate: Facts) -> str:
    """That a difference's interval reaches zero, and at how many items; "" where it does not."""
    ends = interval(estimate)
    if ends is None or not ends[0] <= 0 <= ends[1]:
        return ""
    count = estimate.get("count")
    return "no difference seen" + (f" at {count:,} items" if count else "")


def told(estimate: Facts) -> str:
    """A paired difference in words: its figure, what that says, and how items changed."""
    parts = [format_difference(estimate["value"], estimate.get("stderr"))]
    if words := judged(estimate):
        parts.append(words)
    if "mcnemar_p" in estimate:
        flips = [f"{estimate[key]} {FLIPS[key]}" for key in list(FLIPS)[:2]]
        parts.append(", ".join([*flips, f"McNemar p {format_number(estimate['mcnemar_p'])}"]))
    return "; ".join(parts)


def flatten(nested: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """`{"a": {"b": 1}}` -> `("a.b", "1")`: the spelling that --set takes.

    What is empty is left out, and texts of a list stand behind each other.
    """
    if isinstance(nested, Mapping):
        for key, value in nested.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(nested, list | tuple) and any(isinstance(v, Mapping) for v in nested):
        for i, value in enumerate(nested):
            yield from flatten(value, f"{prefix}[{i}]")
    elif isinstance(nested, list | tuple) and all(isinstance(v, str) for v in nested):
        if nested:
            yield prefix, "; ".join(nested)
    elif prefix:
        yield prefix, MISSING if nested is None else str(nested)


# ---------------------------------------------------------------------------- how it was measured


def conditions_of(evaluation: Facts) -> list[tuple[str, str]]:
    """What the figures depend on, by name: what was set, and what was found out."""
    facts = evaluation.get("conditions") or {}
    told = {k: v for k, v in facts.items() if k != "warnings" and v is not None}
    return list(flatten(told))


def warnings_of(evaluation: Facts) -> list[str]:
    """What lm-eval warned of, a sentence each, and how often if more than once."""
    counts = (evaluation.get("conditions") or {}).get("warnings") or {}
    return [
        f"{message} ({times} times)" if times > 1 else message for message, times in counts.items()
    ]


def told_apart(evaluation: Facts) -> str:
    """How an evaluation was taken, in the few words that tell it from others of the same model."""
    facts, parts = evaluation.get("conditions") or {}, []
    if evaluation.get("results"):
        if (template := facts.get("chat_template")) is not None:
            name = facts.get("chat_template_name")
            parts.append(f"{'with' if template else 'without'} chat template" + _behind(name))
        if system := facts.get("system_instruction"):
            parts.append(f"system prompt “{textwrap.shorten(str(system), 50)}”")
        if shots := sorted({*(facts.get("shots") or {}).values()}):
            parts.append(f"{' and '.join(map(str, shots))} shots")
        asked = ("limit", "gen_kwargs", "max_length", "add_bos_token", "metadata")
        set_ = {key: facts[key] for key in asked if facts.get(key) is not None}
        parts += [f"{key} {value}" for key, value in flatten(set_)]
    if text := evaluation.get("perplexity"):
        size = [f"{text['tokens']:,} tokens"] if text.get("tokens") else []
        if said := facts.get("perplexity_dataset"):
            size.append(Path(str(said)).name.removesuffix(" (held out)"))
        parts += [" of ".join(size)] * bool(size)
        if text.get("length"):
            parts.append(f"{text.get('unit', 'window')}s of {text['length']:,}")
    if (bits := facts.get("activation_bits")) is not None:
        parts.append(f"{bits}-bit activations")
    return ", ".join(parts)


def measured_before(result: Facts) -> str:
    """Of an export: that figures are those of the checkpoint it was made from, and what differs.

    result: as the card and the page of a run take it; "" where no figure is of before an export.
    """
    evaluations = [result.get("evaluation") or {}, *(result.get("earlier") or [])]
    format = next((e["before_export"] for e in evaluations if e.get("before_export")), None)
    if format is None:
        return ""
    differs = (result.get("export") or {}).get("differs")
    text = (
        f"Figures under “before export” were measured on the {format} checkpoint that these files "
        "were exported from, run by modelpress, and not on these files. "
    )
    if differs is None:
        return text + "Whether these hold the same values was not written down."
    if differs:
        return text + f"These do not hold the same values: {'; '.join(differs)}."
    return text + "These hold the same values."


def _behind(name: object) -> str:
    return f" {name}" if name else ""


# ---------------------------------------------------------------------------- pictures


def error_plot(
    layers: Sequence[Facts], width: int = 900, height: int = 260, margin: int = 48
) -> dict[str, Any] | None:
    """Coordinates for the page's SVG: error (logarithmic) by place in the model, coloured by bits.

    Errors that are missing, not finite or not positive cannot be drawn; `omitted` names their
    modules. None where nothing can be drawn.
    """
    drawn = [(i, layer) for i, layer in enumerate(layers) if _drawable(layer.get("error"))]
    if not drawn:
        return None
    logs = [math.log10(layer["error"]) for _, layer in drawn]
    low, high = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
    widths = sorted({str(layer.get("bits", MISSING)) for _, layer in drawn})
    colours = {bits: COLOURS[i % len(COLOURS)] for i, bits in enumerate(widths)}

    def x_of(i: int) -> float:
        return round(margin + (width - 2 * margin) * (i + 0.5) / len(layers), 1)

    def y_of(log: float) -> float:
        return round(height - margin + (2 * margin - height) * (log - low) / (high - low), 1)

    starts: dict[str, int] = {}  # where each decoder layer begins
    for i, layer in enumerate(layers):
        if index := re.search(r"\.(\d+)\.", str(layer.get("name", ""))):
            starts.setdefault(index.group(1), i)
    every = math.ceil(len(starts) / 16) or 1  # no more labels than fit
    return {
        "width": width,
        "height": height,
        "margin": margin,
        "points": [
            {
                "x": x_of(i),
                "y": y_of(log),
                "colour": colours[str(layer.get("bits", MISSING))],
                "title": f"{layer.get('name', i)}: {layer['error']:.4g}",
            }
            for (i, layer), log in zip(drawn, logs, strict=True)
        ],
        "rows": [{"y": y_of(k), "label": f"1e{k}"} for k in range(low, high + 1)],
        "columns": [{"x": x_of(i), "label": k} for k, i in list(starts.items())[::every]],
        "legend": [{"label": f"{bits} bits", "colour": colours[bits]} for bits in widths],
        "omitted": [
            str(layer.get("name", i))
            for i, layer in enumerate(layers)
            if not _drawable(layer.get("error"))
        ],
    }


def _drawable(error: Any) -> bool:
    return isinstance(error, int | float) and math.isfinite(error) and error > 0


def blank_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches; UsageError where matplotlib is not installed."""
    import_package("matplotlib.figure", "a plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure  # the same

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Writes a figure; the suffix says the format (png, svg, pdf)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def plot_quality(
    rows: Sequence[Row],
    path: str | Path,
    metrics: Sequence[str] | None = None,
) -> Path:
    """Quality against bytes: one panel a metric, one labelled point with its error bar a row.

    Args:
        rows: see the file's head; rows without `bytes` or without the metric are not in its panel.
        path: of the picture; its suffix says the format (png, svg, pdf).
        metrics: columns to draw; None for the perplexity and the accuracy (acc) of each task.

    Raises:
        UsageError: matplotlib is not installed, or no row has bytes and one of the metrics.
    """
    columns = columns_of(rows)
    if metrics is None:
        metrics = [c for c in columns if c == "perplexity" or c.split(" ")[-1] == "acc"]
    panels = {
        m: [r for r in rows if None not in (r.values.get("bytes"), r.values.get(m))]
        for m in metrics
    }
    panels = {metric: points for metric, points in panels.items() if points}
    if not panels:
        raise UsageError(
            f"nothing to plot: no row has bytes and one of "
            f"{', '.join(metrics) or 'perplexity, acc'}; columns are {', '.join(columns)}"
        )
    figure = blank_figure(5.6 * len(panels), 4.2)
    colours = {row.name: COLOURS[i % len(COLOURS)] for i, row in enumerate(rows)}
    drawn = []
    for i, (metric, points) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        _draw_panel(axes, metric, points, colours)
        drawn.append((axes, metric, points))
    figure.draw_without_rendering()  # settles the axes, which the labels' places depend on
    for axes, metric, points in drawn:
        _label_points(axes, metric, points, colours)
    return save_figure(figure, path)


def _draw_panel(
    axes: "Axes", metric: str, points: Sequence[Row], colours: Mapping[str, str]
) -> None:
    for row in points:
        axes.errorbar(
            row.number("bytes") / 1e6,
            row.number(metric),
            yerr=row.errors.get(metric),
            fmt="o",
            capsize=3,
            color=colours[row.name],
        )
    ring_front(axes, points, [(row.number("bytes") / 1e6, row.number(metric)) for row in points])
    values = [row.number(metric) for row in points]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    better = "lower" if metric in ("perplexity", "kl") else "higher"
    axes.set_xlabel("size on disk (MB)")
    axes.set_ylabel(f"{metric} ({better} is better)")
    axes.margins(x=0.3, y=0.15)
    axes.grid(alpha=0.25)


def in_picture(name: str, width: int = 48) -> str:
    """A name as there is room for it in a picture: of a long one the beginning and the end."""
    half = width // 2
    return name if len(name) <= width else f"{name[:half]}…{name[-half + 1 :]}"


def ring_front(
    axes: "Axes", rows: Sequence[Row], places: Sequence[tuple[float, float]], label: bool = False
) -> None:
    """A ring round each row that no other beats; `label`: with a line in the legend."""
    rings = [place for row, place in zip(rows, places, strict=True) if row.front]
    if rings:
        axes.plot(
            *zip(*rings, strict=True),
            linestyle="",
            marker="o",
            markersize=12,
            fillstyle="none",
            color="black",
            label="none smaller and nearer to 16 bits" if label else None,
        )


def _label_points(
    axes: "Axes", metric: str, points: Sequence[Row], colours: Mapping[str, str]
) -> None:
    """Names beside the points, lifted where they would cover the name of a point below."""
    points_per_pixel = 72 / axes.figure.dpi
    placed: list[tuple[float, float]] = []  # of the names so far, in points from the corner
    for row in sorted(points, key=lambda row: (row.number(metric), row.name)):
        place = row.number("bytes") / 1e6, row.number(metric)
        x, y = axes.transData.transform(place) * points_per_pixel
        near = [top for left, top in placed if abs(left - x) < 60]
        lifted = max([y - 3.0, *(top + 10.0 for top in near)])
        placed.append((x, lifted))
        axes.annotate(
            in_picture(row.name),
            place,
            xytext=(8, lifted - y),
            textcoords="offset points",
            fontsize=8,
            color=colours[row.name],
        )
