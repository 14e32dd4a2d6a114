"""Products of int8 activations with packed weights on a CPU. Two layouts, exact sums in int32.

`quads`. Codes stay packed, four inputs of an output to a lane, for processors that multiply bytes
in fours; compiled by native.py. 2, 4 and 8 bits lie as they are, 3 bits in 4. Layout and
arithmetic: head of quads.cpp.

`groups` (every processor). c - 2^(bits-1) in int8, a byte each whatever their width: torch._int_mm
reads nothing narrower, and each group of inputs in one piece.

    packed = pack_quads(codes, bits=4)
    y = integers_matmul(values, token_scale, packed, scale, zero, bias, 4, 128, torch.bfloat16)
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.kernels.cpu import native
from compress.kernels.cpu.native import LANES, QUAD, TILE
from compress.kernels.cpu.rows import STORED_BITS


def takes_quads(scale: Tensor, group_size: int | None) -> bool:
    """Whether weights with such scales and groups run compiled on this machine."""
    library = native.kernels()
    return (
        library is not None
        and library.takes_quads()
        and scale.dtype in native.KINDS
        and (group_size or 0) % QUAD == 0
    )


def pack_quads(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K] -> uint8 [ceil(N / 64), ceil(K / 4), 32 * stored bits]; padding is 0."""
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


def unpack_quads(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_quads`, with its padding: uint8 [tiles * 64, steps * 4]."""
    stored = STORED_BITS[bits]
    tiles, steps, _ = packed.shape
    vectors = packed.view(tiles, steps, -1, 1, LANES, QUAD)
    shifts = torch.arange(0, 8, stored, dtype=torch.uint8, device=packed.device)
    codes = (vectors >> shifts[:, None, None]) & (2**stored - 1)
    return codes.flatten(2, 4).transpose(1, 2).reshape(tiles * TILE, steps * QUAD)


def pack_groups(codes: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Codes [N, K] -> c - 2^(bits-1), int8 [G, N, K / G]; inputs beyond K are 0."""
    N, K = codes.shape
    size = group_size or max(K, 2)  # torch._int_mm (2.13) is wrong for one input
    values = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    return pad(values, (0, -K % size)).view(N, -1, size).transpose(0, 1).contiguous()


def unpack_groups(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_groups`, with its padding: uint8 [N, G * inputs]."""
    values = packed.transpose(0, 1).flatten(1).to(torch.int16)
    return (values + 2 ** (bits - 1)).to(torch.uint8)


# One operator to torch.compile, which knows neither layout.
@torch.library.custom_op("modelpress::cpu_integers_matmul", mutates_args=())
def integers_matmul(
    values: Tensor,
    token_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """values int8 [M, K], scales [M] -> [M, N] in `dtype`; group_size 0: one scale per output.

    packed: uint8 as `pack_quads` leaves it, or int8 as `pack_groups` does. Raises ValueError for
    the former in a process that has no compiled kernels.
    """
    if packed.dtype == torch.int8:
        y = _group_products(values, packed, scale, zero, bits) * token_scale[:, None]
    else:
        library = native.kernels()
        if library is None or not library.takes_quads():
            raise ValueError(f"this weight was packed for AVX512-VNNI, found {native.reason()}")
        y = library.quads_matmul(
            values, token_scale, packed, scale, zero, STORED_BITS[bits], group_size or None,
            2 ** (bits - 1),
        )  # fmt: skip
    if bias is not None:
        y += bias
    return y.to(dtype)


@integers_matmul.register_fake
def _(values, token_scale, packed, scale, zero, bias, bits, group_size, dtype):
    return values.new_empty(values.shape[0], scale.shape[1], dtype=dtype)


def _group_products(
    values: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int
) -> Tensor:
    """The sum over groups of scale * (values times c - z), without the scales of tokens."""
    G, N, size = packed.shape
    groups = pad(values, (0, G * size - values.shape[1])).view(-1, G, size).unbind(1)
    y = scale.new_zeros(len(values), N, dtype=torch.float32)
    for g, part in enumerate(groups):
        products = torch._int_mm(part.contiguous(), packed[g].T)
        if zero is not None:
            products += part.sum(1, True, dtype=torch.int32) * (2 ** (bits - 1) - zero[g].int())
        y.addcmul_(products, scale[g].float())
    return y
