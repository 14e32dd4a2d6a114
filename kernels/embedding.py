"""An embedding table whose rows stay packed until a token asks for them.

The table [V, d] is never expanded: a forward unpacks the rows of its tokens alone. A table that is
also the head (tied embeddings) is held once, by the head's linear, in whose layout rows are read.

    table = QuantEmbedding(codes, torch.bfloat16)
    x = table(ids)                    # [B, T] -> [B, T, d]
    table = QuantEmbedding.of(head)   # head: QuantLinear
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from compress.kernels.codes import Codes
from compress.kernels.linear import QuantLinear
from compress.kernels.packing import pack_rows, unpack_rows
from compress.kernels.reference import dequantize

TOKENS = 1 << 10  # looked up at a time: what is unpacked on the way stays small


class QuantEmbedding(nn.Module):
    """Rows of a packed table [num_embeddings, embedding_dim], looked up by token id.

    words int32 [V, ceil(d * bits / 32)]: the codes, a bit stream a row; scale [V, G] in the file's
    dtype, zero uint8 [V, G] or None. dtype: of the rows that a forward gives.
    """

    words: Tensor | None
    scale: Tensor | None
    zero: Tensor | None

    def __init__(
        self, weight: Codes, dtype: torch.dtype = torch.float16, head: QuantLinear | None = None
    ):
        super().__init__()
        assert weight.order is None, "act-order is for inputs of products"
        self.num_embeddings, self.embedding_dim = weight.codes.shape
        self.bits, self.group_size = weight.bits, weight.group_size
        self.dtype = dtype
        own = head is None
        self.register_buffer("words", pack_rows(weight.codes, weight.bits) if own else None)
        self.register_buffer("scale", weight.scale.contiguous() if own else None)
        self.register_buffer("zero", weight.zero if own else None)
        # Not a submodule: the head is one already, of whoever holds both.
        self._head: tuple[QuantLinear, ...] = () if head is None else (head,)

    @classmethod
    def of(cls, head: QuantLinear) -> Self:
        """The table that a head multiplies by, without a copy of it."""
        return cls(head.codes(), head.dtype, head)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] -> rows [..., embedding_dim], each value rounded once to the module's dtype."""
        flat = ids.flatten()
        # On a GPU asking would wait for it, at every token. Traced code has torch's own check of an
        # index, to which a negative one counts from the end.
        if (
            not torch.compiler.is_compiling()
            and flat.numel()
            and not flat.is_cuda
            and not (int(flat.min()) >= 0 and int(flat.max()) < self.num_embeddings)
        ):
            raise IndexError(
                f"token ids lie in [0, {self.num_embeddings - 1}], found "
                f"[{int(flat.min())}, {int(flat.max())}]"
            )
        parts = [self._dense(part) for part in flat.split(TOKENS)]
        return torch.cat(parts).view(*ids.shape, self.embedding_dim)

    def codes(self) -> Codes:
        """The codes, scales and zero points, as they came."""
        if self._head:
            return self._head[0].codes()
        assert self.words is not None and self.scale is not None
        codes = unpack_rows(self.words, self.bits, self.embedding_dim)
        return Codes(codes, self.scale, self.zero, self.bits, self.group_size)

    def packed_bytes(self) -> int:
        """Bytes that the table takes, scales and zero points too; none where the head has it."""
        own = (self.words, self.scale, self.zero)
        return sum(tensor.nbytes for tensor in own if tensor is not None)

    def extra_repr(self) -> str:
        """What print(model) says of this table."""
        group = "channel" if self.group_size is None else self.group_size
        shared = ", of the head" if self._head else ""
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, "
            f"group_size={group}{shared}"
        )

    def _dense(self, ids: Tensor) -> Tensor:
        return dequantize(self._rows(ids)).to(self.dtype)

    def _rows(self, ids: Tensor) -> Codes:
        if self._head:
            return self._head[0].rows(ids)
        assert self.words is not None and self.scale is not None
        codes = unpack_rows(self.words[ids], self.bits, self.embedding_dim)
        zero = None if self.zero is None else self.zero[ids]
        return Codes(codes, self.scale[ids], zero, self.bits, self.group_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves or casts; scales keep their dtype, since another would be another table."""
        device = self._head[0].scale.device if self.scale is None else self.scale.device
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        scale = self.scale
        super()._apply(fn, recurse)
        if scale is not None and self.scale is not None:
            self.scale = scale.to(self.scale.device)
        return self
