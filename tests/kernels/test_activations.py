"""Rounded activations on a CPU: nearest steps, exact products, and nothing taken for another."""

import math
from dataclasses import replace

import pytest
import torch

from compress.kernels.activations import integer_matmul, quantize_tokens
from compress.kernels.cpu import native
from compress.kernels.cpu.products import cpu_matmul, pack_cpu, pack_integers
from compress.kernels.reference import dequantize, reference_matmul
from support.hadamard import reference_hadamard
from support.weights import random_weight, relative_error

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
compiled = pytest.mark.skipif(native.kernels() is None, reason="no compiled kernels")


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


def test_a_weight_for_other_activations_is_refused():
    weight = random_weight(16, 64, 4, 32)
    with pytest.raises(ValueError, match="packed for activations in int8"):
        cpu_matmul(torch.zeros(1, 64), pack_integers(weight))
    values = torch.zeros(1, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match="packed for activations in floats"):
        integer_matmul(values, torch.ones(1), pack_cpu(weight, torch.float32))
    packed, scale = pack_integers(weight), torch.ones(1)
    with pytest.raises(ValueError, match="expected values on cpu, found meta"):
        integer_matmul(values.to("meta"), scale, packed)
    with pytest.raises(ValueError, match="expected scales on cpu, found meta"):
        integer_matmul(values, scale.to("meta"), packed)
    for other in (torch.ones(2), torch.ones(1).half()):
        with pytest.raises(ValueError, match=r"fp32 scale for each token \[1\], found"):
            integer_matmul(values, other, packed)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "full_range"), [(4, False), (4, True), (8, True)])
def test_compiled_rounding_is_that_of_torch_to_the_bit(dtype, bits, full_range, request):
    x = torch.randn(40, 333)
    x[0] = 0
    x[1] *= 1e-6  # subnormal in fp16
    x[2, 5] = 3e4
    x = x.to(dtype)
    x[3, 7], x[4, 7] = math.inf, math.nan
    found = quantize_tokens(x, bits, full_range=full_range)
    request.getfixturevalue("uncompiled")
    expected = quantize_tokens(x, bits, full_range=full_range)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].nan_to_num(7, 8), expected[1].nan_to_num(7, 8))
    assert math.isinf(found[1][3])
    assert math.isnan(found[1][4])


def test_rows_that_do_not_follow_each_other_are_rounded_alike():
    wide = torch.randn(5, 80)
    for x in (wide[:, 3:70], wide.T, wide[:, ::2], wide[:1].expand(5, 80)):
        for found, expected in zip(
            quantize_tokens(x, 8),
            quantize_tokens(x.clone(memory_format=torch.contiguous_format), 8),
            strict=True,
        ):
            assert torch.equal(found, expected)


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
