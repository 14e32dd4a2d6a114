"""Solvers from end to end: a weight and a Hessian go in, codes and honest errors come out."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.importance.weighting import mean_one
from compress.quantization import solvers
from compress.quantization.gptq import column_loop
from compress.quantization.grid import UniformGrid
from compress.quantization.hessian import Hessian, factor
from compress.quantization.solvers import SOLVERS, QuantizedLinear, SolverSettings
from support.refusals import refused
from support.small_linears import (
    correlated_inputs,
    in_range,
    layer_error,
    random_weight,
    second_moment,
)

N, K = 48, 128
BITS = (2, 3, 4, 5, 6, 8)
DEAD = (3, 70, 71)

either_symmetry = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero"])
either_group = pytest.mark.parametrize("group_size", [None, 32])


@pytest.fixture(scope="module")
def x():
    return correlated_inputs(4, 60, K).float()


@pytest.fixture(name="H", scope="module")
def hessian_of_inputs(x):
    return second_moment(x).float()


@pytest.fixture(name="W", scope="module")
def drawn_weight():
    return random_weight(N, K).float()


def solved(W, H, grid=None, group_size=None, method="gptq", **settings) -> QuantizedLinear:
    solver = SOLVERS[method](SolverSettings(**settings))
    statistics = solver.prepare(H.clone()) if solver.needs_hessian else None
    grid = grid or UniformGrid(3, True, torch.bfloat16)
    return solver.solve(W, statistics, grid, group_size)


def parts_of(linear) -> dict:
    return {field.name: getattr(linear, field.name) for field in dataclasses.fields(linear)}


def assert_same(a, b) -> None:
    """Equal to the bit."""
    for name, value in parts_of(a).items():
        other = getattr(b, name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype, name
            assert torch.equal(value, other), name
        else:
            assert value == other, name


def total(W, linear, H) -> float:
    return float(layer_error(W, linear.weight(), H).sum())


# ---- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(SOLVERS))
@pytest.mark.parametrize("bits", BITS)
@either_symmetry
@either_group
def test_codes_and_scales_are_what_a_checkpoint_stores(W, H, method, bits, symmetric, group_size):
    grid = UniformGrid(bits, symmetric, torch.bfloat16)
    linear = solved(W, H, grid, group_size, method)
    groups = K // (group_size or K)
    assert linear.codes.dtype == torch.int8
    assert linear.codes.shape == (N, K)
    assert in_range(linear.codes, bits)
    assert linear.scale.dtype == torch.bfloat16
    assert linear.scale.shape == (N, groups)
    assert (linear.zero is None) == symmetric
    if not symmetric:
        assert linear.zero.dtype == torch.int8
        assert linear.zero.shape == (N, groups)
        assert in_range(linear.zero, bits)
    by_hand = torch.empty(N, K)
    for k in range(K):
        g = k * groups // K
        zero = 0 if symmetric else linear.zero[:, g].float()
        by_hand[:, k] = (linear.codes[:, k].float() - zero) * linear.scale[:, g].float()
    assert torch.equal(linear.weight(), by_hand)
    assert linear.weight(torch.float64).dtype == torch.float64


@either_symmetry
@either_group
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_and_power_are_those_of_the_weight_that_is_read(
    W, H, symmetric, group_size, act_order, dtype
):
    linear = solved(W, H, UniformGrid(3, symmetric, dtype), group_size, act_order=act_order)
    power = layer_error(W, torch.zeros_like(W), H)
    assert linear.error.dtype == linear.power.dtype == torch.float64
    torch.testing.assert_close(linear.power, power, rtol=1e-5, atol=0)
    error = layer_error(W, linear.weight(), H)
    torch.testing.assert_close(linear.error, error, rtol=1e-4, atol=1e-7 * float(power.max()))
    expected = error.sum() / power.sum()
    assert linear.relative_error() == pytest.approx(float(expected), rel=1e-4)
    assert linear.damping == 0.01


def test_relative_error_where_there_is_nothing_to_be_relative_to(W, H):
    assert solved(W, H, method="rtn").relative_error() is None
    assert solved(torch.zeros(4, K), H).relative_error() == 0
    exact = torch.arange(N * K).remainder(7).sub(3).view(N, K) / 8
    exact[:, 0] = -0.5  # on the grid of scale 1/8, with its longest weight
    assert solved(exact, H, group_size=None).relative_error() == 0
    rounding, one = torch.tensor([-1e-9], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    codes = torch.zeros(1, K, dtype=torch.int8)
    assert QuantizedLinear(codes, one, None, rounding, one).relative_error() == 0


def test_the_error_is_near_what_the_factor_promises(W, H):
    """Without refinement: what solve reports is what column loop and damping 0 leave, by hand."""
    linear = solved(W, H, UniformGrid(3), None, refine_sweeps=0, damping=0.01)
    R, _ = factor(H.double(), 0.01)
    arguments = UniformGrid(3), None, "hessian", H.diagonal().double()
    result = column_loop(W.T.double().contiguous(), R / R.diagonal(), *arguments)
    expected = layer_error(W, result.dequantised().T, H).sum()
    torch.testing.assert_close(linear.error.sum(), expected, rtol=1e-2, atol=0)
    assert linear.changed == ()


@pytest.mark.parametrize("sweeps", [0, 1, 5])
def test_changed_holds_a_share_for_each_sweep(W, H, sweeps):
    linear = solved(W, H, refine_sweeps=sweeps)
    assert len(linear.changed) == sweeps
    assert all(0 < share < 1 for share in linear.changed)
    before = solved(W, H, refine_sweeps=0).codes
    if sweeps == 1:
        share = (linear.codes != before).double().mean()
        assert linear.changed == (pytest.approx(float(share)),)


# ---- rows, parts, repetition --------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(SOLVERS))
@either_symmetry
def test_rows_taken_apart_join_to_the_same_linear(W, H, method, symmetric):
    linear = solved(W, H, UniformGrid(3, symmetric, torch.bfloat16), 32, method)
    parts = [linear.rows(slice(a, b)) for a, b in [(0, 1), (1, 17), (17, N)]]
    assert [part.codes.shape[0] for part in parts] == [1, 16, N - 17]
    assert torch.equal(parts[1].weight(), linear.weight()[1:17])
    joined = QuantizedLinear.join(parts)
    assert joined.changed == pytest.approx(linear.changed)
    assert_same(dataclasses.replace(joined, changed=()), dataclasses.replace(linear, changed=()))
    if method == "gptq":
        expected = float(linear.error[1:17].sum() / linear.power[1:17].sum())
        assert parts[1].relative_error() == pytest.approx(expected)


def test_joined_shares_count_each_row_once():
    codes = torch.zeros(1, 2, dtype=torch.int8)
    small, large = (
        QuantizedLinear(codes.repeat(n, 1), torch.ones(n, 1), None, changed=changed)
        for n, changed in [(1, (0.5, 0.25)), (3, (0.1,))]
    )
    joined = QuantizedLinear.join([small, large])
    assert joined.changed == pytest.approx(((0.5 + 3 * 0.1) / 4, 0.25 / 4))


@pytest.mark.parametrize(("weights", "least"), [(1, 5), (20 * K, 1)])
@either_symmetry
@either_group
def test_solving_some_rows_at_a_time_gives_the_same(
    W, H, weights, least, symmetric, group_size, monkeypatch
):
    """In fp64, where another shape of a product cannot flip a code.

    Two sweeps, because a part goes on only as long as one of its own codes changes.
    """
    grid = UniformGrid(3, symmetric, torch.bfloat16)
    expected = solved(W, H.double(), grid, group_size, refine_sweeps=2)
    monkeypatch.setitem(solvers.WEIGHTS_AT_A_TIME, "cpu", weights)
    monkeypatch.setattr(solvers, "LEAST_ROWS", least)
    found = solved(W, H.double(), grid, group_size, refine_sweeps=2)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert symmetric or torch.equal(found.zero, expected.zero)
    torch.testing.assert_close(found.error, expected.error)
    assert found.changed == pytest.approx(expected.changed)


@pytest.mark.parametrize("method", sorted(SOLVERS))
@pytest.mark.parametrize("act_order", [False, True])
def test_the_same_again_is_the_same_to_the_bit(W, H, method, act_order):
    settings = {"method": method, "group_size": 32, "act_order": act_order}
    assert_same(solved(W, H, **settings), solved(W, H, **settings))


@pytest.mark.parametrize("method", sorted(SOLVERS))
@pytest.mark.parametrize("shape", [(N, K), (1, K), (5, 1), (1, 1)])
def test_the_weight_is_left_as_it_was(W, method, shape):
    rows, columns = shape
    W = W[:rows, :columns].clone()
    H = second_moment(correlated_inputs(2, 200, columns)).float()
    H[0] = H[:, 0] = 0  # a dead column, where the solver puts zeros
    before = W.clone()
    solved(W, H, group_size=None, method=method)
    assert torch.equal(W, before)


def test_linears_of_one_hessian_do_not_disturb_one_another(W, H):
    solver, grid = SOLVERS["gptq"](SolverSettings()), UniformGrid(3)
    statistics = solver.prepare(H.clone())
    first = solver.solve(W, statistics, grid, 32)
    other = solver.solve(-2 * W, statistics, UniformGrid(2, False), None)
    assert_same(solver.solve(W, statistics, grid, 32), first)
    assert_same(solver.solve(-2 * W, statistics, UniformGrid(2, False), None), other)


# ---- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
@either_group
def test_dead_columns_get_zero_weights_and_change_nothing_else(W, x, act_order, group_size):
    x = x.clone()
    x[..., DEAD] = 0
    H = second_moment(x).float()
    linear = solved(W, H, group_size=group_size, act_order=act_order)
    assert linear.dead_columns == len(DEAD)
    assert not linear.weight()[:, DEAD].any()
    assert linear.weight().isfinite().all()
    other = W.clone()
    other[:, DEAD] = 1e3
    assert_same(solved(other, H, group_size=group_size, act_order=act_order), linear)


def test_where_nothing_ever_arrives_all_weights_are_zero(W):
    linear = solved(W, torch.zeros(K, K))
    assert linear.dead_columns == K
    assert not linear.codes.any()
    assert linear.relative_error() == 0


@pytest.mark.parametrize("act_order", [False, True])
def test_uniform_tokens_of_any_constant_give_the_codes_of_none(W, x, act_order):
    mask = torch.ones(x.shape[:2], dtype=torch.bool)

    def linear(weights):
        statistics = Hessian(K)
        statistics.add_batch(x, weights)
        return solved(W, statistics.matrix(), group_size=32, act_order=act_order)

    for constant in (1.0, 0.01, 7.0):
        assert_same(linear(mean_one(constant * mask.float(), mask)), linear(None))


@pytest.mark.parametrize("act_order", [False, True])
@either_group
def test_codes_do_not_depend_on_the_unit_of_the_weights(W, H, act_order, group_size):
    """Damping is relative, so c * H is the same problem: here by powers of two, to the bit."""
    expected = solved(W, H, group_size=group_size, act_order=act_order)
    for c in (2.0**-20, 4.0, 2.0**13):
        found = solved(W, c * H, group_size=group_size, act_order=act_order)
        for name in ("codes", "scale", "damping", "changed"):
            a, b = getattr(found, name), getattr(expected, name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name
        assert found.relative_error() == expected.relative_error()


@pytest.mark.parametrize("act_order", [False, True])
@either_group
def test_tokens_of_weight_zero_might_as_well_not_be_there(W, x, act_order, group_size):
    """The same number kept in each window, in fp64: the codes of GPTQ on what is kept."""
    kept = torch.zeros(x.shape[:2], dtype=torch.bool)
    for j in range(len(x)):
        kept[j, 3 * j : 3 * j + 40] = True
    alone = second_moment(x[kept].view(len(x), 40, K))
    masked = second_moment(x, mean_one(kept.float(), torch.ones_like(kept)))
    a, b, c = (
        solved(W.double(), each, group_size=group_size, act_order=act_order)
        for each in (masked, alone, second_moment(x))
    )
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)
    assert not torch.equal(a.codes, c.codes)


@either_group
def test_whole_weights_are_tokens_that_occur_so_often(W, x, group_size):
    repeats = 1 + torch.arange(x.shape[1]) % 3
    repeated = second_moment(x.repeat_interleave(repeats, dim=1))
    weighted = second_moment(x, repeats.repeat(len(x), 1))
    a, b, c = (
        solved(W.double(), each, group_size=group_size)
        for each in (weighted, repeated, second_moment(x))
    )
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)
    assert not torch.equal(a.codes, c.codes)


def test_rounding_to_nearest_needs_no_hessian(W):
    solver = SOLVERS["rtn"](SolverSettings())
    assert not solver.needs_hessian
    linear = solver.solve(W, None, UniformGrid(4), 32)
    assert (linear.error, linear.power, linear.damping, linear.dead_columns) == (None,) * 3 + (0,)
    step = linear.scale.repeat_interleave(32, dim=1).abs()
    assert ((W - linear.weight()).abs() <= 0.5001 * step).double().mean() > 0.9


def test_no_data_at_all_is_needed_where_columns_are_alike(W):
    """H = c I and no refinement: GPTQ is rounding to nearest."""
    for group_size in (None, 32):
        a = solved(W, 3 * torch.eye(K), group_size=group_size, refine_sweeps=0)
        b = solved(W, torch.eye(K), group_size=group_size, method="rtn")
        for name in ("codes", "scale"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_fewer_tokens_than_columns_need_damping(W):
    H = second_moment(correlated_inputs(1, K // 2, K)).float()
    assert solved(W, H).weight().isfinite().all()
    with refused(CompressError, f"{K} columns", "quantize.damping"):
        solved(W, H, damping=0.0)


def test_more_damping_than_asked_for_is_reported(W, H):
    shifted = H - 0.02 * H.diagonal().mean() * torch.eye(K)
    linear = solved(W, shifted, damping=0.01)
    assert linear.damping > 0.01


def test_an_unknown_solver_is_named():
    with refused(UsageError, "'gptqq'", "'gptq'"):
        SOLVERS["gptqq"]


# ---- what it is for -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@either_symmetry
@either_group
def test_it_beats_rounding_to_nearest_at_every_width(W, H, bits, symmetric, group_size):
    grid = UniformGrid(bits, symmetric, torch.bfloat16)
    gptq, rtn = (solved(W, H, grid, group_size, method) for method in ("gptq", "rtn"))
    assert total(W, gptq, H) < 0.6 * total(W, rtn, H)


@either_symmetry
def test_every_bit_helps_and_eight_leave_next_to_nothing(W, H, symmetric):
    errors = [
        solved(W, H, UniformGrid(bits, symmetric, torch.bfloat16), 32).relative_error()
        for bits in BITS
    ]
    assert all(more < 0.6 * less for less, more in pairwise(errors))
    assert errors[-1] < 1e-4


def test_tokens_that_weigh_more_are_served_better(W):
    """RSQ against GPTQ, each judged by both Hessians: a trade, in both directions."""
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(6):
        x = correlated_inputs(4, 60, K, seed).float()
        r = torch.full((4, 60), 0.05)
        r[:, ::7] = 1.0
        weights = mean_one(r, torch.ones(4, 60, dtype=torch.bool))
        both = second_moment(x), second_moment(x, weights)
        linears = [solved(W, H.float()) for H in both]
        sums += torch.tensor([[total(W, linear, H) for H in both] for linear in linears])
    assert sums[1, 1] < 0.97 * sums[0, 1]
    assert sums[0, 0] < 0.97 * sums[1, 0]


def test_act_order_serves_the_columns_of_most_power(W):
    """Not refined, and with one scale a row, where the order of columns is all that differs."""
    own = act = 0.0
    for seed in range(6):
        H = second_moment(correlated_inputs(4, 60, K, seed)).float()
        own += total(W, solved(W, H, refine_sweeps=0), H)
        act += total(W, solved(W, H, refine_sweeps=0, act_order=True), H)
    assert act < own
