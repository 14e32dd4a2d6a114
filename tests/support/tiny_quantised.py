"""A tiny random Llama, quantised by rounding, as a folder on disk and as its fp32 twin."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.checkpoint.compressed_tensors import quantization_config
from compress.checkpoint.packed_formats import FORMATS, codes_of_signed
from compress.scheme import Scheme
from compress.storage.safetensors import save_tensors


@dataclass
class Quantised:
    folder: Path
    twin: LlamaForCausalLM  # its weights are (codes - zero point) * scale, in fp32
    modules: dict[str, Scheme]
    input_ids: torch.Tensor
    logits: torch.Tensor  # of the twin


def tiny_llama(**overrides) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **{"tie_word_embeddings": False, "initializer_range": 0.2} | overrides,
    )
    return LlamaForCausalLM(config).eval()


def round_weight(weight: torch.Tensor, scheme: Scheme):
    """Codes [N, K], scales [N, G] and zero points [N, G] (None: symmetric), by min-max rounding."""
    N, K = weight.shape
    groups = weight.view(N, -1, scheme.group_size or K)
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    if scheme.symmetric:
        scale = groups.abs().amax(-1) / 2 ** (scheme.bits - 1)
        zero_point = None
        shift = torch.zeros_like(scale)
    else:
        bottom, top = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = (top - bottom) / (high - low)
        zero_point = (low - bottom / scale).round().clamp(low, high).to(torch.int8)
        shift = zero_point.float()
    codes = (groups / scale[..., None] + shift[..., None]).round().clamp(low, high)
    weight = (codes - shift[..., None]) * scale[..., None]
    return codes.view(N, K).to(torch.int8), scale, zero_point, weight.view(N, K)


def write_quantised(folder: Path, schemes: list[Scheme], **overrides) -> Quantised:
    """Quantises linear i of a tiny Llama with schemes[i % len(schemes)] and writes the folder."""
    model = tiny_llama(**overrides)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    linears.pop("lm_head")
    modules = {name: schemes[i % len(schemes)] for i, name in enumerate(linears)}
    tensors = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] not in modules}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    for name, scheme in modules.items():
        codes, scale, zero_point, weight = round_weight(linears[name].weight.detach(), scheme)
        linears[name].weight.data = weight
        packed = codes_of_signed(codes, scale, zero_point, scheme)
        compressed = FORMATS["pack-quantized"].write(packed, scheme)
        tensors |= {f"{name}.{key}": value for key, value in compressed.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", tensors)
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
        "quantization_config": quantization_config(modules, ["lm_head"]),
    }
    (folder / "config.json").write_text(json.dumps(config))
    input_ids = torch.arange(24).reshape(2, 12) % 61
    with torch.no_grad():
        logits = model(input_ids).logits
    return Quantised(folder, model, modules, input_ids, logits)


MIXED = [
    Scheme(2, 32),
    Scheme(3, 32),
    Scheme(4, None),
    Scheme(8, 32),
    Scheme(3, None),
]
