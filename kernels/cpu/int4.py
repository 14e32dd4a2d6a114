"""The layout `int4`: torch's weight-only int4 operator, for where no compiler is.

It takes symmetric weights of 4 bits, and of 3 bits moved to the middle of 4, with scales and
activations in bf16. It beats a bf16 product up to some tens of rows, and with hundreds it is slower
than one.

    weight = Int4Weight.pack(codes)
    y = weight.matmul(x, bias)             # x in bf16
"""

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from compress.kernels.codes import Codes
from compress.kernels.cpu.weight import FloatWeight

GROUPS = (32, 64, 128, 256)
OUTPUTS = 16  # the operator wants a multiple
UNPACK_ROWS = 512  # of the identity that reads a weight back


class Int4Weight(FloatWeight):
    """A weight as torch's operator packs it; scale: bf16 [G, N, 2], scales and zeros (0)."""

    @classmethod
    def takes(cls, weight: Codes, dtype: torch.dtype) -> bool:
        """Whether the operator computes this weight without changing a code or a scale."""
        N, K = weight.codes.shape
        return (
            dtype == weight.scale.dtype == torch.bfloat16
            and weight.bits in (3, 4)
            and weight.zero is None
            and weight.group_size in GROUPS
            and K % weight.group_size == 0
            and N % OUTPUTS == 0
        )

    @classmethod
    def pack(cls, weight: Codes) -> Self:
        """Packs codes for the operator. Raises ValueError for a weight that it does not take."""
        if not cls.takes(weight, torch.bfloat16):
            raise ValueError("torch's int4 operator takes no such weight: let the layout be chosen")
        plain = super().pack(weight)
        return replace(plain, scale=_with_zeros(plain.scale))

    def plain_scale(self) -> Tensor:
        """The scales [G, N], without the operator's zeros."""
        return self.scale[..., 0]

    @staticmethod
    def pack_codes(codes: Tensor, bits: int, group_size: int | None) -> Tensor:
        """Lays out codes uint8 [N, K] as the operator does; its zero point is 8."""
        shifted = codes.to(torch.int32) + (8 - 2 ** (bits - 1))
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(shifted, 1)

    def unpack_codes(self) -> Tensor:
        """Gives codes uint8 [N, K] back, by multiplying the identity with scales of 1."""
        exact = replace(self, scale=_with_zeros(torch.ones_like(self.plain_scale())))
        identity = torch.eye(self.shape[1]).bfloat16()
        rows = [exact.matmul(block, None) for block in identity.split(UNPACK_ROWS)]
        middle = 2 ** (self.bits - 1)
        codes = torch.cat([(block.to(torch.int16) + middle).to(torch.uint8) for block in rows])
        return codes.T.contiguous()

    def row_codes(self, ids: Tensor) -> Tensor:
        """Gives rows [n] of the codes, uint8 [n, K]; the operator's layout is read back whole."""
        return self.unpack_codes()[ids]

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiplies x [M, K]: bf16 [M, N]. Raises ValueError for x in another dtype than bf16."""
        if x.dtype != torch.bfloat16:
            raise ValueError(
                f"this weight was packed for bf16 activations, found {x.dtype}: load the model "
                f"with that dtype"
            )
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.packed, self.group_size, self.scale
        )
        return y if bias is None else y + bias


def _with_zeros(scale: Tensor) -> Tensor:
    """Scales [G, N] as the operator reads them, [G, N, 2]: each with its zero point less 8, 0."""
    return torch.stack([scale, torch.zeros_like(scale)], dim=-1)
