"""The 16-bit model's output as a linear's target, against plain formulas in fp64.

sum w ||W x0 - Q x||^2,  whose minimiser without a grid is W C H^-1, C = sum w x0 x^T
"""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from compress.importance.weighting import mean_one
from compress.quantization import solvers
from compress.quantization.grid import UniformGrid
from compress.quantization.hessian import Hessian
from compress.quantization.layer import solve_group
from compress.quantization.solvers import (
    SOLVERS,
    QuantizedLinear,
    SolverSettings,
    Target,
    settled,
)
from compress.scheme import Scheme
from support.drifted_inputs import drifted_hessian, drifted_inputs, output_error
from support.small_linears import random_weight, second_moment

N, K, WINDOWS, TOKENS = 40, 128, 4, 60
DEAD = (3, 70, 71)

either_order = pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
either_weighting = pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])


def token_weights(seed=0, tokens=TOKENS) -> Tensor:
    r = torch.randn(WINDOWS, tokens, generator=torch.Generator().manual_seed(seed)).exp()
    return mean_one(r, torch.ones_like(r, dtype=torch.bool))


def solved(W, H: Hessian, grid=None, group_size=32, settle=True, **settings) -> QuantizedLinear:
    """As `solve_group` does it, for one linear."""
    solver = SOLVERS["gptq"](SolverSettings(**settings))
    drift = H.take_drift()
    target = None if drift is None else Target.of(W, *drift)
    statistics = solver.prepare(H.matrix())
    grid = grid or UniformGrid(3, True, torch.bfloat16)
    found = solver.solve(W, statistics, grid, group_size, target)
    if not settle:
        return found
    return settled(found, solver.alternative(W, statistics, grid, group_size, target))


def plain(W, x, weights=None, **settings) -> QuantizedLinear:
    H = Hessian(x.shape[-1])
    H.add_batch(x.float(), weights)
    return solved(W, H, **settings)


def assert_same(a: QuantizedLinear, b: QuantizedLinear) -> None:
    """Equal to the bit, with all that is said about them."""
    for name, value in vars(a).items():
        other = getattr(b, name)
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name


# ---- the statistics -----------------------------------------------------------------------------


@either_weighting
def test_drift_is_the_difference_of_cross_and_plain_statistics(weighted):
    """Window by window, token by token."""
    x0, x = drifted_inputs(WINDOWS, TOKENS, 24)
    weights = token_weights() if weighted else None
    H = Hessian(24, drift=True)
    for part in (slice(0, 1), slice(1, None)):  # in batches
        H.add_batch(x[part].float(), None if weights is None else weights[part], x0[part].float())
    D, F = H.take_drift()
    cross = torch.zeros(24, 24, dtype=torch.float64)
    for j, t in product(range(WINDOWS), range(TOKENS)):
        w = 1.0 if weights is None else float(weights[j, t])
        cross += 2 / WINDOWS * w * torch.outer(x0[j, t], x[j, t])
    expected = cross - second_moment(x, weights)
    torch.testing.assert_close(
        D.double(), expected, rtol=1e-4, atol=1e-5 * float(cross.abs().max())
    )
    expected = second_moment(x0 - x, weights)
    torch.testing.assert_close(F.double(), expected, rtol=1e-5, atol=1e-6 * float(F.max()))
    assert H.take_drift() is None  # it was taken
    torch.testing.assert_close(H.matrix().double(), second_moment(x, weights), rtol=1e-5, atol=1e-5)


def test_inputs_that_are_the_same_have_no_drift():
    _, x = drifted_inputs(WINDOWS, TOKENS, K)
    assert drifted_hessian(x, x, token_weights()).take_drift() is None
    assert Hessian(K).take_drift() is None


@either_order
def test_dividing_by_the_damped_hessian_is_solving_with_it(act_order):
    _, x = drifted_inputs(WINDOWS, 200, K)
    x[..., DEAD] = 0
    H = second_moment(x)
    statistics = SOLVERS["gptq"](SolverSettings(act_order=act_order)).prepare(H.clone())
    A = torch.randn(K, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A[list(DEAD)] = 0
    found = statistics.divide(A.clone())
    assert (found[list(DEAD)] == 0).all()
    H.diagonal()[list(DEAD)] = 1
    H.diagonal().add_(0.01 * H.diagonal().mean())
    torch.testing.assert_close(H @ found, A, rtol=0, atol=1e-8)


# ---- what comes out -----------------------------------------------------------------------------


@either_order
@either_weighting
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero"])
@pytest.mark.parametrize("group_size", [None, 32])
def test_the_error_to_the_16_bit_output_is_never_above_that_of_the_plain_target(
    act_order, weighted, symmetric, group_size
):
    grid = UniformGrid(3, symmetric, torch.bfloat16)
    for seed, drift in product(range(3), (0.02, 0.1)):
        x0, x = drifted_inputs(WINDOWS, TOKENS, K, seed, drift)
        W, weights = random_weight(N, K, seed).float(), token_weights(seed) if weighted else None
        settings = {"grid": grid, "group_size": group_size, "act_order": act_order}
        found = solved(W, drifted_hessian(x0, x, weights), **settings)
        other = plain(W, x, weights, **settings)
        errors = [
            float(output_error(W, linear.weight(), x0, x, weights).sum())
            for linear in (found, other)
        ]
        assert errors[0] < errors[1], (seed, drift)


@either_order
@pytest.mark.parametrize("sweeps", [0, 5])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_error_and_power_are_those_of_the_outputs(act_order, sweeps, strength):
    """With inputs that are zero in one of the two models, or in both."""
    x0, x = drifted_inputs(WINDOWS, TOKENS, K)
    x[..., DEAD] = 0
    x0[..., DEAD[0]] = 0
    x0[..., 5] = 0
    W, weights = random_weight(N, K).float(), token_weights()
    linear = solved(
        W, drifted_hessian(x0, x, weights),
        act_order=act_order, refine_sweeps=sweeps, target_strength=strength,
    )  # fmt: skip
    assert linear.dead_columns == len(DEAD)
    power = output_error(W, torch.zeros_like(W), x0, x, weights)
    torch.testing.assert_close(linear.power, power, rtol=1e-4, atol=1e-6 * float(power.max()))
    error = output_error(W, linear.weight(), x0, x, weights)
    torch.testing.assert_close(linear.error, error, rtol=1e-3, atol=1e-6 * float(power.max()))
    assert linear.relative_error() == pytest.approx(float(error.sum() / power.sum()), rel=1e-4)


@either_order
@either_weighting
def test_with_equal_inputs_it_is_the_plain_target_to_the_bit(act_order, weighted):
    _, x = drifted_inputs(WINDOWS, TOKENS, K)
    W, weights = random_weight(N, K).float(), token_weights() if weighted else None
    expected = plain(W, x, weights, act_order=act_order)
    assert_same(solved(W, drifted_hessian(x, x, weights), act_order=act_order), expected)
    # And where the sums are not skipped, but zero.
    solver, H = SOLVERS["gptq"](SolverSettings(act_order=act_order)), Hessian(K)
    H.add_batch(x.float(), weights)
    zero = torch.zeros(K, K)
    grid = UniformGrid(3, True, torch.bfloat16)
    found = solver.solve(W, solver.prepare(H.matrix()), grid, 32, Target.of(W, zero, zero))
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)


def test_a_strength_of_zero_leaves_codes_and_measures_against_the_16_bit_output():
    x0, x = drifted_inputs(WINDOWS, TOKENS, K)
    W = random_weight(N, K).float()
    found = solved(W, drifted_hessian(x0, x), settle=False, target_strength=0.0)
    expected = plain(W, x, settle=False)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert float(found.error.sum()) > 1.1 * float(expected.error.sum())


def test_the_stronger_the_correction_the_smaller_the_error_on_its_own_data():
    x0, x = drifted_inputs(WINDOWS, TOKENS, K)
    W = random_weight(N, K).float()
    errors = [
        float(solved(W, drifted_hessian(x0, x), target_strength=s).error.sum())
        for s in (0.0, 0.3, 0.6, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
def test_without_a_grid_to_speak_of_the_error_is_the_part_that_no_weight_can_reach(weighted):
    """8 bits in small groups, little damping: the closed form of weighted least squares."""
    x0, x = drifted_inputs(WINDOWS, 200, K, drift=0.3)
    W, weights = random_weight(N, K).float(), token_weights(tokens=200) if weighted else None
    linear = solved(
        W, drifted_hessian(x0, x, weights), UniformGrid(8, False, torch.float32), damping=1e-7
    )
    root = torch.ones(WINDOWS, 200) if weights is None else weights.sqrt()
    rows, rows0 = ((t * root.unsqueeze(-1)).reshape(-1, K).double() for t in (x, x0))
    best = torch.linalg.lstsq(rows, rows0 @ W.T.double()).solution.T  # W C H^-1
    least = output_error(W, best, x0, x, weights)
    torch.testing.assert_close(linear.error, least, rtol=0.02, atol=0)
    assert float(linear.error.sum()) < 0.1 * float(output_error(W, W, x0, x, weights).sum())
    outputs = best @ rows.T
    off = (linear.weight().double() @ rows.T - outputs).square().sum() / outputs.square().sum()
    assert off < 1e-3


def test_a_linear_change_of_the_inputs_is_undone():
    """x = A x0 carries all that x0 does: W' = W A^-1 gives the 16-bit output again."""
    x0, _ = drifted_inputs(WINDOWS, 200, K)
    draw = torch.Generator().manual_seed(0)
    A = torch.eye(K, dtype=torch.float64)
    A += 0.3 / K**0.5 * torch.randn(K, K, generator=draw, dtype=torch.float64)
    W = random_weight(N, K).float()
    x = x0 @ A.T
    linear = solved(W, drifted_hessian(x0, x), UniformGrid(8, False, torch.float32), damping=1e-7)
    assert linear.relative_error() < 1e-3
    assert float(output_error(W, W, x0, x).sum() / linear.power.sum()) > 0.03


def test_rounding_to_nearest_takes_over_where_it_is_nearer_to_the_16_bit_output():
    x0, x = drifted_inputs(WINDOWS, TOKENS, K)
    W, H = random_weight(N, K).float(), drifted_hessian(x0, x)
    target = Target.of(W, *H.take_drift())
    solver, grid = SOLVERS["gptq"](SolverSettings()), UniformGrid(3, True, torch.bfloat16)
    statistics = solver.prepare(H.matrix())
    good = solver.solve(W, statistics, grid, 32, target)
    other = solver.alternative(W, statistics, grid, 32, target)
    assert settled(good, other) is good
    bad = solver.solve(W, statistics, grid, 32, Target(-20 * target.cross, target.rest))
    bad.error = output_error(W, bad.weight(), x0, x)
    kept = settled(bad, other)
    assert kept.rounded
    expected = output_error(W, kept.weight(), x0, x)
    torch.testing.assert_close(kept.error, expected, rtol=1e-3, atol=0)
    assert expected.sum() < bad.error.sum()


def test_rows_solved_some_at_a_time_are_those_of_all(monkeypatch):
    x0, x = drifted_inputs(WINDOWS, TOKENS, K)
    W = random_weight(70, K).double()  # where another shape of a product cannot flip a code
    whole = solved(W, drifted_hessian(x0, x))
    monkeypatch.setattr(solvers, "LEAST_ROWS", 1)
    monkeypatch.setattr(solvers, "WEIGHTS_AT_A_TIME", {"cpu": 16 * K})
    parts = solved(W, drifted_hessian(x0, x))
    assert (parts.codes != whole.codes).float().mean() < 0.01
    torch.testing.assert_close(parts.error, whole.error, rtol=0.1, atol=0)
    assert parts.error.sum() == pytest.approx(float(whole.error.sum()), rel=0.01)


@pytest.mark.parametrize(
    "schemes",
    [{"q": Scheme(3, 32, True)}, {"q": Scheme(3, 32, True), "k": Scheme(4, None, False)}],
    ids=["one of two", "two schemes"],
)
def test_each_linear_of_a_group_has_its_own_target(schemes):
    x0, x = drifted_inputs(WINDOWS, TOKENS, K)
    layer = nn.Module()
    before = {name: random_weight(N + 8 * i, K, i).float() for i, name in enumerate("qk")}
    for name, W in before.items():
        linear = nn.Linear(*W.T.shape, bias=False)
        linear.weight = nn.Parameter(W, requires_grad=False)
        layer.add_module(name, linear)
    H = drifted_hessian(x0, x)
    found = solve_group(layer, schemes, SOLVERS["gptq"](SolverSettings()), H, torch.bfloat16)
    assert found.keys() == schemes.keys()
    for name, linear in found.items():
        expected = output_error(before[name], layer.get_submodule(name).weight, x0, x)
        torch.testing.assert_close(linear.error, expected, rtol=1e-3, atol=0)
        scheme = schemes[name]
        grid = UniformGrid(scheme.bits, scheme.symmetric, torch.bfloat16)
        other = plain(before[name], x, grid=grid, group_size=scheme.group_size)
        assert expected.sum() < output_error(before[name], other.weight(), x0, x).sum()


def test_stacked_linears_of_one_scheme_are_solved_as_each_on_its_own():
    x0, x = drifted_inputs(WINDOWS, TOKENS, K)
    layer = nn.Module()
    before = {name: random_weight(N + 8 * i, K, i).float() for i, name in enumerate("qkv")}
    for name, W in before.items():
        linear = nn.Linear(*W.T.shape, bias=False)
        linear.weight = nn.Parameter(W, requires_grad=False)
        layer.add_module(name, linear)
    schemes = dict.fromkeys(before, Scheme(3, 32, True))
    solver = SOLVERS["gptq"](SolverSettings())
    found = solve_group(layer, schemes, solver, drifted_hessian(x0, x), torch.bfloat16)
    for name, linear in found.items():
        expected = output_error(before[name], linear.weight(), x0, x)
        torch.testing.assert_close(linear.error, expected, rtol=1e-3, atol=0)
        alone = solved(before[name], drifted_hessian(x0, x))
        assert linear.error.sum() == pytest.approx(float(alone.error.sum()), rel=0.05)
