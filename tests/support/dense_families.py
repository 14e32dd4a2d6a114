"""A tiny random model of every dense family, built so that a wrong assumption shows.

Gains of norms differ from channel to channel, biases from zero, multipliers from one; windows are
shorter than sequences, and layers alternate where a family's do.

    model = tiny_dense("gemma2"); folder = write_dense(tmp_path, "gemma2")
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from support.tiny_checkpoints import byte_tokenizer

VOCABULARY, HIDDEN, WINDOW, LAYERS = 260, 32, 6, 2
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
PARTIAL = {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5,
                               "rope_type": "default"}}  # fmt: skip
SCALED = {"embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.37,
          "attention_multiplier": 0.21}  # fmt: skip

# By name: the model type, or the type and what differs, and what is set.
DENSE: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": SLIDING | {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 0.8,
                         "final_logit_softcapping": 1.5},
    "gemma3_text": SLIDING | {"query_pre_attn_scalar": 20, "final_logit_softcapping": 1.5,
                              "rope_parameters": {
                                  "full_attention": {"rope_type": "linear", "factor": 4.0,
                                                     "rope_theta": 1000.0},
                                  "sliding_attention": {"rope_type": "default",
                                                        "rope_theta": 50.0}}},
    "vaultgemma": SLIDING | {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 0.8,
                             "final_logit_softcapping": 1.5},
    "phi": PARTIAL | {"hidden_act": "gelu_new"},
    "phi-normed": PARTIAL | {"qk_layernorm": True},
    "phi3": PARTIAL | {"sliding_window": WINDOW, "pad_token_id": 0},
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0},
    "smollm3-sliding": SLIDING | {"use_sliding_window": True, "pad_token_id": 0},
    "ministral": SLIDING,
    "ministral3": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0,
                                       "original_max_position_embeddings": 8,
                                       "max_position_embeddings": 64, "beta_fast": 32.0,
                                       "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                                       "llama_4_scaling_beta": 0.3}},
    "cwm": SLIDING,
    "granite": SCALED | {"attention_bias": True, "mlp_bias": True},
    "olmo": {"clip_qkv": 0.7, "pad_token_id": 1},
    "olmo2": {"pad_token_id": 1},
    "olmo3": SLIDING | {"pad_token_id": 1},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.3, "pad_token_id": 0},
    "cohere2": SLIDING | {"logit_scale": 0.3, "pad_token_id": 0},
    "glm": PARTIAL | {"attention_bias": True, "pad_token_id": 0},
    "glm4": PARTIAL | {"attention_bias": True, "pad_token_id": 0},
    "starcoder2": {"sliding_window": WINDOW, "use_bias": True},
    "stablelm": PARTIAL | {"use_qkv_bias": True},
    "stablelm-parallel": PARTIAL | {"use_parallel_residual": True, "qk_layernorm": True},
    "nemotron": PARTIAL | {"attention_bias": True, "mlp_bias": True, "head_dim": 8},
    "exaone4": SLIDING | {"sliding_window_pattern": 2},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True, "pad_token_id": 0},
    "arcee": {"attention_bias": True, "mlp_bias": True},
    "helium": {"head_dim": 8},
    "ernie4_5": {"use_bias": True, "pad_token_id": 0},
    "hunyuan_v1_dense": {"head_dim": 8},
    "apertus": {},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"],
                     "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                     "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 100.0,
                                         "partial_rotary_factor": 0.5,
                                         "mrope_section": [1, 1, 0], "mrope_interleaved": True}},
    "internlm3": {"attention_bias": True, "mlp_bias": True, "pad_token_id": 0},
    "jais2": {"attention_bias": True, "mlp_bias": True},
    "hyperclovax": SCALED | {"use_post_norm": True},
    "persimmon": PARTIAL,
    "persimmon-plain": PARTIAL | {"qk_layernorm": False},
    "iquestcoder": {"attention_bias": True, "mlp_bias": True},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_bias": True,
             "block_auto_adjust_ff_dim": False, "pad_token_id": 0},
}  # fmt: skip


def type_of(family: str) -> str:
    """The model type of a row of `DENSE`."""
    return family.partition("-")[0]


def tiny_dense(family: str, **changes: Any) -> nn.Module:
    """The model in fp32 with every parameter random."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
    } | DENSE[family]
    config = AutoConfig.for_model(type_of(family), **(settings | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    fill(model)
    return model


def fill(model: nn.Module) -> None:
    """Gives every parameter random values."""
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            values = randn(len(parameter), 6) @ randn(6, parameter.shape[1]) / 6**0.5
            values += 0.3 * randn(*parameter.shape) + 0.2
        elif name.endswith(("act_fn.alpha_p", "act_fn.alpha_n", "A_log")):
            values = parameter + 0.1 * randn(*parameter.shape).abs()
        elif name.endswith("weight") and ("norm" in name):  # about 1, or about 0 for 1 + w
            values = parameter + 0.4 * randn(*parameter.shape)
        elif name.endswith("bias"):
            values = 0.3 * randn(*parameter.shape)
        else:
            values = randn(*parameter.shape) / parameter.shape[-1] ** 0.5
        parameter.data.copy_(values)


def write_dense(folder: Path, family: str, **changes: Any) -> Path:
    """A folder as a person would have it: weights, config, tokenizer."""
    tiny_dense(family, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
