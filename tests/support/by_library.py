"""A tiny random Llama whose files compressed-tensors itself writes, and its dense fp32 twin."""

import json
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
)

from compress.kernels.linear import QuantLinear
from compress.storage.safetensors import save_tensors
from support.tiny_checkpoints import byte_tokenizer, relative_error
from support.tiny_quantised import tiny_llama

LINEARS = 2 * 7


def write_by_library(folder: Path, format: str, weights: dict, activation_bits: int | None = None):
    """Rounds every linear by min-max as `weights` says; returns the twin, (q - z) s in fp32."""
    model, twin = tiny_llama(), tiny_llama()
    group = {"targets": ["Linear"], "format": format, "weights": {"type": "int"} | weights}
    if activation_bits is not None:
        by_token = {"type": "int", "dynamic": True, "strategy": "token"}
        group["input_activations"] = by_token | {"num_bits": activation_bits}
    section = {
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "format": format,
        "quant_method": "compressed-tensors",
    }
    config = QuantizationConfig(**section, quantization_status=QuantizationStatus.FROZEN)
    apply_quantization_config(model, config)
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            twin.get_submodule(name).weight.data = _round(module, weights)
    ModelCompressor(quantization_config=config).compress_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", dict(model.state_dict()))
    settings = twin.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
        "quantization_config": section | {"quantization_status": "compressed"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    byte_tokenizer().save_pretrained(folder)
    return twin


def _round(module, weights: dict) -> torch.Tensor:
    """Sets the module's scales and zero points; the weight [N, K] that they stand for."""
    N, K = module.weight.shape
    rows = 1 if weights["strategy"] == "tensor" else N
    groups = module.weight.data.view(rows, -1, weights.get("group_size", N * K // rows))
    levels = 2 ** weights["num_bits"] - 1
    zero = torch.zeros(groups.shape[:2])
    if weights.get("symmetric", True):
        scale = groups.abs().amax(-1) / (levels // 2)
    else:
        low, high = groups.amin(-1), groups.amax(-1)
        scale = (high - low) / levels
        zero = (-(levels + 1) // 2 - low / scale).round()
        module.weight_zero_point.data.copy_(zero.view_as(module.weight_zero_point))
    module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
    scale = module.weight_scale.data.view_as(scale)[..., None]
    shift = zero[..., None]
    codes = (groups / scale + shift).round().clamp(-(levels + 1) // 2, levels // 2)
    return ((codes - shift) * scale).view(N, K)


@torch.no_grad()
def check_linears(model: torch.nn.Module, twin: torch.nn.Module, bits: int | None) -> None:
    """Every packed linear multiplies as its dense twin does, inputs rounded to `bits` if any."""
    layers = {name: m for name, m in model.named_modules() if type(m) is QuantLinear}
    assert len(layers) == LINEARS
    for name, layer in layers.items():
        dense = twin.get_submodule(name)
        x = torch.randn(5, dense.in_features, generator=torch.Generator().manual_seed(1))
        expected = dense(x if bits is None else rounded(x, bits))
        assert relative_error(layer(x), expected) < 1e-5


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Each token of x [..., K] in 2^bits steps, as compressed-tensors has it."""
    half = 2 ** (bits - 1)
    scale = x.abs().amax(-1, keepdim=True) / (half - 0.5)
    return (x / scale).round().clamp(-half, half - 1) * scale
