"""Codes in the formats' tensors and back: exact, and what other readers make of them is the same.

What GPTQModel itself makes of exported folders is in tests/interop/check_gptqmodel.py.
"""

from dataclasses import replace

import pytest
import torch

from compress.checkpoint.compressed_tensors import quantization_config
from compress.checkpoint.packed_formats import (
    FORMATS,
    WRITTEN,
    codes_of_signed,
    planned_bytes,
    with_fp16_scales,
)
from compress.kernels.codes import Codes
from compress.kernels.gpu.layout import pack_kernel, unpack_kernel
from compress.kernels.reference import dequantize
from compress.scheme import PlannedModule, Scheme
from support.gptq_reader import fields, read_naively
from support.refusals import refused
from support.weights import assert_same, random_weight

WIDTHS = [(name, bits) for name, format in FORMATS.items() for bits in format.widths]
SHAPES = [(32, 64, 32), (33, 96, 32), (5, 40, None), (1, 7, None), (70, 33, 11), (40, 200, 96)]


@pytest.fixture(params=[True, False], ids=["symmetric", "asymmetric"])
def symmetric(request):
    return request.param


def scheme_of(weight: Codes) -> Scheme:
    return Scheme(weight.bits, weight.group_size, weight.zero is None)


def with_every_code(N, K, bits, group_size, symmetric, dtype=torch.float16) -> Codes:
    """Random codes and zero points, the least and the greatest among them."""
    weight = random_weight(N, K, bits, group_size, symmetric, dtype, seed=bits)
    for tensor in (weight.codes, weight.zero):
        if tensor is not None:
            ends = torch.tensor([0, 2**bits - 1], dtype=torch.uint8)
            tensor.view(-1)[:2] = ends[: tensor.numel()]
    return weight


# ---- both ways ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "bits"), WIDTHS)
def test_every_format_gives_back_what_it_was_given(name, bits, shape, symmetric):
    N, K, group_size = shape
    weight = with_every_code(N, K, bits, group_size, symmetric)
    scheme, format = scheme_of(weight), FORMATS[name]
    tensors = format.write(weight, scheme)
    shapes = format.shapes(scheme, (N, K))
    assert all(tuple(tensor.shape) == shapes[key] for key, tensor in tensors.items())
    assert shapes.keys() - tensors.keys() <= {format.g_idx}
    assert_same(format.read(tensors, scheme, "up_proj"), weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "bits"), [(n, b) for n, f in WRITTEN.items() for b in f.widths])
def test_a_plan_counts_the_tensors_that_are_written(name, bits, shape, symmetric):
    N, K, group_size = shape
    weight = random_weight(N, K, bits, group_size, symmetric)
    planned = PlannedModule("up_proj", (N, K), scheme_of(weight), format=name)
    written = WRITTEN[name].write(weight, scheme_of(weight))
    expected = {f"up_proj.{key}": tensor.nbytes for key, tensor in written.items()}
    assert planned_bytes([planned], weight.scale.dtype) == expected


def test_signed_integers_are_the_same_weight(symmetric):
    weight = random_weight(33, 96, 3, 32, symmetric)
    signed = weight.codes.to(torch.int8) - 4
    zero = None if symmetric else weight.zero.to(torch.int8) - 4
    assert_same(codes_of_signed(signed, weight.scale, zero, scheme_of(weight)), weight)


def test_integers_and_scales_that_do_not_fit_are_refused():
    codes, scale = torch.zeros(32, 64, dtype=torch.int8), torch.ones(32, 2)
    with refused(ValueError, [32, 64], [32, 5]):
        codes_of_signed(codes, torch.ones(32, 5), None, Scheme(4, 32))
    with refused(ValueError, "zero point", [32, 1]):
        codes_of_signed(codes, scale, torch.zeros(32, 1), Scheme(4, 32, symmetric=False))
    with refused(ValueError, "3 bits"):
        codes_of_signed(codes + 4, scale, None, Scheme(3, 32))


def test_scales_beyond_fp16_are_of_zeros_and_become_0():
    weight = random_weight(8, 64, 4, 32, dtype=torch.float32)
    weight.scale[0, 0] = 1e30
    rounded = with_fp16_scales(weight).scale
    assert rounded[0, 0] == 0
    assert torch.equal(rounded.flatten()[1:], weight.scale.half().flatten()[1:])


# ---- as others read it --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors_reads_the_same_weight(bits, dtype, symmetric):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    weight = random_weight(33, 96, bits, 32, symmetric, dtype)
    tensors = FORMATS["pack-quantized"].write(weight, scheme_of(weight))
    config = quantization_config({"m": scheme_of(weight)}, [])
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = compressor.decompress(dict(tensors), scheme)["weight"]
    assert torch.equal(dequantize(weight).to(dtype), theirs)
    zero = None if symmetric else weight.zero.to(torch.int16).sub(2 ** (bits - 1)).to(torch.int8)
    exact = {"weight": theirs.float(), "weight_scale": weight.scale.float()}
    again = compressor.compress(exact | {"weight_zero_point": zero}, scheme)
    if dtype == torch.float32:  # from the exact weight, their writer gives our bytes
        for key in ("weight_packed", *([] if symmetric else ["weight_zero_point"])):
            assert torch.equal(again[key], tensors[key])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_a_reader_of_gptq_by_its_description_reads_the_same(bits, shape, symmetric, version):
    weight = with_every_code(*shape[:2], bits, shape[2], symmetric)
    tensors = FORMATS["gptq" if version == 1 else "gptq_v2"].write(weight, scheme_of(weight))
    assert torch.equal(read_naively(tensors, bits, version).double(), dequantize(weight))


def test_three_bits_straddle_words_as_published():
    """32 codes in 3 words: ten, a split one, ten, a split one, ten."""
    codes = torch.arange(32, dtype=torch.uint8)[None] * 5 % 8
    tensors = FORMATS["gptq"].write(Codes(codes, torch.ones(1, 1), None, 3, None), Scheme(3, None))
    words = [word & 0xFFFFFFFF for word in tensors["qweight"][:, 0].tolist()]
    c = codes[0].tolist()
    expected = [
        sum(c[i] << (3 * i) for i in range(10)) | (c[10] & 3) << 30,
        c[10] >> 2 | sum(c[i] << (3 * i - 32) for i in range(11, 21)) | (c[21] & 1) << 31,
        c[21] >> 1 | sum(c[i] << (3 * i - 64) for i in range(22, 32)),
    ]
    assert words == expected


@pytest.mark.parametrize(("bits", "ones"), [(2, 0x55555555), (4, 0x11111111), (8, 0x01010101)])
def test_version_1_stores_zero_points_less_one(bits, ones):
    weight = random_weight(32, 64, bits, 32)
    first, second = (FORMATS[n].write(weight, scheme_of(weight)) for n in ("gptq", "gptq_v2"))
    assert set(fields(first["qzeros"][0].tolist(), bits, 32)) == {2 ** (bits - 1) - 1}
    assert torch.equal((first["qzeros"].long() + ones).int(), second["qzeros"])
    assert all(torch.equal(first[k], second[k]) for k in first if k != "qzeros")


# ---- act-order ----------------------------------------------------------------------------------


def test_act_order_is_undone():
    """A file with permuted groups stands for the matrix that g_idx says, input by input."""
    generator = torch.Generator().manual_seed(3)
    shuffle = torch.randperm(128, generator=generator)
    weight = random_weight(32, 128, 4, 32, symmetric=False)
    format, scheme = FORMATS["gptq_v2"], scheme_of(weight)
    tensors = format.write(replace(weight, order=shuffle.argsort()), scheme)
    g_idx = tensors["g_idx"].long()
    assert not torch.equal(g_idx, torch.arange(128) // 32)
    read = format.read(tensors, scheme, "up_proj")
    # Oracle: input k has the codes of its own row in the file, and the scale of its g_idx.
    flat = format.read({k: t for k, t in tensors.items() if k != "g_idx"}, scheme, "up_proj")
    expected = (flat.codes.double() - flat.zero[:, g_idx].double()) * flat.scale.double()[:, g_idx]
    assert torch.equal(dequantize(read), expected)
    written = format.write(unpack_kernel(pack_kernel(read)), scheme)
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)
