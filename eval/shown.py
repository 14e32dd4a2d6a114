"""How a plan or a result shows itself: ten lines at a prompt, a table in a notebook.

class Plan(Shown):
    def summary(self): return {"modules": "210 at 4 bits", ...}
"""

from collections.abc import Sequence
from html import escape


class Shown:
    """Gives `repr` and a notebook what `summary` says."""

    def summary(self) -> dict[str, str]:
        """What a person wants to know first: names and short texts, ten at most."""
        raise NotImplementedError

    def __repr__(self) -> str:
        facts = self.summary()
        wide = max(map(len, facts))
        return "\n".join(
            [type(self).__name__, *(f"  {name:{wide}}  {text}" for name, text in facts.items())]
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th>"
            f"<td style='text-align:left'>{escape(text)}</td></tr>"
            for name, text in self.summary().items()
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"


def shortened(lines: Sequence[str], width: int = 100) -> str:
    """The first of several lines, cut, and how many more there are; `none` of none."""
    if not lines:
        return "none"
    first = lines[0] if len(lines[0]) <= width else lines[0][: width - 1] + "…"
    return first if len(lines) == 1 else f"{first} (and {len(lines) - 1} more)"
