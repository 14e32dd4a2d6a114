"""Token importance: closed forms, orders, the streamed attention sums, and the weights' algebra."""

import numpy as np
import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.importance.tokens import (
    TOKEN_IMPORTANCE,
    attention_concentration,
    count_tokens,
    nearest_centroid,
    viewers,
)
from compress.importance.weighting import normalise, token_weights
from support.refusals import refused
from support.token_contexts import (
    B,
    D,
    T,
    context_of,
    heads,
    settings_of,
    weights_of,
    whole_context,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def materialised(q, k, scaling, window=None):
    """The whole causal map in fp64 with repeated keys: [B, h, T, T]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.double() @ k.double().transpose(-1, -2) * scaling
    i = torch.arange(q.shape[2])
    hidden = i[:, None] < i
    if window:
        hidden |= i[:, None] - i >= window
    return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)


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


def an_image_within(first=10, last=50):
    """What queries see [1, T, T] where the tokens from `first` to `last` see each other."""
    place = torch.arange(T)
    inside = (place >= first) & (place < last)
    return ((place[:, None] >= place) | (inside[:, None] & inside))[None]


@pytest.mark.parametrize("block", [7, 128])
def test_tokens_that_look_ahead_are_summed_as_well(block):
    q, k = heads(6, 2)
    seen = an_image_within()
    whole = q.double() @ k.double().repeat_interleave(3, dim=1).transpose(-1, -2) * 0.5
    whole = whole.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1).sum(dim=(1, 2)).float()
    found = attention_concentration(q, k, 0.5, block=block, seen=seen)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)
    plain = torch.ones(1, T, T, dtype=torch.bool).tril()
    torch.testing.assert_close(
        attention_concentration(q, k, 0.5, seen=plain), attention_concentration(q, k, 0.5)
    )


@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("size", [-30.0, 0.0, 3.0, 60.0])
def test_sinks_take_their_share_of_every_query(size, window):
    """A logit more in each head's softmax; far below the others nothing changes."""
    q, k = heads(6, 2)
    sinks = size + torch.linspace(-1, 1, 6)
    found = attention_concentration(q, k, 0.5, block=7, sliding_window=window, sinks=sinks)
    map_ = materialised(q, k, 0.5, window)  # [B, h, T, T]
    hidden = map_ == 0
    logits = 0.5 * q.double() @ k.double().repeat_interleave(3, dim=1).transpose(-1, -2)
    logits = logits.masked_fill(hidden, -torch.inf)
    more = sinks.double()[:, None, None].expand(*logits.shape[:-1], 1)
    with_sinks = torch.cat([logits, more], dim=-1).softmax(dim=-1)[..., :-1]
    expected = with_sinks.sum(dim=(1, 2)).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    if size == -30:
        torch.testing.assert_close(found, map_.sum(dim=(1, 2)).float(), rtol=1e-4, atol=1e-6)


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
    weights = weights_of("attention_concentration", context)
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
        return weights_of("token_frequency", context)

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
    weights = weights_of(name, whole_context(), minimum=0.0)
    for row in weights:
        assert row.nonzero().flatten().tolist() == places
        torch.testing.assert_close(row[places], torch.full((len(places),), T / len(places)))


def test_hard_masks_count_unmasked_places_only():
    mask = torch.ones(1, 72, dtype=torch.bool)
    mask[:, :8] = False  # 64 tokens behind 8 of padding
    context = context_of(torch.zeros(1, 72, 1), mask=mask)
    weights = weights_of("first_n", context, minimum=0.0)
    assert weights[0].nonzero().flatten().tolist() == list(range(8, 16))


def test_dot_is_the_row_sums_of_all_inner_products():
    Z, mask = torch.randn(B, T, D), torch.rand(B, T) > 0.3
    found = TOKEN_IMPORTANCE["dot"]().score(context_of(Z, mask=mask)).double()
    whole = Z.double() @ Z.double().mT * mask[:, None]
    torch.testing.assert_close(found, whole.sum(dim=-1), rtol=1e-6, atol=1e-5)


# Chunks


def chunks(text, n):
    mask = torch.ones(1, n, dtype=torch.bool)
    score = TOKEN_IMPORTANCE["chunks"](text).score(context_of(torch.zeros(1, n, 1), mask=mask))
    return score[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("text", ["0_8", "0_31_32", "3_1_4", "0_1", "5_7", "0_2_4_6_8"])
@pytest.mark.parametrize("n", [64, 100, 1023])
def test_chunks_are_the_named_stretches_of_equal_length(text, n):
    *named, count = map(int, text.split("_"))
    stretches = [range(c * n // count, (c + 1) * n // count) for c in sorted(named)]
    assert chunks(text, n) == [t for stretch in stretches for t in stretch]


def test_the_first_half_is_left_out_by_its_name():
    assert chunks("first_half", 64) == chunks("1_2", 64) == list(range(32, 64))


@pytest.mark.parametrize(("name", "text"), [("first_n", "0_8"), ("first_last_n", "0_31_32")])
def test_the_papers_masks_are_chunks(name, text):
    for n in (64, 4096):
        context = context_of(torch.zeros(1, n, 1))
        assert TOKEN_IMPORTANCE[name]().score(context)[0].nonzero().flatten().tolist() == chunks(
            text, n
        )


def test_chunks_are_of_the_tokens_that_count():
    mask = torch.ones(1, 72, dtype=torch.bool)
    mask[:, :8] = False
    context = context_of(torch.zeros(1, 72, 1), mask=mask)
    weights = weights_of("chunks", context, minimum=0.0, chunks="1_2")
    assert weights[0].nonzero().flatten().tolist() == list(range(40, 72))


def test_a_chunk_without_tokens_is_counted_and_weighs_all_alike():
    context = context_of(torch.zeros(1, 4, 1))
    found = token_weights(settings_of("chunks", 0.0, chunks="0_8"), context)
    assert found.flat.tolist() == [True] and (found.w == 1).all()


# Position


@pytest.mark.parametrize("window", [None, 1, 9, 100])
def test_position_is_what_attention_that_prefers_nothing_gives(window):
    q, k = heads(4, 2)
    mask = torch.arange(T).expand(B, T) < torch.tensor([T, 50, 3])[:, None]
    context = context_of(torch.zeros(B, T, 1), mask=mask, sliding_window=window)
    found = TOKEN_IMPORTANCE["position"]().score(context)
    even = attention_concentration(0 * q, k, 1.0, sliding_window=window, query_mask=mask)
    torch.testing.assert_close(found, even / 4, rtol=1e-5, atol=1e-6)


def test_position_counts_those_that_look_ahead():
    q, k = heads(4, 2)
    seen = an_image_within()
    context = context_of(torch.zeros(B, T, 1), seen=seen)
    even = attention_concentration(0 * q, k, 1.0, seen=seen)
    found = TOKEN_IMPORTANCE["position"]().score(context)
    torch.testing.assert_close(found, even / 4, rtol=1e-5, atol=1e-6)
    counted = viewers(torch.ones(B, T), None, seen)
    torch.testing.assert_close(counted, seen.sum(1).double().expand(B, T))


# Clusters


def k_means(Z, first):
    """Squared distances by Lloyd's algorithm in numpy, 64 bits, from the tokens `first`."""
    Z = Z.double().numpy()
    centroids = Z[first]
    for _ in range(30):
        nearest = ((Z[:, None] - centroids) ** 2).sum(-1).argmin(-1)
        centroids = np.array(
            [
                Z[nearest == c].mean(0) if (nearest == c).any() else m
                for c, m in enumerate(centroids)
            ]
        )
    return torch.from_numpy(((Z[:, None] - centroids) ** 2).sum(-1).min(-1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("K", [1, 3, 20, 63])
def test_clusters_are_those_of_k_means_from_tokens_drawn_by_the_seed(K, seed):
    Z = torch.randn(T, D, generator=torch.Generator().manual_seed(seed))
    first = torch.randperm(T, generator=torch.Generator().manual_seed(seed))[:K]
    found = nearest_centroid(Z, K, seed).double()
    torch.testing.assert_close(found, k_means(Z, first.numpy()), rtol=1e-5, atol=1e-6)
    if K in (3, 20):  # drawn from all tokens, not the first K in another order
        assert not torch.allclose(found, k_means(Z, np.arange(K)))


def test_clusters_of_a_window_that_has_too_few_tokens_are_an_error():
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 5:] = False
    with refused(CompressError, "cluster", "centroids", 5):
        weights_of("cluster", context_of(torch.randn(2, 12, D), mask=mask), centroids=5)


def test_an_unknown_strategy_names_the_known_ones():
    with refused(UsageError, "'unifrom'", "'uniform'"):
        weights_of("unifrom", context_of())
