"""4-bit activations on a CPU: nearest steps, exact integer sums, and the same as on a GPU."""

import math

import pytest
import torch
from weights import random_weight, relative_error

from compress.kernels.activations import (
    integer_matmul,
    pack_integers,
    quantize_tokens,
)
from compress.kernels.reference import (
    dequantize,
    reference_hadamard,
    reference_matmul,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def signs(order):
    generator = torch.Generator().manual_seed(order)
    return torch.randint(0, 2, (order, order), generator=generator).float() * 2 - 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("power", "orders"), [(1, None), (64, ()), (16, (12,)), (8, (3, 4))])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tokens_are_rounded_to_the_nearest_step(power, orders, bits, dtype):
    n = 200 if orders is None else power * math.prod(orders)
    factors = None if orders is None else tuple(signs(order) for order in orders)
    x = torch.randn(2, 3, n).to(dtype)
    x[0, 1] = 0
    values, scale = quantize_tokens(x, bits, factors)
    assert (values.shape, scale.shape) == (x.shape, x.shape[:-1])
    rotated = x.double() if factors is None else reference_hadamard(x, factors)
    largest = 2 ** (bits - 1) - 1
    assert torch.equal(values.abs().amax(-1) == largest, x.abs().amax(-1) > 0)
    error = (values.double() * scale.double()[..., None] - rotated).abs()
    assert bool((error <= scale.double()[..., None] * 0.5 + 1e-5).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("M", [1, 5, 40])
def test_integer_products(bits, group_size, symmetric, M):
    weight = random_weight(24, 200, bits, group_size, symmetric, torch.float32)
    if bits == 8 and not symmetric:
        with pytest.raises(ValueError, match="8-bit weights without zero points"):
            pack_integers(weight)
        return
    values = torch.randint(-7, 8, (M, 200), dtype=torch.int8)
    scale, bias = torch.rand(M), torch.randn(24)
    y = integer_matmul(values, scale, pack_integers(weight), bias, torch.float32)
    expected = reference_matmul(values.double() * scale.double()[:, None], weight, bias)
    assert relative_error(y, expected) < 5e-7


def test_a_rotation_of_both_sides_changes_only_the_rounding():
    """x W^T = (x M^T)(W M^T)^T, and M spreads an outlier that would cost plain 4 bits dearly."""
    generator = torch.Generator().manual_seed(0)
    weight = random_weight(32, 256, 8, None, dtype=torch.float32)
    x = torch.randn(16, 256, generator=generator)
    x[:, 7] *= 40
    W = dequantize(weight)
    expected, errors = x.double() @ W.T, []
    for factors in (None, ()):
        side = W if factors is None else reference_hadamard(W)
        values, scale = quantize_tokens(x, 4, factors)
        errors.append(relative_error((values * scale[:, None]).double() @ side.T, expected))
    assert errors[1] < errors[0] / 2


def test_act_order_permutes_tokens():
    from dataclasses import replace

    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    weight = replace(random_weight(16, 64, 4, 32, dtype=torch.float32), order=order)
    values = torch.randint(-7, 8, (2, 64), dtype=torch.int8)
    y = integer_matmul(values, torch.ones(2), pack_integers(weight), dtype=torch.float32)
    assert relative_error(y, reference_matmul(values, weight)) < 5e-7


def test_torch_compile_takes_both_operators():
    weight = pack_integers(random_weight(16, 64, 4, 32, dtype=torch.bfloat16))

    def product(x):
        return integer_matmul(*quantize_tokens(x, 4, ()), weight, dtype=x.dtype)

    x = torch.randn(2, 3, 64).bfloat16()
    assert torch.equal(torch.compile(product, backend="eager", fullgraph=True)(x), product(x))


def test_wrong_widths_and_sizes_are_refused():
    with pytest.raises(ValueError, match="2 to 8 bits, found 9"):
        quantize_tokens(torch.zeros(1, 8), 9)
    with pytest.raises(ValueError, match=r"size 24 expected factors .* found orders \[\]"):
        quantize_tokens(torch.zeros(1, 24), 4, ())
    weight = pack_integers(random_weight(16, 64))
    with pytest.raises(ValueError, match=r"expected int8 activations of 64 features, found"):
        integer_matmul(torch.zeros(1, 32, dtype=torch.int8), torch.ones(1), weight)
