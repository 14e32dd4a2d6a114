"""Paired differences between compared recipes: one recipe minus another, on the same data.

Two results differ on a window of text, or on a task's item, by far less than windows and items
differ among each other, so what one recipe changes is the mean of the paired differences d[s, w],
of seed s on window w:

    value        sum of d / scored tokens, both over all seeds and windows, in nats per token; of a
                 task the mean of d over seeds and items, of a group as its own figure is a mean
    over_samples standard error of it over windows or items, each the mean of its seeds (see
                 statistics.py and items.py)
    over_seeds   standard deviation of the seeds' own means / sqrt(seeds)
    stderr       sqrt(over_samples^2 + over_seeds^2): for other text and other seeds. What a seed
                 and a window do together is in both terms: rather too large than too small

Of tasks whose answers are right or wrong: the items that went from right to wrong and from wrong to
right, an item once however many seeds there are, and McNemar's exact test of these (items.py).

    for difference in differences_of(runs, against="QuaRot"):
        print(difference.name, difference.of, difference.value, difference.stderr)
"""

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compress.comparison.study import Run
from compress.eval.items import Items, paired_changes
from compress.eval.report import FLIPS, Row
from compress.eval.statistics import clustered_mean

COLUMNS = {"nll": "NLL", "kl": "KL"}
Seeds = dict[int, dict[str, Any]]  # seed -> evaluation


@dataclass(frozen=True)
class PairedDifference:
    """One recipe minus another; an error is None where there is one of its kind, what is said of
    right and wrong answers where there are none."""

    name: str
    against: str
    of: str  # `nll` or `kl`, in nats per token, or `TASK METRIC`
    value: float
    stderr: float | None
    over_samples: float | None
    over_seeds: float | None
    seeds: int
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None
    mcnemar_p: float | None = None

    def as_dict(self) -> dict[str, str | float | int | None]:
        return asdict(self)


def differences_of(
    runs: Sequence[Run], against: str, drawn: Collection[str] = ()
) -> list[PairedDifference]:
    """Of each other recipe minus the one named `against`, over the seeds that both have.

    `drawn`: tasks whose items are others in each seed. A result that was measured on other windows
    is left out: its evaluation is kept from a version that cut the text otherwise.
    """
    measured: dict[str, Seeds] = {}
    for run in runs:
        measured.setdefault(run["name"], {})[run["seed"]] = run["evaluation"]
    reference = measured.pop(against, {})
    found = []
    for name, seeds in measured.items():
        both = [(seeds[seed], reference[seed]) for seed in sorted(seeds.keys() & reference.keys())]
        found += _of_text(name, against, both) + _of_tasks(name, against, both, drawn)
    return found


def _of_text(
    name: str, against: str, evaluations: Sequence[tuple[dict[str, Any], dict[str, Any]]]
) -> list[PairedDifference]:
    pairs = [
        (a["windows"], b["windows"])
        for a, b in evaluations
        if a.get("windows") and b.get("windows") and _same_windows(a, b)
    ]
    found = []
    for of in COLUMNS:
        both = [(a, b) for a, b in pairs if of in a and of in b]
        if both:
            found.append(_difference(name, against, of, both))
    return found


def _same_windows(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return bool(a["windows"]["tokens"] == b["windows"]["tokens"])


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


def _of_tasks(
    name: str,
    against: str,
    evaluations: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    drawn: Collection[str],
) -> list[PairedDifference]:
    pairs = [(_items(a), _items(b)) for a, b in evaluations]
    groups = evaluations[0][0].get("groups") if evaluations else None
    return [
        PairedDifference(
            name,
            against,
            f"{task} {metric}",
            change.value,
            change.stderr,
            change.over_items,
            change.over_seeds,
            len(pairs),
            change.right_to_wrong,
            change.wrong_to_right,
            change.mcnemar_p,
        )
        for task, changes in paired_changes(pairs, groups, drawn).items()
        for metric, change in changes.items()
    ]


def _items(evaluation: dict[str, Any]) -> dict[str, dict[str, Items]]:
    return {
        task: {metric: Items.of_json(found) for metric, found in metrics.items()}
        for task, metrics in (evaluation.get("items") or {}).items()
    }


def difference_rows(differences: Sequence[PairedDifference]) -> list[Row]:
    """A row a recipe and figure, in order: the difference, and behind it flips and their test."""
    rows = []
    for found in differences:
        row = Row(f"{found.name}, {COLUMNS.get(found.of, found.of)}", {})
        row.put("difference", found.value, found.stderr)
        for key, title in FLIPS.items():
            if (value := getattr(found, key)) is not None:
                row.values[title] = value
        rows.append(row)
    return rows


def pairing_line(differences: Sequence[PairedDifference]) -> str:
    """What the differences are and what their errors are over, in one line; "" for none."""
    if not differences:
        return ""
    first = differences[0]
    text = any(found.of in COLUMNS for found in differences)
    tasks = any(found.of not in COLUMNS for found in differences)
    samples = ["windows"] * text + ["items"] * tasks
    errors = samples * (first.over_samples is not None) + ["seeds"] * (first.over_seeds is not None)
    over = f"; ± standard error over {_listed(errors)}" if errors else ""
    unit = ", NLL and KL in nats per token" if text else ""
    flips = ""
    if any(found.mcnemar_p is not None for found in differences):
        once = "; an item that seeds share counts once, as most of them have it"
        flips = "; p of McNemar's exact test of the items that changed"
        flips += once if first.seeds > 1 else ""
    shared = _listed([*samples, "seeds"])
    return f"minus {first.against}, on the same {shared}{unit}{over}{flips}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
