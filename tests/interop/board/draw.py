"""Draws the board, quality against total bytes, and prints its table, from what measure.py wrote.

    python tests/interop/board/draw.py docs/quality.png

A point is a way of making and a width: its mean over seeds. The table has what the picture has no
room for; ± is the standard error over windows (of BLiMP over items), and behind a mean of several
seeds their standard deviation.
"""

import argparse
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measure import OURS, PEERS, recorded

from compress.eval.report import COLOURS, format_number

# Curves: what a row's name begins with -> how it is called. Ours are solid.
CURVES = {
    "RTN": "RTN",
    "GPTQ, 16-bit target": "GPTQ, 16-bit target",
    "GPTQ": "GPTQ",
    "QuaRot": "QuaRot",
    "RSQ, 16-bit target, 4-bit tables": "RSQ, 16-bit target, 4-bit tables",
    "RSQ, 16-bit target": "RSQ, 16-bit target",
    "RSQ": "RSQ",
    "mixed widths by LIM": "mixed widths by LIM",
    "mixed widths by hidden": "mixed widths by hidden states",
    "mixed": "mixed widths",
    "llmcompressor-gptq": "llm-compressor GPTQ",
    "gptqmodel-gptq": "GPTQModel GPTQ",
    "gptqmodel-gptaq": "GPTQModel GPTAQ",
    "autoround": "auto-round",
    "llamacpp": "llama.cpp",
}
DRAWN = {  # the rest is in the table
    "GPTQ, 16-bit target": (COLOURS[0], "-o"),
    "RSQ, 16-bit target": (COLOURS[1], "-s"),
    "RSQ, 16-bit target, 4-bit tables": (COLOURS[1], "--s"),
    "RTN": (COLOURS[6], "-x"),
    "mixed widths by LIM": ("#8b4513", "-*"),
    "llm-compressor GPTQ": (COLOURS[2], "--^"),
    "GPTQModel GPTQ": (COLOURS[3], "--v"),
    "GPTQModel GPTAQ": (COLOURS[4], "--<"),
    "auto-round": (COLOURS[5], "--D"),
    "llama.cpp": ("#777777", ":P"),
}


def name_of(row: dict[str, Any]) -> str:
    """The recipe's name without the width that it was varied by, or the peer's."""
    return re.split(r" (?:average_)?bits=", row.get("recipe", row["name"]))[0]


def curve_of(row: dict[str, Any]) -> str:
    """The name of the curve that a row is of."""
    name = name_of(row)
    return CURVES[next(start for start in CURVES if name.startswith(start))]


def points(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one recipe as one: means, and the seeds' standard deviation of each mean."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        recipe = row.get("recipe", row["name"]).removesuffix(f"-{row.get('seed')}")
        groups.setdefault(recipe, []).append(row)
    found = []
    for group in groups.values():
        point = dict(group[0]) | {"curve": curve_of(group[0]), "seeds": len(group), "spread": {}}
        for figure in ("nll", "kl", "top1"):
            values = [row[figure]["value"] for row in group]
            point[figure] = point[figure] | {"value": statistics.fmean(values)}
            if len(values) > 1:
                point["spread"][figure] = statistics.stdev(values)
        point["perplexity"] = statistics.fmean(row["perplexity"] for row in group)
        found.append(point)
    return sorted(
        found, key=lambda point: (list(CURVES.values()).index(point["curve"]), point["bytes"])
    )


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """KL to the 16-bit model against bytes, both on scales where a curve is near a line."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (colour, style) in DRAWN.items():
        own = [point for point in found if point["curve"] == name]
        if name == "llama.cpp":  # each of its types is a way of its own
            own = [point for point in own if "imatrix" in point["name"] or "Q4_0" in point["name"]]
        if not own:
            continue
        axes.plot(
            [point["bytes"] / 1e6 for point in own],
            [point["kl"]["value"] for point in own],
            style,
            color=colour,
            label=name,
        )
        for point in own:
            label = str(point["bits"]) if name != "llama.cpp" else point["name"].split("-")[1]
            axes.annotate(
                label,
                (point["bytes"] / 1e6, point["kl"]["value"]),
                textcoords="offset points",
                xytext=(5, 4),
                fontsize=8,
                color=colour,
            )
    axes.set_yscale("log")
    axes.set_xlabel("all tensors of the file, MB (16 bits: 269)")
    axes.set_ylabel("KL to the 16-bit model, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def table(found: Sequence[dict[str, Any]], plain: dict[str, Any]) -> str:
    """Markdown: a line a point."""
    lines = [
        "| | bits | MB | perplexity | KL | same first token | BLiMP | peak, GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        f"| 16-bit | 16 | {plain['bytes'] / 1e6:.1f} | {plain['perplexity']:.2f} | – | – "
        f"| {plain['blimp']['value']:.3f} | |",
    ]
    for point in found:
        kl, top1, blimp = point["kl"], point["top1"], point.get("blimp")
        error = point["spread"].get("kl", kl["stderr"])
        told = "–"
        if blimp is not None:
            difference = blimp["difference"]
            told = f"{difference['value']:+.3f} ± {difference['stderr']:.3f}"
        name = name_of(point).removesuffix(f"-{point.get('seed')}")
        seeds = f" ({point['seeds']} seeds)" if point["seeds"] > 1 else ""
        size = f"{point['bytes'] / 1e6:.1f} | {point['perplexity']:.2f}"
        lines.append(
            f"| {name}{seeds} | {point['bits']} | {size} "
            f"| {format_number(kl['value'], error)} | {top1['value']:.1%} | {told} "
            f"| {point['peak_memory'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("picture", type=Path)
    asked = parser.parse_args()
    rows = [*recorded(OURS), *recorded(PEERS)]
    plain = next(row for row in rows if row["name"] == "16-bit")
    found = points([row for row in rows if row is not plain])
    draw(found, asked.picture)
    print(table(found, plain))


if __name__ == "__main__":
    main()
