"""Blocks hold the codes: what the library gguf reads from them is (code - zero point) * scale."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from compress.checkpoint.gguf.blocks import BLOCK_TYPES, exact_type, pack
from compress.kernels.codes import Codes
from compress.kernels.reference import dequantize
from support.refusals import refused

KINDS = list(BLOCK_TYPES.values())


def make(bits: int, group_size: int, symmetric: bool, seed: int = 0, mantissa: int = 11) -> Codes:
    """[6, 512]: every code, scales of either sign with so many significant bits."""
    generator = torch.Generator().manual_seed(seed)
    G = 512 // group_size

    def draw(*shape: int) -> Tensor:
        return torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)

    scale = torch.randint(2 ** (mantissa - 1), 2**mantissa, (6, G), generator=generator) / 2.0**14
    scale *= 1 - 2 * torch.randint(2, scale.shape, generator=generator)
    codes = draw(6, 512)
    codes[0] = torch.arange(512) % 2**bits
    return Codes(codes, scale, None if symmetric else draw(6, G), bits, group_size)


def values(weight: Codes) -> np.ndarray:
    return dequantize(weight).numpy()


def read(data: np.ndarray, name: str) -> np.ndarray:
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_sizes_are_those_of_the_format(kind):
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.size, kind.nbytes)


@pytest.mark.parametrize("group_size", [32, 64, 256, 512])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_keeps_every_value_that_it_is_said_to_hold(kind, symmetric, group_size):
    held = []
    for bits in range(2, 9):
        weight = make(bits, group_size, symmetric, seed=bits, mantissa=11 - kind.bits)
        if exact_type(bits, group_size, None if symmetric else weight, [kind]):
            data = pack(weight, kind)
            assert data.shape == (6, 512 // kind.size * kind.nbytes)
            assert data.dtype == np.uint8
            assert np.array_equal(read(data, kind.name), values(weight))
            held.append(bits)
        else:
            with refused(ValueError, kind.name):
                pack(weight, kind)
    # Levels of asymmetric codes take one bit more; an fp16 offset is exact for short scales only.
    most = kind.bits if symmetric or kind.offset else kind.bits - 1
    none = group_size % kind.size or (symmetric and kind.name == "Q4_1")
    assert held == ([] if none else list(range(2, most + 1)))


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "own", "smallest"),
    [
        (2, 256, True, "Q2_K", "Q2_K"),
        (2, 512, False, "Q2_K", "Q2_K"),
        (2, 128, True, None, "Q4_0"),
        (3, 512, True, "Q3_K", "Q3_K"),
        (3, 128, True, None, "Q4_0"),
        (3, 256, False, None, "Q4_0"),
        (4, 32, True, "Q4_0", "Q4_0"),
        (4, 256, False, "Q4_K", "Q4_K"),
        (4, 32, False, None, "Q5_0"),  # offsets of long scales are no fp16 numbers
        (5, 64, True, "Q5_0", "Q5_0"),
        (6, 256, True, "Q6_K", "Q6_K"),
        (6, 64, True, None, "Q8_0"),
        (7, 32, True, None, "Q8_0"),
        (7, 32, False, None, "Q8_0"),
        (8, 32, True, "Q8_0", "Q8_0"),
        (8, 512, False, None, None),
        (4, 16, True, None, None),
    ],
)
def test_which_type_a_scheme_gets(bits, group_size, symmetric, own, smallest):
    weight = None if symmetric else make(bits, group_size, symmetric)
    of_width = [kind for kind in KINDS if kind.bits == bits]
    for kinds, expected in ((of_width, own), (KINDS, smallest)):
        found = exact_type(bits, group_size, weight, kinds)
        assert (found and found.name) == expected


def test_offsets_decide_whether_asymmetric_codes_fit():
    """Q4_1 stores scale * zero point in fp16, whose 11 bits a zero point takes four of."""
    short, long = (make(4, 32, False, mantissa=bits) for bits in (7, 11))
    of_width = [kind for kind in KINDS if kind.bits == 4]
    assert exact_type(4, 32, short, of_width).name == "Q4_1"
    assert exact_type(4, 32, long, of_width) is None
    with refused(ValueError, "Q4_1"):
        pack(long, BLOCK_TYPES["Q4_1"])


def test_asymmetric_codes_that_happen_to_be_centred_fit():
    weight = make(8, 32, False)
    weight.zero.fill_(2**7)
    assert exact_type(8, 32, weight, KINDS).name == "Q8_0"
    data = pack(weight, BLOCK_TYPES["Q8_0"])
    assert np.array_equal(read(data, "Q8_0"), values(weight))


def test_the_scale_of_zeros_may_be_anything():
    weight = make(4, 256, True)
    weight.codes[:, :256] = 2**3
    weight.scale[:, 0] = 1e30  # beyond fp16
    expected = values(weight)
    assert not expected[:, :256].any()
    assert np.array_equal(read(pack(weight, BLOCK_TYPES["Q4_0"]), "Q4_0"), expected)


def test_scales_are_rounded_to_fp16_and_nothing_else_is():
    weight = make(4, 32, True)
    weight.scale.mul_(1 + 2.0**-13)
    rounded = replace(weight, scale=weight.scale.half().float())
    assert not np.array_equal(values(rounded), values(weight))
    data = pack(weight, BLOCK_TYPES["Q4_0"])
    assert np.array_equal(read(data, "Q4_0"), values(rounded))
