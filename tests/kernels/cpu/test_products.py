"""Packed products on a CPU: right, packed, and exact both ways, in each layout there is."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from compress.kernels.codes import with_bits
from compress.kernels.cpu import native
from compress.kernels.cpu.int4 import Int4Weight
from compress.kernels.cpu.products import (
    FLOAT_LAYOUTS,
    INTEGER_LAYOUTS,
    cpu_matmul,
    pack_cpu,
    pack_integers,
)
from compress.kernels.cpu.rows import BAG_ROWS, RowsWeight
from compress.kernels.cpu.tiles import TilesWeight
from compress.kernels.reference import dequantize, reference_matmul
from support.weights import assert_same, random_weight, relative_error

WIDTHS = [2, 3, 4, 8]
ROWS = [1, BAG_ROWS, BAG_ROWS + 1, 16]
compiled = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
LAYOUTS = [
    pytest.param(TilesWeight, marks=compiled, id="tiles"),
    pytest.param(RowsWeight, id="rows"),
]


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [24, 32, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("M", ROWS)
def test_fp32_products(bits, group_size, symmetric, M, layout):
    weight = random_weight(45, 200, bits, group_size, symmetric, torch.float32)
    x, bias = torch.randn(M, 200), torch.randn(45)
    y = cpu_matmul(x, layout.pack(weight), bias)
    assert y.dtype == torch.float32
    assert relative_error(y, reference_matmul(x, weight, bias)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("M", ROWS)
def test_16_bit_products(bits, dtype, symmetric, M, layout):
    """One rounding of the result to that dtype: sums and weights are not rounded to 16 bits."""
    weight = random_weight(48, 256, bits, 64, symmetric, dtype)
    x, bias = torch.randn(M, 256).to(dtype), torch.randn(48).to(dtype)
    y = cpu_matmul(x, layout.pack(weight), bias)
    assert y.dtype == dtype
    assert relative_error(y, reference_matmul(x, weight, bias)) < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize(("N", "K", "M"), [(64, 130, 3), (1, 63, 2), (130, 201, 1), (65, 97, 131)])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_that_fill_no_tile(N, K, M, bits, dtype, layout):
    """Odd K leaves half a pair, N half a tile, a group beyond the expanded block a second one."""
    for group_size, symmetric in ((32, False), (None, True)):
        weight = random_weight(N, K, bits, group_size, symmetric, dtype)
        x = torch.randn(M, K).to(dtype)
        y = cpu_matmul(x, layout.pack(weight))
        # of one output little may be left of large terms: errors are theirs
        terms = x.abs().double() @ dequantize(weight).abs().T
        error = (y.double() - reference_matmul(x, weight)).norm() / terms.norm()
        assert error < (5e-7 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_every_size_are_read_exactly(dtype, layout):
    """The smallest subnormal fp16, the largest, both signs: one code times one scale is exact."""
    info = torch.finfo(torch.float16)
    sizes = torch.tensor([2.0**-24, 3 * 2.0**-24, info.tiny, 0.1, 1.0, info.max, 0.0, -2.5])
    weight = random_weight(8, 32, 4, None, dtype=dtype)
    weight = replace(weight, scale=sizes[:, None].to(dtype))
    x = torch.zeros(1, 32)
    x[0, 3] = 1
    y = cpu_matmul(x, layout.pack(weight))
    assert torch.equal(y.double(), reference_matmul(x, weight))


def test_small_scales_survive_where_small_floats_are_flushed(layout):
    """2^-24 is subnormal in fp16 only; x and y are not small."""
    weight = random_weight(8, 32, 4, None)
    weight = replace(weight, scale=torch.full((8, 1), 3 * 2.0**-24).half())
    x = torch.zeros(1, 32)
    x[0, 3] = 1024
    packed = layout.pack(weight)
    torch.set_flush_denormal(True)
    try:
        y = cpu_matmul(x, packed)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y.double(), reference_matmul(x, weight))


@pytest.mark.parametrize("M", [*range(1, 15), 127, 129, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows(M, dtype, layout):
    """Rows are multiplied in blocks of different sizes, of which one may be left alone."""
    weight = random_weight(65, 129, 3, None, True, dtype)
    x = torch.randn(M, 129).to(dtype)
    y = cpu_matmul(x, layout.pack(weight)).double()
    expected = reference_matmul(x, weight)
    errors = (y - expected).norm(dim=1) / expected.norm(dim=1)  # of each row
    assert errors.max() < (1e-6 if dtype == torch.float32 else 2**-8)


def same_values_and_faults(y, expected):
    """Infinities and NaN where they are expected, the rest as close as 16 bits are."""
    assert torch.equal(y.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(y[infinite], expected[infinite])
    good = expected.isfinite()
    torch.testing.assert_close(y[good], expected[good], rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("K", "group_size"), [(63, None), (97, 32)])
def test_what_is_not_finite_stays_in_its_row(dtype, bits, K, group_size, layout):
    """As in a dense product; the last input of an odd K has a neighbour that does not exist."""
    for M, symmetric in ((1, True), (4, False), (16, True)):
        weight = random_weight(66, K, bits, group_size, symmetric, dtype)
        x = torch.randn(M, K).to(dtype)
        for row, (column, value) in enumerate(
            [(K - 1, torch.inf), (0, torch.nan), (5, -torch.inf)]
        ):
            if row < M:
                x[row, column] = value
        y = cpu_matmul(x, layout.pack(weight)).double()
        expected = reference_matmul(x, weight)
        assert not expected[0].isfinite().any()
        same_values_and_faults(y, expected)


def test_no_rows_and_rows_that_do_not_touch(layout):
    packed = layout.pack(random_weight(48, 64, 4, 32))
    assert cpu_matmul(torch.empty(0, 64).half(), packed).shape == (0, 48)
    wide = torch.full((3, 100), torch.nan)
    wide[:, :64] = torch.randn(3, 64)
    assert torch.equal(cpu_matmul(wide[:, :64], packed), cpu_matmul(wide[:, :64].clone(), packed))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("N", "K"), [(45, 256), (48, 255), (64, 32)])
def test_packing_is_exact_both_ways(bits, group_size, symmetric, N, K, layout):
    weight = random_weight(N, K, bits, group_size, symmetric)
    assert_same(layout.pack(weight).unpack(), weight)


def test_another_default_device_changes_nothing(layout):
    weight, x = random_weight(48, 64, 3, 32, False), torch.randn(2, 64)
    with torch.device("meta"):
        packed = layout.pack(weight)
        y, again = cpu_matmul(x, packed), packed.unpack()
    assert relative_error(y, reference_matmul(x, weight)) < 1e-6
    assert_same(again, weight)


@pytest.mark.parametrize("bits", [3, 4])
def test_int4_operator(bits):
    weight = random_weight(48, 256, bits, 128, dtype=torch.bfloat16)
    packed = Int4Weight.pack(weight)
    assert_same(packed.unpack(), weight)
    x, bias = torch.randn(3, 256).bfloat16(), torch.randn(48).bfloat16()
    y = cpu_matmul(x, packed, bias)
    # the result is rounded before the bias is added, and after
    assert relative_error(y, reference_matmul(x, weight, bias)) < torch.finfo(torch.bfloat16).eps
    with pytest.raises(ValueError, match="packed for bf16 activations"):
        cpu_matmul(torch.randn(1, 256), packed)


def test_int4_operator_is_taken_only_where_it_is_exact(uncompiled):
    good = random_weight(48, 256, 4, 128, dtype=torch.bfloat16)
    assert Int4Weight.takes(good, torch.bfloat16)
    assert type(pack_cpu(good, torch.bfloat16)) is Int4Weight
    assert not Int4Weight.takes(good, torch.float32)
    for other in (
        {"bits": 8},
        {"symmetric": False},
        {"group_size": None},
        {"N": 40},
        {"K": 200},
        {"dtype": torch.float16},
    ):
        options = {"N": 48, "K": 256, "bits": 4, "group_size": 128, "dtype": torch.bfloat16}
        weight = random_weight(**options | other)
        assert not Int4Weight.takes(weight, torch.bfloat16), other
        assert type(pack_cpu(weight, torch.bfloat16)) is RowsWeight
        with pytest.raises(ValueError, match="takes no such weight"):
            Int4Weight.pack(weight)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_widths_that_no_kernel_runs_are_taken_by_none(bits):
    """They are widened first, exactly."""
    weight = random_weight(64, 64, bits, 32)
    assert not any(layout.takes(weight, torch.float16) for layout in FLOAT_LAYOUTS)
    assert not any(layout.takes(weight) for layout in INTEGER_LAYOUTS)
    for pack in (
        lambda: pack_cpu(weight, torch.float16),
        lambda: pack_integers(weight),
        *(partial(layout.pack, weight) for layout in (*FLOAT_LAYOUTS, *INTEGER_LAYOUTS)),
    ):
        with pytest.raises(ValueError, match=rf"found {bits}|no such weight"):
            pack()
    assert FLOAT_LAYOUTS[-1].takes(with_bits(weight, 8), torch.float16)


def test_groups_of_an_odd_size():
    weight, x = random_weight(24, 99, 4, 33, dtype=torch.float32), torch.randn(5, 99)
    packed = pack_cpu(weight, torch.float32)
    assert type(packed) is RowsWeight  # in tiles, two inputs of a pair share a scale
    assert relative_error(cpu_matmul(x, packed), reference_matmul(x, weight)) < 1e-6


@pytest.mark.parametrize("bits", WIDTHS)
def test_memory_is_near_the_bits_of_the_codes(bits, layout):
    weight = random_weight(512, 512, bits, 128, dtype=torch.bfloat16)
    stored = 4 if (layout, bits) == (RowsWeight, 3) else bits
    ends = 64 / 512 if layout is RowsWeight else 0  # a table row's own 4 or 8 bytes
    assert layout.pack(weight).nbytes * 8 / 512**2 <= stored + ends + 16 / 128


def test_act_order(layout):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    weight = replace(random_weight(16, 64, 4, 32, dtype=torch.float32), order=order)
    x = torch.randn(2, 64)
    y = cpu_matmul(x, layout.pack(weight))
    assert relative_error(y, reference_matmul(x, weight)) < 1e-6


def test_wrong_activations_are_refused(layout):
    weight = random_weight(16, 64)
    with pytest.raises(ValueError, match=r"expected activations of 64 features, found \[1, 32\]"):
        cpu_matmul(torch.randn(1, 32), layout.pack(weight))
    with pytest.raises(ValueError, match=r"in fp16, bf16 or fp32, found torch\.int64"):
        cpu_matmul(torch.ones(1, 64, dtype=torch.int64), layout.pack(weight))
    with pytest.raises(ValueError, match="expected activations on cpu, found meta"):
        cpu_matmul(torch.ones(1, 64, device="meta"), layout.pack(weight))


@pytest.mark.parametrize("M", [1, 7])
def test_threads_change_no_bit(M, layout):
    """One, a share of the work to each, and more than there are tiles."""
    packed = layout.pack(random_weight(200, 128, 4, 32))
    x, threads = torch.randn(M, 128), torch.get_num_threads()
    results = []
    for count in (1, 2, 9):
        torch.set_num_threads(count)
        results.append(cpu_matmul(x, packed))
    torch.set_num_threads(threads)
    if layout is TilesWeight:
        assert all(torch.equal(results[0], other) for other in results[1:])
    else:  # a library's product may split its sums
        for other in results[1:]:
            torch.testing.assert_close(results[0], other, rtol=1e-5, atol=1e-5)
