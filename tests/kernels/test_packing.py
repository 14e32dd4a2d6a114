"""The packed layout: exact round trips, and the same words as compressed-tensors writes."""

import pytest
import torch

from compress.kernels.packing import pack_rows, packed_columns, unpack_rows

WIDTHS = [2, 3, 4, 5, 6, 7, 8]
COLUMNS = [1, 7, 31, 32, 33, 64, 100, 129]


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * bits + columns)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_round_trip(bits, columns):
    codes = random_codes(5, columns, bits)
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, packed_columns(columns, bits))
    assert torch.equal(unpack_rows(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_each_row_is_one_little_endian_number(bits):
    """Oracle in Python integers: row = sum of code_k * 2^(k*bits)."""
    codes = random_codes(3, 45, bits)
    for row, words in zip(codes.tolist(), pack_rows(codes, bits).tolist(), strict=True):
        expected = sum(code << (k * bits) for k, code in enumerate(row))
        found = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
        assert found == expected


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_words_equal_those_of_compressed_tensors(bits, columns):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(6, columns, bits)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits)
    assert torch.equal(pack_rows(codes, bits), theirs)
    assert torch.equal(
        unpack_rows(theirs, bits, columns).int() - 2 ** (bits - 1),
        helpers.unpack_from_int32(theirs, bits, codes.shape).int(),
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_gives_the_same_words(dtype):
    codes = random_codes(4, 64, 5)
    kept = codes.to(dtype)
    assert torch.equal(pack_rows(kept, 5), pack_rows(codes, 5))
    assert torch.equal(kept, codes.to(dtype))  # packing works on a copy


@pytest.mark.parametrize("columns", [40, 64])
def test_non_contiguous_codes(columns):
    codes = random_codes(columns, 6, 3).T
    assert torch.equal(pack_rows(codes, 3), pack_rows(codes.contiguous(), 3))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows", [1, 5])
def test_words_that_are_part_of_another_tensor(bits, rows):
    codes = random_codes(rows, 64, bits)
    words = pack_rows(codes, bits)
    for first, beyond in ((0, 1), (1, 0), (1, 1), (1, 2)):
        larger = torch.full((rows + 1, first + words.shape[1] + beyond), -1, dtype=torch.int32)
        part = larger[1:, first : first + words.shape[1]]
        part.copy_(words)
        assert torch.equal(unpack_rows(part, bits, 64), codes)
        part = larger.T.contiguous().T[1:, first : first + words.shape[1]]
        assert torch.equal(unpack_rows(part, bits, 64), codes)


@pytest.mark.parametrize("bad", [-1, 8])
def test_a_code_that_does_not_fit_is_refused(bad):
    codes = torch.zeros(2, 32, dtype=torch.int32)
    codes[1, 5] = bad
    with pytest.raises(ValueError, match=rf"\[0, 7\].*{bad}"):
        pack_rows(codes, 3)


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_widths_outside_2_to_8_are_refused(bits):
    with pytest.raises(ValueError, match="2 to 8 bits"):
        pack_rows(torch.zeros(1, 32, dtype=torch.uint8), bits)


def test_rows_of_the_wrong_length_are_refused():
    packed = pack_rows(random_codes(2, 64, 4), 4)
    with pytest.raises(ValueError, match="take 4 int32 words"):
        unpack_rows(packed, 4, 32)


@pytest.mark.parametrize("bits", WIDTHS)
def test_unpacking_block_by_block_is_the_same(bits, monkeypatch):
    """Of 7 rows in blocks of 3: the last block is short."""
    codes = torch.randint(0, 2**bits, (7, 40), dtype=torch.uint8)
    monkeypatch.setattr("compress.kernels.packing.BLOCK_CODES", 3 * 40 + 1)
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, 40), codes)
