"""Linears that share a launch answer as they did alone, whatever they are given and when."""

import copy
import threading

import pytest
import torch
from torch import nn

from compress.kernels.fused import FusedPart, SharedLinear, fuse_linears
from compress.kernels.linear import QuantLinear
from support.weights import assert_same, random_weight

TOGETHER = [("q", "k", "v"), ("gate", "up")]
OUTPUTS = {"q": 48, "k": 16, "v": 32}


class Attention(nn.Module):
    def __init__(self, *, symmetric=(True, True, True), bits=(4, 4, 4), bias=(True, True, True)):
        super().__init__()
        for i, (name, N) in enumerate(OUTPUTS.items()):
            weight = random_weight(N, 96, bits[i], 32, symmetric[i], torch.float32, seed=i)
            setattr(self, name, QuantLinear(weight, torch.randn(N) if bias[i] else None, X.dtype))


X = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(0))


def products(module, x=X):
    return [getattr(module, name)(x) for name in OUTPUTS]


@pytest.mark.parametrize("symmetric", [(True, True, True), (True, False, True)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_products_in_one_launch(symmetric, bias, monkeypatch):
    alone = Attention(symmetric=symmetric, bias=(bias,) * 3)
    fused = copy.deepcopy(alone)
    assert fuse_linears(fused, TOGETHER) == ["fused_q_k_v"]
    calls = []
    forward = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda s, x: calls.append(s) or forward(s, x))
    for x in (X, X[:1, :1], torch.zeros(0, 96)):
        calls.clear()
        found = products(fused, x)
        assert len(calls) == 1
        for one, other in zip(found, products(alone, x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)
    assert fused.fused_q_k_v._product is None  # activations are let go of
    for name in OUTPUTS:
        assert_same(getattr(fused, name).codes(), getattr(alone, name).codes())
        before, after = getattr(alone, name).bias, getattr(fused, name).bias
        assert (before is None and after is None) or torch.equal(before, after)


def test_linears_that_round_otherwise_stay_apart():
    one, other = Attention(), Attention()
    for module, last in ((one, 8), (other, 4)):
        for name, bits in zip(OUTPUTS, (8, 8, last), strict=True):
            linear = getattr(module, name)
            setattr(module, name, QuantLinear(linear.codes(), linear.bias, X.dtype, bits))
    assert fuse_linears(one, TOGETHER) == ["fused_q_k_v"]
    assert one.fused_q_k_v.linear.activation_bits == 8
    assert fuse_linears(other, TOGETHER) == []


def test_every_input_gets_its_own_product():
    alone, fused = Attention(), Attention()
    for name in OUTPUTS:
        setattr(fused, name, copy.deepcopy(getattr(alone, name)))
    fuse_linears(fused, TOGETHER)
    other = X.flip(0)
    x = X.clone()
    order = [("q", x), ("k", other), ("v", x), ("q", x), ("q", x), ("k", x)]
    for name, value in order:
        torch.testing.assert_close(getattr(fused, name)(value), getattr(alone, name)(value))
    fused.q(x)
    x += 1  # the tensor is the same, what it holds is not
    torch.testing.assert_close(fused.k(x), alone.k(x))
    with torch.inference_mode():
        for one, two in zip(products(fused, X * 2), products(alone, X * 2), strict=True):
            torch.testing.assert_close(one, two)
        x = X * 3
        fused.q(x)
        x += 1
        torch.testing.assert_close(fused.q(x), alone.q(x))


def test_threads_do_not_mix_their_inputs():
    fused, alone = Attention(), Attention()
    for name in OUTPUTS:
        setattr(alone, name, copy.deepcopy(getattr(fused, name)))
    fuse_linears(fused, TOGETHER)
    wrong = []

    def work(x):
        expected = products(alone, x)
        for _ in range(100):
            found = products(fused, x)
            if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected)):  # noqa: B905
                wrong.append(x)

    one = X * 4  # two threads may read the very same tensor
    threads = [threading.Thread(target=work, args=(x,)) for x in (X, X * 2, one, one)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "different", [{"bits": (4, 4, 8)}, {"bias": (True, False, True)}], ids=["bits", "bias"]
)
def test_what_does_not_go_together_stays_apart(different):
    module = Attention(**different)
    assert fuse_linears(module, TOGETHER) == []
    assert all(type(getattr(module, name)) is QuantLinear for name in OUTPUTS)


def test_weights_are_held_once_and_move_with_the_model():
    module = Attention()
    packed = sum(getattr(module, name).packed_bytes() for name in OUTPUTS)
    expected = products(module)
    fuse_linears(module, TOGETHER)
    kinds = [type(child) for child in module.children()]
    assert kinds.count(FusedPart) == 3
    assert kinds.count(SharedLinear) == 1
    state = module.state_dict()
    assert all(key.startswith("fused_q_k_v.linear.") for key in state)
    assert sum(t.nbytes for key, t in state.items() if not key.endswith("bias")) <= 1.1 * packed
    clone = copy.deepcopy(module).to(torch.bfloat16)
    assert products(clone, X.bfloat16())[0].dtype == torch.bfloat16
    for one, other in zip(products(module), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


def test_torch_compile_takes_them():
    module = Attention()
    expected = products(module)
    fuse_linears(module, TOGETHER)

    def together(x):
        return torch.cat(products(module, x), -1)

    found = torch.compile(together, backend="eager")(X)
    torch.testing.assert_close(found, torch.cat(expected, -1))
