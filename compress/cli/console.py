"""Tables and lines that the command line prints. Imports no torch, so that `--help` stays quick.

out = console()
out.print(module_table(inspect("out")["modules"]))
"""

import contextlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from compress.eval.report import (
    MISSING,
    Row,
    columns_of,
    conditions_of,
    format_bytes,
    format_number,
    paired_differences,
    told,
    warnings_of,
)
from compress.eval.tables import position_table, quality_table, turned_table
from compress.ranks import launched
from compress.storage.files import write_text

if TYPE_CHECKING:  # need torch
    from compress.allocation.allocate import Allocation
    from compress.pipeline.result import RunResult
    from compress.pipeline.source_check import SourceCheck

MOST_COLUMNS = 6  # of figures side by side; more stand below each other
WIDE = 200  # columns where the output is no terminal, whose own 80 would cut tables short


def console(stderr: bool = False) -> Console:
    """A console on stdout or stderr that prints text as it is: no markup, no highlighting.

    Of several ranks, that of the first.
    """
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDE
    quiet = launched()[0] > 0
    return Console(stderr=stderr, width=width, markup=False, highlight=False, quiet=quiet)


def print_lines(console: Console, *lines: str) -> None:
    """Each on its own line, however long: the terminal wraps it, so that it can be copied."""
    for line in lines:
        console.print(line, soft_wrap=True)


def to_json(value: Any) -> str:
    """Strict JSON of plain values: what is not finite has no number there and becomes null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=str)


def write_json(path: Path | None, value: Any) -> None:
    """Writes a result to a file, if one was asked for; call it after printing, lest it be lost."""
    if path is not None:
        write_text(path, to_json(value) + "\n")


@contextlib.contextmanager
def stdout_for(json: bool) -> Iterator[Callable[[Any], None] | None]:
    """With --json, yields what prints the one object; all other printing then goes to stderr."""
    if not json:
        yield None
        return
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield lambda value: print(to_json(value), file=stdout)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def pairs_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Names left, values right of them; no heading."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def headed_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table with a heading over each column."""
    table = Table(*headings, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def module_table(modules: Sequence[Mapping[str, Any]]) -> Table:
    """Modules as `inspect` and plans list them, layers collapsed: one row a kind and scheme.

    The layer's number is a * in the name; `count` is how many modules the row stands for.
    """

    def row_of(module: Mapping[str, Any]) -> tuple[str, ...]:
        quantised = module.get("symmetric") is not None
        whole = "tensor" if module.get("per_tensor") else "channel"
        group = (module["group_size"] or whole) if quantised else MISSING
        kind = ".".join("*" if part.isdigit() else part for part in module["name"].split("."))
        notes = [{True: "", False: "asymmetric", None: "unquantised"}[module.get("symmetric")]]
        if module.get("act_order"):
            notes.append("act-order")
        if bits := module.get("activation_bits"):
            notes.append(f"activations {bits} bits")
        shape = " × ".join(map(str, module["shape"]))
        return kind, shape, format_number(module["bits"]), str(group), " ".join(filter(None, notes))

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("module")
    for column in ("count", "shape", "bits", "group"):
        table.add_column(column, justify="right")
    table.add_column("")
    for (kind, *rest), count in Counter(map(row_of, modules)).items():
        table.add_row(kind, str(count), *rest)
    return table


BAR = "█"  # one a bit


def allocation_table(allocation: "Allocation") -> Table:
    """Each unit's score, and its width as a number and a bar."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("unit")
    table.add_column("score", justify="right")
    table.add_column("bits", justify="right")
    table.add_column("")
    for unit, bits in allocation.widths.items():
        score = f"{allocation.scores[unit]:.4g}"
        table.add_row(unit, score, str(bits) if bits else "removed", BAR * bits)
    return table


def allocation_rows(allocation: "Allocation") -> list[tuple[str, str]]:
    """What the widths are predicted, and were measured, to cost."""
    rows = []
    if allocation.error is not None:
        rows.append(("predicted error", f"{allocation.error:.4g}, summed over units"))
    if allocation.fitness is not None:
        rows.append(("KL to 16 bits", f"{allocation.fitness:.4g} nats per token, as searched"))
    return rows


def size_rows(sizes: Mapping[str, int]) -> list[tuple[str, str]]:
    """The bytes of a plan or of an inspected folder."""
    return [
        ("quantised weights", format_bytes(sizes["quantized"])),
        ("other tensors", format_bytes(sizes["other"])),
        ("total", format_bytes(sizes["total"])),
    ]


def calibration_rows(facts: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """How much was read, or will be, and how many of its tokens count."""
    if not facts or "windows" not in facts:
        return []
    windows, length = facts["windows"]
    tokens, counted = facts["tokens"], facts["counted_tokens"]
    kind = "conversations, at most" if "cut" in facts else "windows of"
    text = f"{windows:,} {kind} {length:,} tokens: {tokens:,}, "
    if counted is None:
        text += "of which the assistant's count, once they are read"
    else:
        text += "all of which count" if counted == tokens else f"of which {counted:,} count"
    return [("calibration", text)]


def run_table(result: "RunResult") -> Table:
    """What a run has made and what it took."""
    provenance = json.loads((result.path / "modelpress.json").read_text(encoding="utf-8"))
    before, after = provenance["bytes"]["original"], result.plan.bytes["total"]
    size = f"{format_bytes(before)} before, {format_bytes(after)} after ({before / after:.2f} x)"
    seconds = ", ".join(f"{stage} {value:.1f}" for stage, value in result.seconds.items())
    rows = [
        ("tensors", size),
        ("average bits", f"{result.plan.average_bits:.2f} over the quantised weights"),
        ("seconds", f"{sum(result.seconds.values()):.1f} ({seconds})"),
        ("peak memory", result.memory_line()),
        *calibration_rows(provenance.get("calibration")),
    ]
    rows += source_rows(result.source_check)
    if check := result.self_check:
        text = f"relative error {check['relative_error']:.2g}, {check['tolerance']:.0e} allowed"
        rows.append(("self-check", text))
    if result.rounded_to_nearest:
        rows.append(("rounded", f"{result.rounded_to_nearest} linears to nearest: gptq was worse"))
    if result.warnings:
        rows.append(("warnings", str(len(result.warnings))))
    if result.report:
        rows.append(("report", str(result.report)))
    return pairs_table([*rows, ("output", str(result.path))])


def time_rows(forecast: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """How long layers and head will take, by kind of work, and what that leaves out."""
    if not forecast:
        return []
    parts = sorted(forecast["parts"].items(), key=lambda part: -part[1])
    shares = ", ".join(f"{name} {_lasting(seconds)}" for name, seconds in parts)
    return [
        (
            "time",
            f"about {_lasting(forecast['seconds'])} for the layers on this machine ({shares}); "
            "loading, checks, scores and evaluation come on top",
        )
    ]


def _lasting(seconds: float) -> str:
    """Two digits of it: 4.2 s, 95 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.3g} h"


def source_rows(check: "SourceCheck | None") -> list[tuple[str, str]]:
    """How far our forward of the source is from that of transformers, or why nobody looked."""
    if not check:
        return []
    if "skipped" in check:
        return [("source check", f"skipped: {check['skipped']}")]
    errors = [f"{facts['relative_error']:.2g} ({name})" for name, facts in check["probes"].items()]
    place = ", its weights on disk" if check["offloaded"] else ""
    text = f"relative error {', '.join(errors)}, {check['tolerance']:.0e} allowed"
    return [("source check", f"{text}; {check['seconds']:.1f} s{place}")]


def print_scores(
    console: Console, name: str, scores: Mapping[str, Any], baseline: str = "baseline"
) -> None:
    """A table of what `evaluate` returns, and below it everything the figures depend on."""
    rows = [Row.of(name, scores)]
    if reference := scores.get("baseline"):
        rows.insert(0, Row.of(baseline, reference))
    many = len(columns_of(rows)) > MOST_COLUMNS
    console.print(turned_table(rows) if many else quality_table(rows))
    # Model minus baseline, item by item: the errors that say whether the model is worse.
    for column, estimate in paired_differences(scores).items():
        print_lines(console, f"difference from the baseline, paired: {column} {told(estimate)}")
    if positions := scores.get("by_position"):
        console.print(position_table(positions))
    lines = [scores[part]["line"] for part in ("perplexity", "kl") if scores.get(part)]
    conditions = ", ".join(f"{k} {v}" for k, v in conditions_of(scores))
    print_lines(console, *lines, *([f"conditions: {conditions}"] if conditions else []))
    print_lines(console, *(f"warning of lm-eval: {said}" for said in warnings_of(scores)))
    print_lines(console, *(f"written: {file}" for file in scores.get("files") or ()))
