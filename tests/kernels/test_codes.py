"""Codes in another width, and several weights as one: the same weights."""

from dataclasses import replace

import pytest
import torch

from compress.kernels.codes import concatenate, with_bits
from compress.kernels.gpu.layout import pack_kernel
from compress.kernels.reference import dequantize
from support.weights import assert_same, random_weight


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_wider_codes_are_the_same_weight(bits, symmetric):
    weight = random_weight(20, 64, bits, 32, symmetric)
    wide = with_bits(weight, 8)
    assert wide.bits == 8
    assert (wide.zero is None) == symmetric
    assert torch.equal(dequantize(wide), dequantize(weight))
    assert_same(with_bits(wide, bits), weight)


def test_codes_that_do_not_fit_are_not_cut():
    with pytest.raises(ValueError, match="codes of 8 bits do not fit 5"):
        with_bits(random_weight(20, 64, 8, 32), 5)


@pytest.mark.parametrize("mixed", [False, True])
def test_one_launch_for_several_weights(mixed):
    parts = [
        random_weight(N, 96, 3, 32, symmetric=i > 0 or not mixed) for i, N in enumerate((8, 5))
    ]
    whole = concatenate(parts)
    assert (whole.zero is None) == (not mixed)
    assert torch.equal(dequantize(whole), torch.cat([dequantize(part) for part in parts]))
    for other in (random_weight(8, 96, 4, 32), random_weight(8, 64, 3, 32)):
        with pytest.raises(ValueError, match="expected 3 bits, groups of 32, 96 inputs, found"):
            concatenate([parts[0], other])
    with pytest.raises(ValueError, match="input order"):
        concatenate([parts[0], replace(parts[1], order=torch.arange(96))])


def test_weights_without_a_kernel_are_refused():
    for bits in (5, 6, 7):
        with pytest.raises(ValueError, match=f"expected 2, 3, 4 and 8 bits, found {bits}"):
            pack_kernel(random_weight(20, 64, bits, 32))
    with pytest.raises(ValueError, match=r"multiple of 8 inputs.* found 20"):
        pack_kernel(random_weight(20, 96, 4, 20))
