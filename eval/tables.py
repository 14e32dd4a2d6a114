"""Tables of what was measured: for a terminal, in Markdown, and as cells for a page.

rows = [Row.of("RSQ", scores, bytes=1_900_000)]
print(markdown_table(rows, "512 tokens"))
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from compress.eval.markup import in_markdown
from compress.eval.report import Row, columns_of, format_difference, format_number


def quality_table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal."""
    table = Table(box=box.SIMPLE_HEAD)
    columns = columns_of(rows)
    table.add_column("name")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(Text(row.title), *map(row.cell, columns))
    return table


def turned_table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal, a line a figure: for few models with many."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("figure")
    for row in rows:
        table.add_column(Text(row.title), justify="right")
    for column in columns_of(rows):
        table.add_row(Text(column), *(row.cell(column) for row in rows))
    return table


def markdown_table(rows: Sequence[Row], conditions: str) -> str:
    """The same rows as a Markdown table, with the conditions in a line below it."""
    columns = columns_of(rows)
    lines = [["name", *columns], ["---", *("---:" for _ in columns)]]
    lines[0] = list(map(in_markdown, lines[0]))
    lines += [[in_markdown(row.title), *map(row.cell, columns)] for row in rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\n{conditions}\n"


def position_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What `rows_by_position` gave (positions.py), for people: the heads, then a line a stretch.

    [] of no stretches.
    """
    if not rows:
        return []
    with_baseline = any("difference" in row for row in rows)
    heads = ["tokens in front", "predictions", "perplexity"]
    lines = [heads + (["16 bits", "NLL above it", "KL"] if with_baseline else [])]
    for row in rows:
        line = [f"{row['first']} – {row['last']}", f"{row['tokens']:,}"]
        line.append(format_number(row["perplexity"]))
        if with_baseline:
            difference, kl = row["difference"], row["kl"]
            line.append(format_number(row["baseline"]))
            line.append(format_difference(difference["value"], difference["stderr"]))
            line.append(format_number(kl["value"], kl["stderr"]))
        lines.append(line)
    return lines


def position_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The same for a terminal."""
    (first, *heads), *lines = position_lines(rows)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first)
    for head in heads:
        table.add_column(head, justify="right")
    for line in lines:
        table.add_row(*line)
    return table
