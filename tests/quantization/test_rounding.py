"""Rounding in order against a plain double loop over Python floats; the quadratic form."""

import pytest
import torch

from compress.quantization.rounding import RUN, quadratic, round_in_order
from support.small_linears import correlated_inputs, second_moment

SIZES = (1, 2, RUN - 1, RUN, RUN + 1, 2 * RUN, 3 * RUN + 5)
N = 5


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def one_by_one(base, coupling, low, high, scale=None):
    """The definition: x_j = clamp(round(base_j - sum_{i<j} U_ij x_i)), for each output alone."""
    B, outputs = base.shape
    low, high = (torch.as_tensor(b).expand(B, outputs).tolist() for b in (low, high))
    steps = torch.ones_like(base) if scale is None else scale
    x = torch.zeros_like(base)
    for n in range(outputs):
        for j in range(B):
            wanted = float(base[j, n]) - sum(float(coupling[j, i] * x[i, n]) for i in range(j))
            level = round(wanted / float(steps[j, n]))
            x[j, n] = min(max(level, low[j][n]), high[j][n]) * steps[j, n]
    return x


def bounds_of(kind, B):
    """Bounds of each shape that is allowed; where they are tensors, no two outputs share one."""
    if kind == "number":
        return -4, 3
    low = -torch.arange(1.0, N + 1).double()
    if kind == "outputs":
        return low, low + 7
    low = low - torch.arange(B).remainder(3)[:, None]
    return low, low + 7


@pytest.mark.parametrize("B", SIZES)
@pytest.mark.parametrize("kind", ["number", "outputs", "columns"])
@pytest.mark.parametrize("scaled", [False, True])
def test_it_is_the_double_loop(B, kind, scaled):
    scale = drawn(B, N, seed=2).exp() if scaled else None
    base = 3 * drawn(B, N) * (1 if scale is None else scale)
    coupling = drawn(B, B, seed=1) / B**0.5
    low, high = bounds_of(kind, B)
    expected = one_by_one(base, coupling, low, high, scale)
    found = round_in_order(base, coupling, low, high, scale)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert found is base


@pytest.mark.parametrize("B", SIZES)
def test_only_links_to_earlier_columns_are_read(B):
    base, coupling = 3 * drawn(B, N), drawn(B, B, seed=1) / B**0.5
    expected = one_by_one(base, coupling, -4, 3)
    later = torch.ones(B, B, dtype=torch.bool).triu()
    found = round_in_order(base, coupling.masked_fill(later, torch.nan), -4, 3)
    assert torch.equal(found, expected)


def test_a_transposed_coupling_is_read_as_it_stands():
    base, coupling = 3 * drawn(20, N), drawn(20, 20, seed=1).T / 20**0.5
    assert not coupling.is_contiguous()
    expected = one_by_one(base, coupling, -4, 3)
    assert torch.equal(round_in_order(base, coupling, -4, 3), expected)


def test_without_links_it_rounds_to_nearest_even():
    base = torch.tensor([[-9.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 9.0]]).repeat(20, 1)
    found = round_in_order(base.clone(), torch.zeros(20, 20), -4, 3)
    assert torch.equal(found, base.round().clamp(-4, 3))
    assert found[0].tolist() == [-4, -2, -2, 0, 0, 2, 2, 3]


def test_outputs_do_not_know_of_one_another():
    coupling = drawn(40, 40, seed=1) / 40**0.5
    whole = round_in_order(3 * drawn(40, N), coupling, -4, 3)
    alone = [round_in_order(3 * drawn(40, N)[:, n : n + 1], coupling, -4, 3) for n in range(N)]
    assert torch.equal(whole, torch.cat(alone, dim=1))


@pytest.mark.parametrize("block", [1, 7, 20, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_quadratic_form_is_the_diagonal_of_the_product(block, dtype):
    H = second_moment(correlated_inputs(2, 30, 20)).to(dtype)
    A = drawn(20, N).to(dtype)
    before = A.clone()
    expected = (A.double().T @ H.double() @ A.double()).diagonal()
    found = quadratic(H, A, block)
    assert found.dtype == torch.float64
    tolerance = 20 * torch.finfo(dtype).eps * float(expected.max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert torch.equal(A, before)
