"""Visual importance: dense oracles, closed forms of entropy, and what no voters at all means."""

import pytest
import torch

from compress.importance import patches as importance
from compress.importance.patches import (
    add_entropy,
    cut_patches,
    grey_levels,
    patch_entropy,
    received_attention,
    voted_attention,
)

C, H, N, D = 3, 2, 12, 4
MEAN, STD = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def queries_keys(n=N):
    return 2 * torch.randn(C, H, n, D), 2 * torch.randn(C, H, n, D)


def dense(q, k, scaling=0.5):
    return (q @ k.mT * scaling).softmax(-1).mean(1)


@pytest.mark.parametrize("block", [1, 50, 1 << 20])
def test_received_attention_equals_the_dense_matrix_for_every_block_size(monkeypatch, block):
    monkeypatch.setattr(importance, "BLOCK_ELEMENTS", block)
    q, k = queries_keys()
    weights = torch.rand(C, N)
    expected = torch.einsum("cq,cqk->ck", weights, dense(q, k))
    torch.testing.assert_close(received_attention(q, k, 0.5, weights), expected)


@pytest.mark.parametrize("vote", ["mean", "sum"])
@pytest.mark.parametrize("prefix", [0, 1])
def test_votes_equal_the_definition(vote, prefix):
    q, k = queries_keys(N + prefix)
    A = dense(q, k)[:, prefix:, prefix:]
    scores, empty = voted_attention(q, k, 0.5, threshold=1.1, vote=vote, prefix=prefix)
    sizes = set()
    for crop in range(C):
        received = A[crop].mean(0)
        voters = A[crop][received > 1.1 * received.mean()]
        sizes.add(len(voters))
        torch.testing.assert_close(scores[crop], getattr(voters, vote)(0))
    assert not empty.any()
    assert len(sizes) > 1 and max(sizes) < N  # the crops differ, and somebody has no say


def test_threshold_zero_lets_all_vote():
    q, k = queries_keys()
    scores, empty = voted_attention(q, k, 0.5, threshold=0.0)
    torch.testing.assert_close(scores, dense(q, k).mean(1))
    torch.testing.assert_close(scores.sum(1), torch.ones(C))  # rows are distributions
    assert not empty.any()


@pytest.mark.parametrize(("quantile", "count"), [(0.0, N), (0.5, N // 2), (0.99, 1)])
@pytest.mark.parametrize("vote", ["mean", "sum"])
def test_a_quantile_lets_its_share_vote(quantile, count, vote):
    q, k = queries_keys()
    A = dense(q, k)
    scores, empty = voted_attention(q, k, 0.5, threshold=1e9, quantile=quantile, vote=vote)
    for crop in range(C):
        voters = A[crop].mean(0).argsort(descending=True)[:count]
        torch.testing.assert_close(scores[crop], getattr(A[crop][voters], vote)(0))
    assert not empty.any()


def test_equal_patches_all_vote_under_a_quantile():
    q, k = queries_keys()
    scores, empty = voted_attention(q, k * 0, 0.5, threshold=1.5, quantile=0.9)
    torch.testing.assert_close(scores, torch.full_like(scores, 1 / N))
    assert not empty.any()


@pytest.mark.parametrize("vote", ["mean", "sum"])
def test_crops_without_voters_fall_back_to_received_attention_and_say_so(vote):
    q, k = queries_keys()
    k[0] = 0  # a crop of equal attention: nobody is above the mean
    scores, empty = voted_attention(q, k, 0.5, threshold=1.5, vote=vote)
    assert empty.tolist() == [True, False, False]
    torch.testing.assert_close(scores[0], getattr(dense(q, k)[0], vote)(0))
    every, none = voted_attention(q, k, 0.5, threshold=N + 1.0, vote=vote)
    assert none.all()
    torch.testing.assert_close(every, getattr(dense(q, k), vote)(1))


def test_the_voters_decide_and_the_background_does_not():
    """Nine background patches look at each other; three voters look at patch 0."""
    q, k = torch.zeros(1, 1, N, D), torch.zeros(1, 1, N, D)
    k[0, 0, 0, 0] = k[0, 0, 3:, 1] = 1.0
    q[0, 0, 3:, 1] = 8.0  # the background's queries
    q[0, 0, :3, 0] = 40.0  # and those of patches 0 to 2
    plain, _ = voted_attention(q, k, 1.0, threshold=0.0)
    voted, _ = voted_attention(q, k, 1.0, threshold=2.0)  # only patch 0 receives twice the mean
    assert voted[0, 0] > 0.99 > plain[0, 0]


def test_grey_levels_are_those_of_the_picture_before_normalisation():
    picture = torch.randint(0, 256, (C, 3, 6, 6))
    pixels = (picture / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    expected = picture.double().mean(1).round().long()
    assert torch.equal(grey_levels(pixels, MEAN, STD), expected)


def test_grey_levels_of_16_bit_pixels_are_off_by_their_own_rounding_alone():
    levels = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    normalised = (levels / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    half = normalised.bfloat16()
    exact = (half.double() * STD.double().view(3, 1, 1) + MEAN.double().view(3, 1, 1)) * 255
    expected = exact.round().clamp(0, 255).mean(dim=-3).round().long()
    found = grey_levels(half, MEAN, STD)
    assert (found != expected).double().mean() < 0.01


@pytest.mark.parametrize(("levels", "bits"), [(1, 0), (2, 1), (16, 4), (64, 6), (256, 8)])
def test_entropy_of_equally_frequent_levels_is_their_logarithm(levels, bits):
    patch = torch.arange(256).view(1, 256) % levels
    assert patch_entropy(patch).item() == pytest.approx(bits, abs=1e-5)


def test_entropy_does_not_depend_on_the_order_of_pixels_or_the_brightness():
    patch = torch.randint(0, 100, (5, 64))
    shuffled = patch[:, torch.randperm(64)] + 120
    torch.testing.assert_close(patch_entropy(patch), patch_entropy(shuffled))


def test_patches_are_cut_in_raster_order():
    crop = torch.arange(4 * 6).view(1, 4, 6)
    patches = cut_patches(crop, 2)
    assert patches.shape == (1, 6, 4)
    assert patches[0, 1].tolist() == [2, 3, 8, 9]
    assert patches[0, 3].tolist() == [12, 13, 18, 19]
    assert cut_patches(torch.arange(5 * 7).view(1, 5, 7), 2).shape == (1, 6, 4)


def test_entropy_term_sums_to_alpha_in_each_crop():
    scores = torch.rand(C, N)
    added = add_entropy(scores, 8 * torch.rand(C, N), 0.7) - scores
    torch.testing.assert_close(added.sum(1), torch.full((C,), 0.7))
    assert torch.equal(add_entropy(scores, torch.rand(C, N), 0.0), scores)
