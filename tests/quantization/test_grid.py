"""Grids against all their levels written out, and clip searches against trying every share."""

import pytest
import torch

from compress.quantization import grid as grids
from compress.quantization.grid import MAGNITUDE_BITS, UniformGrid, search_scale
from support.small_linears import in_range

BITS = (2, 3, 4, 5, 6, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLIPS = ("none", "magnitude", "hessian")

every_width = pytest.mark.parametrize("bits", BITS)
either_symmetry = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero"])
every_clip = pytest.mark.parametrize("clip", CLIPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def weights(K=48, N=40, dtype=torch.float32):
    """[K, N]: random outputs, then the odd ones."""
    draw = torch.Generator().manual_seed(3)
    W = torch.randn(K, N, generator=draw, dtype=torch.float64)
    W = 0.05 * W * W.abs()
    W[:, 0] = 0
    W[:, 1] = W[:, 1].abs() + 0.01
    W[:, 2] = -W[:, 2].abs() - 0.01
    W[:, 3] = 0.3
    W[:, 4] = -0.3
    W[:, 5] = 0
    W[7, 5] = 1.5  # a spike
    W[:, 6] *= 1e-7  # the scale is below fp16's smallest normal number
    W[:, 7] *= 1e4
    W[:, 8] = 0.16
    W[7, 8] = 1.0  # at 2 bits best cut to a third
    return W.to(dtype)


def importances(K=48, dtype=torch.float32):
    draw = torch.Generator().manual_seed(4)
    return torch.randn(K, generator=draw, dtype=torch.float64).exp().to(dtype)


def levels(grid, scale, zero):
    """Every weight that the grid has for each output, in fp64: [2^bits, N]."""
    codes = torch.arange(2**grid.bits, dtype=torch.float64)[:, None] - 2 ** (grid.bits - 1)
    return (codes - (0 if zero is None else zero.double())) * scale.double()


def least_distances(grid, W, scale, zero):
    """How far each weight is from the nearest of all levels: [K, N] fp64."""
    return (W.double()[None] - levels(grid, scale, zero)[:, None]).abs().amin(0)


def objective(clip, e, importance):
    """What a clip search minimises, of distances [K, N]: [N] fp64."""
    if clip == "magnitude":
        return (e**2.4).sum(0)
    return (importance.double()[:, None] * e.square()).sum(0)


def shared_by(grid, W, share):
    """The scale and zero point for `share` of each output's extent, from the definitions: [N]."""
    half = 2 ** (grid.bits - 1)
    if grid.symmetric:
        longest = torch.where(W.amax(0) > -W.amin(0), W.amax(0), W.amin(0))
        return -share * longest / half, None
    low, high = W.amin(0).clamp(max=0) * share, W.amax(0).clamp(min=0) * share
    scale = (high - low) / (2 * half - 1)
    return scale, (-half - low / scale).round().clamp(-half, half - 1)


# ---- codes, levels and scales -------------------------------------------------------------------


@every_width
@either_symmetry
@every_clip
@every_dtype
def test_codes_fit_levels_are_the_nearest_and_scales_are_as_stored(bits, symmetric, clip, dtype):
    grid, W = UniformGrid(bits, symmetric, dtype), weights()
    scale, zero = search_scale(grid, W, clip, importances())
    assert torch.equal(scale.to(dtype).float(), scale)
    assert scale.isfinite().all()
    assert (scale.abs() >= torch.finfo(dtype).tiny).all()
    x = (W / scale).round().clamp(*grid.range(zero))
    assert in_range(x if zero is None else x + zero, bits)
    e = (W.double() - x.double() * scale.double()).abs()
    slack = 1e-6 * (W.abs() + scale.abs())
    assert (e <= least_distances(grid, W, scale, zero) + slack).all()
    assert (e <= W.abs() + slack).all()  # zero is always a level
    assert (zero is None) == symmetric
    if zero is not None:
        assert in_range(zero, bits)


@every_width
@every_clip
def test_the_extra_level_is_at_the_longer_side(bits, clip):
    grid, W = UniformGrid(bits), weights()[:, 1:]
    scale, _ = search_scale(grid, W, clip, importances())
    longer = torch.where(W.amax(0) > -W.amin(0), W.amax(0), W.amin(0))
    assert torch.equal(scale.sign(), -longer.sign())
    if clip == "none":
        torch.testing.assert_close(scale * -(2 ** (bits - 1)), longer, rtol=1e-6, atol=0)


@every_width
@every_clip
def test_a_mirrored_row_has_the_same_codes(bits, clip):
    grid, W = UniformGrid(bits), weights()[:, 1:]
    scale, _ = search_scale(grid, W, clip, importances())
    mirrored, _ = search_scale(grid, -W, clip, importances())
    assert torch.equal(mirrored, -scale)


@every_width
@either_symmetry
@every_clip
def test_weights_on_a_grid_stay_what_they_are(bits, symmetric, clip):
    """All codes in shuffled order: only their own scale, up to its sign, has no error."""
    grid = UniformGrid(bits, symmetric)
    codes = torch.arange(2.0**bits)[:, None] - 2 ** (bits - 1)
    zero = torch.zeros(6) if symmetric else torch.tensor([-2, -1, 0, 1, 0, -2.0]).clamp(grid.low)
    W = (codes - zero) * torch.tensor([1, -0.5, 0.25, -8, 2**-9, 2**-20])
    if not symmetric:
        W = W * torch.tensor([1, -1, 1, -1, 1, 1])  # its scales are positive
    scale, found = search_scale(grid, W, clip, torch.rand(len(W)))
    assert torch.equal((W / scale).round().clamp(*grid.range(found)) * scale, W)
    assert found is None or torch.equal(found, zero)


@every_width
@either_symmetry
def test_without_clipping_nothing_is_further_off_than_its_step(bits, symmetric):
    grid, W = UniformGrid(bits, symmetric), weights()
    scale, zero = search_scale(grid, W, "none")
    steps = least_distances(grid, W, scale, zero) / scale.double().abs()
    # A symmetric grid lacks the last level on its shorter side, so up to a whole step is missing.
    assert steps.max() <= (1 if symmetric else 0.5) + 1e-4


@either_symmetry
@every_clip
@every_dtype
def test_a_row_of_zeros_becomes_zeros(symmetric, clip, dtype):
    grid, W = UniformGrid(3, symmetric, dtype), torch.zeros(8, 5)
    scale, zero = search_scale(grid, W, clip, torch.ones(8))
    x = (W / scale).round().clamp(*grid.range(zero))
    assert torch.equal(x * scale, W)
    assert (scale != 0).all()


@every_width
@either_symmetry
@every_clip
def test_a_row_of_one_value_is_exact(bits, symmetric, clip):
    grid, W = UniformGrid(bits, symmetric), weights()[:, 3:5]
    scale, zero = search_scale(grid, W, clip, importances())
    assert (least_distances(grid, W, scale, zero) <= 1e-6 * W.abs()).all()


# ---- clip searches ------------------------------------------------------------------------------


@every_width
@either_symmetry
@pytest.mark.parametrize("clip", CLIPS[1:])
@every_dtype
def test_clipping_is_never_worse_than_not_clipping(bits, symmetric, clip, dtype):
    grid, W, importance = UniformGrid(bits, symmetric, dtype), weights(), importances()

    def error(kind):
        scale, zero = search_scale(grid, W, kind, importance)
        return objective(clip, least_distances(grid, W, scale, zero), importance)

    found, unclipped = error(clip), error("none")
    assert (found <= unclipped * (1 + 1e-5)).all()
    if bits <= 3:
        assert (found / unclipped)[9:].mean() < 0.95  # and it is worth the time


@every_width
@either_symmetry
def test_magnitude_is_the_best_of_its_eighty_shares(bits, symmetric):
    grid, W = UniformGrid(bits, symmetric, torch.float64), weights(192, dtype=torch.float64)[:, 1:]
    scale, zero = search_scale(grid, W, "magnitude")
    if bits >= MAGNITUDE_BITS:  # where none is tried
        assert torch.equal(scale, search_scale(grid, W, "none")[0])
        return
    found = objective("magnitude", least_distances(grid, W, scale, zero), None)
    tried = [shared_by(grid, W, 1 - i / 100) for i in range(80)]
    errors = [objective("magnitude", least_distances(grid, W, *s), None) for s in tried]
    torch.testing.assert_close(found, torch.stack(errors).amin(0), rtol=1e-9, atol=0)


@every_width
@either_symmetry
def test_hessian_is_the_best_share_to_the_resolution_of_its_steps(bits, symmetric):
    grid, W = UniformGrid(bits, symmetric, torch.float64), weights(dtype=torch.float64)[:, 1:]
    importance = importances(dtype=torch.float64)
    scale, zero = search_scale(grid, W, "hessian", importance)
    found = objective("hessian", least_distances(grid, W, scale, zero), importance)

    def least(step):
        tried = [shared_by(grid, W, 1.05 - step * i) for i in range(int(0.8 / step))]
        errors = [objective("hessian", least_distances(grid, W, *s), importance) for s in tried]
        return torch.stack(errors).amin(0)

    assert (found <= least(0.075) * (1 + 1e-9) + 1e-30).all()
    assert found.sum() <= 1.05 * least(0.025).sum()


@either_symmetry
def test_only_columns_that_matter_decide_the_scale(symmetric):
    """Two rows that differ where the importance is zero, but not in their extent."""
    grid, W = UniformGrid(3, symmetric), weights()[:, 9:]
    importance = importances()
    W[:6] = W[:6].clamp(-0.01, 0.01)
    importance[:6] = 0
    other = W.clone()
    other[:6] = -other[:6]
    found, expected = (search_scale(grid, each, "hessian", importance) for each in (other, W))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    importance[:6] = 1000
    scale, zero = search_scale(grid, W, "hessian", importance)
    before = least_distances(grid, W, *expected)[:6].square().sum()
    assert least_distances(grid, W, scale, zero)[:6].square().sum() < before


@either_symmetry
@pytest.mark.parametrize("clip", CLIPS[1:])
@pytest.mark.parametrize("chunk", [48 * 3, 48 * 7])
def test_chunks_do_not_change_the_result(symmetric, clip, chunk, monkeypatch):
    """In fp64, so that another order of sums cannot turn one share into another."""
    grid = UniformGrid(3, symmetric)
    arguments = grid, weights(dtype=torch.float64), clip, importances(dtype=torch.float64)
    expected = search_scale(*arguments)
    monkeypatch.setitem(grids.CHUNK, "cpu", chunk)
    torch.testing.assert_close(search_scale(*arguments), expected, rtol=0, atol=0)


@either_symmetry
@pytest.mark.parametrize("clip", CLIPS[1:])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_shares_tried_together_find_what_they_find_in_turn(symmetric, clip, chunk, monkeypatch):
    """As on a GPU; in fp64, as above."""
    W = weights(dtype=torch.float64)
    W[:, 3] = 0
    arguments = UniformGrid(3, symmetric), W, clip, importances(dtype=torch.float64)
    expected = search_scale(*arguments)
    monkeypatch.setattr(grids, "tried_together", lambda _: True)
    monkeypatch.setitem(grids.CHUNK, "cpu", chunk)
    torch.testing.assert_close(search_scale(*arguments), expected, rtol=0, atol=0)


@every_clip
def test_the_weights_are_left_as_they_were(clip):
    for W in (weights(), weights()[:, :1], weights()[:1]):
        before = W.clone()
        search_scale(UniformGrid(3), W, clip, importances()[: len(W)])
        assert torch.equal(W, before)
