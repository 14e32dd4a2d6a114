"""The Triton kernels against the fp64 reference: on the GPU, or in the interpreter on the CPU.

No test file by name: `test_triton.py` runs it in a process of its own, since TRITON_INTERPRET is
read when triton is imported.
"""

import math
from dataclasses import replace

import pytest
import torch

from compress.kernels.activations import integer_matmul, quantize_tokens
from compress.kernels.gpu import tuning
from compress.kernels.gpu.hadamard import hadamard_
from compress.kernels.gpu.integer_launch import tiled_integers
from compress.kernels.gpu.layout import pack_kernel
from compress.kernels.gpu.matmul import (
    EXACT_ROWS,
    FP32_TABLE,
    TABLE,
    Tiles,
    dense_matmul,
    dequantize_weight,
    device_name,
    interpreted,
    quantized_matmul,
    tiled_matmul,
    tiles_for,
)
from compress.kernels.gpu.occupancy import split_of
from compress.kernels.reference import dequantize, reference_matmul
from support.hadamard import reference_hadamard
from support.weights import random_weight

DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = [torch.float16, torch.float32] + ([] if interpreted() else [torch.bfloat16])
WIDTHS = [2, 3, 4, 8]
GROUPS = [32, 64, 128, None]
SPLITS = [1, 2]
# All of it on a GPU. The interpreter takes a tenth of a second for each: every value, not every
# combination.
SCHEMES = [
    (group, split, dtype)
    for g, group in enumerate(GROUPS)
    for s, split in enumerate(SPLITS)
    for d, dtype in enumerate(DTYPES)
    if not interpreted() or ((g + s) % 2 == 0 and (g // 2 + d) % 2 == 0)
]
FEW = Tiles(rows=8, block_m=8, block_n=64, warps=4, stages=2)
SMALL = Tiles(rows=16, block_m=16, block_n=32, warps=4, stages=2)
SCALED = Tiles(rows=128, block_m=128, block_n=32, warps=2, stages=2)


@pytest.fixture(autouse=interpreted())
def launches(monkeypatch):
    """Every launch in the interpreter is watched: bf16, which it computes as integers, fails."""
    from triton.runtime.interpreter import GridExecutor

    seen, launch = [], GridExecutor.__call__

    def watched(self, *args, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        assert not any(t.dtype == torch.bfloat16 for t in tensors), "bf16 in the interpreter"
        seen.append(len(tensors))
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", watched)
    return seen


def problem(M=1, N=40, K=200, bits=4, group_size=64, symmetric=True, dtype=torch.float16, **more):
    weight = random_weight(N, K, bits, group_size, symmetric, dtype, **more)
    generator = torch.Generator().manual_seed(M)
    x = torch.randn(M, K, generator=generator).to(dtype)
    bias = torch.randn(N, generator=generator).to(dtype)
    expected = reference_matmul(x, weight, bias)
    return x.to(DEVICE), pack_kernel(weight).to(DEVICE), bias.to(DEVICE), expected


def check(y, expected, x):
    """Off by no more than rounding of the result and of fp32 sums: both follow from dtypes."""
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    error = (y.double().cpu() - expected).abs()
    unit = torch.finfo(x.dtype).eps / 2
    spread = expected.abs().mean() * 2 ** -(23 - 5)  # fp32 sums of up to 256 terms
    assert bool((error <= expected.abs() * unit * 1.01 + spread).all()), float(error.max())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "split", "dtype"), SCHEMES)
def test_one_row(bits, group_size, symmetric, dtype, split):
    x, weight, bias, expected = problem(1, 24, 200, bits, group_size, symmetric, dtype)
    check(tiled_matmul(x, weight, bias, replace(FEW, split=split)), expected, x)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "split", "dtype"), SCHEMES)
def test_tiled_and_split(bits, group_size, symmetric, dtype, split):
    x, weight, bias, expected = problem(5, 24, 200, bits, group_size, symmetric, dtype)
    check(tiled_matmul(x, weight, bias, replace(SMALL, split=split)), expected, x)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [16, 24, 96, 256])
def test_groups_that_are_no_divisor_of_a_block(bits, group_size):
    x, weight, bias, expected = problem(3, 16, 256, bits, group_size, dtype=torch.float32)
    check(tiled_matmul(x, weight, bias, SMALL), expected, x)
    check(tiled_matmul(x[:1], weight, bias, FEW), expected[:1], x)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("split", [1, 2])
def test_second_block_of_the_widest_layouts(bits, split):
    """256 inputs to a block."""
    x, weight, bias, expected = problem(2, 16, 300, bits, 128, dtype=torch.float32)
    check(tiled_matmul(x, weight, bias, replace(SMALL, split=split)), expected, x)
    check(tiled_matmul(x[:1], weight, bias, replace(FEW, split=split)), expected[:1], x)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "split", "dtype"), SCHEMES)
def test_scales_on_the_weights(bits, group_size, symmetric, dtype, split):
    """As a dense product in the same dtype: each weight is rounded once, and sums are fp32."""
    x, weight, bias, expected = problem(70, 24, 200, bits, group_size, symmetric, dtype)
    if group_size is not None:
        dense = dequantize_weight(weight, dtype).cpu().double()
        expected = x.cpu().double() @ dense.T + bias.cpu().double()
    check(tiled_matmul(x, weight, bias, replace(SCALED, split=split)), expected, x)


def test_rows_and_not_tiles_decide_where_scales_go():
    """So that tuning changes no bit more than another order of sums does."""
    x, weight, bias, expected = problem(32, 16, 256, 4, 32)
    check(tiled_matmul(x, weight, bias, SCALED), expected, x)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [24, 96])
def test_scales_on_the_weights_of_odd_groups(bits, group_size):
    x, weight, bias, expected = problem(33, 16, 256, bits, group_size, dtype=torch.float32)
    check(tiled_matmul(x, weight, bias, SCALED), expected, x)


def test_a_wide_scale_is_not_rounded_before_the_weight():
    x, weight, bias, _ = problem(33, 24, 128, 4, 64)
    weight = replace(weight, scale=weight.scale.float() * 1.0003)
    dense = dequantize_weight(weight, x.dtype).cpu().double()
    expected = x.cpu().double() @ dense.T + bias.cpu().double()
    check(tiled_matmul(x, weight, bias, SCALED), expected, x)


@pytest.mark.parametrize("M", [17, 33])
def test_several_tiles_of_rows_and_outputs(M):
    x, weight, bias, expected = problem(M, 70, 64, 4, 32)
    if M > EXACT_ROWS:
        dense = dequantize_weight(weight, x.dtype).cpu().double()
        expected = x.cpu().double() @ dense.T + bias.cpu().double()
    check(tiled_matmul(x, weight, bias, SMALL), expected, x)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantising_rounds_once(bits, symmetric, dtype):
    weight = random_weight(40, 200, bits, 32, symmetric, dtype)
    dense = dequantize_weight(pack_kernel(weight).to(DEVICE), dtype).cpu()
    # (c - z) s is exact in fp32 for 16-bit scales, and rounded once for 32-bit ones
    assert torch.equal(dense, dequantize(weight).float().to(dtype))


def test_dense_product():
    x, weight, bias, expected = problem(4, dtype=torch.float32)
    check(dense_matmul(x, weight, bias), expected, x)
    check(dense_matmul(x, weight), expected - bias.double().cpu(), x)


@pytest.mark.parametrize("rows", [1, 2, 20])
def test_operator_without_bias_and_with_more_axes(rows):
    x, weight, bias, expected = problem(rows)
    y = quantized_matmul(x.view(1, rows, -1), weight)
    check(y.view(rows, -1), expected - bias.double().cpu(), x)


def test_operator_takes_rows_that_do_not_touch():
    x, weight, bias, expected = problem(3)
    wide = torch.full((3, 300), torch.nan, dtype=x.dtype, device=DEVICE)
    wide[:, :200] = x
    check(quantized_matmul(wide[:, :200], weight, bias), expected, x)


def test_operator_permutes_for_act_order():
    weight = random_weight(24, 96, 4, 32, dtype=torch.float32)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    weight = replace(weight, order=order)
    x = torch.randn(2, 96, device=DEVICE)
    y = quantized_matmul(x, pack_kernel(weight).to(DEVICE))
    check(y, reference_matmul(x.cpu(), weight), x)


def test_no_rows():
    x, weight, _, _ = problem(1)
    assert quantized_matmul(x[:0], weight).shape == (0, 40)


@pytest.mark.parametrize("rows", [1, 3])
def test_same_input_same_bits(rows):
    x, weight, bias, _ = problem(rows, 40, 256, 4, 32)
    tiles = replace(FEW if rows == 1 else SMALL, split=2)
    first, second = (tiled_matmul(x, weight, bias, tiles) for _ in range(2))
    assert torch.equal(first, second)


def test_operator_is_registered_as_torch_wants_it():
    x, weight, bias, _ = problem(2)
    arguments = (x, weight.words, weight.high, weight.scale, weight.zero, bias, 4, 64)
    torch.library.opcheck(
        torch.ops.modelpress.quantized_matmul.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_table_is_sorted_and_splits_fit():
    rows = [tiles.rows for tiles in TABLE]
    assert rows == sorted(rows)
    weight = pack_kernel(random_weight(8, 900, 4, 32))  # 8 blocks
    for held in (0, 3, 1000):
        for grid in (1, 2, 700):
            count = split_of(SMALL, grid, weight, held)
            assert 1 <= count <= 8
            assert count == 1 or grid * count <= held
            assert (count - 1) * math.ceil(8 / count) < 8  # no program without a block
    assert split_of(replace(SMALL, split=32), 1, weight, 0) == 8


def test_tuned_tiles_come_before_the_table(tmp_path, monkeypatch):
    x, weight, bias, expected = problem(3, 40, 200, 4, 64)
    assert tiles_for(x, weight) == TABLE[0]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned = replace(SMALL, rows=4, block_n=16)
    name = device_name(x.device)
    tuning.save({tuning.key(name, 40, 200, 4, 64, 4): tuned})
    assert tiles_for(x, weight) == tuned
    check(quantized_matmul(x, weight, bias), expected, x)
    assert tiles_for(x[:2], weight) == TABLE[0]
    assert tiles_for(x.float(), weight) == FP32_TABLE[0]
    tuning.forget()


@pytest.mark.skipif(not interpreted(), reason="the interpreter's own limit")
@pytest.mark.parametrize("which", ["x", "scale", "bias"])
def test_no_bf16_reaches_the_interpreter(which):
    x, weight, bias, _ = problem(2, dtype=torch.float32)
    if which == "x":
        x = x.bfloat16()
    elif which == "bias":
        bias = bias.bfloat16()
    else:
        weight = replace(weight, scale=weight.scale.bfloat16())
    with pytest.raises(ValueError, match="interpreter gets bf16 wrong"):
        quantized_matmul(x, weight, bias)


@pytest.mark.skipif(not interpreted(), reason="the interpreter's own limit")
def test_the_watch_sees_every_kernel_that_is_launched(launches):
    x, weight, bias, _ = problem(1, dtype=torch.float32)
    tiled_matmul(x, weight, bias, replace(FEW, split=1))
    assert launches == [5]  # x, words, scale, bias, out
    for launch in (
        lambda: tiled_matmul(x.bfloat16(), weight, bias, FEW),
        lambda: tiled_matmul(x, weight, bias.bfloat16(), SMALL),
        lambda: dequantize_weight(weight, torch.bfloat16),
    ):
        with pytest.raises(AssertionError, match="bf16 in the interpreter"):
            launch()
    assert launches == [5]


def test_wrong_activations_are_refused():
    x, weight, _, _ = problem(1)
    with pytest.raises(ValueError, match="expected activations of 200 features, found"):
        quantized_matmul(x[:, :100], weight)
    with pytest.raises(ValueError, match=r"found torch\.float64"):
        quantized_matmul(x.double(), weight)


# ---- Hadamard -----------------------------------------------------------------------------------


def orthogonal(order):
    """A +-1 matrix [order, order], not symmetric; any will do to test a product."""
    generator = torch.Generator().manual_seed(order)
    return torch.randint(0, 2, (order, order), generator=generator).float() * 2 - 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("power", "orders"), [(2, ()), (64, ()), (256, ()), (16, (12,)), (1, (20,)), (4, (3, 12))]
)
def test_hadamard(power, orders, dtype):
    n = power * math.prod(orders)
    factors = tuple(orthogonal(order).to(DEVICE) for order in orders)
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    expected = reference_hadamard(x, tuple(f.cpu() for f in factors))
    y = x.to(DEVICE)
    assert hadamard_(y, factors).data_ptr() == y.data_ptr()
    passes = len(orders) + 1
    tolerance = passes * 4 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert float((y.double().cpu() - expected).abs().max()) <= tolerance


@pytest.mark.parametrize("size", [64, 192, 336])
def test_hadamard_is_the_rotation_that_was_fused(size):
    rotation = pytest.importorskip("compress.rotation.hadamard")
    transform = rotation.HadamardTransform(size)
    orders = [order for order in transform.factors if order & (order - 1)]
    factors = tuple(rotation.hadamard_matrix(order).to(DEVICE) for order in orders)
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(size))
    expected = transform.apply(x)  # before x is overwritten
    assert torch.allclose(hadamard_(x.to(DEVICE), factors).cpu(), expected, atol=1e-5)


def test_hadamard_twice_is_the_identity():
    x = torch.randn(2, 128, device=DEVICE)
    assert torch.allclose(hadamard_(hadamard_(x.clone())), x, atol=1e-6)


def test_hadamard_is_registered_as_torch_wants_it():
    torch.library.opcheck(
        torch.ops.modelpress.hadamard.default,
        (torch.randn(2, 48, device=DEVICE), [orthogonal(12).to(DEVICE)], True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_hadamard_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"size 24 expected factors .* found orders \[\]"):
        hadamard_(torch.zeros(2, 24, device=DEVICE))
    with pytest.raises(ValueError, match="contiguous"):
        hadamard_(torch.zeros(8, 2, device=DEVICE).T)


# ---- integer activations ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("power", "orders"), [(1, None), (64, ()), (16, (12,)), (8, (3, 4))])
@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_are_rounded_to_the_nearest_step(power, orders, bits, dtype):
    """|q a - h| is at most half a step, the largest value is L steps: no more can be asked."""
    n = 200 if orders is None else power * math.prod(orders)
    factors = None if orders is None else tuple(orthogonal(order).to(DEVICE) for order in orders)
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    x[1] = 0
    kept = x.to(DEVICE)
    values, scale = (t.cpu() for t in quantize_tokens(kept, bits, factors))
    assert torch.equal(kept.cpu(), x)  # not in place
    rotated = x.double()
    if factors is not None:
        rotated = reference_hadamard(x, tuple(f.cpu() for f in factors))
    largest = 2 ** (bits - 1) - 1
    assert values.dtype == torch.int8
    assert values.abs().amax(1).tolist() == [largest, 0, largest]
    # 16-bit values between two passes are rounded
    between = 4 * torch.finfo(dtype).eps * float(rotated.abs().max()) if orders else 1e-5
    assert scale == pytest.approx(rotated.abs().amax(1) / largest, abs=between / largest)
    error = (values.double() * scale.double()[:, None] - rotated).abs()
    assert bool((error <= scale.double()[:, None] * 0.5 + between).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_full_range_of_integers(bits):
    half = 2 ** (bits - 1)
    x = torch.randn(40, 200, generator=torch.Generator().manual_seed(bits))
    values, scale = (t.cpu() for t in quantize_tokens(x.to(DEVICE), bits, full_range=True))
    assert scale == pytest.approx(x.abs().amax(1) / (half - 0.5), rel=1e-6)
    expected = (x / scale[:, None]).round().clamp(-half, half - 1)
    assert {int(values.min()), int(values.max())} == {-half, half - 1}
    different = values != expected
    # only where the largest value lies between two integers
    assert bool((expected[different].abs() >= half - 1).all())
    assert different.sum() <= len(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [None, ()])
def test_what_is_no_number_is_not_lost(dtype, factors):
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1, 7], x[2, 200], x[3, 0] = math.inf, math.nan, -math.nan
    values, scale = (t.cpu() for t in quantize_tokens(x.to(DEVICE), 8, factors, full_range=True))
    assert scale.isfinite().tolist() == [True, False, False, False]
    assert values.any(1).tolist() == [True, False, False, False]


def test_ties_round_to_even_as_torch_does():
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -2.5, 3.5, 0]]).to(DEVICE)
    values, _ = quantize_tokens(x, 4)
    assert values.tolist() == [[7, 0, 2, 2, 0, -2, 4, 0]]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "split"), [(64, 1), (32, 2), (None, 1), (None, 2)])
def test_integer_products(bits, symmetric, group_size, split):
    """Exact up to fp32 scales: int8 sums lose nothing."""
    if bits == 8 and not symmetric:
        return
    weight = random_weight(24, 200, bits, group_size, symmetric, torch.float32)
    generator = torch.Generator().manual_seed(bits)
    values = torch.randint(-7, 8, (5, 200), generator=generator, dtype=torch.int8)
    scale, bias = torch.rand(5, generator=generator), torch.randn(24, generator=generator)
    expected = reference_matmul(values.double() * scale.double()[:, None], weight, bias)
    packed = pack_kernel(weight).to(DEVICE)
    tiles = replace(SMALL, split=split)
    y = tiled_integers(
        values.to(DEVICE), scale.to(DEVICE), packed, bias.to(DEVICE), tiles, torch.float32
    )
    assert float((y.double().cpu() - expected).norm() / expected.norm()) < 5e-7


def test_integer_operators_are_registered_as_torch_wants_them():
    weight = pack_kernel(random_weight(16, 64, 4, 32, dtype=torch.float32)).to(DEVICE)
    values, scale = quantize_tokens(torch.randn(2, 64, device=DEVICE), 4, ())
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.modelpress.quantize_tokens.default,
        (torch.randn(2, 48, device=DEVICE), [orthogonal(12).to(DEVICE)], 4, 4, False),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.modelpress.integer_matmul.default,
        (values, scale, weight.words, None, weight.scale, None, None, 4, 32, torch.float32),
        test_utils=checks,
    )


def test_integer_products_refuse_what_they_would_get_wrong():
    values, scale = torch.zeros(2, 64, dtype=torch.int8, device=DEVICE), torch.ones(2)
    scale = scale.to(DEVICE)
    small = pack_kernel(random_weight(16, 64, 4, 16, dtype=torch.float32)).to(DEVICE)
    with pytest.raises(ValueError, match=r"multiple of 32 inputs, .* found 16"):
        integer_matmul(values, scale, small, dtype=torch.float32)
    wide = pack_kernel(random_weight(16, 64, 8, 32, False, torch.float32)).to(DEVICE)
    with pytest.raises(ValueError, match="8-bit weights without zero points"):
        integer_matmul(values, scale, wide, dtype=torch.float32)
    assert integer_matmul(values[:0], scale[:0], small, dtype=torch.float32).shape == (0, 16)
