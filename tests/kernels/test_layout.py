"""File layout, codes, kernel layout: exact both ways, and the same files as the writers make."""

from dataclasses import replace

import pytest
import torch

from compress.kernels.codes import (
    block_columns,
    concatenate,
    pack_kernel,
    read_compressed_tensors,
    read_gptq,
    unpack_kernel,
    with_bits,
    write_compressed_tensors,
    write_gptq,
)
from compress.kernels.reference import dequantize, reference_matmul
from support.weights import assert_same, random_weight

WIDTHS = [2, 3, 4, 8]
GROUPS = [32, 64, 128, 256, None]


@pytest.fixture(params=[True, False], ids=["symmetric", "asymmetric"])
def symmetric(request):
    return request.param


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("K", [64, 200, 512, 777])
def test_kernel_layout_is_exact_both_ways(bits, group_size, K, symmetric):
    weight = random_weight(33, K, bits, group_size, symmetric)
    assert_same(unpack_kernel(pack_kernel(weight)), weight)


@pytest.mark.parametrize("bits", WIDTHS)
def test_each_code_lies_where_the_layout_says(bits):
    """Oracle: the formula of the file's head, one code at a time, in Python integers."""
    weight = random_weight(3, 530, bits, 32)
    packed = pack_kernel(weight)
    part, size = (2 if bits == 3 else bits), block_columns(bits)
    words = (packed.words.long() & 0xFFFFFFFF).tolist()
    high = (packed.high.long() & 0xFFFFFFFF).tolist() if bits == 3 else None
    for n, row in enumerate(weight.codes.tolist()):
        for k, code in enumerate(row):
            i, inner = divmod(k, size)
            t, h, j, q, e = inner // 32, inner // 16 % 2, inner // 8 % 2, inner // 2 % 4, inner % 2
            found = words[i][n][4 * q + 2 * h + j] >> (part * t + 16 * e) & (2**part - 1)
            if bits == 3:
                bit = 4 * (t // 2) + 2 * j + t % 2 + 16 * e
                found |= (high[i][n][2 * q + h] >> bit & 1) << 2
            assert found == code, (n, k)


@pytest.mark.parametrize("bits", WIDTHS)
def test_whole_blocks_take_exactly_their_bits(bits):
    packed = pack_kernel(random_weight(8, 512, bits, None))
    assert packed.zero is None
    assert packed.nbytes == 512 * bits // 8 * 8 + 8 * 2


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


def test_reference_is_the_formula():
    weight = random_weight(5, 40, 3, 16, symmetric=False)
    x, bias = torch.randn(2, 40), torch.randn(5)
    y = reference_matmul(x, weight, bias)
    for m in range(2):
        for n in range(5):
            total = float(bias[n])
            for k in range(40):
                offset = int(weight.codes[n, k]) - int(weight.zero[n, k // 16])
                total += float(x[m, k]) * offset * float(weight.scale[n, k // 16])
            assert float(y[m, n]) == pytest.approx(total, rel=1e-12, abs=1e-12)


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
