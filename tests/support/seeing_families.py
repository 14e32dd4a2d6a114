"""A tiny random checkpoint of every multimodal family beside those of `tiny_folders`.

Built so that a wrong assumption shows, as those of `dense_families`. Where its processor needs a
package that tests do not have, a folder has none, and `PROCESSORS` stands in for it.

    folder = write_seeing(tmp_path / "gemma3", "gemma3")
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from compress.models import pretrained
from support.dense_families import DENSE, fill
from support.tiny_folders import _tokenizer

IMAGE, START, END, VIDEO, BREAK = 90, 91, 92, 93, 94
VOCABULARY, HIDDEN, LAYERS, WINDOW = 96, 32, 3, 6
SIDE, PATCH = 24, 4  # pixels of a crop, and of its patches
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
SLIDING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
STRETCHED = DENSE["ministral3"]["rope_parameters"]
M_ROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}
SCALED = {"embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.37,
          "attention_multiplier": 0.21}  # fmt: skip


def text(kind: str, **changes: Any) -> Any:
    return hf.AutoConfig.for_model(kind, **(TEXT | changes))


def llava(vision: Any, inside: Any, **options: Any) -> Any:
    return hf.LlavaConfig(
        vision_config=vision, text_config=inside, image_token_index=IMAGE, **options
    )


def _internvl() -> Any:
    sizes = {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    vision = hf.InternVLVisionConfig(**(VISION | sizes), use_qk_norm=True, attention_bias=True)
    return hf.InternVLConfig(
        vision_config=vision, text_config=text("qwen2"), image_token_id=IMAGE, image_seq_length=9
    )


def _gemma3() -> Any:
    rope = {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}  # fmt: skip
    inside = text("gemma3_text", query_pre_attn_scalar=20, rope_parameters=rope, **SLIDING)
    return hf.Gemma3Config(
        text_config=inside,
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        mm_tokens_per_image=9,
        boi_token_index=START,
        eoi_token_index=END,
        image_token_index=IMAGE,
    )


def _idefics(config: Any, vision: Any) -> Any:
    return config(
        vision_config=vision(**VISION).to_dict(),
        text_config=text("llama", attention_bias=True),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )


def _mistral3(inside: str = "mistral", **changes: Any) -> Any:
    vision = hf.PixtralVisionConfig(**VISION, head_dim=6)
    return hf.Mistral3Config(
        vision_config=vision,
        text_config=text(inside, sliding_window=None, **changes),
        image_token_index=IMAGE,
        multimodal_projector_bias=True,
    )


def _qwen3_vl() -> Any:
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 4,
              "patch_size": PATCH, "temporal_patch_size": 2, "out_hidden_size": HIDDEN,
              "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    inside = hf.Qwen3VLTextConfig(**TEXT, rope_parameters=M_ROPE | {"mrope_interleaved": True})
    return hf.Qwen3VLConfig(
        vision_config=vision,
        text_config=inside.to_dict(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _qwen3_vl_moe() -> Any:
    """Experts of 3 x 24 numbers a channel: were two of them as wide as the stream, a file would not
    say which way they lie."""
    parts = _qwen3_vl()
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
               "mlp_only_layers": [0]}  # fmt: skip
    rope = M_ROPE | {"mrope_interleaved": True}
    inside = hf.Qwen3VLMoeTextConfig(**TEXT, **changes, rope_parameters=rope)
    tokens = {name: getattr(parts, name) for name in vars(parts) if name.endswith("_token_id")}
    return hf.Qwen3VLMoeConfig(
        vision_config=parts.vision_config.to_dict() | {"model_type": "qwen3_vl_moe_vision"},
        text_config=inside.to_dict(),
        **tokens,
    )


def _glm4v() -> Any:
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 4,
              "image_size": SIDE, "patch_size": PATCH, "out_hidden_size": HIDDEN}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0,
            "mrope_section": [1, 1, 2]}  # fmt: skip
    inside = hf.Glm4vTextConfig(**TEXT, rope_parameters=rope)
    return hf.Glm4vConfig(
        vision_config=vision,
        text_config=inside.to_dict(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=80,
        video_end_token_id=81,
    )


def _aya_vision() -> Any:
    return hf.AyaVisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text("cohere2", logit_scale=0.3, **SLIDING),
        image_token_index=IMAGE,
    )


def _paligemma() -> Any:
    return hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(
            **VISION, vision_use_head=False, projection_dim=HIDDEN, num_image_tokens=36
        ),
        text_config=text("gemma", hidden_activation="gelu_pytorch_tanh"),
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
    )


def _vipllava() -> Any:
    return hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=text("llama"),
        image_token_index=IMAGE,
        vision_feature_layers=[-2, -1],
    )


def _glm46v() -> Any:
    parts = _glm4v()
    tokens = {name: getattr(parts, name) for name in vars(parts) if name.endswith("_token_id")}
    return hf.Glm46VConfig(
        vision_config=parts.vision_config.to_dict(),
        text_config=parts.text_config.to_dict(),
        **tokens,
    )


def _qwen3_5() -> Any:
    parts = _qwen3_vl()
    vision = parts.vision_config.to_dict()
    del vision["deepstack_visual_indexes"], vision["model_type"]
    inside = text(
        "qwen3_5_text",
        layer_types=["full_attention", "linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        rope_parameters=M_ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0],
                                  "mrope_interleaved": True},
    )  # fmt: skip
    return hf.Qwen3_5Config(
        vision_config=vision,
        text_config=inside.to_dict(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _exaone4_5() -> Any:
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 4,
              "num_key_value_heads": 2, "patch_size": PATCH, "temporal_patch_size": 2,
              "window_size": 16, "fullatt_block_indexes": [1],
              "out_hidden_size": HIDDEN}  # fmt: skip
    return hf.Exaone4_5_Config(
        vision_config=vision,
        text_config=text("exaone4", sliding_window_pattern=2, **SLIDING).to_dict(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def _lighton_ocr() -> Any:
    return hf.LightOnOcrConfig(
        vision_config=hf.PixtralVisionConfig(**VISION, head_dim=6),
        text_config=text("qwen3"),
        image_token_id=IMAGE,
    )


def _ovis2() -> Any:
    vision = hf.Ovis2VisionConfig(**VISION, vocab_size=40, hidden_stride=2)
    return hf.Ovis2Config(
        vision_config=vision,
        text_config=text("qwen2"),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, END, VIDEO, BREAK, 95],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
    )


def _cohere2_vision() -> Any:
    return hf.Cohere2VisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text("cohere2", logit_scale=0.3, **SLIDING),
        image_token_id=IMAGE,
        alignment_intermediate_size=48,
    )


def _deepseek_vl() -> Any:
    vision = hf.SiglipVisionConfig(**VISION, vision_use_head=False)
    return hf.DeepseekVLConfig(
        vision_config=vision, text_config=text("llama"), image_token_id=IMAGE
    )


def _llama4() -> Any:
    vision = VISION | {"intermediate_size": 96, "vision_output_dim": 28, "pixel_shuffle_ratio": 0.5,
                       "projector_input_dim": 28, "projector_output_dim": 28,
                       "num_attention_heads": 3}  # fmt: skip
    inside = text(
        "llama4_text",
        num_local_experts=4,
        num_experts_per_tok=1,
        moe_layers=[1, 2],
        intermediate_size_mlp=64,
        no_rope_layers=[1, 0, 1],
        attention_chunk_size=WINDOW,
        floor_scale=4,
        attn_scale=0.7,
    )
    return hf.Llama4Config(
        vision_config=hf.Llama4VisionConfig(**vision),
        text_config=inside.to_dict(),
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


# By name: the model type, or the type and what differs.
SEEING: dict[str, Callable[[], Any]] = {
    "llava-pixtral": lambda: llava(
        hf.PixtralVisionConfig(**VISION, head_dim=6),
        text("mistral", sliding_window=None),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    "llava-granite": lambda: llava(hf.CLIPVisionConfig(**VISION), text("granite", **SCALED)),
    "llava-phi3": lambda: llava(hf.CLIPVisionConfig(**VISION), text("phi3")),
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "gemma3": _gemma3,
    "idefics3": lambda: _idefics(hf.Idefics3Config, hf.Idefics3VisionConfig),
    "smolvlm": lambda: _idefics(hf.SmolVLMConfig, hf.SmolVLMVisionConfig),
    "mistral3": _mistral3,
    "mistral3-ministral": lambda: _mistral3("ministral3", rope_parameters=STRETCHED),
    "internvl": _internvl,
    "aya_vision": _aya_vision,
    "paligemma": _paligemma,
    "vipllava": _vipllava,
    "glm4v": _glm4v,
    "glm46v": _glm46v,
    "qwen3_5": _qwen3_5,
    "exaone4_5": _exaone4_5,
    "lighton_ocr": _lighton_ocr,
    "ovis2": _ovis2,
    "cohere2_vision": _cohere2_vision,
    "deepseek_vl": _deepseek_vl,
    "llama4": _llama4,
}


def type_of(family: str) -> str:
    """The model type of a row of `SEEING`."""
    return family.partition("-")[0]


def tiny_seeing(family: str) -> nn.Module:
    """The model in fp32 with every parameter random."""
    config = SEEING[family]()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    model = hf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    fill(model)
    return model


# ---- processors ---------------------------------------------------------------------------------


class StandIn:
    """What a processor does, for prompts with one picture of a fixed size."""

    image_token = "<image>"
    chat_template = None
    image_mean, image_std = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]

    def __init__(self, pixels: Callable[[], dict[str, Tensor]], tokens: int):
        self.tokenizer = _tokenizer({IMAGE: self.image_token})
        self.pixels, self.tokens = pixels, tokens

    def __call__(self, text: list[str], images: list[Any], **options: Any) -> dict[str, Tensor]:
        expanded = [part.replace(self.image_token, self.image_token * self.tokens) for part in text]
        inputs = dict(self.tokenizer(expanded, return_tensors="pt")) | self.pixels()
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
        return inputs


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _pixtral() -> dict[str, Tensor]:
    return {"pixel_values": _noise(1, 3, 24, 16), "image_sizes": torch.tensor([[24, 16]])}


def _grid() -> dict[str, Tensor]:
    """6 x 4 patches of two frames."""
    return {
        "pixel_values": _noise(24, 3 * 2 * PATCH**2),
        "image_grid_thw": torch.tensor([[1, 6, 4]]),
    }


def _crop() -> dict[str, Tensor]:
    return {"pixel_values": _noise(1, 3, SIDE, SIDE)}


PROCESSORS: dict[str, Callable[[], StandIn]] = {
    "llava-pixtral": lambda: StandIn(_pixtral, 24),
    "mistral3": lambda: StandIn(_pixtral, 6),
    "mistral3-ministral": lambda: StandIn(_pixtral, 6),
    "smolvlm": lambda: StandIn(lambda: {"pixel_values": _noise(1, 2, 3, SIDE, SIDE)}, 18),
    "glm46v": lambda: StandIn(_grid, 6),
    "qwen3_5": lambda: StandIn(_grid, 6),
    "exaone4_5": lambda: StandIn(_grid, 6),
    "lighton_ocr": lambda: StandIn(_pixtral, 6),
    "ovis2": lambda: StandIn(_crop, 9),
    "cohere2_vision": lambda: StandIn(_crop, 9),
    "deepseek_vl": lambda: StandIn(_crop, 36),
    "llama4": lambda: StandIn(_crop, 9),
}


def _crops(kind: Any = hf.GotOcr2ImageProcessorPil) -> Any:
    return kind(size={"height": SIDE, "width": SIDE}, min_patches=1, max_patches=4)


def processor_of(family: str) -> Any:
    """The processor that a published folder of the family would have."""
    square = {"height": SIDE, "width": SIDE}
    kind = type_of(family)
    names = {IMAGE: "<image>", START: "<start>", END: "<end>", VIDEO: "<video>"}
    if kind in ("llava", "vipllava"):
        images = hf.CLIPImageProcessorPil(size=square, crop_size=square)
        return hf.LlavaProcessor(
            images,
            tokenizer(names),
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    if kind == "gemma3":
        special = {"boi_token": "<start>", "eoi_token": "<end>", "image_token": "<image>"}
        images = hf.Gemma3ImageProcessorPil(size=square)
        return hf.Gemma3Processor(images, tokenizer(names, **special), image_seq_length=9)
    if kind == "idefics3":
        images = hf.Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
        )
        names = names | {START: "<fake_token_around_image>", END: "<end_of_utterance>"}
        return hf.Idefics3Processor(images, tokenizer(names), image_seq_len=9)
    if kind == "internvl":
        special = {"start_image_token": "<start>", "end_image_token": "<end>",
                   "context_image_token": "<image>", "video_token": "<video>"}  # fmt: skip
        reads = pretrained._without_videos(hf.InternVLProcessor)
        return reads(_crops(), tokenizer(names, **special), image_seq_length=9)
    if kind == "aya_vision":
        return hf.AyaVisionProcessor(
            _crops(),
            tokenizer({BREAK: "<image>"} | {IMAGE: "<|IMG_PATCH|>"}),
            patch_size=PATCH,
            img_size=SIDE,
            downsample_factor=2,
        )
    if kind == "paligemma":
        images = hf.SiglipImageProcessorPil(size=square)
        images.image_seq_length = 36
        return hf.PaliGemmaProcessor(images, tokenizer(names, image_token="<image>"))  # noqa: S106
    raise KeyError(family)


def tokenizer(names: dict[int, str], **special: str) -> Any:
    made = _tokenizer(names)
    if special:
        made.add_special_tokens({}, replace_extra_special_tokens=False)
        made._set_model_specific_special_tokens(special_tokens=special)
    return made


def _write_grid_processor(folder: Path, family: str) -> None:
    """Tokenizer and image processor apart, as published checkpoints have them."""
    glm = family == "glm4v"
    special = {IMAGE: "<|image|>" if glm else "<|image_pad|>",
               VIDEO: "<|video|>" if glm else "<|video_pad|>"}  # fmt: skip
    _tokenizer(special).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 4096}
    kind = hf.Glm4vImageProcessorPil if glm else hf.Qwen2VLImageProcessorPil
    kind(patch_size=PATCH, merge_size=2, size=size).save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    name = "Glm4vProcessor" if glm else "Qwen3VLProcessor"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processor_class": name}))


def write_seeing(folder: Path, family: str) -> Path:
    """A folder as a person would have it: weights, config, tokenizer, processor."""
    model = tiny_seeing(family)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    if family in ("qwen3_vl", "qwen3_vl_moe", "glm4v"):
        _write_grid_processor(folder, family)
    elif family in PROCESSORS:
        _tokenizer({IMAGE: StandIn.image_token}).save_pretrained(folder)
    else:
        processor_of(family).save_pretrained(folder)
    return folder
