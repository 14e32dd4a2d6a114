"""Packed products on a CPU, and QuantLinear: right, packed, and the same weight wherever it is."""

import pytest
import torch
from weights import assert_same, random_weight

from compress.kernels.cpu import BAG_ROWS, cpu_matmul, pack_cpu, takes_int4, unpack_cpu
from compress.kernels.linear import QuantLinear
from compress.kernels.reference import dequantize, reference_matmul

WIDTHS = [2, 3, 4, 8]
ROWS = [1, BAG_ROWS, BAG_ROWS + 1, 16]


def relative_error(y, expected):
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("M", ROWS)
def test_fp32_products(bits, group_size, symmetric, M):
    weight = random_weight(45, 200, bits, group_size, symmetric, torch.float32)
    x, bias = torch.randn(M, 200), torch.randn(45)
    y = cpu_matmul(x, pack_cpu(weight, torch.float32), bias)
    assert y.dtype == torch.float32
    assert relative_error(y, reference_matmul(x, weight, bias)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("M", ROWS)
def test_16_bit_products(bits, dtype, symmetric, M):
    """No worse than a dense product of the same dtype may be: two roundings of that dtype."""
    weight = random_weight(48, 256, bits, 64, symmetric, dtype)
    x, bias = torch.randn(M, 256).to(dtype), torch.randn(48).to(dtype)
    y = cpu_matmul(x, pack_cpu(weight, dtype), bias)
    assert y.dtype == dtype
    assert relative_error(y, reference_matmul(x, weight, bias)) < torch.finfo(dtype).eps


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [45, 48])
def test_packing_is_exact_both_ways(bits, group_size, symmetric, dtype, N):
    weight = random_weight(N, 256, bits, group_size, symmetric, dtype)
    assert_same(unpack_cpu(pack_cpu(weight, dtype)), weight)


def test_int4_operator_is_taken_only_where_it_is_exact():
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
        assert not takes_int4(random_weight(**options | other), torch.bfloat16), other


def test_int4_refuses_other_activations():
    packed = pack_cpu(random_weight(48, 256, 4, 128, dtype=torch.bfloat16), torch.bfloat16)
    with pytest.raises(ValueError, match="packed for bf16 activations"):
        cpu_matmul(torch.randn(1, 256), packed)


@pytest.mark.parametrize(("bits", "most"), [(2, 2), (3, 4), (4, 4), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_near_the_bits_of_the_codes(bits, most, dtype):
    weight = random_weight(512, 512, bits, 128, dtype=torch.bfloat16)
    extra = 16 / 128 + 64 / 512 + 0.01  # a scale for each group; a table row's own 4 or 8 bytes
    assert pack_cpu(weight, dtype).nbytes * 8 / 512**2 <= most + extra


# ---- QuantLinear --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDTHS)
def test_layer_equals_the_dense_layer(bits):
    weight = random_weight(32, 128, bits, 32, False, torch.float32)
    bias = torch.randn(32)
    layer = QuantLinear(weight, bias, torch.float32)
    x = torch.randn(2, 3, 128)
    dense = torch.nn.functional.linear(x, layer.dequantize(), bias)
    assert torch.allclose(layer(x), dense, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.dequantize(), dequantize(weight).float())


def test_layer_holds_nothing_dense():
    layer = QuantLinear(random_weight(256, 256, 4, 128), None, torch.float16)
    held = sum(t.nbytes for t in layer.state_dict().values())
    assert held == layer.packed_bytes() < 0.3 * 256 * 256 * 2
    layer(torch.randn(2, 256).half())
    assert sum(t.nbytes for t in layer.state_dict().values()) == held


def test_casting_changes_the_activations_and_not_the_weight():
    weight = random_weight(48, 256, 4, 128, dtype=torch.bfloat16)
    layer = QuantLinear(weight, torch.randn(48), torch.bfloat16)
    assert layer.packed_weight().kind == "int4"
    layer.float()
    assert layer.packed_weight().kind == "rows"
    assert layer.bias.dtype == torch.float32
    assert_same(layer.codes(), weight)
    x = torch.randn(3, 256)
    assert relative_error(layer(x), reference_matmul(x, weight, layer.bias)) < 1e-6
    assert_same(layer.bfloat16().codes(), weight)
    assert layer.packed_weight().kind == "int4"


def test_act_order_on_the_cpu():
    from dataclasses import replace

    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    weight = replace(random_weight(16, 64, 4, 32, dtype=torch.float32), order=order)
    layer, x = QuantLinear(weight, dtype=torch.float32), torch.randn(2, 64)
    assert relative_error(layer(x), reference_matmul(x, weight)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_takes_the_layer_whole(dtype):
    layer = QuantLinear(random_weight(48, 256, 4, 128, dtype=dtype), torch.randn(48), dtype)
    x = torch.randn(2, 3, 256).to(dtype)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_state_survives_saving():
    layer = QuantLinear(random_weight(16, 64, 3, 32, False), torch.ones(16))
    other = QuantLinear(random_weight(16, 64, 3, 32, False, seed=1), torch.zeros(16))
    other.load_state_dict(layer.state_dict())
    assert_same(other.codes(), layer.codes())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", WIDTHS)
def test_moving_to_a_gpu_and_back(bits):
    weight = random_weight(48, 256, bits, 128, dtype=torch.bfloat16)
    layer = QuantLinear(weight, torch.randn(48), torch.bfloat16)
    x = torch.randn(3, 256).bfloat16()
    expected = reference_matmul(x, weight, layer.bias)
    layer.cuda()
    assert relative_error(layer(x.cuda()).cpu(), expected) < torch.finfo(torch.bfloat16).eps
    assert_same(layer.cpu().codes(), weight)
