"""Token importance: closed forms, orders, the streamed attention sums, and the weights' algebra."""

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.importance.tokens import (
    TOKEN_IMPORTANCE,
    LayerContext,
    attention_concentration,
    count_tokens,
    effective_sample_size,
    mean_one,
    normalise,
    token_weights,
)
from support.refusals import refused

B, T, D = 3, 64, 8


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def unused(*_):
    raise AssertionError("a strategy asked for something it does not need")


def context_of(Z=None, ids=None, mask=None, **parts) -> LayerContext:
    Z = torch.randn(B, T, D) if Z is None else Z
    ids = torch.zeros(Z.shape[:2], dtype=torch.int64) if ids is None else ids
    mask = torch.ones(Z.shape[:2], dtype=torch.bool) if mask is None else mask
    return LayerContext(
        hidden_states=Z,
        input_ids=ids,
        mask=mask,
        **{"queries_keys": unused, "output": unused} | parts,
    )


def heads(h, h_kv, length=T, d_h=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(B, h, length, d_h, generator=draw)
    return q, torch.randn(B, h_kv, length, d_h, generator=draw)


def materialised(q, k, scaling, window=None):
    """The whole causal map in fp64 with repeated keys: [B, h, T, T]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.double() @ k.double().transpose(-1, -2) * scaling
    i = torch.arange(q.shape[2])
    hidden = i[:, None] < i
    if window:
        hidden |= i[:, None] - i >= window
    return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)


def all_weights(name, minimum=0.01, power=1, mask=None):
    """A context that satisfies every strategy."""
    Z, output = torch.randn(2, B, T, D)
    q, k = heads(4, 2)
    ids = torch.randint(9, (B, T))
    keep = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    context = context_of(
        Z,
        ids,
        mask,
        queries_keys=lambda: (q, k, 0.5),
        output=lambda: output,
        token_counts=count_tokens(ids, keep, 9),
    )
    return token_weights(name, context, minimum, 1.0, power), context


# Attention concentration


@pytest.mark.parametrize(("h", "h_kv"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 10, 100])
@pytest.mark.parametrize("block", [1, 7, 16, 128])
def test_streamed_sums_equal_those_of_the_whole_map(h, h_kv, window, block):
    q, k = heads(h, h_kv)
    q[0] *= 20  # peaked maps too
    streamed = attention_concentration(q, k, 0.5, block=block, sliding_window=window)
    whole = materialised(q, k, 0.5, window).sum(dim=(1, 2)).float()
    torch.testing.assert_close(streamed, whole, rtol=1e-4, atol=1e-6)


def test_all_attention_is_handed_out_and_the_last_token_has_one_viewer():
    q, k = heads(6, 2)
    scores = attention_concentration(q, k, 0.5)
    torch.testing.assert_close(scores.sum(dim=-1), torch.full((B,), 6.0 * T))
    assert (scores[:, -1] <= 6).all()


def test_queries_before_an_edited_token_do_not_see_the_edit():
    q, k = heads(4, 2)
    u = 40
    edited = k.clone()
    edited[:, :, u] += 5
    early = torch.arange(T).expand(B, T) < u
    before, after = (attention_concentration(q, x, 0.5, query_mask=early) for x in (k, edited))
    assert torch.equal(before, after)
    assert not torch.allclose(
        attention_concentration(q, k, 0.5), attention_concentration(q, edited, 0.5)
    )


def test_masked_queries_do_not_count():
    q, k = heads(4, 2)
    mask = torch.rand(B, T) > 0.3
    rows = materialised(q, k, 0.5).sum(dim=1)  # [B, T, T]
    expected = (rows * mask[:, :, None]).sum(dim=1).float()
    torch.testing.assert_close(attention_concentration(q, k, 0.5, query_mask=mask), expected)


def test_padding_on_the_right_changes_no_score_before_it():
    q, k = heads(4, 2)
    n = 50
    mask = torch.arange(T).expand(B, T) < n
    padded = attention_concentration(q, k, 0.5, query_mask=mask)
    torch.testing.assert_close(
        padded[:, :n], attention_concentration(q[:, :, :n], k[:, :, :n], 0.5)
    )


def test_half_precision_is_summed_in_single():
    q, k = (x.bfloat16() for x in heads(4, 2))
    scores = attention_concentration(q, k, 0.5)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, attention_concentration(q.float(), k.float(), 0.5))


def test_a_token_that_every_query_looks_at_is_the_most_important():
    q, k = heads(4, 4)
    q[..., 0], k[..., 0] = 3.0, 0.0
    k[:, :, 5, 0] = 3.0
    context = context_of(queries_keys=lambda: (q, k, 1.0))
    weights = token_weights("attention_concentration", context, 0.01, 1.0, 1)
    assert (weights.argmax(dim=-1) == 5).all()


# The other strategies: the order that the paper gives them


def order(name, **parts):
    scores = TOKEN_IMPORTANCE[name]().score(context_of(**parts))
    return scores.argsort(dim=-1, descending=True)[0].tolist()


def test_largest_activations_matter_most():
    assert order("activation_norm", Z=torch.tensor([[[1.0, 0], [3, 4], [-2, 0]]])) == [1, 2, 0]


def test_least_changed_tokens_matter_most():
    Z = torch.zeros(1, 3, 2)
    output = torch.tensor([[[2.0, 0], [0, 0.5], [-3, 0]]])
    assert order("activation_difference", Z=Z, output=lambda: output) == [1, 0, 2]


def test_rarest_tokens_matter_most():
    ids = torch.tensor([[7, 5, 6]])
    counts = count_tokens(torch.tensor([5, 6, 6, 7, 7, 7]), torch.ones(6, dtype=torch.bool), 9)
    assert order("token_frequency", Z=torch.zeros(1, 3, 2), ids=ids, token_counts=counts) == [
        1,
        2,
        0,
    ]


def test_frequencies_belong_to_their_sample_after_any_shuffle():
    ids = torch.randint(20, (5, 16))
    counts = count_tokens(ids, torch.ones_like(ids, dtype=torch.bool), 20)

    def weights(rows):
        context = context_of(Z=torch.zeros(5, 16, 1), ids=rows, token_counts=counts)
        return token_weights("token_frequency", context, 0.01, 1.0, 1)

    shuffle = torch.randperm(5)
    assert torch.equal(weights(ids)[shuffle], weights(ids[shuffle]))
    rarest = [int(counts[row].min()) for row in ids]
    for row, w, least in zip(ids, weights(ids), rarest, strict=True):
        assert counts[row[w.argmax()]] == least


def test_masked_places_are_not_counted():
    ids, mask = torch.tensor([[1, 1, 2]]), torch.tensor([[True, False, True]])
    assert count_tokens(ids, mask, 4).tolist() == [0, 1, 1, 0]


def test_similarity_is_the_mean_squared_distance_to_all_tokens():
    Z = torch.randn(B, T, D)
    ones = torch.ones(B, T, dtype=torch.bool)
    paper = (Z[:, :, None] - Z[:, None]).square().sum(dim=-1).mean(dim=-1)
    ours = TOKEN_IMPORTANCE["token_similarity"]().score(context_of(Z))
    torch.testing.assert_close(normalise(ours, 0, 1, ones), normalise(paper, 0, 1, ones))


@pytest.mark.parametrize(
    ("name", "places"), [("first_n", [0, 1, 2, 3, 4, 5, 6, 7]), ("first_last_n", [0, 1, 62, 63])]
)
def test_hard_masks_keep_exactly_the_stated_tokens(name, places):
    weights, _ = all_weights(name, minimum=0.0)
    for row in weights:
        assert row.nonzero().flatten().tolist() == places
        torch.testing.assert_close(row[places], torch.full((len(places),), T / len(places)))


def test_hard_masks_count_unmasked_places_only():
    mask = torch.ones(1, 72, dtype=torch.bool)
    mask[:, :8] = False  # 64 tokens behind 8 of padding
    context = context_of(torch.zeros(1, 72, 1), mask=mask)
    weights = token_weights("first_n", context, 0.0, 1.0, 1)
    assert weights[0].nonzero().flatten().tolist() == list(range(8, 16))


def test_an_unknown_strategy_names_the_known_ones():
    with refused(UsageError, "'unifrom'", "'uniform'"):
        token_weights("unifrom", context_of(), 0.01, 1.0, 1)


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
    mask = torch.rand(B, T) > 0.3 if masked else None
    weights, context = all_weights(name, mask=mask)
    assert weights.shape == (B, T) and weights.dtype == torch.float32
    assert weights.isfinite().all() and (weights[context.mask] > 0).all()
    assert (weights[~context.mask] == 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), context.mask.sum(dim=-1).float())


def test_uniform_is_exactly_one_for_every_range_and_power():
    for minimum, maximum, power in ((0.01, 1.0, 1), (0.3, 0.7, 2)):
        assert (token_weights("uniform", context_of(), minimum, maximum, power) == 1).all()


def test_power_two_squares_the_normalised_scores():
    context = context_of()
    r = normalise(context.hidden_states.norm(dim=-1), 0.1, 1.0, context.mask)
    weights = token_weights("activation_norm", context, 0.1, 1.0, 2)
    torch.testing.assert_close(weights, mean_one(r.square(), context.mask))


@pytest.mark.parametrize("name", sorted(set(TOKEN_IMPORTANCE) - {"uniform"}))
def test_weights_of_a_sample_do_not_depend_on_the_rest_of_the_batch(name):
    weights, context = all_weights(name)
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
        torch.testing.assert_close(token_weights(name, alone, 0.01, 1.0, 1), weights[one])
