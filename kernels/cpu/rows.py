"""The layout `rows`: torch's embedding tables, for every weight where no compiler is.

The weight is stored input by input, a row of N codes at a time, as torch's quantised embedding
tables are. A weighted sum of table rows is then a product, summed in fp32:

    bag_g = sum over inputs k of group g of x[k] * (code row k)        [N]
    y     = sum over g of scale_g * (bag_g - (zero_g * sum of x[k]))

`embedding_bag` reads 2, 4 and 8 bits as they lie; 3 bits are stored in 4. It treats one row of x at
a time, so more than BAG_ROWS rows are multiplied by blocks of the weight, expanded one after
another.

    weight = RowsWeight.pack(codes)
    y = weight.matmul(x, bias)
"""

import torch
from torch import Tensor

from compress.kernels.codes import WIDTHS, Codes
from compress.kernels.cpu.weight import STORED_BITS, FloatWeight

# Above this many rows, expanding the weight costs less than reading it once for each row.
BAG_ROWS = 8
BAG_INPUTS = 512  # of one bag where a scale covers more: shorter fp32 sums
BLOCK_WEIGHTS = 1 << 18  # expanded at a time: 1 MB in fp32 stays in the cache


class RowsWeight(FloatWeight):
    """A weight as a table with a row of codes for each input.

    packed: uint8 [K, bytes], each row with its own scale 1 and offset -2^(bits-1) at the end.
    """

    @classmethod
    def takes(cls, weight: Codes, dtype: torch.dtype) -> bool:
        """Every weight of a width that kernels run."""
        return weight.bits in WIDTHS

    @staticmethod
    def pack_codes(codes: Tensor, bits: int, group_size: int | None) -> Tensor:
        """Lays out codes uint8 [N, K], input by input."""
        stored = STORED_BITS[bits]
        each = 8 // stored
        inputs = torch.nn.functional.pad(codes.T, (0, -len(codes) % each)).contiguous()
        octets = inputs.view(len(inputs), -1, each)
        packed = octets[..., 0].clone()
        for i in range(1, each):
            packed |= octets[..., i] << (i * stored)
        tail = torch.float32 if stored == 8 else torch.float16
        line = torch.tensor([1.0, -(2.0 ** (bits - 1))], dtype=tail, device=codes.device)
        line = line.view(torch.uint8)
        return torch.cat([packed, line.expand(len(inputs), -1)], dim=1)

    def unpack_codes(self) -> Tensor:
        """Gives codes uint8 [N, K] back."""
        N, bits = self.shape[0], self.bits
        blocks = self.packed.split(max(1, BLOCK_WEIGHTS // N))
        middle = 2 ** (bits - 1)
        inputs = [(_expand(b, bits)[:, :N] + middle).to(torch.uint8) for b in blocks]
        return torch.cat(inputs).T

    def row_codes(self, ids: Tensor) -> Tensor:
        """Gives rows [n] of the codes, uint8 [n, K]."""
        stored = STORED_BITS[self.bits]
        each = 8 // stored
        octets = self.packed[:, ids // each]
        codes = (octets >> (ids % each * stored).to(torch.uint8)) & (2**stored - 1)
        return codes.T.contiguous()

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiplies x [M, K]: [M, N] in x's dtype."""
        size = self.group_size or 0
        return rows_matmul(
            x, self.packed, self.scale, self.zero, bias, self.bits, size, self.shape[0]
        )


# One operator to torch.compile, which cannot trace embedding_bag on packed tables.
@torch.library.custom_op("modelpress::cpu_rows_matmul", mutates_args=())
def rows_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    outputs: int,
) -> Tensor:
    """x [M, K] -> [M, outputs] in x's dtype; scale [G, N]; group_size 0: one scale per output."""
    size = group_size or x.shape[1]
    y = x.new_zeros(len(x), outputs, dtype=torch.float32)
    # a bag adds scale and offset apart, so an infinity in x would give inf - inf
    bags = len(x) <= BAG_ROWS and bool(x.isfinite().all())
    multiply = _bag_products if bags else _expanded_products
    multiply(x, packed, scale, zero, bits, size, y)
    if bias is not None:
        y += bias
    return y.to(x.dtype)


@rows_matmul.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[1])


def _bag_products(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, size: int, y: Tensor
) -> None:
    """Adds x W^T to y [M, N], a weighted sum of table rows for each group."""
    K, N = x.shape[1], y.shape[1]
    size = BAG_INPUTS if len(scale) == 1 else size
    inputs = torch.arange(K, dtype=torch.int32)
    edges = torch.arange(0, K + size, size, dtype=torch.int32).clamp(max=K)
    multiply = getattr(torch.ops.quantized, f"embedding_bag_{_operator(bits)}_rowwise_offsets")
    scale = scale.float()
    shift = None if zero is None else (zero - 2.0 ** (bits - 1)) * scale
    for row, out in zip(x.float(), y, strict=True):
        # mode 0 is a sum; indices are not pruned; the last offset is the end
        bags = multiply(packed, inputs, edges, False, 0, False, row.contiguous(), None, True)
        out += (bags[:, :N] * scale).sum(0)
        if shift is not None:
            sums = torch.nn.functional.pad(row, (0, -K % size)).view(-1, size).sum(1)
            out -= sums @ shift.expand(len(sums), -1)


def _expanded_products(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, size: int, y: Tensor
) -> None:
    """Adds x W^T to y [M, N], one block of inputs after another, expanded to fp32.

    Blocks are scaled where they lie: a temporary as large costs more than unpacking itself.
    """
    K, N = x.shape[1], y.shape[1]
    step = max(1, BLOCK_WEIGHTS // N)
    for start in range(0, K, step):
        stop = min(start + step, K)
        block = _expand(packed[start:stop], bits)[:, :N]
        for g in range(start // size, (stop - 1) // size + 1):
            piece = block[max(g * size - start, 0) : (g + 1) * size - start]
            if zero is not None:
                piece -= zero[g].float() - 2.0 ** (bits - 1)
            piece *= scale[g].float()
        y.addmm_(x[:, start:stop].float(), block)


def _expand(rows: Tensor, bits: int) -> Tensor:
    """Table rows as c - 2^(bits-1): fp32 [rows, N], and a few columns of padding."""
    unpack = getattr(torch.ops.quantized, f"embedding_bag_{_operator(bits)}_unpack")
    return unpack(rows.contiguous())


def _operator(bits: int) -> str:
    return {2: "2bit", 4: "4bit", 8: "byte"}[STORED_BITS[bits]]
