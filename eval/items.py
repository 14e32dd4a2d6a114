"""Figures of single items, and what becomes of the same items under another model.

Two models answer the same items, so what one changes is the mean of the paired differences d, of
seed s on item i: right is 1, wrong is 0.

    value       mean of d over seeds and items; of a group its tasks' values, weighted as the
                group's own figure is
    over_items  standard error of it over items, each the mean of its seeds: s / sqrt(n); of a group
                sqrt(sum (w_t se_t)^2), for its tasks have different items
    over_seeds  standard error of the seeds' own means
    stderr      sqrt(over_items^2 + over_seeds^2): for other items and other seeds
    flips       items that went from right to wrong, and from wrong to right. Of several seeds an
                item counts once: by the sign of its mean, as most of its seeds that differ have it
    mcnemar_p   McNemar's exact test: how probable a split of the flips at least as uneven is where
                both ways are alike. Seeds share items, so they are no further evidence; it says
                nothing of other seeds

Where each seed draws its own items, every one of them counts.

    changes = paired_changes([(items, reference)], groups)
    changes["demo_code"]["acc"].right_to_wrong
"""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from compress.errors import UsageError
from compress.eval.statistics import clustered_mean, mcnemar_p, mean_and_stderr

TOLERANCE = 1e-6  # of a figure to the mean of its items, relative: sums in another order


@dataclass(frozen=True)
class Items:
    """A metric of a task, item by item, in item order.

    `sizes` of items that are of different size: the figure is then sum(values) / sum(sizes), as
    bits per byte are. `right`: 1 stands for a right answer and 0 for a wrong one.
    """

    values: tuple[float, ...]
    sizes: tuple[float, ...] | None = None
    right: bool = False

    def figure(self) -> float:
        """What the task reports of them, if it is their mean."""
        return math.fsum(self.values) / math.fsum(self.sizes or (len(self.values),))

    def as_json(self) -> dict[str, Any]:
        """{"right": "0110"}, or the values, with sizes where there are any."""
        if self.right:
            return {"right": "".join(str(int(value)) for value in self.values)}
        sizes = {} if self.sizes is None else {"sizes": list(self.sizes)}
        return {"values": list(self.values)} | sizes

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> "Items":
        if "right" in found:
            return cls(tuple(map(float, found["right"])), right=True)
        sizes = found.get("sizes")
        return cls(tuple(found["values"]), None if sizes is None else tuple(sizes))


TaskItems = Mapping[str, Mapping[str, Items]]  # task -> metric
# group -> metric -> task -> its weight in the group's figure; weights add up to 1.
Groups = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class Change:
    """What a model does otherwise than another on the same items. Fields: see the file's head.

    `seed_means` has the difference of each seed. Flips are None where no answer is right or wrong.
    """

    value: float
    over_items: float | None
    count: int  # of items
    seed_means: tuple[float, ...]
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None

    @property
    def over_seeds(self) -> float | None:
        if len(self.seed_means) < 2:
            return None
        return statistics.stdev(self.seed_means) / math.sqrt(len(self.seed_means))

    @property
    def stderr(self) -> float | None:
        known = [error for error in (self.over_items, self.over_seeds) if error is not None]
        return math.hypot(*known) if known else None

    @property
    def mcnemar_p(self) -> float | None:
        if self.right_to_wrong is None or self.wrong_to_right is None:
            return None
        return mcnemar_p(self.right_to_wrong, self.wrong_to_right)

    def flips(self) -> dict[str, float | int | None]:
        """Both ways, and their test; {} where no answer is right or wrong."""
        if self.right_to_wrong is None:
            return {}
        return {
            "right_to_wrong": self.right_to_wrong,
            "wrong_to_right": self.wrong_to_right,
            "mcnemar_p": self.mcnemar_p,
        }

    def to_dict(self) -> dict[str, float | int | None]:
        return {"value": self.value, "stderr": self.stderr, "count": self.count} | self.flips()


def paired_changes(
    seeds: Sequence[tuple[TaskItems, TaskItems]],
    groups: Groups | None = None,
    drawn: Collection[str] = (),
) -> dict[str, dict[str, Change]]:
    """Of each task and group that both models have, metric by metric.

    Args:
        seeds: a pair for each, the model's items and those of the other.
        groups: how their figures follow from those of tasks.
        drawn: tasks whose items are others in each seed.

    Raises UsageError where two models have answered different numbers of items.
    """
    first = seeds[0][0] if seeds else {}
    found: dict[str, dict[str, Change]] = {task: {} for task in first}
    for task, metrics in first.items():
        for metric in metrics:
            if all(metric in side.get(task, {}) for pair in seeds for side in pair):
                pairs = [(a[task][metric], b[task][metric]) for a, b in seeds]
                found[task][metric] = _change(pairs, task in drawn)
    for group, metrics_of in (groups or {}).items():
        for metric, weights in metrics_of.items():
            if all(metric in found.get(task, {}) for task in weights):
                parts = [(weight, found[task][metric]) for task, weight in weights.items()]
                found.setdefault(group, {})[metric] = _together(parts)
    return found


def _change(pairs: Sequence[tuple[Items, Items]], drawn: bool) -> Change:
    lengths = sorted({len(side.values) for pair in pairs for side in pair})
    if any(len(a.values) != len(b.values) for a, b in pairs) or (len(lengths) > 1 and not drawn):
        raise UsageError(
            "a paired difference needs the same items on both sides: found "
            + " and ".join(map(str, lengths))
        )
    differences = [
        [x - y for x, y in zip(a.values, b.values, strict=True)] for a, b in pairs
    ]  # [seed][item]
    sizes = [a.sizes or (1.0,) * len(a.values) for a, _ in pairs]
    means = tuple(math.fsum(d) / math.fsum(n) for d, n in zip(differences, sizes, strict=True))
    if drawn:
        items, counts = list(chain(*differences)), list(chain(*sizes))
    else:
        items = [statistics.fmean(of) for of in zip(*differences, strict=True)]
        counts = list(sizes[0])
    if pairs[0][0].sizes is None:
        estimate = mean_and_stderr(items)
    else:
        estimate = clustered_mean(items, counts)
    lost = gained = None
    if all(a.right and b.right for a, b in pairs):
        lost, gained = sum(d < 0 for d in items), sum(d > 0 for d in items)
    return Change(estimate.mean, estimate.stderr, len(items), means, lost, gained)


def _together(parts: Sequence[tuple[float, Change]]) -> Change:
    """The change of a group: its tasks' with their weights."""
    errors = [weight * c.over_items for weight, c in parts if c.over_items is not None]
    lost = [c.right_to_wrong for _, c in parts if c.right_to_wrong is not None]
    gained = [c.wrong_to_right for _, c in parts if c.wrong_to_right is not None]
    judged = len(lost) == len(parts)
    by_seed = zip(*(c.seed_means for _, c in parts), strict=True)
    weights = [weight for weight, _ in parts]
    return Change(
        math.fsum(weight * c.value for weight, c in parts),
        math.hypot(*errors) if len(errors) == len(parts) else None,
        sum(c.count for _, c in parts),
        tuple(math.fsum(w * m for w, m in zip(weights, of, strict=True)) for of in by_seed),
        sum(lost) if judged else None,
        sum(gained) if judged else None,
    )


def group_weights(
    members: Mapping[str, Sequence[str]], sizes: Mapping[str, int], figures: Mapping[str, Any]
) -> dict[str, dict[str, dict[str, float]]]:
    """How the figures of groups follow from those of their tasks: by size, or all alike.

    A group says which in its definition, which results do not repeat; its own figure tells, and one
    that is neither mean is left out.

    Args:
        members: group -> tasks, or groups of them.
        sizes: task -> number of items.
        figures: task or group -> metric -> its figure.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for group in members:
        tasks = [task for task in dict.fromkeys(_leaves(group, members)) if task in sizes]
        for metric, figure in (figures.get(group) or {}).items():
            values = {task: figures.get(task, {}).get(metric) for task in tasks}
            known = {task: value for task, value in values.items() if value is not None}
            for share in (lambda task: sizes[task], lambda task: 1):
                total = sum(map(share, known))
                weights = {task: share(task) / total for task in known}
                mean = math.fsum(weights[task] * known[task] for task in known)
                if known and figure is not None and math.isclose(mean, figure, rel_tol=TOLERANCE):
                    found.setdefault(group, {})[metric] = weights
                    break
    return found


def _leaves(name: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group and of the groups in it."""
    if name not in members:
        return [name]
    return [leaf for child in members[name] for leaf in _leaves(child, members)]
