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
        # outputs are joined where they lie, so that bytes move and not codes
        lanes = pad(codes, (0, K % 2, 0, -N % TILE)).view(-1, TILE // LANES, LANES, K + K % 2)
        if bits != 3:
            return _of_pairs(_join(lanes, bits))
        high = _join(lanes >> 2, 1).unflatten(-1, (-1, 2))
        high = high[..., 0] | high[..., 1] << 4
        return torch.cat([_of_pairs(_join(lanes & 3, 2)), high[:, 0].transpose(1, 2)], dim=-1)

    def unpack_codes(self) -> Tensor:
        """Gives codes uint8 [tiles * 64, pairs * 2] back, the padding included."""
        packed, bits = self.packed, self.bits
        low = 2 if bits == 3 else bits
        codes = _part(packed[..., : LANES * low], low)
        if bits == 3:
            codes |= _part(packed[..., LANES * low :], 1) << 2
        return codes.permute(0, 3, 1, 2).reshape(len(packed) * TILE, -1)

    def row_codes(self, ids: Tensor) -> Tensor:
        """Gives rows [n] of the codes, uint8 [n, pairs * 2]."""
        low = 2 if self.bits == 3 else self.bits
        tiles, output = self.packed[ids // TILE], ids % TILE
        codes = _row(tiles[..., : LANES * low], low, output)
        if self.bits == 3:
            codes |= _row(tiles[..., LANES * low :], 1, output) << 2
        return codes

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiplies x [M, K]: [M, N] in x's dtype. Raises ValueError without compiled kernels."""
        size = self.group_size or 0
        multiply = multiply_tiles if native.may_call(x) else tiles_matmul
        return multiply(x, self.packed, self.scale, self.zero, bias, self.bits, size)


def multiply_tiles(
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


# One operator to torch.compile, which cannot trace a call by address.
tiles_matmul = torch.library.custom_op(
    "modelpress::cpu_tiles_matmul", multiply_tiles, mutates_args=()
)


@tiles_matmul.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[1])


def _join(lanes: Tensor, bits: int) -> Tensor:
    """[tiles, 4, 16, K] -> [tiles, 4 * bits / 8, 16, K]: bytes of codes 16 outputs apart.

    One at least: four codes of 1 bit leave its upper half free.
    """
    each = min(8 // bits, lanes.shape[1])
    parts = lanes.unflatten(1, (-1, each))
    packed = parts[:, :, 0].clone()
    for i in range(1, each):
        packed |= parts[:, :, i] << (i * bits)
    return packed


def _of_pairs(packed: Tensor) -> Tensor:
    """[tiles, vectors, 16, K] -> [tiles, K / 2, 32 * vectors]: one input after another."""
    tiles, vectors, _, K = packed.shape
    inputs = packed.view(tiles, vectors * LANES, K).transpose(1, 2).contiguous()
    return inputs.view(tiles, K // 2, 2 * vectors * LANES)


def _row(packed: Tensor, bits: int, output: Tensor) -> Tensor:
    """The codes of one output of each tile: [n, pairs, 16 * bits], [n] -> [n, pairs * 2]."""
    codes = _part(packed, bits)
    return codes[torch.arange(len(output)), :, :, output].flatten(1)


def _part(packed: Tensor, bits: int) -> Tensor:
    """Bytes of codes 16 outputs apart: [..., 16 * bits] -> [..., 2, 64]."""
    lanes = packed.unflatten(-1, (-1, 1, LANES))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    codes = (lanes >> shifts) & (2**bits - 1)
    return codes.flatten(-3).unflatten(-1, (2, TILE))
