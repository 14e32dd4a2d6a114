"""What every benchmark gives back: plain values for JSON, and their table for a terminal.

report = Report({"rows": rows, "conditions": conditions}, kernels_table)
report["rows"]; console.print(report.table())
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table


@dataclass(frozen=True)
class Report:
    """`values` are strings, numbers, lists and dicts; `draw` makes a table of them."""

    values: dict[str, Any]
    draw: Callable[[Mapping[str, Any]], Table]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def table(self) -> Table:
        return self.draw(self.values)


def table_of(caption: str, columns: Iterable[str], *, names: str | None = None) -> Table:
    """An empty table of numbers; `names`: the head of a first column that holds words."""
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    if names is not None:
        table.add_column(names)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def spread_cell(samples: Mapping[str, float], scale: float = 1) -> str:
    """`clock.spread` of seconds as text: thousandths of a second, or tenths of a smaller unit."""
    digits = 1 if scale > 1 else 3
    median, low, high = (
        f"{scale * samples[name]:.{digits}f}" for name in ("median", "minimum", "maximum")
    )
    return f"{median} ({low} to {high})"
