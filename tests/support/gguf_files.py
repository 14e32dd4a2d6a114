"""GGUF files read by the library gguf, and exports that must be refused."""

from pathlib import Path

import gguf
import torch
from torch import Tensor

from support.tiny_checkpoints import LAYERS

FILE = "model.gguf"
# Names of llama.cpp for what is inside a layer.
INSIDE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
} | {
    f"blk.{i}.{theirs}.{key}": f"model.layers.{i}.{ours}.{key}"
    for i in range(LAYERS)
    for ours, theirs in INSIDE.items()
    for key in ("weight", "bias")
}


class Read:
    """A GGUF file: types and fp32 values by name, and metadata."""

    def __init__(self, *files: Path):
        self.types: dict[str, str] = {}
        self.values: dict[str, Tensor] = {}
        self.fields: dict = {}
        for file in files:
            reader = gguf.GGUFReader(file)
            self.fields |= {name: field.contents() for name, field in reader.fields.items()}
            for tensor in reader.tensors:
                shape = tuple(int(size) for size in reversed(tensor.shape))
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                self.types[tensor.name] = tensor.tensor_type.name
                self.values[tensor.name] = torch.from_numpy(values.copy()).view(shape)

    def setting(self, name: str):
        return self.fields[f"{self.fields['general.architecture']}.{name}"]


def halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of llama.cpp's Llama, where a pair is neighbours, with pairs half a head apart again."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])  # head, pair, member
    return torch.cat([pairs[:, :, 0], pairs[:, :, 1]], 1).reshape(rows.shape)


def as_checkpoint(read: Read, config) -> dict[str, Tensor]:
    """The tensors by the names and in the order of transformers."""
    tensors = {}
    for name, value in read.values.items():
        if name == "rope_freqs.weight":
            continue
        if config.model_type in ("llama", "mistral") and ".attn_q." in name:
            value = halves(value, config.num_attention_heads)
        if config.model_type in ("llama", "mistral") and ".attn_k." in name:
            value = halves(value, config.num_key_value_heads)
        tensors[NAMES[name]] = value
    return tensors


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
