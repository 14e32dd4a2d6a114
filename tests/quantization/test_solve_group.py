"""The linears of one input solved together, against each of them solved on its own."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from compress.quantization import solvers
from compress.quantization.grid import UniformGrid
from compress.quantization.hessian import Hessian
from compress.quantization.layer import solve_group
from compress.quantization.solvers import SOLVERS, SolverSettings
from compress.scheme import Scheme
from support.small_linears import correlated_inputs, random_weight

K = 64
OUTPUTS = {"q": 24, "k": 8, "v": 8}  # grouped queries
GROUP = tuple(OUTPUTS)
THREE, FOUR = Scheme(3, 32, True), Scheme(4, None, False)
SCHEMES = {
    "one scheme": dict.fromkeys(GROUP, THREE),
    "two schemes": {"q": THREE, "k": FOUR, "v": THREE},
    "one left out": {"q": FOUR, "k": None, "v": FOUR},
}

each_solver = pytest.mark.parametrize("method", ["gptq", "rtn"])


@pytest.fixture
def layer() -> nn.Module:
    """In fp64, where another shape of a product cannot flip a code."""
    layer = nn.Module()
    for seed, (name, outputs) in enumerate(OUTPUTS.items()):
        linear = nn.Linear(K, outputs, bias=False, dtype=torch.float64)
        linear.weight = nn.Parameter(random_weight(outputs, K, seed), requires_grad=False)
        layer.add_module(name, linear)
    return layer


def hessian() -> Hessian:
    statistics = Hessian(K)
    statistics.add_batch(correlated_inputs(4, 40, K).float())
    return statistics


def solver_of(method, sweeps=1):
    return SOLVERS[method](SolverSettings(refine_sweeps=sweeps))


def statistics_for(method):
    return hessian() if method == "gptq" else None


def quantised(schemes):
    return {name: schemes[name] for name in GROUP if schemes[name]}


@each_solver
@pytest.mark.parametrize("schemes", SCHEMES)
def test_together_is_each_on_its_own(layer, method, schemes):
    schemes, solver = SCHEMES[schemes], solver_of(method)
    before = copy.deepcopy(layer)
    found = solve_group(layer, quantised(schemes), solver, statistics_for(method), torch.bfloat16)
    assert set(found) == {name for name in GROUP if schemes[name]}
    for name, linear in found.items():
        grid = UniformGrid(schemes[name].bits, schemes[name].symmetric, torch.bfloat16)
        statistics = solver.prepare(hessian().matrix()) if method == "gptq" else None
        W = getattr(before, name).weight
        alone = solver.solve(W, statistics, grid, schemes[name].group_size)
        assert torch.equal(linear.codes, alone.codes)
        assert torch.equal(linear.scale, alone.scale)
        assert (linear.zero is None) == schemes[name].symmetric
        if linear.zero is not None:
            assert torch.equal(linear.zero, alone.zero)
        expected = alone.relative_error()
        assert linear.relative_error() == (expected and pytest.approx(expected, rel=1e-6))


@each_solver
@pytest.mark.parametrize("schemes", SCHEMES)
def test_the_layer_goes_on_with_what_a_checkpoint_would_give_it(layer, method, schemes):
    before = {name: getattr(layer, name).weight for name in GROUP}
    arguments = solver_of(method), statistics_for(method), torch.bfloat16
    found = solve_group(layer, quantised(SCHEMES[schemes]), *arguments)
    for name in GROUP:
        weight = getattr(layer, name).weight
        if name not in found:
            assert weight is before[name]
        else:
            assert torch.equal(weight, found[name].weight())
            assert not weight.requires_grad


def test_where_nothing_is_quantised_nothing_is_done(layer):
    """The Hessian is not even put together."""
    before, H = copy.deepcopy(layer), hessian()
    assert solve_group(layer, {}, solver_of("gptq"), H, torch.float32) == {}
    assert all(map(torch.equal, layer.parameters(), before.parameters()))
    assert H.matrix().any()


def test_what_the_others_are_does_not_matter(layer):
    """The codes of one linear, whatever the schemes of the two that share its input."""
    codes = []
    for k, v in product((THREE, FOUR, None), repeat=2):
        schemes = {"q": THREE, "k": k, "v": v}
        arguments = quantised(schemes), solver_of("gptq"), hessian(), torch.bfloat16
        codes.append(solve_group(copy.deepcopy(layer), *arguments)["q"].codes)
    assert all(torch.equal(found, codes[0]) for found in codes)


def test_a_solution_worse_than_rounding_to_nearest_gives_way_to_it(layer, monkeypatch):
    """Whatever makes it worse: here the column loop is made to count down one level too far."""
    before, solver = copy.deepcopy(layer), solver_of("gptq", sweeps=0)
    healthy = solve_group(layer, {"q": FOUR}, solver, hessian(), torch.bfloat16)["q"]
    assert not healthy.rounded
    loop = solvers.column_loop

    def worse(*args, **kwargs):
        found = loop(*args, **kwargs)
        found.x.sub_(1).clamp_(min=-8)
        found.error = None
        return found

    monkeypatch.setattr(solvers, "column_loop", worse)
    schemes = {"q": FOUR, "k": FOUR}
    found = solve_group(copy.deepcopy(before), schemes, solver, hessian(), torch.bfloat16)
    nearest = solve_group(copy.deepcopy(before), schemes, solver_of("rtn"), None, torch.bfloat16)
    H = hessian().matrix()
    for name, linear in found.items():
        assert linear.rounded
        for part in ("codes", "scale"):
            assert torch.equal(getattr(linear, part), getattr(nearest[name], part))
        E = (getattr(before, name).weight - linear.weight()).double()
        expected = float(((E @ H.double()) * E).sum())
        assert float(linear.error.sum()) == pytest.approx(expected, rel=1e-3)
        assert linear.relative_error() > healthy.relative_error()
