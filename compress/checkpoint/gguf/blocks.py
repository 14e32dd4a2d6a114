"""Integer codes as the blocks of GGUF, with no code changed.

A GGUF tensor [N, K] is N rows of blocks of 32 or 256 weights. A block carries its own scale d in
fp16, so a group of 128 weights becomes four blocks of 32 that repeat its scale:

    Q4_0, Q5_0, Q8_0    32   d * level, levels signed
    Q4_1                32   d * code + m, codes from 0; m = -d * zero point, if fp16 holds that
    Q3_K, Q6_K         256   d * sub-scale * level, a sub-scale for each 16 weights: all are 1
    Q2_K, Q4_K         256   d * sub-scale * code - m * sub-offset; sub-scales 1, m = d, and the
                             sub-offsets are the zero point

Here level = code - zero point. A type holds a module without loss if its groups are made of whole
blocks, its codes or levels are in range, and d (and m) are fp16 numbers. Sub-scales that differ
would be integer multiples of one d, which scales of a search are not: hence groups of 256.

    kind = exact_type(4, 32, None, BLOCK_TYPES.values())    # Q4_0
    data = pack(weight, kind)                               # [N, bytes of a row] uint8
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.checkpoint.packed_formats import with_fp16_scales
from compress.kernels.codes import Codes

SMALL, SUPER = 32, 256  # weights of a block: of the plain types, and of those with sub-scales


@dataclass(frozen=True)
class BlockType:
    """A block of `size` weights in `nbytes` bytes.

    `offset` types store codes from 0 and shift them by a zero point; others store signed levels.
    `encode` turns codes or levels from 0 [B, size] uint8, scales [B] fp16 and zero points [B]
    (from 0; offset types only) into blocks [B, nbytes].
    """

    name: str
    bits: int
    size: int
    nbytes: int
    offset: bool
    encode: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.size


# ---- choosing a type ----------------------------------------------------------------------------


def exact_type(
    bits: int, group_size: int, weight: Codes | None, kinds: Iterable[BlockType]
) -> BlockType | None:
    """The smallest of `kinds` that holds codes of `bits` bits without loss; None if none does.

    group_size: columns that share a scale. weight: asymmetric codes, whose values matter as well;
    None for symmetric ones, of which only width and group size do. Scales count as fp16.
    """
    for kind in sorted(kinds, key=lambda kind: kind.bits_per_weight):
        if kind.bits < bits or group_size % kind.size:
            continue
        if _holds_symmetric(kind) if weight is None else _holds(kind, weight):
            return kind
    return None


def _holds_symmetric(kind: BlockType) -> bool:
    """A zero point of half the range needs an exact offset, which only sub-offsets are."""
    return not kind.offset or kind.size == SUPER


def _holds(kind: BlockType, weight: Codes) -> bool:
    """Whether the values are in range, and offsets, where stored in fp16, are fp16 numbers."""
    if weight.zero is None:
        return _holds_symmetric(kind)
    if not kind.offset:
        low, high = (int(value) for value in _levels(weight).aminmax())
        return -(2 ** (kind.bits - 1)) <= low and high < 2 ** (kind.bits - 1)
    if kind.size == SUPER:
        return True  # a zero point is a whole number, and a sub-offset has more bits than it
    offset = with_fp16_scales(weight).scale.double() * weight.zero.double()
    return bool((offset.half().double() == offset).all())


def _levels(weight: Codes) -> Tensor:
    """code - zero point [N, K] int16."""
    zero = weight.zero_points().to(torch.int16).unsqueeze(-1)  # [N, G, 1]
    groups = weight.codes.to(torch.int16).view(*weight.scale.shape, -1)
    return (groups - zero).view(weight.codes.shape)


# ---- packing ------------------------------------------------------------------------------------


def pack(weight: Codes, kind: BlockType) -> np.ndarray:
    """The weight as rows of blocks [N, K / kind.size * kind.nbytes] uint8, scales in fp16.

    Raises ValueError if `kind` does not hold it.
    """
    (N, K), G = weight.codes.shape, weight.scale.shape[1]
    if kind.bits < weight.bits or K // G % kind.size or not _holds(kind, weight):
        raise ValueError(f"{kind.name} does not hold these codes: ask exact_type for one that does")
    scale, zero = (
        of_groups.repeat_interleave(K // G // kind.size, 1).flatten()  # of each block
        for of_groups in (with_fp16_scales(weight).scale, weight.zero_points())
    )
    codes = weight.codes if kind.offset else _levels(weight) + 2 ** (kind.bits - 1)
    blocks = codes.to(torch.uint8).numpy().reshape(-1, kind.size)
    return kind.encode(blocks, scale.numpy(), zero.numpy()).reshape(N, -1)


def _octets(numbers: np.ndarray) -> np.ndarray:
    """fp16 numbers [B] as little-endian bytes [B, 2]."""
    return numbers.astype("<f2").view(np.uint8).reshape(-1, 2)


def _stripes(codes: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Packs the lowest `bits` bits of codes [B, size]: byte i of a run holds code i, i + width, ...

    A run is the 8 / bits stripes of `width` codes that share `width` bytes.
    """
    runs = (codes & (2**bits - 1)).reshape(len(codes), -1, 8 // bits, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(runs << shifts, axis=2).reshape(len(codes), -1)


def _q4_0(levels: np.ndarray, d: np.ndarray, zero: np.ndarray) -> np.ndarray:
    return np.hstack([_octets(d), _stripes(levels, 4, 16)])


def _q4_1(codes: np.ndarray, d: np.ndarray, zero: np.ndarray) -> np.ndarray:
    m = -d.astype(np.float64) * zero
    return np.hstack([_octets(d), _octets(m), _stripes(codes, 4, 16)])


def _q5_0(levels: np.ndarray, d: np.ndarray, zero: np.ndarray) -> np.ndarray:
    high = np.packbits(levels >> 4, axis=1, bitorder="little")  # bit i: of weight i
    return np.hstack([_octets(d), high, _stripes(levels, 4, 16)])


def _q8_0(levels: np.ndarray, d: np.ndarray, zero: np.ndarray) -> np.ndarray:
    return np.hstack([_octets(d), levels ^ 0x80])  # from 0 to two's complement


def _q2_k(codes: np.ndarray, d: np.ndarray, zero: np.ndarray) -> np.ndarray:
    scales = np.repeat((1 | zero << 4)[:, None], 16, 1)  # sub-scale below, sub-offset above
    return np.hstack([scales, _stripes(codes, 2, 32), _octets(d), _octets(d)])


def _q3_k(levels: np.ndarray, d: np.ndarray, zero: np.ndarray) -> np.ndarray:
    # Sub-scales are 6 bits and less by 32 when read: 33 = 0b10_0001. The lower four bits of all
    # sixteen come first, two a byte, then the upper two, four a byte.
    scales = np.tile(np.array([0x11] * 8 + [0xAA] * 4, np.uint8), (len(levels), 1))
    high = _stripes(levels >> 2, 1, 32)
    return np.hstack([high, _stripes(levels, 2, 32), scales, _octets(d)])


def _q4_k(codes: np.ndarray, d: np.ndarray, zero: np.ndarray) -> np.ndarray:
    # Eight sub-scales and sub-offsets of 6 bits in 12 bytes: the first four of each are the lower
    # bits of bytes 0-3 and 4-7, the lower four bits of the others share bytes 8-11, and their upper
    # two bits (of a sub-scale of 1 and a zero point below 16: none) top bytes 0-7.
    scales = np.repeat(np.stack([np.ones_like(zero), zero, 1 | zero << 4], 1), 4, 1)
    return np.hstack([_octets(d), _octets(d), scales, _stripes(codes, 4, 32)])


def _q6_k(levels: np.ndarray, d: np.ndarray, zero: np.ndarray) -> np.ndarray:
    scales = np.ones((len(levels), 16), np.uint8)
    return np.hstack([_stripes(levels, 4, 64), _stripes(levels >> 4, 2, 32), scales, _octets(d)])


BLOCK_TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q2_K", 2, SUPER, 84, True, _q2_k),
        BlockType("Q3_K", 3, SUPER, 110, False, _q3_k),
        BlockType("Q4_0", 4, SMALL, 18, False, _q4_0),
        BlockType("Q4_K", 4, SUPER, 144, True, _q4_k),
        BlockType("Q4_1", 4, SMALL, 20, True, _q4_1),
        BlockType("Q5_0", 5, SMALL, 22, False, _q5_0),
        BlockType("Q6_K", 6, SUPER, 210, False, _q6_k),
        BlockType("Q8_0", 8, SMALL, 34, False, _q8_0),
    )
}
