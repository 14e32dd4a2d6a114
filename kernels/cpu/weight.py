"""Packed products on a CPU: weights stay packed. Three layouts for floats, two for integers.

`tiles` (every width and dtype, groups of an even size). Compiled for this machine by native.py,
where it has a C++ compiler; 2, 3, 4 and 8 bits take just that. Layout and arithmetic: head of
tiles.cpp.

Without a compiler:
`int4` (3 and 4 bits, symmetric, bf16 scales and activations). torch's weight-only int4 operator. It
beats a bf16 product up to some tens of rows, and with hundreds it is slower than one.
`rows` (everything else). torch's embedding tables: cpu_rows.py. 3 bits are stored in 4.

`quads`, `groups` (activations rounded to int8): cpu_integers.py.

    weight = pack_cpu(codes, dtype=torch.bfloat16)
    y = cpu_matmul(x, weight, bias)
    codes = unpack_cpu(weight)             # exact
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.kernels.codes import Codes, check_integer_sums, tensors_of
from compress.kernels.cpu import native
from compress.kernels.cpu.integers import (
    pack_groups,
    pack_quads,
    takes_quads,
    unpack_groups,
    unpack_quads,
)
from compress.kernels.cpu.native import LANES, TILE
from compress.kernels.cpu.rows import pack_table, rows_matmul, unpack_table

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of activations
INT4_GROUPS = (32, 64, 128, 256)
INT4_OUTPUTS = 16  # the operator wants a multiple
UNPACK_ROWS = 512  # of the identity that reads an int4 weight back
INTEGER_KINDS = ("quads", "groups")


@dataclass(frozen=True)
class CpuWeight:
    """A quantised weight as CPU products read it.

    kind "tiles": packed uint8 [ceil(N / 64), ceil(K / 2), 16 * bits].
    kind "rows": packed uint8 [K, bytes], each row with its own scale 1 and offset -2^(bits-1) at
    the end. Both: scale [G, N]; zero uint8 [G, N] or None.
    kind "int4": packed as torch's operator packs; scale bf16 [G, N, 2], scales and zeros (0).
    kinds "quads", "groups", for int8 activations: packed uint8 [ceil(N / 64), ceil(K / 4), 32 *
    stored bits], int8 [G, N, K / G]; scale [G, N]; zero uint8 [G, N] or None.
    """

    kind: str
    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int | None
    shape: tuple[int, int]
    order: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in tensors_of(self).values())


def takes_int4(weight: Codes, dtype: torch.dtype) -> bool:
    """Whether torch's int4 operator computes this weight without changing a code or a scale."""
    N, K = weight.codes.shape
    return (
        dtype == weight.scale.dtype == torch.bfloat16
        and weight.bits in (3, 4)
        and weight.zero is None
        and weight.group_size in INT4_GROUPS
        and K % weight.group_size == 0
        and N % INT4_OUTPUTS == 0
    )


def pack_cpu(weight: Codes, dtype: torch.dtype, kind: str | None = None) -> CpuWeight:
    """The layout that is fastest on this machine for activations of `dtype`, or the one named.

    Raises ValueError for a kind that does not take this weight.
    """
    N, K = weight.codes.shape
    if kind is None:
        without = "int4" if takes_int4(weight, dtype) else "rows"
        kind = "tiles" if _takes_tiles(weight) else without
    common = {
        "kind": kind,
        "bits": weight.bits,
        "group_size": weight.group_size,
        "shape": (N, K),
        "order": weight.order,
    }
    if kind == "int4":
        if not takes_int4(weight, dtype):
            raise ValueError("torch's int4 operator takes no such weight: let the kind be chosen")
        shifted = weight.codes.to(torch.int32) + (8 - 2 ** (weight.bits - 1))  # z = 8 there
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(shifted, 1)
        scale = torch.stack([weight.scale.T, torch.zeros_like(weight.scale.T)], dim=-1)
        return CpuWeight(packed=packed, scale=scale.contiguous(), zero=None, **common)
    if kind not in ("tiles", "rows", *INTEGER_KINDS):
        raise ValueError(f"CPU layouts are tiles, int4, rows, quads and groups, found {kind!r}")
    if kind in INTEGER_KINDS:
        check_integer_sums(K, weight.group_size)
    codes, bits = weight.codes, weight.bits
    pack = {
        "tiles": lambda: _pack_tiles(codes, bits),
        "rows": lambda: pack_table(codes.T, bits),
        "quads": lambda: pack_quads(codes, bits),
        "groups": lambda: pack_groups(codes, bits, weight.group_size),
    }
    return CpuWeight(
        packed=pack[kind](),
        scale=weight.scale.T.contiguous(),
        zero=None if weight.zero is None else weight.zero.T.contiguous(),
        **common,
    )


def pack_integers(weight: Codes) -> CpuWeight:
    """The layout that is fastest on this machine for activations rounded to int8.

    Raises ValueError as `check_integer_sums` does.
    """
    kind = "quads" if takes_quads(weight.scale, weight.group_size) else "groups"
    return pack_cpu(weight, torch.int8, kind)


def unpack_cpu(weight: CpuWeight) -> Codes:
    """The inverse of `pack_cpu`, whatever the layout."""
    N, K = weight.shape
    packed, bits = weight.packed, weight.bits
    scale = weight.scale[..., 0] if weight.kind == "int4" else weight.scale
    unpack = {
        "int4": lambda: _unpack_int4(weight),
        "rows": lambda: unpack_table(packed, bits, N).T,
        "tiles": lambda: _unpack_tiles(packed, bits),
        "quads": lambda: unpack_quads(packed, bits),
        "groups": lambda: unpack_groups(packed, bits),
    }
    codes = unpack[weight.kind]()[:N, :K].contiguous()
    zero = None if weight.zero is None else weight.zero.T.contiguous()
    return Codes(codes, scale.T.contiguous(), zero, weight.bits, weight.group_size, weight.order)


def cpu_matmul(x: Tensor, weight: CpuWeight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times the transpose of `weight` [N, K], plus bias [N]: [M, N] in x's dtype.

    Raises ValueError for another K, dtype or device, for a weight packed for other activations, and
    where a weight packed for compiled kernels meets a process that has none.
    """
    N, K = weight.shape
    if x.shape[-1] != K:
        raise ValueError(f"expected activations of {K} features, found {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"expected activations in fp16, bf16 or fp32, found {x.dtype}")
    if x.device.type != weight.packed.device.type:  # its address would be read as one of here
        raise ValueError(f"expected activations on {weight.packed.device}, found {x.device}")
    if weight.kind in INTEGER_KINDS:
        raise ValueError("this weight was packed for activations in int8, not in floats")
    if weight.order is not None:
        x = x[..., weight.order]
    if weight.kind == "int4":
        return _int4_matmul(x, weight, bias)
    size = weight.group_size or 0
    if weight.kind == "rows":
        return rows_matmul(x, weight.packed, weight.scale, weight.zero, bias, weight.bits, size, N)
    return _tiles_matmul(x, weight.packed, weight.scale, weight.zero, bias, weight.bits, size)


def _takes_tiles(weight: Codes) -> bool:
    pairs = (weight.group_size or 2) % 2 == 0
    return native.kernels() is not None and weight.scale.dtype in native.KINDS and pairs


# ---- tiles --------------------------------------------------------------------------------------


@torch.library.custom_op("modelpress::cpu_tiles_matmul", mutates_args=())
def _tiles_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """x [M, K] -> [M, N]; group_size 0 is one scale per output."""
    library = native.kernels()
    if library is None:
        raise ValueError(f"this weight was packed for compiled kernels, found {native.reason()}")
    y = library.tiles_matmul(x, packed, scale, zero, bits, group_size or None)
    if bias is not None:
        y += bias
    return y.to(x.dtype)


@_tiles_matmul.register_fake
def _(x, packed, scale, zero, bias, bits, group_size):
    return x.new_empty(x.shape[0], scale.shape[1])


def _pack_tiles(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K] -> uint8 [ceil(N / 64), ceil(K / 2), 16 * bits]; padding is 0."""
    N, K = codes.shape
    # outputs are joined where they lie, so that bytes move and not codes
    lanes = pad(codes, (0, K % 2, 0, -N % TILE)).view(-1, TILE // LANES, LANES, K + K % 2)
    if bits != 3:
        return _of_pairs(_join(lanes, bits))
    high = _join(lanes >> 2, 1).unflatten(-1, (-1, 2))
    high = high[..., 0] | high[..., 1] << 4
    return torch.cat([_of_pairs(_join(lanes & 3, 2)), high[:, 0].transpose(1, 2)], dim=-1)


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


def _unpack_tiles(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack_tiles`, with its padding: uint8 [tiles * 64, pairs * 2]."""
    low = 2 if bits == 3 else bits
    codes = _part(packed[..., : LANES * low], low)
    if bits == 3:
        codes |= _part(packed[..., LANES * low :], 1) << 2
    return codes.permute(0, 3, 1, 2).reshape(len(packed) * TILE, -1)


def _part(packed: Tensor, bits: int) -> Tensor:
    """Bytes of codes 16 outputs apart: [..., 16 * bits] -> [..., 2, 64]."""
    lanes = packed.unflatten(-1, (-1, 1, LANES))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    codes = (lanes >> shifts) & (2**bits - 1)
    return codes.flatten(-3).unflatten(-1, (2, TILE))


# ---- torch's int4 operator ----------------------------------------------------------------------


def _int4_matmul(x: Tensor, weight: CpuWeight, bias: Tensor | None) -> Tensor:
    if x.dtype != torch.bfloat16:
        raise ValueError(
            f"this weight was packed for bf16 activations, found {x.dtype}: load the model "
            f"with that dtype"
        )
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.contiguous(), weight.packed, weight.group_size, weight.scale
    )
    return y if bias is None else y + bias


def _unpack_int4(weight: CpuWeight) -> Tensor:
    """Codes [N, K], by multiplying the identity with scales of 1."""
    ones = torch.zeros_like(weight.scale)
    ones[..., 0] = 1
    exact = replace(weight, scale=ones, order=None)
    identity = torch.eye(weight.shape[1]).bfloat16()
    rows = [cpu_matmul(block, exact) for block in identity.split(UNPACK_ROWS)]
    middle = 2 ** (weight.bits - 1)
    codes = torch.cat([(block.to(torch.int16) + middle).to(torch.uint8) for block in rows])
    return codes.T.contiguous()
