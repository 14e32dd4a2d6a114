"""The families that are known, a row each, and where the parts of each one are.

A dense decoder is one row of `ARCHITECTURES`: the `model_type` of transformers, and what it can be
put through. How its layers are built is not written down but found on the family's own class
(`structure.py`); what is found is a `LayerSpec` for each layer (`family_specs.py`).

A multimodal family has such a decoder inside, whose layers are found in the same way; what makes
visual tokens of pixels is its `vision`.

    spec = architecture_of(AutoConfig.from_pretrained(path))
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import UsageError, did_you_mean
from compress.models.family_specs import AFTER, MEAN, ArchitectureSpec, ExpertNames, VisionSpec

if TYPE_CHECKING:  # slow to import
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """A row: a dense decoder that has been tried, as tests do with a tiny one of each.

    Attributes:
        models: what people know it by.
        unrotatable: why the residual stream cannot be rotated, or None.
        weighs: the layers whose tokens can be weighed by attention.
        since: the oldest transformers that is known to have it, of those that are supported.
        experts: what files call them, in a family that has such.
    """

    models: str
    unrotatable: str | None = None
    weighs: str = "all layers"
    since: str = "5.17"
    experts: ExpertNames | None = None


ARCHITECTURES: dict[str, Family] = {
    "llama": Family("Llama 2, 3.x and many others"),
    "mistral": Family("Mistral 7B, Mistral Nemo, Mistral Small 24B"),
    "qwen2": Family("Qwen 2, Qwen 2.5"),
    "qwen3": Family("Qwen 3"),
    "gemma": Family("Gemma"),
    "gemma2": Family("Gemma 2", AFTER),
    "gemma3_text": Family("Gemma 3, text alone", AFTER),
    "vaultgemma": Family("VaultGemma"),
    "phi": Family("Phi 1, 1.5, 2", MEAN),
    "phi3": Family("Phi 3, Phi 4"),
    "smollm3": Family("SmolLM3"),
    "ministral": Family("Ministral"),
    "ministral3": Family("Ministral 3, text alone"),
    "cwm": Family("Code World Model"),
    "granite": Family("Granite 3, dense"),
    "olmo": Family("OLMo", MEAN),
    "olmo2": Family("OLMo 2", AFTER),
    "olmo3": Family("OLMo 3", AFTER),
    "cohere": Family("Command R", MEAN),
    "cohere2": Family("Command R7B, Command A", MEAN),
    "glm": Family("GLM-4 9B of 2024, GLM-Edge"),
    "glm4": Family("GLM-4-0414", AFTER),
    "starcoder2": Family("StarCoder 2", MEAN),
    "stablelm": Family("StableLM", MEAN),
    "nemotron": Family("Nemotron 3, 4 and Minitron", MEAN),
    "exaone4": Family("EXAONE 4", AFTER),
    "seed_oss": Family("Seed-OSS"),
    "arcee": Family("AFM"),
    "helium": Family("Helium"),
    "ernie4_5": Family("ERNIE 4.5, dense"),
    "hunyuan_v1_dense": Family("Hunyuan, dense"),
    "apertus": Family("Apertus"),
    "qwen3_5_text": Family("Qwen 3.5, text alone", weighs="those with attention"),
    "internlm3": Family("InternLM 3", since="5.23"),
    "jais2": Family("Jais 2", MEAN),
    "hyperclovax": Family("HyperCLOVA X", AFTER),
    "persimmon": Family("Persimmon 8B", MEAN),
    "iquestcoder": Family("IQuest-Coder V1", since="5.23"),
    "lfm2": Family("LFM2", weighs="those with attention"),
}

_LLAMA4 = ExpertNames(
    files=("experts.gate_up_proj", "experts.down_proj"),
    transposed=True,
    scaled_input=True,
    parted=True,
)

# Decoders with experts, which `models/experts.py` opens.
MIXTURES: dict[str, Family] = {
    "mixtral": Family(
        "Mixtral 8x7B, 8x22B", experts=ExpertNames("w1", "w3", "w2", "block_sparse_moe")
    ),
    "deepseek_v2": Family("DeepSeek V2, V2-Lite", experts=ExpertNames()),
    "deepseek_v3": Family("DeepSeek V3, R1", experts=ExpertNames()),
    "glm4_moe": Family("GLM-4.5, 4.6", experts=ExpertNames()),
    "qwen2_moe": Family("Qwen 1.5 and 2 with experts", experts=ExpertNames()),
    "olmoe": Family("OLMoE", experts=ExpertNames()),
    "qwen3_moe": Family("Qwen 3 with experts, Qwen3-Coder", experts=ExpertNames()),
    "qwen3_next": Family(
        "Qwen3-Next", weighs="those with attention", since="5.23", experts=ExpertNames()
    ),
    "glm4_moe_lite": Family("GLM-4.7-Flash", since="5.23", experts=ExpertNames()),
    "dots1": Family("dots.llm1", since="5.23", experts=ExpertNames()),
    "solar_open": Family("Solar Open", since="5.23", experts=ExpertNames()),
    "mellum": Family("Mellum", since="5.23", experts=ExpertNames()),
    "flex_olmo": Family("FlexOlmo", AFTER, since="5.23", experts=ExpertNames()),
    "minimax_m2": Family(
        "MiniMax M2",
        since="5.23",
        experts=ExpertNames("w1", "w3", "w2", "block_sparse_moe"),
    ),
    "granitemoe": Family(
        "Granite 3 with experts",
        since="5.23",
        experts=ExpertNames(
            "w1", "w3", "w2", router="layer", files=("input_linear.weight", "output_linear.weight")
        ),
    ),
    "gpt_oss": Family(
        "gpt-oss 20B, 120B",
        since="5.23",
        experts=ExpertNames(
            files=("experts.gate_up_proj", "experts.down_proj"),
            transposed=True,
            interleaved=True,
            mxfp4=True,
        ),
    ),
    "cohere2_moe": Family("Command A+", MEAN, experts=ExpertNames()),
    "hunyuan_v1_moe": Family("Hunyuan A13B", experts=ExpertNames()),
    "lfm2_moe": Family(
        "LFM2 8B-A1B", weighs="those with attention", experts=ExpertNames("w1", "w3", "w2")
    ),
    "ernie4_5_moe": Family("ERNIE 4.5 with experts", experts=ExpertNames(beside="moe_statics")),
    "phimoe": Family(
        "Phi 3.5 MoE",
        MEAN,
        experts=ExpertNames("w1", "w3", "w2", "block_sparse_moe", renamed=("router", "gate")),
    ),
    "llama4_text": Family("Llama 4, text alone", since="5.23", experts=_LLAMA4),
}


@dataclass(frozen=True)
class SeeingFamily:
    """A row: a multimodal family that has been tried, as tests do with a tiny one of each.

    Attributes:
        models: what people know it by.
        spec: its parts; how its decoder layers are built is found, as those of a text family are.
        unrotatable: as in `Family`, of the language model that it is known with.
        unprunable: why visual tokens cannot be pruned, or None.
        weighs, since, experts: as in `Family`.
    """

    models: str
    spec: ArchitectureSpec
    unrotatable: str | None = None
    unprunable: str | None = None
    weighs: str = "all layers"
    since: str = "5.17"
    experts: ExpertNames | None = None


# Why an image's tokens all stay.
CHUNKS = "its decoder attends in chunks, which a shorter prompt would cut elsewhere"
WINDOWS = "its decoder has sliding windows, which a shorter prompt would widen"
LINEAR = "its decoder has linear attention, where what was read leaves its mark"
TOGETHER = "tokens of an image attend to those behind them, which is not followed here"


def _multimodal(vision: VisionSpec, decoder: str = "language_model") -> ArchitectureSpec:
    inside = f"model.{decoder}"
    return ArchitectureSpec(
        layers=f"{inside}.layers",
        embedding=f"{inside}.embed_tokens",
        rotary=f"{inside}.rotary_emb",
        final_norm=f"{inside}.norm",
        vision=vision,
    )


def _llava(
    projector: str | None = "linear_2",
    vectors: tuple[str, ...] = (),
    ignored: tuple[str, ...] = ("re:.*vision_tower.*", "re:.*multi_modal_projector.*"),
) -> ArchitectureSpec:
    """Tower, projector and decoder as LLaVA names them."""
    return _multimodal(
        VisionSpec(
            projectors=(f"model.multi_modal_projector.{projector}",) if projector else (),
            vectors=vectors,
            ignored=ignored,
            spellings=(
                (r"^language_model\.lm_head\.", "lm_head."),
                (r"^language_model\.model\.", "model.language_model."),
                (r"^(?=vision_tower\.|multi_modal_projector\.|image_newline$)", "model."),
                (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
            ),
        )
    )


def _qwen(*projectors: str) -> ArchitectureSpec:
    """Tower and decoder as Qwen2-VL names them."""
    return _multimodal(
        VisionSpec(
            projectors=tuple(f"model.visual.{name}" for name in projectors),
            vectors=(),
            ignored=(r"re:.*visual\..*",),
            spellings=(
                (r"^visual\.", "model.visual."),
                (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
            ),
        )
    )


_IDEFICS = _multimodal(
    VisionSpec(
        projectors=("model.connector.modality_projection.proj",),
        vectors=(),
        ignored=(r"re:.*vision_model\..*", r"re:.*connector\..*"),
        spellings=(),
    ),
    "text_model",
)

# The decoder is a causal model with a head of its own, and nothing has that and the tower alone.
_LLAMA4_SEEING = ArchitectureSpec(
    base="",
    layers="language_model.model.layers",
    embedding="language_model.model.embed_tokens",
    rotary="language_model.model.rotary_emb",
    final_norm="language_model.model.norm",
    head="language_model.lm_head",
    vision=VisionSpec(
        projectors=("multi_modal_projector.linear_1",),
        vectors=(),
        ignored=("re:.*vision_model.*", "re:.*multi_modal_projector.*"),
        spellings=(),
    ),
)

# LLaVA and its kin hold many decoders. The unpadded tiles of NeXT and OneVision end each row with
# `image_newline`; they are resized behind the projector, but channel by channel.
MULTIMODAL: dict[str, SeeingFamily] = {
    "llava": SeeingFamily("LLaVA 1.5", _llava()),
    "llava_next": SeeingFamily("LLaVA-NeXT", _llava(vectors=("model.image_newline",))),
    "llava_onevision": SeeingFamily("LLaVA-OneVision", _llava(vectors=("model.image_newline",))),
    "qwen2_vl": SeeingFamily("Qwen2-VL", _qwen("merger.mlp.2")),
    "qwen2_5_vl": SeeingFamily("Qwen2.5-VL", _qwen("merger.mlp.2")),
    "qwen3_vl": SeeingFamily(
        "Qwen3-VL",
        _qwen("merger.linear_fc2", "deepstack_merger_list.*.linear_fc2"),
    ),
    "qwen3_vl_moe": SeeingFamily(
        "Qwen3-VL with experts",
        _qwen("merger.linear_fc2", "deepstack_merger_list.*.linear_fc2"),
        since="5.23",
        experts=ExpertNames(files=("experts.gate_up_proj", "experts.down_proj"), transposed=None),
    ),
    "glm4v": SeeingFamily("GLM-4.1V", _qwen("merger.down_proj"), AFTER),
    "glm46v": SeeingFamily("GLM-4.6V-Flash", _qwen("merger.down_proj"), AFTER),
    "qwen3_5": SeeingFamily(
        "Qwen 3.5", _qwen("merger.linear_fc2"), None, LINEAR, "those with attention"
    ),
    "exaone4_5": SeeingFamily("EXAONE 4.5", _qwen("merger.mlp.2"), AFTER, WINDOWS),
    "gemma3": SeeingFamily("Gemma 3", _llava(None), AFTER, WINDOWS),
    "idefics3": SeeingFamily("Idefics3", _IDEFICS),
    "smolvlm": SeeingFamily("SmolVLM 2", _IDEFICS),
    "mistral3": SeeingFamily("Mistral Small 3.1, 3.2, Ministral 3", _llava()),
    "internvl": SeeingFamily("InternVL 3", _llava()),
    "aya_vision": SeeingFamily("Aya Vision", _llava(), MEAN, WINDOWS),
    "paligemma": SeeingFamily("PaliGemma", _llava("linear"), None, TOGETHER),
    "vipllava": SeeingFamily("ViP-LLaVA", _llava()),
    "lighton_ocr": SeeingFamily(
        "LightOnOCR",
        _multimodal(
            VisionSpec(
                projectors=("model.vision_projection.linear_2",),
                vectors=(),
                ignored=("re:.*vision_encoder.*", "re:.*vision_projection.*"),
                spellings=(),
            )
        ),
    ),
    "ovis2": SeeingFamily(
        "Ovis 2",
        _multimodal(
            VisionSpec(
                projectors=(),
                vectors=("model.visual_embeddings_table.weight",),
                ignored=("re:.*vision_tower.*",),
                spellings=(),
            )
        ),
    ),
    "cohere2_vision": SeeingFamily("Command A Vision", _llava(), MEAN, WINDOWS),
    "deepseek_vl": SeeingFamily(
        "DeepSeek-VL",
        _multimodal(
            VisionSpec(
                projectors=("model.aligner.linear2",),
                vectors=(),
                ignored=(r"re:.*vision_model\..*", r"re:.*aligner\..*"),
                spellings=(),
            )
        ),
    ),
    "llama4": SeeingFamily(
        "Llama 4 Scout, Maverick", _LLAMA4_SEEING, None, CHUNKS, since="5.23", experts=_LLAMA4
    ),
}
# What families call the decoder that is theirs alone.
OWN_DECODERS = (
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
    "glm4v_text",
    "llama4_text",
)
INSIDE = (*ARCHITECTURES, *OWN_DECODERS)


def experts_of(model_type: str) -> ExpertNames | None:
    """What files of a type call its experts, or None where it has none."""
    row = MIXTURES.get(model_type) or MULTIMODAL.get(model_type)
    return None if row is None else row.experts


def architecture_of(config: "PretrainedConfig") -> ArchitectureSpec:
    """The parts of a model by its family; a UsageError that lists the supported ones if it is none.

    How the decoder layers are built is found by `structure.look`.
    """
    if config.model_type not in (*ARCHITECTURES, *MIXTURES, *MULTIMODAL):
        raise _unsupported(config.model_type)
    if config.model_type in MULTIMODAL:
        decoder = config.get_text_config().model_type
        if decoder not in INSIDE:
            raise UsageError(
                f"the language model inside this {config.model_type!r} is a {decoder!r}, which is "
                f"not supported: supported are {', '.join(INSIDE)}"
            )
        return MULTIMODAL[config.model_type].spec
    return ArchitectureSpec()


def refuse_partly_seen(config: "PretrainedConfig") -> None:
    """UsageError, the same as above, for a family that reads images or sound and has no row here.

    As a language model alone it would load, without what sees or hears.
    """
    from transformers.models.auto.modeling_auto import (  # slow to import
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    senses = ("vision_config", "image_config", "audio_config", "speech_config", "vq_config")
    parts = getattr(config, "sub_configs", {})
    seeing = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if config.model_type not in MULTIMODAL and (seeing or any(n.endswith(senses) for n in parts)):
        raise _unsupported(config.model_type)


def _unsupported(model_type: str) -> UsageError:
    """It names the nearest family for a typo, but not for a type that transformers knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # slow to import

    known = [*ARCHITECTURES, *MIXTURES, *MULTIMODAL]
    near = "" if model_type in CONFIG_MAPPING_NAMES else did_you_mean(model_type, known)
    return UsageError(
        f"model type {model_type!r} is not supported{near}: supported are {', '.join(known)}"
    )


def head_dim_of(config: "PretrainedConfig") -> int:
    """Width of one attention head: explicit in the config, or hidden size over heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def experts_per_token(config: "PretrainedConfig") -> int:
    """How many experts a token goes to: the most of any layer, where a config has a list."""
    chosen: int | list[int] | None = getattr(config, "num_experts_per_tok", None)
    return (max(chosen) if isinstance(chosen, list) else chosen) or 1
