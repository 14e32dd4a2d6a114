import math

import pytest
import torch

from compress.errors import UsageError
from compress.eval.statistics import (
    clustered_mean,
    mcnemar_p,
    mean_and_stderr,
    paired_clustered_difference,
)
from support.refusals import refused


def test_mean_of_accuracies_has_the_binomial_error():
    correct = [1.0] * 30 + [0.0] * 70
    estimate = mean_and_stderr(correct)
    assert estimate.mean == pytest.approx(0.3)
    assert estimate.stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


def test_clusters_of_one_are_independent_values():
    values = torch.randn(50, generator=torch.manual_seed(0), dtype=torch.float64)
    plain, clustered = mean_and_stderr(values), clustered_mean(values, torch.ones(50))
    assert clustered.mean == pytest.approx(plain.mean)
    assert clustered.stderr == pytest.approx(plain.stderr)


def test_repeating_each_value_inside_a_cluster_adds_no_certainty():
    values = torch.randn(20, generator=torch.manual_seed(1), dtype=torch.float64)
    plain = mean_and_stderr(values)
    repeated = clustered_mean(values * 8, torch.full((20,), 8))
    assert repeated.stderr == pytest.approx(plain.stderr)
    assert mean_and_stderr(values.repeat(8)).stderr < plain.stderr / 2  # what it is not


def test_cluster_error_is_near_the_bootstrap_of_unequal_clusters():
    draw = torch.Generator().manual_seed(2)
    counts = torch.randint(5, 40, (200,), generator=draw).double()
    totals = counts * (2 + torch.randn(200, generator=draw, dtype=torch.float64))
    chosen = torch.randint(200, (2000, 200), generator=draw)
    means = totals[chosen].sum(1) / counts[chosen].sum(1)
    assert clustered_mean(totals, counts).stderr == pytest.approx(means.std().item(), rel=0.1)


def test_paired_clusters():
    counts = [3.0, 5.0, 2.0]
    a, b = [6.0, 9.0, 5.0], [3.0, 4.0, 3.0]
    difference = paired_clustered_difference(a, b, counts)
    assert difference.mean == pytest.approx(1.0)  # each cluster differs by its count
    assert difference.stderr == pytest.approx(0, abs=1e-12)
    assert difference.count == 3


def test_too_little_to_tell():
    assert mean_and_stderr([2.0]).stderr is None
    assert clustered_mean([4.0], [2]).mean == 2
    with refused(UsageError, "mean", "values"):
        mean_and_stderr([])
    with refused(UsageError, 2, 3):
        paired_clustered_difference([1, 2], [1, 2, 3], [1, 1])


def test_mcnemar_counts_the_ways_in_which_flips_could_have_fallen():
    """Two-sided: all splits of n flips that are no likelier than the one found."""
    for lost, gained in ((0, 0), (1, 0), (12, 3), (5, 5), (0, 9), (30, 41)):
        n = lost + gained
        ways = [math.comb(n, k) for k in range(n + 1)]
        p = sum(way for way in ways if way <= ways[lost]) / 2**n
        assert mcnemar_p(lost, gained) == pytest.approx(p, rel=1e-9)
        assert mcnemar_p(lost, gained) == mcnemar_p(gained, lost)
