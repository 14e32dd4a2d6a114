"""Asks vLLM's CPU build, with a product of our own behind what its CPU kernel does not take.

    ENV/bin/python tests/interop/engines/by_vllm_unpacked.py OUT CHECKPOINT      # ENV: by_vllm.py

vLLM's CPU kernel multiplies 4 bits in bf16 and fp16, experts only where a processor has AMX, and
looks rows of a packed embedding up in Triton. What stands in for these here unpacks the bit stream
of any width and multiplies in fp32. All else is vLLM's own: how it reads the config, which scheme
it gives each layer, names, shapes, the loading of q, k and v into one matrix, zero points,
attention and the engine's loop. An answer says that vLLM reads the file as it was meant; it says
nothing of the kernels that a GPU would run.
"""

from fractions import Fraction
from functools import partial

import asking
import by_vllm
import torch
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors import (
    compressed_tensors_embedding as tables,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as experts,
)
from vllm.platforms import PlatformEnum


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of each row of a bit stream in words of 32 bits [R, W]."""
    stream = (words.long()[..., None] >> torch.arange(32)) & 1
    stream = stream.flatten(1)[:, : count * bits].reshape(len(words), count, bits)
    return (stream << torch.arange(bits)).sum(-1)


def gather(
    ids: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, hidden: int, bits: int
) -> torch.Tensor:
    """Rows of a packed embedding."""
    codes = unpacked(words[ids], bits, hidden) - 2 ** (bits - 1)
    wide = scales[ids].repeat_interleave(hidden // scales.shape[1], dim=1)
    return (codes * wide).to(scales.dtype)


class UnpackAndMultiply(MPLinearKernel):
    """Weights dense after loading: (code - zero point) * scale, in fp32."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c):
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        inputs, outputs = self.config.partition_weight_shape
        bits, kind = self.config.weight_type.size_bits, self.config.weight_type
        words, scales, zeros = self._get_weight_params(layer)
        rows = words.data if words.packed_dim == words.input_dim == 1 else words.data.T
        codes = unpacked(rows.contiguous(), bits, inputs)  # [out, in]
        scales_out = scales.data if scales.output_dim == 0 else scales.data.T  # [out, groups]
        middle = torch.full_like(scales_out, kind.bias, dtype=torch.long)
        if self.config.zero_points:
            packed = zeros.data.T if zeros.output_dim == 0 else zeros.data  # [groups, words]
            middle = unpacked(packed.contiguous(), bits, outputs).T
        size = inputs // scales_out.shape[1]
        expanded = [part.repeat_interleave(size, dim=1) for part in (middle, scales_out)]
        layer.dense = ((codes - expanded[0]) * expanded[1]).float()

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.dense.to(x.dtype), bias)


class UnpackedExperts(UnquantizedFusedMoEMethod):
    """vLLM's own packed parameters while it loads, its method for 16 bits afterwards."""

    _packed = experts.CompressedTensorsWNA16MoEMethod
    _packed_dim, get_weight_shape = _packed._packed_dim, _packed.get_weight_shape

    def __init__(self, weight_quant, input_quant, moe, layer_name=None):
        super().__init__(moe)
        self.symmetric, self.strategy = weight_quant.symmetric, weight_quant.strategy
        self.num_bits, self.group_size = weight_quant.num_bits, weight_quant.group_size
        self.packed_factor = Fraction(32, self.num_bits)

    def create_weights(self, layer, *args, **kwargs) -> None:
        self._packed.create_weights(self, layer, *args, **kwargs)

    def process_weights_after_loading(self, layer) -> None:
        for name in ("w13_weight", "w2_weight"):
            words = getattr(layer, f"{name}_packed").data  # [experts, out, words]
            scales = getattr(layer, f"{name}_scale").data  # [experts, out, groups]
            count = words.shape[-1] * 32 // self.num_bits
            codes = unpacked(words.flatten(0, 1), self.num_bits, count).view(*words.shape[:2], -1)
            wide = scales.repeat_interleave(count // scales.shape[-1], dim=-1)
            dense = ((codes - 2 ** (self.num_bits - 1)) * wide).to(scales.dtype)
            layer.register_parameter(name, torch.nn.Parameter(dense, requires_grad=False))
        super().process_weights_after_loading(layer)


if __name__ == "__main__":
    linear._POSSIBLE_KERNELS[PlatformEnum.CPU].insert(0, UnpackAndMultiply)
    UnpackedExperts.__name__ = (
        experts.CompressedTensorsWNA16MoEMethod.__name__
    )  # loaders ask for it
    experts.CompressedTensorsWNA16MoEMethod = UnpackedExperts
    tables._dequant_gather_triton = gather
    asking.main("vllm-unpacked", by_vllm.PACKAGES, partial(by_vllm.ask, dtype="float32"))
