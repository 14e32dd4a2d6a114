"""What a model family looks like: where its decoder layers, norms and linears are.

A family is one row of `ARCHITECTURES`. The rows here share one structure, the pre-norm decoder
layer `x += o(attention(norm(x))); x += down(mlp(norm(x)))`, which is all that fusing, rotating and
quantising layer by layer rely on. Names inside a layer are relative to the layer.

A multimodal family has such a decoder inside; what makes visual tokens of pixels is its `vision`.

    spec = architecture_of(AutoConfig.from_pretrained(path))
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import UsageError, did_you_mean

if TYPE_CHECKING:  # slow to import
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class VisionSpec:
    """The part of a multimodal model before its language model; it is never quantised.

    Attributes:
        projector: the last linear before the residual stream.
        vectors: parameters [d] that enter the residual stream as they are.
        ignored: patterns of the linears of this part, as `quantization_config` names them; engines
            spell what lies inside a vision tower differently.
        spellings: expression -> replacement, applied in order: from the names of checkpoints,
            old and new, to those of the modules.
    """

    projector: str
    vectors: tuple[str, ...]
    ignored: tuple[str, ...]
    spellings: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ArchitectureSpec:
    """Names of the parts of one model family, as its checkpoint and its modules spell them.

    `groups` lists the linears of a decoder layer in the order in which data meets them; the
    linears of one group read the same input, so they share one Hessian.
    """

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    rotary: str = "model.rotary_emb"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    input_norm: str = "input_layernorm"
    post_norm: str = "post_attention_layernorm"
    attention: str = "self_attn"
    mlp: str = "mlp"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    vision: VisionSpec | None = None

    def module_name(self, tensor: str) -> str:
        """The name that the model's modules give a tensor of a checkpoint."""
        for pattern, replacement in self.vision.spellings if self.vision else ():
            tensor = re.sub(pattern, replacement, tensor)
        return tensor

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        return ((self.query, self.key, self.value), (self.output,), self.mlp_in, (self.mlp_out,))

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group)


# Llama covers Llama 2 and 3.x; Qwen2 covers Qwen2.5 (q/k/v biases); Qwen3 adds q/k norms, which
# sit behind the projections and so see neither fusion nor rotation.
ARCHITECTURES: dict[str, ArchitectureSpec] = {
    "llama": ArchitectureSpec(),
    "mistral": ArchitectureSpec(),
    "qwen2": ArchitectureSpec(),
    "qwen3": ArchitectureSpec(),
}


def _multimodal(vision: VisionSpec) -> ArchitectureSpec:
    inside = "model.language_model"
    return ArchitectureSpec(
        layers=f"{inside}.layers",
        embedding=f"{inside}.embed_tokens",
        rotary=f"{inside}.rotary_emb",
        final_norm=f"{inside}.norm",
        vision=vision,
    )


def _llava(*vectors: str) -> ArchitectureSpec:
    return _multimodal(
        VisionSpec(
            projector="model.multi_modal_projector.linear_2",
            vectors=vectors,
            ignored=("re:.*vision_tower.*", "re:.*multi_modal_projector.*"),
            spellings=(
                (r"^language_model\.lm_head\.", "lm_head."),
                (r"^language_model\.model\.", "model.language_model."),
                (r"^(?=vision_tower\.|multi_modal_projector\.|image_newline$)", "model."),
                (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
            ),
        )
    )


_QWEN_VL = _multimodal(
    VisionSpec(
        projector="model.visual.merger.mlp.2",
        vectors=(),
        ignored=(r"re:.*visual\..*",),
        spellings=(
            (r"^visual\.", "model.visual."),
            (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
        ),
    )
)

# LLaVA and its kin hold any of the decoders above. The unpadded tiles of NeXT and OneVision end
# each row with `image_newline`; they are resized behind the projector, but channel by channel.
MULTIMODAL: dict[str, ArchitectureSpec] = {
    "llava": _llava(),
    "llava_next": _llava("model.image_newline"),
    "llava_onevision": _llava("model.image_newline"),
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
}
# What the Qwen families call the decoder that is theirs alone.
OWN_DECODERS = ("qwen2_vl_text", "qwen2_5_vl_text")


def architecture_of(config: "PretrainedConfig") -> ArchitectureSpec:
    """The row of a model's family; a UsageError that lists the supported ones if there is none."""
    known = ARCHITECTURES | MULTIMODAL
    if config.model_type not in known:
        raise _unsupported(config.model_type)
    if config.model_type in MULTIMODAL:
        decoder = config.get_text_config().model_type
        if decoder not in (*ARCHITECTURES, *OWN_DECODERS):
            raise UsageError(
                f"the language model inside this {config.model_type!r} is a {decoder!r}, which is "
                f"not supported: supported are {', '.join(ARCHITECTURES)}"
            )
    return known[config.model_type]


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

    known = ARCHITECTURES | MULTIMODAL
    near = "" if model_type in CONFIG_MAPPING_NAMES else did_you_mean(model_type, known)
    return UsageError(
        f"model type {model_type!r} is not supported{near}: supported are {', '.join(known)}"
    )


def head_dim_of(config: "PretrainedConfig") -> int:
    """Width of one attention head: explicit in the config, or hidden size over heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
