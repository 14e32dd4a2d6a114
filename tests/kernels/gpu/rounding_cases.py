"""Rounding in order by the kernel against torch, step by step: on the GPU, or interpreted.

No test file by name: `test_triton.py` runs it, as it does `triton_cases.py`.
"""

import math

import pytest
import torch

from compress.kernels.gpu.matmul import interpreted
from compress.kernels.gpu.rounding import RUN, round_rows_
from compress.quantization.gptq import column_loop
from compress.quantization.grid import UniformGrid
from compress.quantization.hessian import factor
from compress.quantization.refine import refine
from compress.quantization.rounding import quadratic, round_eagerly, round_in_order
from support.small_linears import correlated_inputs, second_moment

DEVICE = "cpu" if interpreted() else "cuda"
# The interpreter takes a second for a program of 40 rows and ten for one of 128.
BLOCKS = [1, 8, RUN - 1, RUN, RUN + 1, 24, 40] + ([] if interpreted() else [100, 128])
LONG = [(129, "numbers"), (256, "columns")] + ([] if interpreted() else [(300, "outputs")])
OUTPUTS = [1, 33]
KINDS = ["numbers", "outputs", "columns", "a number and columns"]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bounds_of(kind, B, N):
    """Of 3 bits; where they are tensors, no two outputs share one."""
    if kind == "numbers":
        return -4, 3
    low = -torch.arange(N).remainder(8).float()
    if kind == "outputs":
        return low, low + 7
    low = low - torch.arange(B).remainder(3)[:, None]
    return (-4, low.abs()) if kind == "a number and columns" else (low, low + 7)


def on_device(*given):
    return (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in given)


def both(base, coupling, low, high, scale=None, rounded=round_rows_):
    """By the kernel, and step by step on the CPU."""
    low_high = (low, high)
    if not all(isinstance(bound, torch.Tensor) for bound in low_high):
        low_high = [
            torch.full(base.shape, float(b)) if not isinstance(b, torch.Tensor) else b
            for b in low_high
        ]
    expected = round_eagerly(base.clone(), coupling, *low_high, scale)
    given = base.clone().to(DEVICE)
    found = rounded(given, *on_device(coupling, low, high, scale))
    assert found is given
    return found.cpu(), expected


def whole_numbers(B, N):
    """A problem whose sums are exact in any order: quarters, and links that are integers."""
    generator = torch.Generator().manual_seed(B + N)
    base = torch.randint(-40, 41, (B, N), generator=generator) / 4
    return base, torch.randint(-2, 3, (B, B), generator=generator).float()


@pytest.mark.parametrize("B", BLOCKS)
@pytest.mark.parametrize("N", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_sums_give_the_same_levels(B, N, kind):
    found, expected = both(*whole_numbers(B, N), *bounds_of(kind, B, N))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("B", [8, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_differ_in_scale(B, kind):
    """Scales are powers of two: nothing is rounded but to levels."""
    base, coupling = whole_numbers(B, 33)
    scale = 2.0 ** torch.randint(-2, 3, base.shape, generator=torch.Generator().manual_seed(1))
    found, expected = both(base, coupling, *bounds_of(kind, B, 33), scale)
    assert torch.equal(found, expected)
    assert not torch.equal(found, both(base, coupling, *bounds_of(kind, B, 33))[1])


def test_division_by_a_scale_is_rounded_as_torch_does():
    scale = drawn(16, 33, seed=2).exp()
    base = scale * (torch.arange(33) - 16 + 0.5)  # next to ties, where the last bit decides
    found, expected = both(base, torch.zeros(16, 16), -16, 15, scale)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("B", "kind"), LONG)
def test_more_columns_than_one_launch_takes(B, kind):
    found, expected = both(*whole_numbers(B, 5), *bounds_of(kind, B, 5), rounded=round_in_order)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [8, 24, 128, 256])
def test_real_links_change_few_levels_and_no_error(size):
    """GPTQ's own recursion: another order of the sums moves a level next to a tie, and those after
    it make up for that."""
    H = second_moment(correlated_inputs(2, 300, size)).float()
    R, _ = factor(H, 0.01)
    coupling = (R / R.diagonal()).T
    W = drawn(size, 40, seed=size)
    base = coupling @ W * 3
    found, expected = both(base, coupling, -4, 3, rounded=round_in_order)
    assert (found != expected).float().mean() < 0.02
    mine, torchs = (float(quadratic(H, W - x / 3).sum()) for x in (found, expected))
    assert mine == pytest.approx(torchs, rel=1e-3)


def test_a_nan_stays_one_and_in_its_output():
    base, coupling = 3 * drawn(40, 33), drawn(40, 40, seed=1) / 40**0.5
    base[20, 5] = math.nan
    found, _ = both(base, coupling, -4, 3)
    clean, _ = both(base.nan_to_num(0.0), coupling, -4, 3)
    assert found[20:, 5].isnan().all()
    others = torch.arange(33) != 5
    assert torch.equal(found[:, others], clean[:, others])
    assert torch.equal(found[:20, 5], clean[:20, 5])


def test_links_to_later_columns_are_not_read():
    base, coupling = whole_numbers(40, 5)
    later = torch.ones(40, 40, dtype=torch.bool).triu()
    found, _ = both(base, coupling.masked_fill(later, math.nan), -4, 3)
    assert torch.equal(found, both(base, coupling, -4, 3)[1])


def test_half_goes_to_even_and_all_else_to_its_bound():
    given = [-math.inf, -1e30, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.0**22, 3e38, math.inf]
    found, expected = both(torch.tensor([given]), torch.zeros(1, 1), -4, 3)
    assert torch.equal(found, expected)
    assert found.tolist() == [[-4, -4, -2, -2, 0, 0, 2, 2, 3, 3, 3]]


def test_views_of_a_larger_coupling_and_bounds():
    base, coupling = whole_numbers(24, 5)
    wide = torch.full((40, 50), math.nan)
    wide[8:32, 9:33] = coupling
    low, high = bounds_of("columns", 24, 5)
    found, _ = both(base, wide[8:32, 9:33], low.T.contiguous().T, high)
    assert torch.equal(found, both(base, coupling, low, high)[1])
    assert torch.equal(both(base, coupling.T.contiguous().T, low, high)[0], found)


def test_no_outputs_and_no_columns():
    for B, N in ((0, 3), (3, 0)):
        base = torch.zeros(B, N, device=DEVICE)
        assert round_rows_(base, torch.zeros(B, B, device=DEVICE), -4, 3) is base


@pytest.mark.parametrize(("group_size", "order"), [(32, False), (None, False), (32, True)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_column_loop_and_the_sweeps_run_by_it(group_size, order, symmetric, monkeypatch):
    """A whole linear: as good as with torch's steps, and hardly another."""
    H = second_moment(correlated_inputs(2, 300, 96)).float()
    taken = torch.randperm(96, generator=torch.Generator().manual_seed(0)) if order else None
    R, _ = factor(H if taken is None else H[taken][:, taken], 0.01)
    grid, W = UniformGrid(3, symmetric), drawn(96, 40, seed=3)

    def solved(device):
        Wt, M, Hd = (x.to(device) for x in (W, R / R.diagonal(), H))
        at = None if taken is None else taken.to(device)
        found = column_loop(Wt, M, grid, group_size, "hessian", Hd.diagonal(), at)
        refine(found, Wt, Hd, grid, group_size, sweeps=2)
        return found.codes().cpu(), (Wt - found.dequantised()).cpu()

    codes, E = solved(DEVICE)
    for module in ("gptq", "refine"):
        monkeypatch.setattr(f"compress.quantization.{module}.round_in_order", round_eagerly)
    eager_codes, eager_E = solved("cpu")
    assert (codes != eager_codes).float().mean() < 0.05
    mine, torchs = (float(quadratic(H, each).sum()) for each in (E, eager_E))
    assert mine == pytest.approx(torchs, rel=1e-2)


def test_what_it_would_get_wrong_is_refused():
    base, coupling = torch.zeros(4, 6, device=DEVICE), torch.zeros(4, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"base in fp32, found torch\.float64"):
        round_rows_(base.double(), coupling, -4, 3)
    with pytest.raises(ValueError, match=r"coupling in fp32, found torch\.float16"):
        round_rows_(base, coupling.half(), -4, 3)
    with pytest.raises(ValueError, match="contiguous base"):
        round_rows_(base[:, ::2], coupling, -4, 3)
