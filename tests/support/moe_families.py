"""A tiny random model of every family with experts, as `dense_families` has them of the others.

folder = write_mixture(tmp_path, "mixtral")
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from support.dense_families import (
    LAYERS,
    SCALED,
    SLIDING,
    VOCABULARY,
    WINDOW,
    fill,
    type_of,
)
from support.tiny_checkpoints import byte_tokenizer

HIDDEN, INNER, EXPERTS, CHOSEN = 32, 32, 4, 2

SPARSE = {"n_routed_experts": EXPERTS, "n_shared_experts": 2, "first_k_dense_replace": 1,
          "routed_scaling_factor": 1.7}  # fmt: skip
MLA = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
       "num_key_value_heads": 4}  # fmt: skip

LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
          "linear_value_head_dim": 8, "linear_num_key_heads": 2,
          "linear_num_value_heads": 4}  # fmt: skip

MIXED: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "sliding_window": WINDOW},
    "deepseek_v2": MLA | SPARSE | {"q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v2-lora": MLA | SPARSE | {"q_lora_rank": 16, "topk_method": "group_limited_greedy",
                                        "n_group": 2, "topk_group": 1},
    "deepseek_v3": MLA | SPARSE | {"q_lora_rank": 16, "n_group": 2, "topk_group": 1,
                                   "norm_topk_prob": True},
    "glm4_moe": SPARSE | {"n_group": 1, "topk_group": 1, "use_qk_norm": True,
                          "attention_bias": True},
    "qwen2_moe": {"shared_expert_intermediate_size": 48},
    "olmoe": {"clip_qkv": 0.7, "pad_token_id": 1},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_moe-dense-first": {"mlp_only_layers": [0], "norm_topk_prob": False},
    "qwen3_next": LINEAR | {"shared_expert_intermediate_size": 48},
    "glm4_moe_lite": MLA | SPARSE | {"q_lora_rank": 16, "n_group": 1, "topk_group": 1},
    "dots1": SPARSE | {"n_group": 2, "topk_group": 1, "norm_topk_prob": True},
    "solar_open": SPARSE | {"n_group": 1, "topk_group": 1},
    "mellum": SLIDING,
    "flex_olmo": {"pad_token_id": 1},
    "minimax_m2": {"num_local_experts": EXPERTS, "rotary_dim": 8},
    "granitemoe": SCALED | {"num_local_experts": EXPERTS},
    "gpt_oss": SLIDING | {"num_local_experts": EXPERTS, "swiglu_limit": 1.1},
    "cohere2_moe": SLIDING | {"num_shared_experts": 2, "expert_selection_fn": "sigmoid",
                              "logit_scale": 0.3, "pad_token_id": 0},
    "cohere2_moe-dense-first": SLIDING | {"mlp_layer_types": ["dense", "sparse"],
                                          "prefix_dense_intermediate_size": 48,
                                          "logit_scale": 0.3, "pad_token_id": 0},
    "hunyuan_v1_moe": {"attention_bias": True, "num_experts_per_tok": [CHOSEN] * LAYERS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0,
                 "conv_bias": True, "routed_scaling_factor": 1.7, "pad_token_id": 0},
    "lfm2_moe-dense-first": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1,
                             "pad_token_id": 0},
    "ernie4_5_moe": {"use_bias": True, "pad_token_id": 0},
    "phimoe": {"num_local_experts": EXPERTS, "attention_bias": True, "lm_head_bias": True},
    "llama4_text": {"num_local_experts": EXPERTS, "num_experts_per_tok": 1, "moe_layers": [1],
                    "interleave_moe_layer_step": 2, "intermediate_size_mlp": 64,
                    "no_rope_layers": [1, 0], "attention_chunk_size": WINDOW,
                    "attn_temperature_tuning": True, "floor_scale": 4, "attn_scale": 0.7,
                    "use_qk_norm": True},
    "llama4_text-two": {"num_local_experts": EXPERTS, "moe_layers": [0, 1],
                        "no_rope_layers": [0, 1], "attention_chunk_size": 64,
                        "use_qk_norm": False},
}  # fmt: skip


def write_mixture(folder: Path, family: str, **changes: Any) -> Path:
    """A folder as a person would have it: weights, config, tokenizer."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "moe_intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
    } | MIXED[family]
    if "num_local_experts" in settings or "n_routed_experts" in settings:
        del settings["num_experts"]
    if "kv_lora_rank" in settings:
        del settings["head_dim"]
    config = AutoConfig.for_model(type_of(family), **(settings | changes))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    fill(model)
    for name, parameter in model.named_parameters():  # of softmax scores, which are small
        if name.endswith("e_score_correction_bias"):
            parameter.data *= 0.1
    draw = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():  # of routers: what is added to scores
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=draw))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
