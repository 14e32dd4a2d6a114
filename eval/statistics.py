"""Means with standard errors, and differences of two models measured on the same data.

    mean and its standard error     m = sum x / n,   se = s / sqrt(n),   s with n - 1
    clusters (windows, documents)   m = sum_w t_w / sum_w n_w
                                    se = sqrt(W / (W - 1) * sum_w (t_w - m n_w)^2) / sum_w n_w

Tokens of one window are not independent, so the error of a mean over tokens is taken over windows:
the linearised variance of a ratio of cluster totals (Cochran, Sampling Techniques, 3rd ed., 6.8).
Two models on the same items differ by far less than either varies over items, so a comparison is
the mean of the paired differences, never the difference of two means with errors added. scipy has
the error of a mean and the exact test; of clusters it has nothing.

    mean_and_stderr([1, 0, 1])       # Estimate(mean=0.667, stderr=0.333, count=3)
    mcnemar_p(12, 3)                 # 0.035
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compress.errors import UsageError, import_package

Numbers = Sequence[float] | torch.Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error (None where one value or one cluster gives none), and its n."""

    mean: float
    stderr: float | None
    count: int

    def to_dict(self) -> dict[str, float | int | None]:
        return {"value": self.mean, "stderr": self.stderr, "count": self.count}


def _column(values: Numbers) -> torch.Tensor:
    column = torch.as_tensor(values, dtype=torch.float64).flatten().cpu()
    if column.numel() == 0:
        raise UsageError("no values: a mean needs at least one")
    return column


def _same_length(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.numel() != b.numel():
        raise UsageError(
            f"a paired difference needs the same items on both sides: "
            f"found {a.numel()} and {b.numel()}"
        )


def mean_and_stderr(values: Numbers) -> Estimate:
    """Mean of independent values: items of a task."""
    x = _column(values)
    stats = import_package("scipy.stats", "statistics of tasks")
    error = float(stats.sem(x.numpy())) if x.numel() > 1 else None
    return Estimate(x.mean().item(), error, x.numel())


def mcnemar_p(lost: int, gained: int) -> float:
    """McNemar's exact test of items that two models answer differently, two-sided.

    Where neither model is better, each such item goes either way with probability 1/2 (McNemar,
    Psychometrika 12, 1947; exact: the binomial test). 1 where no item differs.
    """
    if lost + gained == 0:
        return 1.0
    stats = import_package("scipy.stats", "statistics of tasks")
    return float(stats.binomtest(lost, lost + gained).pvalue)


def exp_of(nats: float) -> float:
    """exp that says infinity, where math.exp overflows: a broken model has such a perplexity."""
    return math.exp(nats) if nats < 709 else math.inf


def clustered_mean(totals: Numbers, counts: Numbers) -> Estimate:
    """Mean over all members of clusters, with the standard error over clusters.

    Args:
        totals: sum of the values in each cluster (NLL of a window, nats).
        counts: members of each cluster (scored tokens of a window).
    """
    t, n = _column(totals), _column(counts)
    _same_length(t, n)
    clusters, mean = t.numel(), (t.sum() / n.sum()).item()
    if clusters == 1:
        return Estimate(mean, None, 1)
    residual = (t - mean * n).square().sum().item()
    error = math.sqrt(clusters / (clusters - 1) * residual) / n.sum().item()
    return Estimate(mean, error, clusters)


def paired_clustered_difference(a: Numbers, b: Numbers, counts: Numbers) -> Estimate:
    """Mean of a - b per member, from the totals of the same clusters on both sides.

    With totals of NLL per window this is the difference of two mean NLLs, that is the logarithm
    of the ratio of the two perplexities.
    """
    x, y = _column(a), _column(b)
    _same_length(x, y)
    return clustered_mean(x - y, counts)
