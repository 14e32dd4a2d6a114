"""Configs of popular models, each with the parameters that its publisher counts.

tests/data/configs/NAME.json is the model's config.json without what decides neither shape nor
forward (token ids, dropout, versions). COUNTS are those of model cards and hub pages, in billions
and as precise as these give them; layers that only predict further tokens are not in them. SOURCES
say where a config comes from: a public copy of the file, unless another way is named.

    config_of("Llama-3.2-1B")["hidden_size"], COUNTS["Llama-3.2-1B"]
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[1] / "data" / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))

# Model types whose family has no row yet: a plan names the type and stops. Whoever adds a family
# takes its types out of here, and the tests of its models below begin to count.
NO_FAMILY_YET: set[str] = set()

COUNTS = {
    "Command-R": 35.0, "Command-R7B": 8.03,
    "DeepSeek-V2-Lite": 15.7, "DeepSeek-V3": 671,
    "EXAONE-4.0-32B": 32.0,
    "GLM-4-9B-0414": 9.40, "GLM-4.5": 355, "GLM-4.5-Air": 106,
    "InternVL3-8B": 7.94, "LLaVA-OneVision-7B": 8.03,
    "Llama-3.1-405B": 406, "Llama-3.1-70B": 70.6, "Llama-3.1-8B": 8.03,
    "Llama-3.2-1B": 1.23, "Llama-3.2-3B": 3.21, "Llama-3.3-70B": 70.6,
    "Llama-4-Maverick": 402, "Llama-4-Scout": 109,
    "Ministral-8B": 8.02, "Mistral-7B-v0.3": 7.25, "Mistral-Nemo": 12.2,
    "Mistral-Small-24B": 23.6, "Mistral-Small-3.2": 24.0,
    "Mixtral-8x22B": 141, "Mixtral-8x7B": 46.7,
    "OLMo-2-7B": 7.30, "OLMoE-1B-7B": 6.92,
    "Phi-3.5-mini": 3.82, "Phi-4": 14.7, "Phi-4-mini": 3.84,
    "Qwen2.5-0.5B": 0.49, "Qwen2.5-1.5B": 1.54, "Qwen2.5-3B": 3.09, "Qwen2.5-7B": 7.61,
    "Qwen2.5-14B": 14.7, "Qwen2.5-32B": 32.5, "Qwen2.5-72B": 72.7, "Qwen2.5-VL-7B": 8.29,
    "Qwen3-0.6B": 0.6, "Qwen3-4B": 4.02, "Qwen3-8B": 8.19, "Qwen3-32B": 32.8,
    "Qwen3-30B-A3B": 30.5, "Qwen3-235B-A22B": 235, "Qwen3-Coder-480B-A35B": 480,
    "Qwen3-VL-8B": 8.77, "Qwen3-VL-30B-A3B": 31.1,
    "SmolLM2-1.7B": 1.71, "SmolLM3-3B": 3.08, "SmolVLM2-500M": 0.507,
    "gemma-2-2b": 2.61, "gemma-2-9b": 9.24, "gemma-2-27b": 27.2,
    "gemma-3-1b": 1.00, "gemma-3-4b": 4.30, "gemma-3-12b": 12.2, "gemma-3-27b": 27.4,
    "gpt-oss-20b": 20.9, "gpt-oss-120b": 117, "granite-3.3-8b": 8.17,
}  # fmt: skip

AIC, OME = "aiconfigurator-core 0.12.0, model_configs", "ome, pkg/hfutil/modelconfig/testdata"
MLC, LIT = "mlc-llm, model_preset.py", "litgpt 0.5.13, config.py, in the words of config.json"
SLIME = "slime, scripts/models, in the words of config.json; context and norm by transformers"
SOURCES = {
    "Command-R": f"{OME}; the rest are transformers' defaults",
    "Command-R7B": "a model zoo's table of the family, in the words of config.json",
    "DeepSeek-V2-Lite": MLC,
    "DeepSeek-V3": AIC,
    "EXAONE-4.0-32B": "TensorRT-LLM's test of the family, with the depth that it names; window and "
    "vocabulary by other tests of the family",
    "GLM-4-9B-0414": "transformers' defaults of the type, which have this model's count",
    "GLM-4.5": SLIME,
    "GLM-4.5-Air": f"{SLIME}; its defaults agree",
    "InternVL3-8B": "Qwen2.5-7B, which its card names, the vocabulary of its family, and "
    "transformers' default tower",
    "LLaVA-OneVision-7B": "a converter to this format, and transformers' default tower",
    "Llama-3.2-1B": MLC,
    "Llama-4-Maverick": "as Llama-4-Scout; without norms of queries and keys or stretched RoPE",
    "Llama-4-Scout": "a loader's copy of the text config; transformers' tower, with its image size",
    "Llama-3.2-3B": MLC,
    "Ministral-8B": "the table of its card",
    "Mistral-7B-v0.3": MLC,
    "Mistral-Nemo": "thunder_model_blocks, mistral_config.py",
    "Mistral-Small-24B": "the config in a loader's test; that of a model trained from it agrees",
    "Mistral-Small-3.2": "the text encoder of an image model; not tied, by the published count",
    "OLMo-2-7B": LIT,
    "OLMoE-1B-7B": "the config in an engine's test; a second one agrees",
    "Phi-3.5-mini": f"{MLC}; RoPE factors to two digits",
    "Phi-4": LIT,
    "Phi-4-mini": MLC,
    "Qwen2.5-0.5B": OME,
    "Qwen2.5-1.5B": LIT,
    "Qwen2.5-3B": MLC,
    "Qwen2.5-7B": LIT,
    "Qwen2.5-14B": OME,
    "Qwen2.5-32B": LIT,
    "Qwen2.5-72B": LIT,
    "Qwen2.5-VL-7B": OME,
    "Qwen3-4B": MLC,
    "SmolLM2-1.7B": MLC,
    "SmolLM3-3B": "the config in a training script",
    "SmolVLM2-500M": "the values that an exporter checks of this model",
    "gemma-2-2b": MLC,
    "gemma-2-9b": MLC,
    "gemma-2-27b": MLC,
    "gemma-3-1b": MLC,
    "gemma-3-4b": f"{LIT}; the rest as in gemma-3-27b",
    "gemma-3-12b": f"{LIT}; the rest as in gemma-3-27b",
    "gemma-3-27b": OME,
    "granite-3.3-8b": "the config in a notebook",
}
SOURCES |= {name: AIC for name in NAMES if name not in SOURCES}


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a model."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that is about the decoder."""
    return config.get("text_config", config)


class Linears(NamedTuple):
    """So many weights [N, K] of a decoder."""

    count: int
    N: int
    K: int


def decoder_linears(config: dict[str, Any]) -> Iterator[Linears]:
    """The linears of all decoder layers, routers aside, from the numbers of a config alone."""
    c = text_of(config)
    d, L, heads = c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"]
    if "kv_lora_rank" in c:  # latent attention
        rope, nope, wide, rank = (
            c[key] for key in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")
        )
        if c.get("q_lora_rank"):
            yield Linears(L, c["q_lora_rank"], d)
        yield Linears(L, heads * (nope + rope), c.get("q_lora_rank") or d)
        yield Linears(L, rank + rope, d)
        yield Linears(L, heads * (nope + wide), rank)
        yield Linears(L, d, heads * wide)
    else:
        size = c.get("head_dim") or d // heads
        yield Linears(L, heads * size, d)
        yield Linears(2 * L, c.get("num_key_value_heads", heads) * size, d)
        yield Linears(L, d, heads * size)
    experts = next(
        (c[k] for k in ("num_experts", "n_routed_experts", "num_local_experts") if k in c), 0
    )
    dense = c.get("first_k_dense_replace", 0) if experts else L
    if step := c.get("interleave_moe_layer_step"):  # Llama 4: the last of so many layers has them
        dense = L - L // step
    yield from _gated(dense, d, c.get("intermediate_size_mlp", c["intermediate_size"]))
    if experts:
        inner = c.get("moe_intermediate_size", c["intermediate_size"])
        yield from _gated((L - dense) * experts, d, inner)
        if shared := c.get("n_shared_experts", 1 if step else 0):
            yield from _gated(L - dense, d, shared * inner)


def _gated(count: int, d: int, inner: int) -> Iterator[Linears]:
    if count:
        yield Linears(2 * count, inner, d)
        yield Linears(count, d, inner)
