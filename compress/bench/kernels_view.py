"""What `bench kernels` shows: a table, and a plot of speed against rows. Imports no torch.

console.print(kernels_table(result))
plot_kernels(result, Path("kernels.svg"))
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from compress.bench.report import table_of
from compress.errors import import_package
from compress.eval.report import format_bytes

STYLES = ("-", "--", ":", "-.")


def kernels_table(result: Mapping[str, Any]) -> Table:
    """One line for each shape, width and M: time, bandwidth, floor, and how others compare."""
    ratios = [name for row in result["rows"] for name in row["ratio"] if name != "packed"]
    others = list(dict.fromkeys(ratios))
    columns = ("N x K", "bits", "M", "µs", "± %", "GB/s", "of copy", "x floor", "error")
    compared = (f"{other} /" for other in others)
    table = table_of(_caption(result), (*columns, *compared, "bytes", "of bf16"))
    for row in result["rows"]:
        table.add_row(
            " x ".join(map(str, row["shape"])),
            str(row["bits"]),
            str(row["rows"]),
            f"{row['seconds']['packed'] * 1e6:.1f}",
            f"{row['spread']['packed'] * 100:.0f}",
            f"{row['bytes_per_second'] / 1e9:.1f}",
            f"{row['share_of_bandwidth']:.0%}",
            f"{row['times_floor']:.2f}",
            f"{row['error']['packed']:.1e}",
            *(f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "-" for name in others),
            format_bytes(row["bytes"]["packed"]),
            f"{row['memory_ratio']:.2f}",
        )
    return table


def tuning_table(result: Mapping[str, Any]) -> Table:
    """One line for each entry that was written."""
    table = table_of(f"written to {result['path']}", ())
    for name in ("entry", "tiles", "µs", "before", "tried"):
        table.add_column(name)
    for entry in result["entries"]:
        tiles = ", ".join(f"{name} {value}" for name, value in entry["tiles"].items())
        times = (f"{entry[name] * 1e6:.1f}" for name in ("seconds", "before"))
        table.add_row(entry["key"], tiles, *times, str(entry["tried"]))
    return table


def plot_kernels(result: Mapping[str, Any], path: Path) -> None:
    """Times as fast as dense, against M: a panel for each shape, a line for each width.

    Writes what the suffix says (.svg, .png, .pdf). Raises UsageError without matplotlib.
    """
    import_package("matplotlib.figure", "a plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # may not be installed
    from matplotlib.figure import Figure  # the same

    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in result["rows"]))
    figure = Figure(figsize=(4.2 * len(shapes), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    dense = dense_name(result)
    for panel, shape in zip(panels, shapes, strict=True):
        rows = [row for row in result["rows"] if tuple(row["shape"]) == shape]
        for i, bits in enumerate(dict.fromkeys(row["bits"] for row in rows)):
            line = [row for row in rows if row["bits"] == bits]
            times = [row["ratio"][dense] for row in line]
            label = f"{bits} bits"
            panel.plot([row["rows"] for row in line], times, STYLES[i % 4], marker="o", label=label)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_title(f"{shape[0]} x {shape[1]}")
        panel.set_xlabel("rows M")
    panels[0].set_ylabel(f"times as fast as {dense}")
    panels[0].legend()
    figure.savefig(path)


def dense_name(result: Mapping[str, Any]) -> str:
    """The dense product that a packed one stands in for: same activations."""
    return f"dense {result['conditions']['bench']['dtype']}"


def _caption(result: Mapping[str, Any]) -> str:
    conditions = result["conditions"]
    bench = conditions["bench"]
    rates = ", ".join(
        f"{name} {rate / 1e9:.0f}" for name, rate in conditions["product_rates"].items()
    )
    where = [conditions["device"], f"torch {conditions['torch']}"]
    if conditions.get("threads"):
        where += [f"{conditions['threads']} threads", conditions["cpu_kernels"]]
    where += [
        f"{bench['dtype']} activations, groups of {bench['group_size'] or 'all inputs'}",
        f"copy {conditions['copy_bandwidth'] / 1e9:.1f} GB/s",
        f"products {rates} GFLOP/s",
    ]
    return (
        "; ".join(where)
        + "\nmedian of "
        + f"{conditions['rounds']} rounds, ± interquartile range; NAME / = how many times as long "
        "as packed NAME takes"
    )
