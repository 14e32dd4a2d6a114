"""The layout `tiles`: every width and every dtype of activations, compiled for this machine.

64 outputs to a tile; 2, 3, 4 and 8 bits take just that. Layout and arithmetic: head of tiles.cpp,
which native.py compiles where it finds a C++ compiler. The codes of two inputs lie together and
share a scale, so groups have an even size.

    weight = TilesWeight.pack(codes)
    y = weight.matmul(x, bias)
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.kernels.codes import WIDTHS, Codes
from compress.kernels.cpu import native
from compress.kernels.cpu.native import LANES, TILE
from compress.kernels.cpu.weight import FloatWeight

FIELDS = TILE // LANES


class TilesWeight(FloatWeight):
    """A weight in tiles of 64 outputs. packed: uint8 [ceil(N / 64), ceil(K / 2), 16 * bits]."""

    @classmethod
    def takes(cls, weight: Codes, dtype: torch.dtype) -> bool:
        """Whether there are compiled kernels, and groups of an even size."""
        return (
            native.kernels() is not None
            and weight.bits in WIDTHS
            and weight.scale.dtype in native.KINDS
            and (weight.group_size or 2) % 2 == 0
        )

    @staticmethod
    def pack_codes(codes: Tensor, bits: int, group_size: int | None) -> Tensor:
        """Lays out codes uint8 [N, K]; padding is 0."""
        N, K = codes.shape
        padded = pad(codes, (0, K % 2, 0, -N % TILE))
        fields = padded.view(-1, FIELDS, LANES, padded.shape[1] // 2, 2)
        if bits == 8:
            return fields.permute(0, 3, 4, 2, 1).flatten(2).contiguous()
        numbers = torch.zeros_like(fields[:, 0, :, :, 0], dtype=torch.int32)
        for k, f, shift in _places(bits):
            numbers |= fields[:, f, :, :, k].int() << shift
        return _bytes(numbers.transpose(1, 2).contiguous(), bits)

    def unpack_codes(self) -> Tensor:
        """Gives codes uint8 [tiles * 64, pairs * 2] back, the padding included."""
        tiles, pairs, _ = self.packed.shape
        if self.bits == 8:
            fields = self.packed.view(tiles, pairs, 2, LANES, FIELDS).permute(0, 4, 3, 1, 2)
            return fields.reshape(tiles * TILE, pairs * 2)
        fields = self.packed.new_empty(tiles, FIELDS, LANES, pairs, 2)
        numbers = _numbers(self.packed, self.bits).transpose(1, 2).contiguous()
        for k, f, shift in _places(self.bits):
            fields[:, f, :, :, k] = (numbers >> shift) & (2**self.bits - 1)
        return fields.view(tiles * TILE, pairs * 2)

    def row_codes(self, ids: Tensor) -> Tensor:
        """Gives rows [n] of the codes, uint8 [n, pairs * 2]."""
        tiles, output, n = self.packed[ids // TILE], ids % TILE, torch.arange(len(ids))
        if self.bits == 8:
            fields = tiles.view(len(ids), -1, 2, LANES, FIELDS)
            return fields[n, :, :, output % LANES, output // LANES].flatten(1)
        numbers = _numbers(tiles, self.bits)[n, :, output % LANES] >> self.bits * (
            output // LANES
        ).int().unsqueeze(1)
        pairs = torch.stack([numbers, numbers >> 4 * self.bits], dim=-1) & (2**self.bits - 1)
        return pairs.to(torch.uint8).flatten(1)

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiplies x [M, K]: [M, N] in x's dtype. Raises ValueError without compiled kernels."""
        size, operators = self.group_size or 0, native.operators(x)
        multiply = tiles_matmul if operators is None else operators.tiles_matmul
        return multiply(x, self.packed, self.scale, self.zero, bias, self.bits, size)


# By address: one operator to torch.compile, which cannot trace that.
@torch.library.custom_op("modelpress::cpu_tiles_matmul", mutates_args=())
def tiles_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype; group_size 0 is one scale per output."""
    library = native.kernels()
    if library is None:
        raise ValueError(f"this weight was packed for compiled kernels, found {native.reason()}")
    y = library.tiles_matmul(x, packed, scale, zero, bits, group_size or None)
    if bias is not None:
        y += bias
    return y.to(x.dtype)


tiles_matmul.register_fake(native.products)


def _places(bits: int) -> list[tuple[int, int, int]]:
    """Of a pair's input k and field f of outputs: where in a number of up to 32 bits they begin."""
    return [(k, f, bits * (FIELDS * k + f)) for k in range(2) for f in range(FIELDS)]


def _bytes(numbers: Tensor, bits: int) -> Tensor:
    """Numbers int32 [..., 16] as bytes [..., 16 * bits]."""
    parts = numbers.unsqueeze(-1).view(torch.uint8)
    return (
        torch.cat([parts[..., :2].flatten(-2), parts[..., 2]], -1)
        if bits == 3
        else (parts[..., :bits].flatten(-2))
    )


def _numbers(packed: Tensor, bits: int) -> Tensor:
    """Bytes [..., 16 * bits] as numbers int32 [..., 16]: the inverse."""
    low = 2 if bits == 3 else bits
    parts = packed.new_zeros(*packed.shape[:-1], LANES, 4)
    parts[..., :low] = packed[..., : LANES * low].unflatten(-1, (LANES, low))
    if bits == 3:
        parts[..., 2] = packed[..., LANES * low :]
    return parts.view(torch.int32).squeeze(-1)
