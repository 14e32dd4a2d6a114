"""From scores to token weights: ranges, ranks, sinks, bounds, and the algebra of the weights."""

import pytest
import torch

from compress.errors import CompressError
from compress.importance.tokens import TOKEN_IMPORTANCE
from compress.importance.weighting import effective_sample_size, mean_one, normalise
from support.refusals import refused
from support.token_contexts import B, T, context_of, weights_of, whole_context


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Normalising


def test_min_max_reaches_both_ends_and_keeps_the_order():
    scores = torch.randn(B, T)
    mask = torch.rand(B, T) > 0.2
    r = normalise(scores, 0.05, 0.8, mask)
    for s, w, m in zip(scores, r, mask, strict=True):
        assert w[m].min() == pytest.approx(0.05) and w[m].max() == pytest.approx(0.8)
        assert torch.equal(s[m].argsort(), w[m].argsort())
        assert (w[~m] == 0).all()
    torch.testing.assert_close(normalise(7 * scores + 3, 0.05, 0.8, mask), r)


def test_scores_behind_the_mask_are_never_read():
    scores, mask = torch.randn(1, 8), torch.ones(1, 8, dtype=torch.bool)
    mask[0, 3] = False
    expected = normalise(scores, 0, 1, mask)
    for value in (1e9, torch.inf, torch.nan):
        scores[0, 3] = value
        assert torch.equal(normalise(scores, 0, 1, mask), expected)


def test_constant_scores_are_uniform_and_not_nan():
    mask = torch.rand(B, T) > 0.2
    r = normalise(torch.full((B, T), 3.3), 0.01, 0.7, mask)
    assert (r[mask] == torch.tensor(0.7)).all() and (r[~mask] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_are_an_error(value):
    scores = torch.zeros(1, 4)
    scores[0, 1] = value
    with refused(CompressError, "token importance", "NaN"):
        normalise(scores, 0, 1, torch.ones(1, 4, dtype=torch.bool))


# Mean one


@pytest.mark.parametrize("constant", [1.0, 0.1, 0.7, 3.3e-5])
def test_equal_weights_are_exactly_one(constant):
    mask = torch.rand(B, 999) > 0.3
    weights = mean_one(torch.full((B, 999), constant), mask)
    assert (weights[mask] == 1).all() and (weights[~mask] == 0).all()


def test_mean_is_one_per_sample_whatever_the_scale():
    w, mask = torch.rand(B, T) + 0.01, torch.rand(B, T) > 0.3
    weights = mean_one(w, mask)
    n = mask.sum(dim=-1).float()
    torch.testing.assert_close(weights.sum(dim=-1), n)
    torch.testing.assert_close(mean_one(w * 37.5, mask), weights)


@pytest.mark.parametrize(
    ("weights", "mask", "named"),
    [
        ([0.0, 0.0], [True, True], ("sample 1", "zero")),
        ([1.0, 0.0], [False, True], ("sample 1", "zero")),
        ([1.0, 1.0], [False, False], ("sample 1", "masked")),
        ([-1.0, 2.0], [True, True], ("finite",)),
        ([torch.nan, 2.0], [True, True], ("finite",)),
    ],
)
def test_samples_without_weight_are_an_error(weights, mask, named):
    w, m = torch.tensor([[1.0, 1.0], weights]), torch.tensor([[True, True], mask])
    with refused(CompressError, "token weights", *named):
        mean_one(w, m)


def test_effective_sample_size_counts_the_tokens_that_carry_the_weight():
    assert effective_sample_size(torch.ones(2, 50)) == pytest.approx(50)
    one = torch.zeros(2, 50)
    one[:, :10] = 5.0
    assert effective_sample_size(one) == pytest.approx(10)
    assert effective_sample_size(torch.stack([torch.ones(50), one[0]])) == pytest.approx(30)
    assert effective_sample_size(one * 3) == pytest.approx(10)


# Whole weights


@pytest.mark.parametrize("name", sorted(TOKEN_IMPORTANCE))
@pytest.mark.parametrize("masked", [False, True])
def test_weights_of_every_strategy(name, masked):
    context = whole_context(torch.rand(B, T) > 0.3 if masked else None)
    weights = weights_of(name, context)
    assert weights.shape == (B, T) and weights.dtype == torch.float32
    assert weights.isfinite().all() and (weights[context.mask] > 0).all()
    assert (weights[~context.mask] == 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), context.mask.sum(dim=-1).float())


def test_uniform_is_exactly_one_for_every_range_and_power():
    for minimum, maximum, power in ((0.01, 1.0, 1), (0.3, 0.7, 2)):
        options = {"minimum": minimum, "maximum": maximum, "power": power}
        assert (weights_of("uniform", context_of(), **options) == 1).all()


def test_power_two_squares_the_normalised_scores():
    context = context_of()
    r = normalise(context.hidden_states.norm(dim=-1), 0.1, 1.0, context.mask)
    weights = weights_of("activation_norm", context, 0.1, power=2)
    torch.testing.assert_close(weights, mean_one(r.square(), context.mask))


@pytest.mark.parametrize("name", sorted(set(TOKEN_IMPORTANCE) - {"uniform"}))
def test_weights_of_a_sample_do_not_depend_on_the_rest_of_the_batch(name):
    context = whole_context()
    weights = weights_of(name, context)
    q, k, scaling = context.queries_keys()
    for j in range(B):
        one = slice(j, j + 1)
        alone = context_of(
            context.hidden_states[one],
            context.input_ids[one],
            queries_keys=lambda one=one: (q[one], k[one], scaling),
            output=lambda one=one: context.output()[one],
            token_counts=context.token_counts,
        )
        torch.testing.assert_close(weights_of(name, alone), weights[one])
