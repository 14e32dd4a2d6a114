"""Products of int8 activations on a CPU: exact sums in each layout, and the layout by machine."""

import math

import pytest
import torch

from compress.kernels.activations import integer_matmul, quantize_tokens
from compress.kernels.codes import LONGEST
from compress.kernels.cpu import native
from compress.kernels.cpu.integers import GroupsWeight, QuadsWeight
from compress.kernels.cpu.products import pack_integers
from compress.kernels.reference import reference_matmul
from support.weights import random_weight, relative_error

library = native.kernels()
quads = pytest.mark.skipif(
    library is None or not library.takes_quads(), reason="no product of four bytes here"
)
LAYOUTS = [
    pytest.param(QuadsWeight, marks=quads, id="quads"),
    pytest.param(GroupsWeight, id="groups"),
]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("N", "K"), [(24, 200), (130, 97), (64, 256), (2, 1)])
def test_integer_products(bits, group_size, symmetric, layout, N, K):
    weight = random_weight(N, K, bits, group_size, symmetric, torch.float32)
    packed = layout.pack(weight)
    assert torch.equal(packed.unpack().codes, weight.codes)
    for M in (0, 1, 5, 7, 16, 40):
        values = torch.randint(-128, 128, (M, K), dtype=torch.int8)
        scale, bias = torch.rand(M), torch.randn(N)
        y = integer_matmul(values, scale, packed, bias, torch.float32)
        expected = reference_matmul(values.double() * scale.double()[:, None], weight, bias)
        assert y.shape == (M, N)
        assert M == 0 or relative_error(y, expected) < 5e-7


@quads
@pytest.mark.parametrize("code", [0, 255])
def test_the_largest_sums_fit(code):
    """A group of LONGEST inputs, all at their ends: 2^15 * LONGEST on the way, 2^31 in all."""
    weight = random_weight(64, LONGEST, 8, None, False, torch.float32)
    weight.codes.fill_(code)
    weight.zero.fill_(255 - code)
    weight.scale.fill_(1)
    packed = pack_integers(weight)
    assert type(packed) is QuadsWeight
    values = torch.full((1, LONGEST), -128, dtype=torch.int8)
    y = integer_matmul(values, torch.ones(1), packed, dtype=torch.float32)
    assert torch.equal(y, torch.full((1, 64), -128.0 * (2 * code - 255) * LONGEST))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_that_do_not_fit_are_refused(layout):
    weight = random_weight(1, LONGEST + 1, 4, None)
    with pytest.raises(ValueError, match="up to 65536 inputs, found 65537"):
        layout.pack(weight)


@quads
def test_the_layout_follows_the_machine(monkeypatch):
    weight = random_weight(64, 128, 4, 32)
    assert type(pack_integers(weight)) is QuadsWeight
    assert pack_integers(weight).packed.nbytes == 64 * 128 // 2
    # a quad is of one group
    assert type(pack_integers(random_weight(16, 60, 4, 6))) is GroupsWeight
    monkeypatch.setattr(native.Kernels, "takes_quads", lambda self: False)
    packed = pack_integers(weight)
    assert type(packed) is GroupsWeight
    values = torch.randint(-128, 128, (3, 128), dtype=torch.int8)
    y = integer_matmul(values, torch.ones(3), packed, dtype=torch.float32)
    assert relative_error(y, reference_matmul(values, weight)) < 5e-7
    monkeypatch.setattr(native, "_operators", None)
    with pytest.raises(ValueError, match="packed for products of bytes, found"):
        integer_matmul(values, torch.ones(3), QuadsWeight.pack(weight))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_number_makes_its_token_none(layout):
    """And no other token."""
    weight, x = random_weight(70, 64, 4, 32), torch.randn(4, 64)
    x[1, 7], x[2, 9] = -math.inf, math.nan
    packed = layout.pack(weight)
    y = integer_matmul(*quantize_tokens(x, 8), packed, dtype=torch.float32)
    assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [False, True, True, False]
