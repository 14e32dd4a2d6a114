"""A linear layer whose weight stays packed: Triton kernels on a GPU, compiled ones on a CPU.

The module holds one layout at a time, that of its device, as buffers. Moving it to another kind of
device repacks, which is exact: codes, scales and zero points are the same before and after.

    layer = QuantLinear(codes, bias, torch.bfloat16)
    y = layer.to("cuda")(x)
    layer.dequantize()                # the weight [N, K], dense
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Self

import torch
from torch import Tensor, nn

from compress.kernels.activations import BITS, integer_matmul, quantize_tokens
from compress.kernels.codes import Codes
from compress.kernels.cpu.products import cpu_matmul, pack_cpu, pack_integers
from compress.kernels.cpu.weight import CpuWeight
from compress.kernels.gpu.layout import KernelWeight, kernel_rows, pack_kernel, unpack_kernel
from compress.kernels.reference import dense

BUFFERS = ("words", "high", "packed", "scale", "zero", "order")  # of any layout


class QuantLinear(nn.Module):
    """y = x W^T + bias with W [out_features, in_features] packed.

    weight: codes on any device; they decide where the module lives. dtype: of the activations to
    come (on a CPU it decides the layout) and of the bias. activation_bits: rounds each token of x
    to integers of so many bits first, as compressed-tensors does in fp32, and multiplies integers
    (activations.py, `full_range`).

    Raises ValueError for activation_bits beyond 2 to 8, and for such with zero points of 8-bit
    weights, whose c - z is no int8.
    """

    bias: Tensor | None
    scale: Tensor  # of every layout

    def __init__(
        self,
        weight: Codes,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float16,
        activation_bits: int | None = None,
    ):
        super().__init__()
        if activation_bits is not None and weight.zero is not None and weight.bits == 8:
            raise ValueError("quantised activations take 8-bit weights without zero points only")
        if activation_bits is not None and activation_bits not in BITS:
            raise ValueError(f"activations take 2 to 8 bits, found {activation_bits}")
        self.out_features, self.in_features = weight.codes.shape
        self.bits, self.group_size = weight.bits, weight.group_size
        self.symmetric = weight.zero is None
        self.activation_bits = activation_bits
        self.dtype = dtype
        own = None if bias is None else bias.detach().to(weight.codes.device, dtype)
        self.register_buffer("bias", own)
        self._hold(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype."""
        weight = self.packed_weight()
        if self.activation_bits is not None:
            values, scale = quantize_tokens(x, self.activation_bits, full_range=True)
            return integer_matmul(values, scale, weight, self.bias, x.dtype)
        if isinstance(weight, KernelWeight):
            from compress.kernels.gpu.matmul import quantized_matmul  # needs triton, CPUs do not

            return quantized_matmul(x, weight, self.bias)
        y = cpu_matmul(x.reshape(-1, x.shape[-1]), weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def packed_weight(self) -> KernelWeight | CpuWeight:
        """The weight in the layout of its device; it shares the module's memory."""
        tensors = {name: self._buffers[name] for name in self._tensors}
        return self._layout(**tensors, **self._facts)

    def codes(self) -> Codes:
        """The codes, scales and zero points, as they came."""
        weight = self.packed_weight()
        return unpack_kernel(weight) if isinstance(weight, KernelWeight) else weight.unpack()

    def rows(self, ids: Tensor) -> Codes:
        """The codes of some outputs [n], in that order; the rest stays packed."""
        weight = self.packed_weight()
        if isinstance(weight, KernelWeight):
            return unpack_kernel(kernel_rows(weight, ids))
        return weight.rows(ids)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [out_features, in_features], each entry rounded once."""
        return dense(self.codes(), dtype or self.dtype)

    def packed_bytes(self) -> int:
        """Bytes that the weight takes, scales and zero points included."""
        return self.packed_weight().nbytes

    def extra_repr(self) -> str:
        """What print(model) says of this layer."""
        group = "channel" if self.group_size is None else self.group_size
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={group}, symmetric={self.symmetric}, bias={self.bias is not None}"
            + (f", activation_bits={self.activation_bits}" if self.activation_bits else "")
        )

    def _hold(self, weight: Codes) -> None:
        """Packs for the device of the codes, and forgets any other layout."""
        packed: KernelWeight | CpuWeight
        if weight.codes.is_cuda:
            packed = pack_kernel(weight)
        elif self.activation_bits is not None:
            packed = pack_integers(weight)
        else:
            packed = pack_cpu(weight, self.dtype)
        for name in BUFFERS:
            self._buffers.pop(name, None)
        names = [field.name for field in fields(packed)]
        self._layout: Callable[..., KernelWeight | CpuWeight] = type(packed)
        self._tensors = [name for name in names if name in BUFFERS]
        self._facts = {name: getattr(packed, name) for name in names if name not in BUFFERS}
        for name in self._tensors:
            self.register_buffer(name, getattr(packed, name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves or casts; scales keep their dtype, since another would be another weight."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device))
        if probe.device.type == self.scale.device.type and probe.dtype == self.dtype:
            scale = self.scale
            super()._apply(fn, recurse)
            self.scale = scale.to(self.scale.device)
            return self
        codes = self.codes()
        self.dtype = probe.dtype
        if self.bias is not None:
            self.bias = fn(self.bias)
        self._hold(codes.to(probe.device))
        return self
