"""The layouts `quads` and `groups`, for activations rounded to int8: exact sums in int32.

`quads`. Codes stay packed, four inputs of an output to a lane, for processors that multiply bytes
in fours (VNNI, ARM's dot product) or in pairs (AVX2); compiled by native.py. 2, 4 and 8 bits lie as
they are, 3 bits in 4. Layout and arithmetic: head of quads.cpp.

`groups` (every processor). c - 2^(bits-1) in int8, a byte each whatever their width: torch._int_mm
reads nothing narrower, and each group of inputs in one piece.

    weight = GroupsWeight.pack(codes)
    y = weight.matmul(values, token_scale, bias, torch.bfloat16)
"""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.kernels.codes import WIDTHS, Codes
from compress.kernels.cpu import native
from compress.kernels.cpu.native import LANES, QUAD, TILE
from compress.kernels.cpu.weight import STORED_BITS, IntegerWeight


class QuadsWeight(IntegerWeight):
    """A weight in fours of inputs. packed: uint8 [ceil(N / 64), ceil(K / 4), 32 * stored bits]."""

    @classmethod
    def takes(cls, weight: Codes) -> bool:
        """Whether this processor multiplies bytes in fours, and a group is made of such."""
        library = native.kernels()
        return (
            library is not None
            and library.takes_quads()
            and weight.bits in WIDTHS
            and weight.scale.dtype in native.KINDS
            and (weight.group_size or 0) % QUAD == 0
        )

    @staticmethod
    def pack_codes(codes: Tensor, bits: int, group_size: int | None) -> Tensor:
        """Lays out codes uint8 [N, K]; padding is 0."""
        stored = STORED_BITS[bits]
        each = 8 // stored
        N, K = codes.shape
        padded = pad(codes, (0, -K % QUAD, 0, -N % TILE))
        # tile, vector, part of a byte, lane, step, input
        parts = padded.view(len(padded) // TILE, -1, each, LANES, padded.shape[1] // QUAD, QUAD)
        packed = parts[:, :, 0].clone()
        for i in range(1, each):
            packed |= parts[:, :, i] << (i * stored)
        return packed.permute(0, 3, 1, 2, 4).flatten(2).contiguous()

    def unpack_codes(self) -> Tensor:
        """Gives codes uint8 [tiles * 64, steps * 4] back, the padding included."""
        stored = STORED_BITS[self.bits]
        tiles, steps, _ = self.packed.shape
        vectors = self.packed.view(tiles, steps, -1, 1, LANES, QUAD)
        shifts = torch.arange(0, 8, stored, dtype=torch.uint8, device=self.packed.device)
        codes = (vectors >> shifts[:, None, None]) & (2**stored - 1)
        return codes.flatten(2, 4).transpose(1, 2).reshape(tiles * TILE, steps * QUAD)

    def row_codes(self, ids: Tensor) -> Tensor:
        """Gives rows [n] of the codes, uint8 [n, steps * 4]."""
        tiles = replace(self, packed=self.packed[ids // TILE]).unpack_codes()
        return tiles.view(len(ids), TILE, -1)[torch.arange(len(ids)), ids % TILE]

    def matmul(
        self, values: Tensor, token_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Multiplies int8 values [M, K]: [M, N] in `dtype`. Raises ValueError on another CPU."""
        weight = (self.packed, self.scale, self.zero, bias, self.bits, STORED_BITS[self.bits])
        operators, size = native.operators(values), self.group_size or 0
        multiply = quads_matmul if operators is None else operators.quads_matmul
        return multiply(values, token_scale, *weight, size, dtype)


class GroupsWeight(IntegerWeight):
    """A weight in groups of inputs, a byte for each code. packed: int8 [G, N, K / G]."""

    @classmethod
    def takes(cls, weight: Codes) -> bool:
        """Every weight of a width that kernels run."""
        return weight.bits in WIDTHS

    @staticmethod
    def pack_codes(codes: Tensor, bits: int, group_size: int | None) -> Tensor:
        """Lays out codes uint8 [N, K] as integers around 0; padding is 0."""
        N, K = codes.shape
        size = group_size or max(K, 2)  # torch._int_mm (2.13) is wrong for one input
        values = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
        return pad(values, (0, -K % size)).view(N, -1, size).transpose(0, 1).contiguous()

    def unpack_codes(self) -> Tensor:
        """Gives codes uint8 [N, G * inputs] back, the padding included."""
        values = self.packed.transpose(0, 1).flatten(1).to(torch.int16)
        return (values + 2 ** (self.bits - 1)).to(torch.uint8)

    def row_codes(self, ids: Tensor) -> Tensor:
        """Gives rows [n] of the codes, uint8 [n, G * inputs]."""
        return replace(self, packed=self.packed[:, ids]).unpack_codes()

    def matmul(
        self, values: Tensor, token_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Multiplies int8 values [M, K]: [M, N] in `dtype`."""
        return groups_matmul(
            values, token_scale, self.packed, self.scale, self.zero, bias, self.bits, dtype
        )


# ---- quads --------------------------------------------------------------------------------------


# By address: one operator to torch.compile, which cannot trace that.
@torch.library.custom_op("modelpress::cpu_quads_matmul", mutates_args=())
def quads_matmul(
    values: Tensor,
    token_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    stored: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """values int8 [M, K], scales [M] -> [M, N] in `dtype`; group_size 0: one scale per output.

    stored: bits that a code of `bits` lies in.

    Raises ValueError in a process that has no compiled kernels, or none for this processor.
    """
    library = native.kernels()
    if library is None or not library.takes_quads():
        raise ValueError(f"this weight was packed for products of bytes, found {native.reason()}")
    middle = 2 ** (bits - 1)
    y = library.quads_matmul(
        values, token_scale, packed, scale, zero, stored, group_size or None, middle
    )
    if bias is not None:
        y += bias
    return y.to(dtype)


quads_matmul.register_fake(native.integer_products)


# ---- groups -------------------------------------------------------------------------------------


# One operator to torch.compile, however many groups there are.
@torch.library.custom_op("modelpress::cpu_groups_matmul", mutates_args=())
def groups_matmul(
    values: Tensor,
    token_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """values int8 [M, K], scales [M] -> [M, N] in `dtype`."""
    y = _group_products(values, packed, scale, zero, bits) * token_scale[:, None]
    if bias is not None:
        y += bias
    return y.to(dtype)


groups_matmul.register_fake(native.integer_products)


def _group_products(
    values: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int
) -> Tensor:
    """The sum over groups of scale * (values times c - z), without the scales of tokens."""
    G, N, size = packed.shape
    groups = pad(values, (0, G * size - values.shape[1])).view(-1, G, size).unbind(1)
    y = scale.new_zeros(len(values), N, dtype=torch.float32)
    for g, part in enumerate(groups):
        products = int_products(part.contiguous(), packed[g])
        if zero is not None:
            products += part.sum(1, True, dtype=torch.int32) * (2 ** (bits - 1) - zero[g].int())
        y.addcmul_(products, scale[g].float())
    return y


EXACT = 1024  # products of two bytes, 2^14 each, that fp32 sums exactly


def int_products(values: Tensor, weight: Tensor) -> Tensor:
    """int8 values [M, K] times the transpose of int8 weights [N, K]: int32 [M, N], exact."""
    if _int_mm_is_exact():
        return torch._int_mm(values, weight.T)
    y = values.new_zeros(len(values), len(weight), dtype=torch.int32)
    for x, w in zip(values.split(EXACT, 1), weight.split(EXACT, 1), strict=True):
        y += (x.float() @ w.float().T).int()
    return y


@cache
def _int_mm_is_exact() -> bool:
    """Whether torch._int_mm sums exactly on this processor.

    Where x86 has no VNNI, oneDNN (torch 2.13) sums two products in 16 bits, and cuts what does not
    fit: 2 * 255 * 127.
    """
    values, weight = (torch.full((M, 64), 127, dtype=torch.int8) for M in (17, 32))
    return bool((torch._int_mm(values, weight.T) == 64 * 127 * 127).all())
