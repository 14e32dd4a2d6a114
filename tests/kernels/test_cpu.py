"""Packed products on a CPU: right, packed, and exact both ways, in each layout there is."""

from dataclasses import replace

import pytest
import torch
from weights import assert_same, random_weight, relative_error

from compress.kernels import native
from compress.kernels.cpu import cpu_matmul, pack_cpu, takes_int4, unpack_cpu
from compress.kernels.cpu_rows import BAG_ROWS
from compress.kernels.reference import dequantize, reference_matmul

WIDTHS = [2, 3, 4, 8]
ROWS = [1, BAG_ROWS, BAG_ROWS + 1, 16]
COMPILED = pytest.param(
    "tiles", marks=pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
)


@pytest.fixture(params=[COMPILED, "rows"])
def kind(request):
    return request.param


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("M", ROWS)
def test_fp32_products(bits, group_size, symmetric, M, kind):
    weight = random_weight(45, 200, bits, group_size, symmetric, torch.float32)
    x, bias = torch.randn(M, 200), torch.randn(45)
    y = cpu_matmul(x, pack_cpu(weight, torch.float32, kind), bias)
    assert y.dtype == torch.float32
    assert relative_error(y, reference_matmul(x, weight, bias)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("M", ROWS)
def test_16_bit_products(bits, dtype, symmetric, M, kind):
    """One rounding of the result to that dtype: sums and weights are not rounded to 16 bits."""
    weight = random_weight(48, 256, bits, 64, symmetric, dtype)
    x, bias = torch.randn(M, 256).to(dtype), torch.randn(48).to(dtype)
    y = cpu_matmul(x, pack_cpu(weight, dtype, kind), bias)
    assert y.dtype == dtype
    assert relative_error(y, reference_matmul(x, weight, bias)) < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize(("N", "K", "M"), [(64, 130, 3), (1, 63, 2), (130, 201, 1), (65, 97, 131)])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_that_fill_no_tile(N, K, M, bits, dtype, kind):
    """Odd K leaves half a pair, N half a tile, a group beyond the expanded block a second one."""
    for group_size, symmetric in ((32, False), (None, True)):
        weight = random_weight(N, K, bits, group_size, symmetric, dtype)
        x = torch.randn(M, K).to(dtype)
        y = cpu_matmul(x, pack_cpu(weight, dtype, kind))
        # of one output little may be left of large terms: errors are theirs
        terms = x.abs().double() @ dequantize(weight).abs().T
        error = (y.double() - reference_matmul(x, weight)).norm() / terms.norm()
        assert error < (5e-7 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_every_size_are_read_exactly(dtype, kind):
    """The smallest subnormal fp16, the largest, both signs: one code times one scale is exact."""
    info = torch.finfo(torch.float16)
    sizes = torch.tensor([2.0**-24, 3 * 2.0**-24, info.tiny, 0.1, 1.0, info.max, 0.0, -2.5])
    weight = random_weight(8, 32, 4, None, dtype=dtype)
    weight = replace(weight, scale=sizes[:, None].to(dtype))
    x = torch.zeros(1, 32)
    x[0, 3] = 1
    y = cpu_matmul(x, pack_cpu(weight, torch.float32, kind))
    assert torch.equal(y.double(), reference_matmul(x, weight))


def test_no_rows_and_rows_that_do_not_touch(kind):
    packed = pack_cpu(random_weight(48, 64, 4, 32), torch.float16, kind)
    assert cpu_matmul(torch.empty(0, 64).half(), packed).shape == (0, 48)
    wide = torch.full((3, 100), torch.nan)
    wide[:, :64] = torch.randn(3, 64)
    assert torch.equal(cpu_matmul(wide[:, :64], packed), cpu_matmul(wide[:, :64].clone(), packed))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("N", "K"), [(45, 256), (48, 255), (64, 32)])
def test_packing_is_exact_both_ways(bits, group_size, symmetric, N, K, kind):
    weight = random_weight(N, K, bits, group_size, symmetric)
    assert_same(unpack_cpu(pack_cpu(weight, torch.float16, kind)), weight)


@pytest.mark.parametrize("bits", [3, 4])
def test_int4_operator(bits):
    weight = random_weight(48, 256, bits, 128, dtype=torch.bfloat16)
    packed = pack_cpu(weight, torch.bfloat16, "int4")
    assert_same(unpack_cpu(packed), weight)
    x, bias = torch.randn(3, 256).bfloat16(), torch.randn(48).bfloat16()
    y = cpu_matmul(x, packed, bias)
    # the result is rounded before the bias is added, and after
    assert relative_error(y, reference_matmul(x, weight, bias)) < torch.finfo(torch.bfloat16).eps
    with pytest.raises(ValueError, match="packed for bf16 activations"):
        cpu_matmul(torch.randn(1, 256), packed)


def test_int4_operator_is_taken_only_where_it_is_exact(uncompiled):
    good = random_weight(48, 256, 4, 128, dtype=torch.bfloat16)
    assert takes_int4(good, torch.bfloat16)
    assert pack_cpu(good, torch.bfloat16).kind == "int4"
    assert not takes_int4(good, torch.float32)
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
        assert not takes_int4(weight, torch.bfloat16), other
        assert pack_cpu(weight, torch.bfloat16).kind == "rows"
        with pytest.raises(ValueError, match="takes no such weight"):
            pack_cpu(weight, torch.bfloat16, "int4")


@pytest.mark.parametrize("bits", WIDTHS)
def test_memory_is_near_the_bits_of_the_codes(bits, kind):
    weight = random_weight(512, 512, bits, 128, dtype=torch.bfloat16)
    stored = 4 if (kind, bits) == ("rows", 3) else bits
    ends = 64 / 512 if kind == "rows" else 0  # a table row's own 4 or 8 bytes
    assert pack_cpu(weight, torch.float32, kind).nbytes * 8 / 512**2 <= stored + ends + 16 / 128


def test_act_order(kind):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    weight = replace(random_weight(16, 64, 4, 32, dtype=torch.float32), order=order)
    x = torch.randn(2, 64)
    y = cpu_matmul(x, pack_cpu(weight, torch.float32, kind))
    assert relative_error(y, reference_matmul(x, weight)) < 1e-6


def test_wrong_activations_and_layouts_are_refused(kind):
    weight = random_weight(16, 64)
    with pytest.raises(ValueError, match=r"expected activations of 64 features, found \[1, 32\]"):
        cpu_matmul(torch.randn(1, 32), pack_cpu(weight, torch.float16, kind))
    with pytest.raises(ValueError, match="CPU layouts are tiles, int4 and rows"):
        pack_cpu(weight, torch.float16, "columns")


@pytest.mark.parametrize("M", [1, 7])
def test_threads_change_no_bit(M, kind):
    packed = pack_cpu(random_weight(200, 128, 4, 32), torch.float32, kind)
    x, threads = torch.randn(M, 128), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(cpu_matmul(x, packed))
    torch.set_num_threads(threads)
    if kind == "tiles":
        assert torch.equal(*results)
    else:  # a library's product may split its sums
        assert torch.allclose(*results, rtol=1e-5, atol=1e-5)
