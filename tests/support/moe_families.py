"""A tiny random model of every family with experts, as `dense_families` has them of the others.

folder = write_mixture(tmp_path, "mixtral")
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from support.dense_families import LAYERS, VOCABULARY, WINDOW, fill, type_of
from support.tiny_checkpoints import byte_tokenizer

HIDDEN, INNER, EXPERTS, CHOSEN = 32, 32, 4, 2

MIXED: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "sliding_window": WINDOW},
    "qwen2_moe": {"shared_expert_intermediate_size": 48},
    "olmoe": {"clip_qkv": 0.7, "pad_token_id": 1},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_moe-dense-first": {"mlp_only_layers": [0], "norm_topk_prob": False},
}


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
    if "num_local_experts" in settings:
        del settings["num_experts"]
    config = AutoConfig.for_model(type_of(family), **(settings | changes))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    fill(model)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
