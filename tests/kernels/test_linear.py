"""QuantLinear: the dense layer's results, nothing dense in memory, the same weight anywhere."""

import copy
from dataclasses import replace

import pytest
import torch

from compress.kernels.cpu.int4 import Int4Weight
from compress.kernels.cpu.rows import RowsWeight
from compress.kernels.linear import QuantLinear
from compress.kernels.reference import dequantize, reference_matmul
from support.weights import assert_same, random_weight, relative_error

WIDTHS = [2, 3, 4, 8]


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
    layer.float()
    assert layer.bias.dtype == torch.float32
    assert_same(layer.codes(), weight)
    x = torch.randn(3, 256)
    assert relative_error(layer(x), reference_matmul(x, weight, layer.bias)) < 1e-6
    assert_same(layer.bfloat16().codes(), weight)


def test_casting_repacks_where_the_layout_depends_on_the_activations(uncompiled):
    weight = random_weight(48, 256, 4, 128, dtype=torch.bfloat16)
    layer = QuantLinear(weight, None, torch.bfloat16)
    assert type(layer.packed_weight()) is Int4Weight
    assert type(layer.float().packed_weight()) is RowsWeight
    assert type(layer.bfloat16().packed_weight()) is Int4Weight
    assert_same(layer.codes(), weight)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    [(8, None, True), (8, 32, True), (4, 64, True), (4, 64, False), (3, 32, False)],
)
@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("compiled", [True, False])
def test_rounded_activations(bits, group_size, symmetric, activation_bits, compiled, request):
    if not compiled:
        request.getfixturevalue("uncompiled")
    weight = random_weight(32, 128, bits, group_size, symmetric, torch.float32)
    bias, x = torch.randn(32), torch.randn(2, 3, 128)
    layer = QuantLinear(weight, bias, torch.float32, activation_bits)
    half = 2 ** (activation_bits - 1)
    scale = x.abs().amax(-1, keepdim=True) / (half - 0.5)
    rounded = (x / scale).round().clamp(-half, half - 1) * scale
    assert relative_error(layer(x), reference_matmul(rounded, weight, bias)) < 1e-6
    assert_same(layer.codes(), weight)
    assert_same(layer.bfloat16().codes(), weight)
    assert f"activation_bits={activation_bits}" in repr(layer)


def test_activations_that_are_not_rounded_so_are_refused():
    with pytest.raises(ValueError, match="8-bit weights without zero points only"):
        QuantLinear(random_weight(32, 64, 8, 32, symmetric=False), activation_bits=8)
    with pytest.raises(ValueError, match="2 to 8 bits, found 16"):
        QuantLinear(random_weight(32, 64, 4, 32), activation_bits=16)


def test_a_bias_that_was_a_parameter_asks_for_no_gradient():
    layer = QuantLinear(random_weight(32, 64, 4, 32), torch.nn.Parameter(torch.randn(32)))
    assert not layer(torch.randn(1, 64).half()).requires_grad
    copy.deepcopy(layer)


def test_act_order_of_a_layer():
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    weight = replace(random_weight(16, 64, 4, 32, dtype=torch.float32), order=order)
    layer, x = QuantLinear(weight, dtype=torch.float32), torch.randn(2, 64)
    assert relative_error(layer(x), reference_matmul(x, weight)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False])
def test_torch_compile_takes_the_layer_whole(dtype, compiled, request):
    if not compiled:
        request.getfixturevalue("uncompiled")
    layer = QuantLinear(random_weight(48, 256, 4, 128, dtype=dtype), torch.randn(48), dtype)
    x = torch.randn(2, 3, 256).to(dtype)
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(whole(x), layer(x))


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
