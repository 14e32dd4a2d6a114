"""What llama.cpp is told about a model, and what it cannot be told.

Sizes, the RoPE rule and the norm's epsilon become keys of the GGUF file. A setting that would make
llama.cpp compute something else than transformers, and has no key, is refused.

    family = checked_family(config)
    add_settings(writer, config)
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from compress.errors import UsageError
from compress.models.families import head_dim_of

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig

# Of a RoPE rule: what is read here. Other settings would be lost.
ROPE_SETTINGS = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}


@dataclass(frozen=True)
class Family:
    """What llama.cpp makes of a model family: its name there, and what it has a place for.

    `pairs`: rows of q and k change places. `biases`: linears that may have one, None for all.
    """

    architecture: str
    pairs: bool
    biases: tuple[str, ...] | None
    rope: tuple[str, ...]


FAMILIES = {
    "llama": Family("llama", True, None, ("default", "linear", "yarn", "llama3")),
    "mistral": Family("llama", True, None, ("default", "linear", "yarn", "llama3")),
    "qwen2": Family("qwen2", False, ("q_proj", "k_proj", "v_proj"), ("default", "linear", "yarn")),
    "qwen3": Family("qwen3", False, ("q_proj", "k_proj", "v_proj"), ("default", "linear", "yarn")),
}


def checked_family(config: "PretrainedConfig") -> Family:
    """The family of a model; UsageError for what llama.cpp would compute differently."""
    if config.model_type not in FAMILIES:
        raise UsageError(
            f"GGUF export knows {', '.join(FAMILIES)}, the model is a {config.model_type}: export "
            f"to another format"
        )
    family = FAMILIES[config.model_type]
    rope = {key: value for key, value in config.rope_parameters.items() if value is not None}
    kind = rope.get("rope_type", "default")
    extra = rope.keys() - {"rope_type", "rope_theta"} - ROPE_SETTINGS.get(kind, set())
    if kind not in family.rope or extra:
        what = f"RoPE of type {kind!r}" + (f" with {', '.join(sorted(extra))}" if extra else "")
        raise UsageError(
            f"llama.cpp has no {what} in a {config.model_type}: export to another format"
        )
    if config.hidden_act != "silu":
        raise UsageError(
            f"llama.cpp computes SiLU in a {config.model_type}, not {config.hidden_act}"
        )
    width = config.num_attention_heads * head_dim_of(config)
    if config.model_type == "qwen2" and width != config.hidden_size:
        raise UsageError(
            f"llama.cpp takes a qwen2 whose heads are as wide together as the hidden state, "
            f"{config.hidden_size}; here they are {width}"
        )
    return family


def add_settings(writer: "GGUFWriter", config: "PretrainedConfig") -> None:
    """Writes sizes and rules of the model to the metadata of a file."""
    head_dim = head_dim_of(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rope(writer, config)


def _add_rope(writer: "GGUFWriter", config: "PretrainedConfig") -> None:
    import gguf  # slow to import

    rope = config.rope_parameters
    writer.add_rope_dimension_count(head_dim_of(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    scaling = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
    if kind := scaling.get(rope.get("rope_type", "default")):
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(rope["factor"])
        if original := rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)


def rope_factors(config: "PretrainedConfig") -> np.ndarray | None:
    """What llama.cpp divides each frequency by [head_dim / 2] for Llama 3's RoPE; None for others.

    Wavelengths beyond the original context over `low_freq_factor` are stretched by `factor`, those
    below it over `high_freq_factor` stay, and frequencies between are interpolated.
    """
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = head_dim_of(config)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * torch.pi * rope["rope_theta"] ** exponents
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wavelengths
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: stays, 0: stretched
    return (1 / ((1 - kept) / rope["factor"] + kept)).float().numpy()
