"""Coordinate descent against the same descent one weight at a time, in fp64, and by brute force."""

import copy

import pytest
import torch
from torch import Tensor

from compress.quantization import refine as refining
from compress.quantization.gptq import QuantizedColumns, column_loop, nearest
from compress.quantization.grid import UniformGrid
from compress.quantization.hessian import factor
from compress.quantization.refine import refine
from support.small_linears import (
    correlated_inputs,
    in_range,
    layer_error,
    random_weight,
    second_moment,
)

N, K = 16, 160  # more columns than a block has, and not a multiple of it
EXACT = torch.float64  # of scales

either_symmetry = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero"])
either_group = pytest.mark.parametrize("group_size", [None, 32])
every_start = pytest.mark.parametrize("start", ["rtn", "gptq"])


@pytest.fixture(name="H", scope="module")
def hessian_of_inputs() -> Tensor:
    return second_moment(correlated_inputs(4, 60, K))


@pytest.fixture(name="W", scope="module")
def drawn_weight() -> Tensor:
    return random_weight(N, K)


def started(start, W, H, grid, group_size) -> QuantizedColumns:
    """Where the descent begins: [K, N], in the dtype of W."""
    Wt, importance = W.T.contiguous(), H.diagonal().to(W.dtype)
    if start == "rtn":
        return nearest(Wt, grid, group_size, "hessian", importance)
    R, _ = factor(H, 0.01)
    M = (R / R.diagonal()).to(W.dtype)
    return column_loop(Wt, M, grid, group_size, "hessian", importance)


def error(result, W, H) -> Tensor:
    """f of each output: [N] fp64."""
    return layer_error(W, result.dequantised().T, H)


def best_scale(x, target, H):
    """The minimiser of f over one scale of levels x [k, N]; `target` is what x s shall come to."""
    return (x * (H @ target)).sum(0) / (x * (H @ x)).sum(0)


def one_weight_at_a_time(result, W, H, grid, group_size, sweeps):
    """The descent from its definition. Changes `result`; returns the changes of each sweep."""
    Wt, size, changed = W.T, group_size or K, []

    def fit(g):
        part = slice(g * size, (g + 1) * size)
        others = result.dequantised()
        others[part] = 0
        x = torch.zeros_like(Wt)
        x[part] = result.x[part]
        fitted = best_scale(x, Wt - others, H)
        result.scale[g] = torch.where(fitted.isfinite(), fitted, result.scale[g])

    for _ in range(sweeps):
        before = result.x.clone()
        for j in range(K):
            if j % size == 0:
                fit(j // size)
            s, G = result.scale[j // size], H[j] @ (Wt - result.dequantised())
            target = result.x[j] + G / (H[j, j] * s)
            result.x[j] = target.round().clamp(*grid.range(result.zero_of(j // size)))
        changed.append(int((result.x != before).sum()))
        if changed[-1] == 0:
            break
    if group_size is None:
        fit(0)
    return changed


def settle(result, Wt, H, grid, group_size):
    """Sweeps until neither levels nor scales move."""
    for _ in range(100):
        scale = result.scale.clone()
        if refine(result, Wt, H, grid, group_size, 1) == [0] and torch.equal(scale, result.scale):
            return
    raise AssertionError("100 sweeps did not settle it")


# ---- the oracle ---------------------------------------------------------------------------------


@every_start
@either_symmetry
@either_group
@pytest.mark.parametrize("sweeps", [1, 3])
def test_it_is_the_descent_one_weight_at_a_time(W, H, start, symmetric, group_size, sweeps):
    grid = UniformGrid(3, symmetric, EXACT)
    result = started(start, W, H, grid, group_size)
    expected = copy.deepcopy(result)
    changed = refine(result, W.T.contiguous(), H, grid, group_size, sweeps)
    by_hand = one_weight_at_a_time(expected, W, H, grid, group_size, sweeps)
    assert changed == by_hand
    assert torch.equal(result.x, expected.x)
    torch.testing.assert_close(result.scale, expected.scale, rtol=1e-9, atol=0)


@pytest.mark.parametrize("block", [1, 16, 100, 1000])
def test_blocks_do_not_change_the_result(W, H, block, monkeypatch):
    grid = UniformGrid(3, True, EXACT)
    result = started("gptq", W, H, grid, None)
    expected = copy.deepcopy(result)
    refine(expected, W.T.contiguous(), H, grid, None, 3)
    monkeypatch.setattr(refining, "BLOCK", block)
    refine(result, W.T.contiguous(), H, grid, None, 3)
    assert torch.equal(result.x, expected.x)
    torch.testing.assert_close(result.scale, expected.scale, rtol=1e-9, atol=0)


def test_without_correlations_it_alternates_levels_and_least_squares(W):
    """H = c I: every row is a one-dimensional fit of its own."""
    H, grid = 3 * torch.eye(K, dtype=EXACT), UniformGrid(2, True, EXACT)
    result = started("rtn", W, H, grid, None)
    x, Wt = result.x.clone(), W.T.contiguous()
    refine(result, Wt, H, grid, None, 4)
    for _ in range(4):
        s = (x * Wt).sum(0) / x.square().sum(0)
        x = (Wt / s).round().clamp(-2, 1)
    assert torch.equal(result.x, x)
    torch.testing.assert_close(result.scale[0], (x * Wt).sum(0) / x.square().sum(0))


# ---- descent ------------------------------------------------------------------------------------


@every_start
@either_symmetry
@either_group
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_sweep_raises_the_error_of_any_output(W, H, start, symmetric, group_size, bits, dtype):
    """In fp32, with scales as stored: what is nearest to the best scale is no worse than before."""
    grid, Wt, H32 = UniformGrid(bits, symmetric, dtype), W.T.float().contiguous(), H.float()
    result = started(start, W.float(), H, grid, group_size)
    rounding = 1e-6 * layer_error(W, torch.zeros_like(W), H)
    first = before = error(result, W, H)
    for _ in range(4):
        refine(result, Wt, H32, grid, group_size, 1)
        after = error(result, W, H)
        assert (after <= before + rounding).all()
        before = after
    assert after.sum() < first.sum()
    assert in_range(result.codes(), bits)
    assert torch.equal(result.scale.to(dtype).float(), result.scale)


@pytest.mark.parametrize(("start", "share"), [("rtn", 0.6), ("gptq", 0.9)])
@either_group
def test_it_is_worth_its_time(W, H, start, share, group_size):
    grid = UniformGrid(3, True, torch.bfloat16)
    result = started(start, W, H, grid, group_size)
    before = error(result, W, H).sum()
    refine(result, W.T.contiguous(), H, grid, group_size, 5)
    assert error(result, W, H).sum() < share * before


@either_symmetry
@either_group
def test_where_nothing_changes_no_single_code_lowers_the_error(symmetric, group_size):
    """Brute force over every other code of every weight."""
    columns, bits = 64, 2
    H, W = second_moment(correlated_inputs(2, 60, columns)), random_weight(8, columns)
    grid, Wt = UniformGrid(bits, symmetric, torch.bfloat16), W.T.contiguous()
    result = started("gptq", W, H, grid, group_size)
    settle(result, Wt, H, grid, group_size)
    settled, codes = error(result, W, H), result.codes()
    for k in range(columns):
        for code in range(-2, 2):
            other = copy.deepcopy(result)
            other.x[k] += code - codes[k]
            assert (error(other, W, H) >= settled * (1 - 1e-12)).all()


@either_group
def test_it_stops_when_nothing_changes_and_counts_what_did(W, H, group_size):
    grid, Wt = UniformGrid(2, True, EXACT), W.T.contiguous()
    result = started("rtn", W, H, grid, group_size)
    for _ in range(3):
        before = result.x.clone()
        (count,) = refine(result, Wt, H, grid, group_size, 1)
        assert count == (result.x != before).sum()
    changed = refine(result, Wt, H, grid, group_size, 200, settled=0)
    assert len(changed) < 200
    assert changed[-1] == 0
    assert all(changed[:-1])


@pytest.mark.parametrize("settled", [0.01, 0.1, 1.0])
def test_the_sweep_that_changes_hardly_anything_is_the_last(W, H, settled):
    grid = UniformGrid(2, True, EXACT)
    result = started("rtn", W, H, grid, 16)
    *more, last = refine(result, W.T.contiguous(), H, grid, 16, 200, settled=settled)
    assert last <= settled * W.numel()
    assert all(count > settled * W.numel() for count in more)


@either_group
def test_no_sweeps_change_nothing(W, H, group_size):
    grid = UniformGrid(3, True, torch.bfloat16)
    result = started("gptq", W, H, grid, group_size)
    before = copy.deepcopy(result)
    assert refine(result, W.T.contiguous(), H, grid, group_size, 0) == []
    assert torch.equal(result.x, before.x)
    assert torch.equal(result.scale, before.scale)


# ---- scales -------------------------------------------------------------------------------------


@either_symmetry
@pytest.mark.parametrize("dtype", [EXACT, torch.bfloat16], ids=str)
def test_the_scale_of_a_row_is_the_exact_minimiser(W, H, symmetric, dtype):
    grid = UniformGrid(3, symmetric, dtype)
    result = started("rtn", W, H, grid, None)
    refine(result, W.T.contiguous(), H, grid, None, 1)
    best = best_scale(result.x, W.T, H)
    if dtype == EXACT:
        torch.testing.assert_close(result.scale[0], best, rtol=1e-9, atol=0)
    else:
        assert torch.equal(result.scale[0].bfloat16(), best.bfloat16())
        assert torch.equal(result.scale[0], best.bfloat16().double())


@either_symmetry
def test_the_scales_of_groups_are_minimisers_given_one_another(W, H, symmetric):
    """Where it has settled, no neighbouring scale of any group is better."""
    grid, Wt = UniformGrid(2, symmetric, torch.bfloat16), W.T.contiguous()
    result = started("gptq", W, H, grid, 32)
    settle(result, Wt, H, grid, 32)
    settled = error(result, W, H)
    for g in range(K // 32):
        for step in (-1, 1):
            other = copy.deepcopy(result)
            bits = other.scale[g].bfloat16().view(torch.int16) + step
            other.scale[g] = bits.view(torch.bfloat16).double()
            assert (error(other, W, H) >= settled * (1 - 1e-12)).all()


@either_group
@either_symmetry
def test_rows_of_zeros_stay_zeros(W, H, group_size, symmetric):
    W = W.clone()
    W[3], W[:, :32] = 0, 0
    grid = UniformGrid(3, symmetric, torch.bfloat16)
    result = started("rtn", W, H, grid, group_size)
    before = result.scale.clone()
    refine(result, W.T.contiguous(), H, grid, group_size, 3)
    assert not result.x[:, 3].any()
    assert torch.equal(result.scale[:, 3], before[:, 3])
    assert result.x.isfinite().all()
    assert result.scale.isfinite().all()
