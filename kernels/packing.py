"""Codes of 2 to 8 bits in 32-bit words: one dense little-endian bit stream per row.

Code k of a row takes bits [k*b, (k+1)*b) of that row's stream; bit i of the stream is bit i % 32 of
word i // 32. A code may straddle two words; only the end of a row is padded, with zeros.

    codes  [N, K] in [0, 2^b - 1]   ->   words  [N, ceil(K*b / 32)] int32

Eight codes of b bits are exactly b bytes. So the eight bytes of a 64-bit integer, a code each, are
put together by twos, these by twos, and these: its b low bytes are then their part of the stream.
Reading goes the other way, and no width needs a case of its own.
This is the layout of compressed-tensors `weight_packed`; GPTQ `qweight` is its transpose.

    words = pack_rows(codes, bits=3)
    codes = unpack_rows(words, bits=3, columns=K)
"""

import sys

import torch
from torch import Tensor

WIDTHS = range(2, 9)
WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # what holds eight codes, where it can
BLOCK_CODES = 1 << 20  # treated at a time: what is needed on the way stays in the cache


def packed_columns(columns: int, bits: int) -> int:
    """Words that a row of `columns` codes takes: ceil(columns * bits / 32)."""
    return -(-columns * bits // 32)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Packs unsigned codes [N, K] (any integer dtype) into int32 words [N, ceil(K*bits / 32)].

    Raises ValueError for a width outside 2..8 or a code outside [0, 2^bits - 1], which would
    otherwise spill into its neighbours.
    """
    _check(bits)
    rows, columns = codes.shape
    low, high = (int(edge) for edge in codes.aminmax()) if codes.numel() else (0, 0)
    if low < 0 or high >= 2**bits:
        raise ValueError(
            f"codes of {bits} bits must lie in [0, {2**bits - 1}], found [{low}, {high}]"
        )
    words = torch.empty(rows, packed_columns(columns, bits), dtype=torch.int32, device=codes.device)
    step = max(1, BLOCK_CODES // max(columns, 1))
    for start in range(0, rows, step):
        words[start : start + step] = _pack(codes[start : start + step], bits)
    return words


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The first `columns` codes of each row, uint8 [N, columns]; the inverse of `pack_rows`.

    Raises ValueError if the rows of `packed` (int32) are not as long as `columns` codes take.
    """
    _check(bits)
    rows, words = packed.shape
    if packed.dtype != torch.int32 or words != packed_columns(columns, bits):
        raise ValueError(
            f"{columns} codes of {bits} bits take {packed_columns(columns, bits)} int32 words "
            f"a row, found {words} of {packed.dtype}"
        )
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=packed.device)
    step = max(1, BLOCK_CODES // max(columns, 1))
    for start in range(0, rows, step):
        codes[start : start + step] = _unpack(packed[start : start + step], bits, columns)
    return codes


def _pack(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    blocks = -(-columns // 32)  # 32 codes fill `bits` whole words
    padded = torch.zeros(rows, blocks * 32, dtype=torch.uint8, device=codes.device)
    padded[:, :columns] = codes
    stream = padded.view(torch.int64)
    for width in (16, 32, 64) if bits < 8 else ():
        _move(stream, bits, width, width // 2, bits * width // 16)
    if bits in WHOLE:
        words = stream.to(WHOLE[bits]).view(torch.int32)
    else:
        octets = stream.view(torch.uint8).view(rows, blocks * 4, 8)[..., :bits]
        words = octets.reshape(rows, blocks * 4 * bits).view(torch.int32)
    return words[:, : packed_columns(columns, bits)]


def _unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    rows, words = packed.shape
    blocks = -(-columns // 32)
    if blocks * bits > words:
        packed = torch.nn.functional.pad(packed, (0, blocks * bits - words))
    if bits in WHOLE:
        # a copy begins at a whole integer, whatever tensor the words are part of
        stream = packed.flatten().clone().view(WHOLE[bits]).to(torch.int64)
    else:
        octets = packed.contiguous().view(torch.uint8).view(rows, blocks * 4, bits)
        stream = torch.nn.functional.pad(octets, (0, 8 - bits)).view(torch.int64).squeeze(-1)
    for width in (64, 32, 16) if bits < 8 else ():
        _move(stream, bits, width, bits * width // 16, width // 2)
    return stream.view(torch.uint8).view(rows, blocks * 32)[:, :columns]


def _move(stream: Tensor, bits: int, width: int, found: int, to: int) -> None:
    """In each lane of `width` bits, the upper half of its codes from bit `found` to bit `to`."""
    mask = _in_every_lane(2 ** (bits * width // 16) - 1, width)
    # the mask also drops what an arithmetic shift of a negative number brings in
    upper = (stream >> found) & mask
    stream &= mask
    stream |= upper << to


def _in_every_lane(value: int, width: int) -> int:
    """The int64 that has `value` in each of its lanes."""
    both = sum(value << at for at in range(0, 64, width))
    return both - 2**64 if both >= 2**63 else both


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"packing takes 2 to 8 bits, got {bits}")
    assert sys.byteorder == "little", "the byte views above assume a little-endian host"
