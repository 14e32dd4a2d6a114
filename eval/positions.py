"""Perplexity and KL by how much text stands in front of a token: for stretches of positions.

A window's mean hides what compression does to long contexts: most of its tokens may have little in
front of them. So the predictions of each window are told apart by the tokens that the model sees,
BOS included: 1 to 63 of them, 64 to 127, 128 to 255 and so on, each stretch twice as long as the
one before. Means and errors as for whole windows (statistics.py), over the windows in which the
stretch has a prediction that counts.

    nll = Stretches(length=2048)
    negative_log_likelihoods(model, batches, nll.add)
    rows_by_position(nll)
"""

from typing import Any

import torch
from torch import Tensor

from compress.eval.statistics import clustered_mean, exp_of, paired_clustered_difference

FIRST = 64  # tokens seen at the start of the second stretch


class Stretches:
    """Totals of one figure of every prediction, for each row and stretch of positions.

    Attributes:
        starts: tokens seen where each stretch begins; it ends where the next one begins.
        totals, counts: of each row, [stretches] in fp64.
    """

    def __init__(self, length: int):
        """length: the most tokens of a row, of which the last is seen by no prediction."""
        self.last = length - 1
        self.starts = [1]
        start = FIRST
        while start <= self.last:
            self.starts.append(start)
            start *= 2
        self.totals: list[Tensor] = []
        self.counts: list[Tensor] = []

    def add(self, row: int, at: Tensor, values: Tensor) -> None:
        """Values [n] of the predictions at `at` [n] of a row; rows come in order, in parts."""
        while len(self.totals) <= row:
            for of in (self.totals, self.counts):
                of.append(torch.zeros(len(self.starts), dtype=torch.float64))
        seen = at.cpu() + 1
        stretch = torch.bucketize(seen, torch.tensor(self.starts), right=True) - 1
        self.totals[row].index_add_(0, stretch, values.double().cpu())
        self.counts[row] += stretch.bincount(minlength=len(self.starts))


def rows_by_position(
    nll: Stretches, before: Stretches | None = None, kl: Stretches | None = None
) -> list[dict[str, Any]]:
    """For each stretch with a prediction in it, what was measured there, for JSON.

    Args:
        nll: of the model, in nats; `before`: of its baseline, on the same text.
        kl: KL(baseline || model), in nats.

    Returns `first` and `last` tokens seen, `tokens`, `perplexity`, `mean_nll` {value, stderr, count
    of windows}; with a baseline `baseline` (its perplexity), `difference` of the mean NLL, paired,
    and `kl`.
    """
    ends = [*(start - 1 for start in nll.starts[1:]), nll.last]
    counts, ours = torch.stack(nll.counts), torch.stack(nll.totals)  # [rows, stretches]
    rows = []
    for i, (first, last) in enumerate(zip(nll.starts, ends, strict=True)):
        there = counts[:, i] > 0
        if not there.any():
            continue
        n, x = counts[there, i], ours[there, i]
        mean = clustered_mean(x, n)
        row = {
            "first": first,
            "last": last,
            "tokens": int(n.sum()),
            "perplexity": exp_of(mean.mean),
            "mean_nll": mean.to_dict(),
        }
        if before is not None:
            y = torch.stack(before.totals)[there, i]
            row["baseline"] = exp_of(clustered_mean(y, n).mean)
            row["difference"] = paired_clustered_difference(x, y, n).to_dict()
        if kl is not None:
            row["kl"] = clustered_mean(torch.stack(kl.totals)[there, i], n).to_dict()
        rows.append(row)
    return rows
