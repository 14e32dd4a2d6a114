"""The column loop against GPTQ as its paper writes it, through the inverse of H, in fp64."""

import pytest
import torch
from torch import Tensor

from compress.quantization.gptq import column_loop, nearest
from compress.quantization.grid import UniformGrid, search_scale
from compress.quantization.hessian import factor
from support.small_linears import (
    correlated_inputs,
    in_range,
    layer_error,
    random_weight,
    second_moment,
)

N, K = 24, 256
DAMPING = 0.01
EXACT = torch.float64  # of scales, where both sides shall round nothing but weights

every_group = pytest.mark.parametrize("group_size", [None, 32, 64, 128])
either_symmetry = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero"])
either_order = pytest.mark.parametrize("act_order", [False, True], ids=["own", "act"])


@pytest.fixture(name="H", scope="module")
def hessian_of_inputs() -> Tensor:
    return second_moment(correlated_inputs(4, 80, K))


@pytest.fixture(name="W", scope="module")
def drawn_weight() -> Tensor:
    return random_weight(N, K)


def unit_factor(H, order=None, damping=DAMPING):
    R, used = factor(H if order is None else H[order][:, order], damping)
    assert used == damping
    return R / R.diagonal()


def act_order_of(H):
    return torch.argsort(H.diagonal(), descending=True)


def full_scale(W, bits, symmetric):
    """Scale and zero point of W [N, G] that clip nothing: [N], [N]."""
    if symmetric:
        longest = W.gather(1, W.abs().argmax(1, keepdim=True))[:, 0]
        return -longest / 2 ** (bits - 1), torch.zeros(len(W), dtype=W.dtype)
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return scale, (-(2 ** (bits - 1)) - low / scale).round()


def textbook(W, H, bits, symmetric, group_size, order=None, clip="none"):
    """Algorithm 1 of GPTQ (arXiv 2210.17323), one column at a time: codes and weights, [N, K].

    Every column's error is spread over the columns to come by a row of the Cholesky factor of the
    inverse. A group's scale is taken when its first column comes up, or with another order of
    columns, before the loop.
    """
    size, importance = group_size or K, H.diagonal()
    order = torch.arange(K) if order is None else order
    static = not torch.equal(order, torch.arange(K))
    grid = UniformGrid(bits, symmetric, EXACT)

    def scale_of(W, g):
        if clip == "none":
            return full_scale(W, bits, symmetric)
        part = slice(g * size, (g + 1) * size)
        scale, zero = search_scale(grid, W.T.contiguous(), clip, importance[part])
        return scale, torch.zeros_like(scale) if zero is None else zero

    scales = {g: scale_of(W[:, g * size : (g + 1) * size], g) for g in range(K // size)}
    permuted = (H + DAMPING * importance.mean() * torch.eye(K, dtype=H.dtype))[order][:, order]
    U = torch.linalg.cholesky(torch.linalg.inv(permuted), upper=True)
    left = W[:, order].clone()
    codes, Q = torch.empty_like(W), torch.empty_like(W)
    for j in range(K):
        g = int(order[j]) // size
        if j % size == 0 and not static:
            scales[g] = scale_of(left[:, j : j + size], g)
        scale, zero = scales[g]
        code = (left[:, j] / scale + zero).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        q = (code - zero) * scale
        codes[:, order[j]], Q[:, order[j]] = code, q
        left[:, j:] -= torch.outer((left[:, j] - q) / U[j, j], U[j, j:])
    return codes, Q


def solved(W, H, grid, group_size, act_order=False, clip="none", **options):
    """The column loop with factor and order from H, all in the dtype of W."""
    order = act_order_of(H) if act_order else None
    M = unit_factor(H, order).to(W.dtype)
    importance = H.diagonal().to(W.dtype)
    return column_loop(W.T.contiguous(), M, grid, group_size, clip, importance, order, **options)


# ---- the oracle ---------------------------------------------------------------------------------


@every_group
@either_symmetry
@either_order
@pytest.mark.parametrize("clip", ["none", "hessian"])
@pytest.mark.parametrize("bits", [2, 4])
def test_it_is_the_textbook_algorithm(W, H, group_size, symmetric, act_order, clip, bits):
    order = act_order_of(H) if act_order else None
    codes, Q = textbook(W, H, bits, symmetric, group_size, order, clip)
    result = solved(W, H, UniformGrid(bits, symmetric, EXACT), group_size, act_order, clip)
    assert (codes != result.codes().T).double().mean() < 1e-3  # only ties may fall otherwise
    found, expected = (layer_error(W, q, H).sum() for q in (result.dequantised().T, Q))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@every_group
@either_order
def test_in_fp32_it_costs_what_the_textbook_costs(W, H, group_size, act_order):
    """Rounding flips a code now and then, and the codes after it; the error hardly moves."""
    order = act_order_of(H) if act_order else None
    _, Q = textbook(W, H, 3, True, group_size, order)
    result = solved(W.float(), H, UniformGrid(3), group_size, act_order)
    found, expected = (layer_error(W, q, H).sum() for q in (result.dequantised().T, Q))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


@either_symmetry
@pytest.mark.parametrize("group_size", [None, 32])
def test_every_column_takes_the_level_nearest_to_its_target(W, H, symmetric, group_size):
    """The greedy choice, seen from the result alone: W_j + sum_{i<j} E_i M_ij."""
    grid = UniformGrid(3, symmetric, EXACT)
    result = solved(W, H, grid, group_size)
    E, M = W.T - result.dequantised(), unit_factor(H)
    targets = W.T + M.triu(1).T @ E  # [K, N]
    levels = torch.arange(-4.0, 4.0, dtype=EXACT)[:, None, None] * torch.ones_like(targets)
    if result.zero is not None:
        levels = levels - result.zero[result.group_of]
    scale = result.scale[result.group_of]
    least = (targets - levels * scale).abs().amin(0)
    assert ((targets - result.dequantised()).abs() <= least + 1e-9 * scale.abs()).all()


def test_no_other_level_of_the_last_column_is_better(W, H):
    """The last column corrects for nothing later, so its choice is the best for the whole error."""
    result = solved(W, H, UniformGrid(2, True, EXACT), None)
    damped = H + DAMPING * H.diagonal().mean() * torch.eye(K, dtype=H.dtype)
    best = layer_error(W, result.dequantised().T, damped)
    for level in range(-2, 2):
        result.x[-1] = level
        assert (layer_error(W, result.dequantised().T, damped) >= best * (1 - 1e-12)).all()


# ---- special cases ------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [None, 64])
@either_symmetry
@pytest.mark.parametrize("clip", ["none", "magnitude", "hessian"])
def test_without_correlations_it_is_rounding_to_nearest(W, group_size, symmetric, clip):
    Wt, grid = W.T.float().contiguous(), UniformGrid(3, symmetric, torch.bfloat16)
    importance = torch.rand(K, generator=torch.Generator().manual_seed(0)) + 0.1
    arguments = grid, group_size, clip, importance
    expected = nearest(Wt, *arguments)
    for order in (None, torch.arange(K), torch.argsort(importance)):
        found = column_loop(Wt, torch.eye(K), *arguments, order)
        assert torch.equal(found.scale, expected.scale)
        assert torch.equal(found.x, expected.x)
        if not symmetric:
            assert torch.equal(found.zero, expected.zero)


@either_symmetry
@either_order
@pytest.mark.parametrize("block", [1, 32, 100, K, 2 * K])
def test_blocks_do_not_change_the_result(W, H, symmetric, act_order, block):
    grid = UniformGrid(3, symmetric, EXACT)
    expected = solved(W, H, grid, None, act_order)
    assert torch.equal(solved(W, H, grid, None, act_order, block=block).x, expected.x)


@either_symmetry
def test_their_own_order_is_no_other_order(W, H, symmetric):
    grid, M = UniformGrid(3, symmetric, EXACT), unit_factor(H)
    arguments = W.T.contiguous(), M, grid, None, "hessian", H.diagonal()
    assert torch.equal(column_loop(*arguments, torch.arange(K)).x, column_loop(*arguments).x)


@either_symmetry
@pytest.mark.parametrize("group_size", [None, 32])
def test_act_order_is_the_same_layer_with_its_columns_shuffled(W, H, symmetric, group_size):
    """Scales are fixed before the loop, so shuffling columns inside groups permutes the codes."""
    draw = torch.Generator().manual_seed(0)
    size = group_size or K
    shuffle = torch.cat([torch.randperm(size, generator=draw) + g for g in range(0, K, size)])
    grid = UniformGrid(3, symmetric, EXACT)
    plain = solved(W, H, grid, group_size, act_order=True)
    shuffled = solved(W[:, shuffle], H[shuffle][:, shuffle], grid, group_size, act_order=True)
    torch.testing.assert_close(shuffled.codes(), plain.codes()[shuffle], rtol=0, atol=0)


@pytest.mark.parametrize("group_size", [None, 32])
@either_symmetry
@either_order
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_fit_and_stand_for_the_weights(W, H, group_size, symmetric, act_order, bits):
    grid = UniformGrid(bits, symmetric, torch.bfloat16)
    result = solved(W.float(), H, grid, group_size, act_order, "hessian")
    codes, scale = result.codes(), result.scale
    assert in_range(codes, bits)
    assert scale.shape == (K // (group_size or K), N)
    assert torch.equal(scale.bfloat16().float(), scale)
    rows = K // len(scale)
    by_hand = codes.view(-1, rows, N)
    if result.zero is not None:
        assert in_range(result.zero, bits)
        by_hand = by_hand - result.zero[:, None]
    assert torch.equal((by_hand * scale[:, None]).view(K, N), result.dequantised())


@every_group
@either_symmetry
def test_rounding_to_nearest_leaves_no_weight_at_another_level(W, group_size, symmetric):
    grid, Wt = UniformGrid(3, symmetric, torch.bfloat16), W.T.float().contiguous()
    result = nearest(Wt, grid, group_size, "magnitude", torch.ones(K))
    assert in_range(result.codes(), 3)
    scale, e = result.scale[result.group_of], (Wt - result.dequantised()).abs()
    for step in (-1, 1):
        other = result.codes() + step
        allowed = (other >= -4) & (other <= 3)
        further = (Wt - (result.x + step) * scale).abs() >= e - 1e-6 * scale.abs()
        assert further[allowed].all()


def test_the_inputs_are_left_as_they_were(W, H):
    for rows in (N, 1):
        Wt, M = W[:rows].T.contiguous().clone(), unit_factor(H)
        before = Wt.clone(), M.clone()
        for order in (None, torch.arange(K)):
            column_loop(Wt, M, UniformGrid(3), 32, "hessian", H.diagonal(), order)
        assert torch.equal(Wt, before[0])
        assert torch.equal(M, before[1])


# ---- what it is for -----------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_beats_rounding_to_nearest_with_the_same_clip_search(W, H, bits, group_size):
    grid = UniformGrid(bits, True, torch.bfloat16)
    rounded = nearest(W.T.contiguous(), grid, group_size, "hessian", H.diagonal())
    loop = solved(W, H, grid, group_size, clip="hessian")
    errors = [layer_error(W, r.dequantised().T, H).sum() for r in (loop, rounded)]
    assert errors[0] < 0.75 * errors[1]


def test_it_closes_most_of_the_gap_between_rounding_and_the_best_of_all_codes():
    """Brute force over all codes of 6 columns in 2 bits, with the same scales for all three."""
    columns, sums = 6, torch.zeros(3, dtype=EXACT)
    every = torch.cartesian_prod(*[torch.arange(-2.0, 2, dtype=EXACT)] * columns)  # [4^6, 6]
    for seed in range(6):
        H = second_moment(correlated_inputs(1, 40, columns, seed))
        W = random_weight(16, columns, seed)
        arguments = UniformGrid(2, True, EXACT), None, "hessian", H.diagonal()
        loop = column_loop(W.T.contiguous(), unit_factor(H), *arguments)
        rounded = nearest(W.T.contiguous(), *arguments)
        E = W[:, None] - every * loop.scale.T[:, None]
        least = ((E @ H) * E).sum(-1).amin(1)
        found, plain = (layer_error(W, r.dequantised().T, H) for r in (loop, rounded))
        assert (found >= least * (1 - 1e-9)).all()
        sums += torch.stack([least.sum(), found.sum(), plain.sum()])
    least, found, plain = sums
    assert found - least < 0.6 * (plain - least)
