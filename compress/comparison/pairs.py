"""Paired differences between compared recipes: one recipe minus another, on the same windows.

Two results differ on a window by far less than windows differ among each other, so what one recipe
changes is the mean of the paired differences d[s, w], of seed s on window w:

    value        sum of d / scored tokens, both over all seeds and windows, in nats per token
    over_windows standard error of it over windows, each the mean of its seeds (see statistics.py)
    over_seeds   standard deviation of the seeds' own means / sqrt(seeds)
    stderr       sqrt(over_windows^2 + over_seeds^2): for other text and other seeds. What a seed
                 and a window do together is in both terms: rather too large than too small

    for difference in differences_of(runs, against="QuaRot"):
        print(difference.name, difference.value, difference.stderr)
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from compress.comparison.study import Run
from compress.eval.report import Row
from compress.eval.statistics import clustered_mean

COLUMNS = {"nll": "NLL", "kl": "KL"}


@dataclass(frozen=True)
class PairedDifference:
    """One recipe minus another, nats per token; an error is None where there is one of its kind."""

    name: str
    against: str
    of: str  # `nll` or `kl`
    value: float
    stderr: float | None
    over_windows: float | None
    over_seeds: float | None
    seeds: int

    def as_dict(self) -> dict[str, str | float | int | None]:
        return asdict(self)


def differences_of(runs: Sequence[Run], against: str) -> list[PairedDifference]:
    """Of each other recipe minus the one named `against`, over the seeds that both have.

    Empty where no text was measured. A result that was measured on other windows is left out: its
    evaluation is kept from a version that cut the text otherwise.
    """
    totals: dict[str, dict[int, dict[str, list[float]]]] = {}
    for run in runs:
        windows = run["evaluation"].get("windows")
        if windows:
            totals.setdefault(run["name"], {})[run["seed"]] = windows
    reference = totals.pop(against, {})
    found = []
    for name, seeds in totals.items():
        pairs = [
            (seeds[seed], reference[seed])
            for seed in sorted(seeds.keys() & reference.keys())
            if seeds[seed]["tokens"] == reference[seed]["tokens"]
        ]
        for of in COLUMNS:
            both = [(a, b) for a, b in pairs if of in a and of in b]
            if both:
                found.append(_difference(name, against, of, both))
    return found


def _difference(
    name: str,
    against: str,
    of: str,
    pairs: Sequence[tuple[dict[str, list[float]], dict[str, list[float]]]],
) -> PairedDifference:
    tokens = pairs[0][0]["tokens"]
    drawn = [[x - y for x, y in zip(a[of], b[of], strict=True)] for a, b in pairs]
    mean = clustered_mean([statistics.fmean(window) for window in zip(*drawn, strict=True)], tokens)
    of_seeds = [math.fsum(windows) / sum(tokens) for windows in drawn]
    over_seeds = statistics.stdev(of_seeds) / math.sqrt(len(drawn)) if len(drawn) > 1 else None
    known = [error for error in (mean.stderr, over_seeds) if error is not None]
    return PairedDifference(
        name,
        against,
        of,
        mean.mean,
        math.hypot(*known) if known else None,
        mean.stderr,
        over_seeds,
        len(drawn),
    )


def difference_rows(differences: Sequence[PairedDifference]) -> list[Row]:
    """A row a recipe, in order, with `NLL` and `KL` minus those of the recipe beside it."""
    rows: dict[str, Row] = {}
    for found in differences:
        row = rows.setdefault(found.name, Row(found.name, {}))
        row.put(COLUMNS[found.of], found.value, found.stderr)
    return list(rows.values())


def pairing_line(differences: Sequence[PairedDifference]) -> str:
    """What the differences are and what their errors are over, in one line; "" for none."""
    if not differences:
        return ""
    first = differences[0]
    errors = [
        kind
        for kind, error in (("windows", first.over_windows), ("seeds", first.over_seeds))
        if error is not None
    ]
    over = f"; ± standard error over {' and '.join(errors)}" if errors else ""
    return f"minus {first.against}, on the same windows and seeds, in nats per token{over}"
