"""The layout that GPU kernels read: codes in 32-bit words, each thread's share side by side.

What a thread of a tensor-core product multiplies lies in its own words, so that codes go from
memory to the product through registers alone. In a product of 16 x 16 weights, lane 4n + q of a
warp holds inputs 2q, 2q + 1, 2q + 8, 2q + 9 of outputs n and n + 8 (PTX ISA, fragments of
mma.m16n8k16 and of wgmma). Inputs are cut into blocks of 16 * E, E = 32 // b codes to a word:

    words [blocks, N, 16] int32:   bits [b*t + 16*e, ...) of words[i, n, 4*q + 2*h + j] are the code
                                   of output n and input (16*i) * E + 32*t + 16*h + 8*j + 2*q + e

with t < E / 2, q < 4 and bits h, j, e. So a thread's share of a block is 16 bytes of each of its
outputs, the outputs of a tile follow each other without gaps, the same shift of a whole tile gives
32 neighbouring inputs, and a mask leaves the codes of two neighbours where a register of two 16-bit
floats has them. 3 bits do not divide a word: they are a plane of 2 bits, laid out as above with
E = 16, and one of 1 bit,

    high  [blocks, N, 8] int32:    bit 4*(t // 2) + 2*j + t % 2 + 16*e of high[i, n, 2*q + h]

which one shift and one mask move to where four bits hold a code. Columns beyond K are 0 and meet no
input.

    weight = pack_kernel(codes)
    codes = unpack_kernel(weight)          # exact
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.kernels.codes import Codes, TensorRecord, check_scheme

WORDS = 16  # of an output and a block: 4 lanes have 16 bytes each


@dataclass(frozen=True)
class KernelWeight(TensorRecord):
    """A quantised weight as GPU kernels read it; the file's head describes `words` and `high`.

    high: None unless bits is 3. scale [G, N] in the file's dtype; zero uint8 [G, N], None if
    symmetric; order int64 [K] or None, as in Codes. columns: K.
    """

    words: Tensor
    high: Tensor | None
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int | None
    columns: int
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs, [N, K]."""
        return self.words.shape[1], self.columns


def block_columns(bits: int) -> int:
    """Inputs in one block of the kernel layout: 64, 128, 256, 256 for 8, 4, 3, 2 bits."""
    return WORDS * (32 // word_bits(bits))


def word_bits(bits: int) -> int:
    """Bits of a code that lie in `words`: all, or 2 of 3."""
    return 2 if bits == 3 else bits


def pack_kernel(weight: Codes) -> KernelWeight:
    """Lays the codes of a weight out for GPU kernels, on the device that holds them.

    Raises ValueError for a width other than 2, 3, 4 and 8, and for groups that are no multiple of
    8 inputs.
    """
    check_scheme(weight.bits, weight.group_size, "weight")
    codes, bits = weight.codes, weight.bits
    N, K = codes.shape
    part, size = word_bits(bits), block_columns(bits)
    codes = torch.nn.functional.pad(codes, (0, -K % size))
    # [N, blocks, t, h, j, q, e]
    fields = codes.view(N, -1, 16 // part, 2, 2, 4, 2).transpose(0, 1)
    high = None
    if bits == 3:
        # [blocks, N, t // 2, t % 2, h, j, q, e] -> [blocks, N, q, h, e, t // 2, j, t % 2]
        thirds = (fields >> 2).unflatten(2, (4, 2)).permute(0, 1, 6, 4, 7, 2, 5, 3)
        high = _gather_words(thirds.reshape(-1, N, 8, 32), 1)
    low = (fields & (2**part - 1)).permute(0, 1, 5, 3, 4, 6, 2)  # [blocks, N, q, h, j, e, t]
    return KernelWeight(
        words=_gather_words(low.reshape(-1, N, WORDS, 32 // part), part),
        high=high,
        scale=weight.scale.T.contiguous(),
        zero=None if weight.zero is None else weight.zero.T.contiguous(),
        bits=bits,
        group_size=weight.group_size,
        columns=K,
        order=weight.order,
    )


def kernel_rows(weight: KernelWeight, ids: Tensor) -> KernelWeight:
    """The weight of some outputs [n], in that order."""
    return replace(
        weight,
        words=weight.words[:, ids],
        high=None if weight.high is None else weight.high[:, ids],
        scale=weight.scale[:, ids],
        zero=None if weight.zero is None else weight.zero[:, ids],
    )


def unpack_kernel(weight: KernelWeight) -> Codes:
    """Gives the codes that `pack_kernel` laid out: its inverse, exact."""
    N, K = weight.shape
    part = word_bits(weight.bits)
    blocks = len(weight.words)
    low = _scatter_words(weight.words, part).view(blocks, N, 4, 2, 2, 2, 16 // part)
    fields = low.permute(1, 0, 6, 3, 4, 2, 5)  # [N, blocks, t, h, j, q, e]
    if weight.high is not None:
        thirds = _scatter_words(weight.high, 1).view(blocks, N, 4, 2, 2, 4, 2, 2)
        fields = fields | thirds.permute(1, 0, 5, 7, 3, 6, 2, 4).flatten(2, 3) << 2
    return Codes(
        codes=fields.reshape(N, -1)[:, :K].contiguous(),
        scale=weight.scale.T.contiguous(),
        zero=None if weight.zero is None else weight.zero.T.contiguous(),
        bits=weight.bits,
        group_size=weight.group_size,
        order=weight.order,
    )


def _gather_words(fields: Tensor, bits: int) -> Tensor:
    """uint8 [..., 32 // bits], field i at bits [bits*i, ...), -> int32 [...]."""
    words = torch.zeros_like(fields[..., 0], dtype=torch.int64)
    for i in range(fields.shape[-1]):
        words |= fields[..., i].to(torch.int64) << (bits * i)
    # the low half: a cast of 2^31 or more is undefined
    return words.view(torch.int32)[..., ::2].contiguous()


def _scatter_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_gather_words`: uint8 [..., 32 // bits]."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> shifts) & (2**bits - 1)).to(torch.uint8)
