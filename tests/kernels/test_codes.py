"""Codes from files and back: exact both ways, and the same files as the writers make."""

from dataclasses import replace

import pytest
import torch

from compress.kernels.codes import (
    concatenate,
    read_compressed_tensors,
    read_gptq,
    with_bits,
    write_compressed_tensors,
    write_gptq,
)
from compress.kernels.gpu.layout import pack_kernel, unpack_kernel
from compress.kernels.reference import dequantize
from support.weights import assert_same, random_weight

WIDTHS = [2, 3, 4, 8]


@pytest.fixture(params=[True, False], ids=["symmetric", "asymmetric"])
def symmetric(request):
    return request.param


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [32, 96, None])
@pytest.mark.parametrize("K", [96, 200])
def test_compressed_tensors_round_trip(bits, group_size, K, symmetric):
    weight = random_weight(40, K, bits, group_size, symmetric, torch.bfloat16)
    assert_same(read_compressed_tensors(write_compressed_tensors(weight), bits, group_size), weight)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_round_trip(bits, version, symmetric):
    weight = random_weight(64, 192, bits, 64, symmetric)
    assert_same(read_gptq(write_gptq(weight, version), bits, 64, version), weight)


@pytest.mark.parametrize("bits", WIDTHS)
def test_files_of_the_checkpoint_writers(bits, symmetric):
    """The project's writers and this reader agree on the weight that a file stands for."""
    writers = pytest.importorskip("compress.checkpoint.compressed_tensors")
    gptq = pytest.importorskip("compress.checkpoint.gptq")
    weight = random_weight(32, 128, bits, 32, symmetric)
    middle = 2 ** (bits - 1)
    signed = weight.codes.to(torch.int16) - middle
    zero = None if weight.zero is None else weight.zero.to(torch.int16) - middle
    tensors = writers.compress_module(signed, weight.scale, zero, bits)
    assert_same(read_compressed_tensors(tensors, bits, 32), weight)
    version = 1 if symmetric else 2
    tensors = gptq.pack_module(signed, weight.scale, zero, bits, version)
    assert_same(read_gptq(tensors, bits, 32, version), weight)


@pytest.mark.parametrize("bits", WIDTHS)
def test_compressed_tensors_library_dequantises_the_same(bits):
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weight = random_weight(32, 128, bits, 32)
    tensors = write_compressed_tensors(weight)
    signed = library.unpack_from_int32(tensors["weight_packed"], bits, weight.codes.shape)
    expected = signed.double() * weight.scale.double().repeat_interleave(32, dim=1)
    assert torch.equal(dequantize(weight), expected)


def test_act_order_is_undone():
    """A file with permuted groups stands for the matrix that g_idx says, input by input."""
    generator = torch.Generator().manual_seed(3)
    shuffle = torch.randperm(128, generator=generator)
    weight = random_weight(32, 128, 4, 32, symmetric=False)
    tensors = write_gptq(replace(weight, order=shuffle.argsort()), version=2)
    g_idx = tensors["g_idx"].long()
    assert not torch.equal(g_idx, torch.arange(128) // 32)
    read = read_gptq(tensors, 4, 32, version=2)
    # Oracle: input k has the codes of its own row in the file, and the scale of its g_idx.
    flat = read_gptq({k: t for k, t in tensors.items() if k != "g_idx"}, 4, 32, version=2)
    expected = (flat.codes.double() - flat.zero[:, g_idx].double()) * flat.scale.double()[:, g_idx]
    assert torch.equal(dequantize(read), expected)
    written = write_gptq(unpack_kernel(pack_kernel(read)), version=2)
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)


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


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_widths_between_are_read_and_not_run(bits):
    tensors = write_compressed_tensors(random_weight(20, 64, bits, 32, False))
    found = read_compressed_tensors(tensors, bits, 32)
    assert_same(found, random_weight(20, 64, bits, 32, False))
    with pytest.raises(ValueError, match=f"expected 2, 3, 4 and 8 bits, found {bits}"):
        pack_kernel(found)


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


def test_version_1_zero_point_of_zero_survives():
    weight = random_weight(32, 64, 4, 32, symmetric=False)
    weight.zero.zero_()
    assert_same(read_gptq(write_gptq(weight, 1), 4, 32, 1), weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": None}, r"q_proj: expected a tensor weight_scale"),
        ({"weight_scale": torch.ones(32, 3)}, r"q_proj.weight_scale: expected \[32, 2\], found"),
        ({"weight_packed": torch.ones(32, 7, dtype=torch.int32)}, r"expected \[32, 8\], found"),
        ({"weight_zero_point": torch.ones(4, 1, dtype=torch.int32)}, r"weight_zero_point: expec"),
    ],
)
def test_damaged_tensors_are_refused_by_name(change, message):
    tensors = write_compressed_tensors(random_weight(32, 64, 4, 32)) | change
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        read_compressed_tensors(tensors, 4, 32, name="q_proj")


def test_schemes_without_a_kernel_are_refused_by_name():
    tensors = write_gptq(random_weight(32, 64, 4, 32))
    with pytest.raises(ValueError, match="up_proj: expected 2, 3, 4 and 8 bits, found 5"):
        read_gptq(tensors, 5, 32, name="up_proj")
    with pytest.raises(ValueError, match=r"multiple of 16 inputs.* found 24"):
        read_gptq(tensors, 4, 24)
    tensors["g_idx"][0] = 1
    with pytest.raises(ValueError, match=r"up_proj.g_idx: expected groups of 32"):
        read_gptq(tensors, 4, 32, name="up_proj")
