"""A packed weight on a CPU: what all layouts have in common, and what each must do.

A layout is a class. It packs codes, gives them back, and multiplies activations by them:

    FloatWeight       tiles.py, int4.py, rows.py            activations in fp16, bf16 and fp32
    IntegerWeight     integers.py (quads and groups)        activations rounded to int8

products.py chooses the layout that is fastest on this machine.

    weight = RowsWeight.pack(codes)
    y = weight.matmul(x, bias)
    codes = weight.unpack()                # exact
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from compress.kernels.codes import WIDTHS, Codes, TensorRecord, check_integer_sums

# Of a code, where bytes hold one, two or four of them; for each of WIDTHS.
STORED_BITS = {2: 2, 3: 4, 4: 4, 8: 8}


@dataclass(frozen=True)
class CpuWeight(TensorRecord, ABC):
    """A quantised weight [N, K] in one layout.

    packed: the codes, as the layout says. scale [G, N] in the file's dtype; zero uint8 [G, N], None
    if symmetric. shape: N, K. order int64 [K] or None, as in Codes: columns are packed in the order
    of the codes, and whoever multiplies permutes the activations.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int | None
    shape: tuple[int, int]
    order: Tensor | None = None

    @classmethod
    def pack(cls, weight: Codes) -> Self:
        """Packs codes in this layout. Raises ValueError where it cannot hold or multiply them."""
        if weight.bits not in WIDTHS:
            widths = ", ".join(map(str, WIDTHS))
            raise ValueError(f"expected codes of {widths} bits, found {weight.bits}: see with_bits")
        N, K = weight.codes.shape
        return cls(
            packed=cls.pack_codes(weight.codes, weight.bits, weight.group_size),
            scale=weight.scale.T.contiguous(),
            zero=None if weight.zero is None else weight.zero.T.contiguous(),
            bits=weight.bits,
            group_size=weight.group_size,
            shape=(N, K),
            order=weight.order,
        )

    def unpack(self) -> Codes:
        """Gives back what was packed: the inverse of `pack`, exact."""
        N, K = self.shape
        return Codes(
            codes=self.unpack_codes()[:N, :K].contiguous(),
            scale=self.plain_scale().T.contiguous(),
            zero=None if self.zero is None else self.zero.T.contiguous(),
            bits=self.bits,
            group_size=self.group_size,
            order=self.order,
        )

    def rows(self, ids: Tensor) -> Codes:
        """The codes of some rows [n] of the weight, in that order, exact; the rest stays packed."""
        scale, zero = self.plain_scale().T[ids], None if self.zero is None else self.zero.T[ids]
        codes = self.row_codes(ids)[:, : self.shape[1]]
        return Codes(codes, scale, zero, self.bits, self.group_size, self.order)

    def plain_scale(self) -> Tensor:
        """The scales [G, N], in a layout that holds more beside them too."""
        return self.scale

    @staticmethod
    @abstractmethod
    def pack_codes(codes: Tensor, bits: int, group_size: int | None) -> Tensor:
        """Lays out codes uint8 [N, K]."""

    @abstractmethod
    def unpack_codes(self) -> Tensor:
        """Gives codes uint8 [N, K] back; rows and columns of padding may follow them."""

    @abstractmethod
    def row_codes(self, ids: Tensor) -> Tensor:
        """Gives rows [n] of the codes, uint8 [n, K]; columns of padding may follow them."""


class FloatWeight(CpuWeight):
    """A weight for activations in fp16, bf16 and fp32."""

    @classmethod
    @abstractmethod
    def takes(cls, weight: Codes, dtype: torch.dtype) -> bool:
        """Whether this process multiplies activations of `dtype` by this weight, unchanged."""

    @abstractmethod
    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiplies x [M, K] by the transpose of the weight, plus bias [N]: [M, N] in x's dtype.

        Raises ValueError for what this process cannot multiply.
        """


class IntegerWeight(CpuWeight):
    """A weight for activations rounded to int8; sums of a group are exact in int32."""

    @classmethod
    @abstractmethod
    def takes(cls, weight: Codes) -> bool:
        """Whether this process multiplies int8 activations by this weight, unchanged."""

    @classmethod
    def pack(cls, weight: Codes) -> Self:
        """Packs codes in this layout. Raises ValueError as `check_integer_sums` does."""
        check_integer_sums(weight.codes.shape[1], weight.group_size)
        return super().pack(weight)

    @abstractmethod
    def matmul(
        self, values: Tensor, token_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Multiplies int8 values [M, K], with their scales fp32 [M]: [M, N] in `dtype`.

        Raises ValueError for what this process cannot multiply.
        """
