"""Packed products on a CPU, by operators that torch has: weights stay packed, sums are in fp32.

`rows` (every width, dtype and group size). The weight is stored input by input, a row of N codes at
a time, as torch's quantised embedding tables are. A weighted sum of table rows is then a product:

    bag_g = sum over inputs k of group g of x[k] * (code row k)        [N]
    y     = sum over g of scale_g * (bag_g - (zero_g * sum of x[k]))

`embedding_bag` reads 2, 4 and 8 bits as they lie. It treats one row of x at a time, so more than
BAG_ROWS rows are multiplied by blocks of the weight, expanded one after another. 3 bits are stored
in 4.

`int4` (3 and 4 bits, symmetric, bf16 scales and activations). torch's weight-only int4 operator. It
beats a bf16 product up to some tens of rows, and with hundreds it is slower than one.

    weight = pack_cpu(codes, dtype=torch.bfloat16)
    y = cpu_matmul(x, weight, bias)
    codes = unpack_cpu(weight)             # exact
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.kernels.layout import Codes, tensors_of

# Above this many rows, expanding the weight costs less than reading it once for each row.
BAG_ROWS = 8
BAG_INPUTS = 512  # of one bag where a scale covers more: shorter fp32 sums
BLOCK_WEIGHTS = 1 << 18  # expanded at a time: 1 MB in fp32 stays in the cache
INT4_GROUPS = (32, 64, 128, 256)
INT4_OUTPUTS = 16  # the operator wants a multiple
STORED_BITS = {2: 2, 3: 4, 4: 4, 8: 8}


@dataclass(frozen=True)
class CpuWeight:
    """A quantised weight as CPU operators read it.

    kind "rows": packed uint8 [K, bytes], each row with its own scale 1 and offset -2^(bits-1) at
    the end; scale [G, N]; zero uint8 [G, N] or None.
    kind "int4": packed as torch's operator packs; scale bf16 [G, N, 2], scales and zeros (0).
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


def pack_cpu(weight: Codes, dtype: torch.dtype) -> CpuWeight:
    """The layout that is fastest for activations of `dtype`."""
    N, K = weight.codes.shape
    common = {
        "bits": weight.bits,
        "group_size": weight.group_size,
        "shape": (N, K),
        "order": weight.order,
    }
    if takes_int4(weight, dtype):
        shifted = weight.codes.to(torch.int32) + (8 - 2 ** (weight.bits - 1))  # z = 8 there
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(shifted, 1)
        scale = torch.stack([weight.scale.T, torch.zeros_like(weight.scale.T)], dim=-1)
        return CpuWeight("int4", packed, scale.contiguous(), None, **common)
    return CpuWeight(
        kind="rows",
        packed=_pack_table(weight.codes.T, weight.bits),
        scale=weight.scale.T.contiguous(),
        zero=None if weight.zero is None else weight.zero.T.contiguous(),
        **common,
    )


def unpack_cpu(weight: CpuWeight) -> Codes:
    """The inverse of `pack_cpu`."""
    N, K = weight.shape
    middle = 2 ** (weight.bits - 1)
    if weight.kind == "int4":
        scale = weight.scale[..., 0].T.contiguous()
        ones = torch.zeros_like(weight.scale)
        ones[..., 0] = 1
        exact = replace(weight, scale=ones, order=None)
        rows = [
            cpu_matmul(row_block, exact) for row_block in torch.eye(K).bfloat16().split(BAG_INPUTS)
        ]
        codes = torch.cat([(block.to(torch.int16) + middle).to(torch.uint8) for block in rows])
    else:
        scale = weight.scale.T.contiguous()
        blocks = weight.packed.split(max(1, BLOCK_WEIGHTS // N))
        codes = torch.cat(
            [(_table_rows(b, weight)[:, :N] + middle).to(torch.uint8) for b in blocks]
        )
    zero = None if weight.zero is None else weight.zero.T.contiguous()
    return Codes(codes.T.contiguous(), scale, zero, weight.bits, weight.group_size, weight.order)


def cpu_matmul(x: Tensor, weight: CpuWeight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times the transpose of `weight` [N, K], plus bias [N]: [M, N] in x's dtype.

    Raises ValueError for another K, and for activations that `weight` was not packed for.
    """
    N, K = weight.shape
    if x.shape[-1] != K:
        raise ValueError(f"expected activations of {K} features, found {list(x.shape)}")
    if weight.order is not None:
        x = x[..., weight.order]
    if weight.kind == "int4":
        if x.dtype != torch.bfloat16:
            raise ValueError(
                f"this weight was packed for bf16 activations, found {x.dtype}: load the model "
                f"with that dtype"
            )
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), weight.packed, weight.group_size, weight.scale
        )
        return y if bias is None else y + bias
    return _rows_matmul(
        x, weight.packed, weight.scale, weight.zero, bias, weight.bits, weight.group_size or 0, N
    )


# One operator to torch.compile, which cannot trace embedding_bag on packed tables.
@torch.library.custom_op("modelpress::cpu_rows_matmul", mutates_args=())
def _rows_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    outputs: int,
) -> Tensor:
    """x [M, K] -> [M, outputs]; group_size 0 is one scale per output."""
    shape = (outputs, x.shape[1])
    weight = CpuWeight("rows", packed, scale, zero, bits, group_size or None, shape)
    y = x.new_zeros(len(x), outputs, dtype=torch.float32)
    multiply = _bag_products if len(x) <= BAG_ROWS else _expanded_products
    multiply(x, weight, y)
    if bias is not None:
        y += bias
    return y.to(x.dtype)


@_rows_matmul.register_fake
def _(x, packed, scale, zero, bias, bits, group_size, outputs):
    return x.new_empty(x.shape[0], outputs)


def _bag_products(x: Tensor, weight: CpuWeight, y: Tensor) -> None:
    """Adds x W^T to y [M, N], a weighted sum of table rows for each group."""
    N, K = weight.shape
    size = BAG_INPUTS if weight.group_size is None else weight.group_size
    inputs = torch.arange(K, dtype=torch.int32)
    edges = torch.arange(0, K + size, size, dtype=torch.int32).clamp(max=K)
    multiply = getattr(
        torch.ops.quantized, f"embedding_bag_{_operator(weight.bits)}_rowwise_offsets"
    )
    scale = weight.scale.float()
    shift = None if weight.zero is None else (weight.zero - 2.0 ** (weight.bits - 1)) * scale
    for row, out in zip(x.float(), y, strict=True):
        # mode 0 is a sum; indices are not pruned; the last offset is the end
        bags = multiply(
            weight.packed, inputs, edges, False, 0, False, row.contiguous(), None, True
        )[:, :N]
        out += (bags * scale).sum(0)
        if shift is not None:
            sums = torch.nn.functional.pad(row, (0, -K % size)).view(-1, size).sum(1)
            out -= sums @ shift.expand(len(sums), -1)


def _expanded_products(x: Tensor, weight: CpuWeight, y: Tensor) -> None:
    """Adds x W^T to y [M, N], one block of inputs after another, expanded to fp32.

    Blocks are scaled where they lie: a temporary as large costs more than unpacking itself.
    """
    N, K = weight.shape
    size = K if weight.group_size is None else weight.group_size
    step = max(1, BLOCK_WEIGHTS // N)
    for start in range(0, K, step):
        stop = min(start + step, K)
        block = _table_rows(weight.packed[start:stop], weight)[:, :N]
        for g in range(start // size, (stop - 1) // size + 1):
            piece = block[max(g * size - start, 0) : (g + 1) * size - start]
            if weight.zero is not None:
                piece -= weight.zero[g].float() - 2.0 ** (weight.bits - 1)
            piece *= weight.scale[g].float()
        y.addmm_(x[:, start:stop].float(), block)


# ---- embedding tables ---------------------------------------------------------------------------


def _operator(bits: int) -> str:
    return {2: "2bit", 4: "4bit", 8: "byte"}[STORED_BITS[bits]]


def _pack_table(codes: Tensor, bits: int) -> Tensor:
    """Codes [K, N] as table rows; each ends in its scale, 1, and offset, -2^(bits-1)."""
    stored = STORED_BITS[bits]
    each = 8 // stored
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each)).contiguous()
    octets = codes.view(len(codes), -1, each)
    packed = octets[..., 0].clone()
    for i in range(1, each):
        packed |= octets[..., i] << (i * stored)
    tail = torch.float32 if stored == 8 else torch.float16
    line = torch.tensor([1.0, -(2.0 ** (bits - 1))], dtype=tail).view(torch.uint8)
    return torch.cat([packed, line.expand(len(codes), -1)], dim=1)


def _table_rows(rows: Tensor, weight: CpuWeight) -> Tensor:
    """Table rows as c - 2^(bits-1): fp32 [rows, N], and a few columns of padding."""
    unpack = getattr(torch.ops.quantized, f"embedding_bag_{_operator(weight.bits)}_unpack")
    return unpack(rows.contiguous())
