"""Tiny random multimodal models of each family, their prompts, and the full run to compare with.

The oracle: `masked_run` runs the whole prompt and hides the pruned keys with its own 4-D masks, so
it shares nothing with the code that shortens prompts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

IMAGE, VIDEO, PAD, BREAK = 90, 91, 0, 89
LAYERS, HEADS, KV_HEADS, HIDDEN, VOCABULARY = 4, 4, 2, 32, 96
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "image_size": 24,
    "patch_size": 4,
}
PATCHES = 36  # of a crop
ON_GRIDS = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "glm4v",
    "glm46v",
)  # images of any size
# Towers of their own, and patches that become one token 2x2: of crops, or of whole images.
SHUFFLED = ("idefics3", "smolvlm", "internvl", "ovis2")
PIXTRAL = ("mistral3", "lighton_ocr", "llava_pixtral")  # the last does not merge
OWN_TOWERS = (*SHUFFLED, *PIXTRAL, "vipllava", "deepseek_vl")


def tiny_model(family: str, attention: str = "sdpa", **text: Any) -> Any:
    """A random model, the same for the same arguments. Weights are large enough to matter."""
    import transformers as hf

    torch.manual_seed(1)
    text = TEXT | text
    if family in ("llava", "llava_siglip"):
        siglip = family == "llava_siglip"
        vision = (hf.SiglipVisionConfig if siglip else hf.CLIPVisionConfig)(**VISION)
        config = hf.LlavaConfig(
            vision_config=vision,
            text_config=hf.LlamaConfig(**text),
            image_token_index=IMAGE,
            vision_feature_select_strategy="full" if siglip else "default",
            vision_feature_layer=-1 if siglip else -2,
        )
        kind = hf.LlavaForConditionalGeneration
    elif family == "llava_next":
        config = hf.LlavaNextConfig(
            vision_config=hf.CLIPVisionConfig(**VISION),
            text_config=hf.LlamaConfig(**text),
            image_token_index=IMAGE,
            image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
        )
        kind = hf.LlavaNextForConditionalGeneration
    elif family == "llava_onevision":
        config = hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
            text_config=hf.Qwen2Config(**text),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[24, 48], [48, 24], [48, 48], [72, 72]],
            vision_aspect_ratio="anyres_max_4",
        )
        kind = hf.LlavaOnevisionForConditionalGeneration
    elif family in OWN_TOWERS:
        config, kind = _own_tower(family, text)
    else:
        config, kind = _on_grids(family, text)
    config._attn_implementation = attention
    model = kind(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:  # the default 0.02 makes all attention uniform
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def _own_tower(family: str, text: dict[str, Any]) -> tuple[Any, Any]:
    import transformers as hf

    inside = hf.LlamaConfig(**text)
    if family in ("idefics3", "smolvlm"):
        smol = family == "smolvlm"
        vision = (hf.SmolVLMVisionConfig if smol else hf.Idefics3VisionConfig)(**VISION)
        config = (hf.SmolVLMConfig if smol else hf.Idefics3Config)(
            vision_config=vision.to_dict(),
            text_config=inside,
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=PAD,
        )
        kind = hf.SmolVLMForConditionalGeneration if smol else hf.Idefics3ForConditionalGeneration
        return config, kind
    if family == "internvl":
        sizes = {"image_size": [24, 24], "patch_size": [4, 4]}
        vision = hf.InternVLVisionConfig(**(VISION | sizes), use_qk_norm=True)
        config = hf.InternVLConfig(vision_config=vision, text_config=inside, image_token_id=IMAGE)
        return config, hf.InternVLForConditionalGeneration
    if family == "ovis2":
        vision = hf.Ovis2VisionConfig(**VISION, vocab_size=40, hidden_stride=2)
        config = hf.Ovis2Config(
            vision_config=vision,
            text_config=inside,
            image_token_id=IMAGE,
            visual_indicator_token_ids=[91, 92, 93, 94, 95],
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
        )
        return config, hf.Ovis2ForConditionalGeneration
    if family in PIXTRAL:
        vision = hf.PixtralVisionConfig(**VISION, head_dim=HIDDEN // HEADS)
        if family == "llava_pixtral":
            config = hf.LlavaConfig(
                vision_config=vision,
                text_config=inside,
                image_token_index=IMAGE,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
            )
            return config, hf.LlavaForConditionalGeneration
        if family == "mistral3":
            return (
                hf.Mistral3Config(vision_config=vision, text_config=inside, image_token_id=IMAGE),
                hf.Mistral3ForConditionalGeneration,
            )
        config = hf.LightOnOcrConfig(vision_config=vision, text_config=inside, image_token_id=IMAGE)
        return config, hf.LightOnOcrForConditionalGeneration
    if family == "vipllava":
        config = hf.VipLlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION),
            text_config=inside,
            image_token_id=IMAGE,
            vision_feature_layer=[-2, 1],
        )
        return config, hf.VipLlavaForConditionalGeneration
    vision = hf.SiglipVisionConfig(**VISION, vision_use_head=False)
    config = hf.DeepseekVLConfig(vision_config=vision, text_config=inside, image_token_id=IMAGE)
    return config, hf.DeepseekVLForConditionalGeneration


def _on_grids(family: str, text: dict[str, Any]) -> tuple[Any, Any]:
    import transformers as hf

    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
    }
    tokens = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    }
    text = text | {"rope_parameters": rope}
    vision = {"depth": 3, "num_heads": HEADS, "patch_size": 4, "temporal_patch_size": 2}
    if family == "qwen2_vl":
        vision |= {"embed_dim": HIDDEN, "hidden_size": HIDDEN, "mlp_ratio": 2}
        config = hf.Qwen2VLConfig(vision_config=vision, text_config=text, **tokens)
        return config, hf.Qwen2VLForConditionalGeneration
    if family in ("qwen3_vl", "qwen3_vl_moe"):
        vision |= {
            "hidden_size": HIDDEN,
            "out_hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],  # added behind layers 0 and 1
        }
        text |= {"head_dim": 8, "rope_parameters": rope | {"mrope_interleaved": True}}
        if family == "qwen3_vl_moe":
            text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
            config = hf.Qwen3VLMoeConfig(vision_config=vision, text_config=text, **tokens)
            return config, hf.Qwen3VLMoeForConditionalGeneration
        config = hf.Qwen3VLConfig(vision_config=vision, text_config=text, **tokens)
        return config, hf.Qwen3VLForConditionalGeneration
    if family in ("glm4v", "glm46v"):
        vision |= {
            "hidden_size": HIDDEN,
            "out_hidden_size": HIDDEN,
            "intermediate_size": 48,
            "image_size": 24,
        }
        text |= {"rope_parameters": rope | {"partial_rotary_factor": 1.0}}
        tokens |= {"image_start_token_id": 92, "image_end_token_id": 93}
        tokens |= {"video_start_token_id": 94, "video_end_token_id": 95}
        if family == "glm4v":
            config = hf.Glm4vConfig(vision_config=vision, text_config=text, **tokens)
            return config, hf.Glm4vForConditionalGeneration
        parts = {"vision_config": vision | {"model_type": "glm4v_vision"}}
        parts["text_config"] = text | {"model_type": "glm4v_text"}
        return hf.Glm46VConfig(**parts, **tokens), hf.Glm46VForConditionalGeneration
    vision |= {
        "hidden_size": HIDDEN,
        "out_hidden_size": HIDDEN,
        "intermediate_size": 48,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **tokens)
    return config, hf.Qwen2_5_VLForConditionalGeneration


# Each prompt: what stands in it, text by its number of tokens, images by their size in pixels.
SINGLE = [[3, (20, 40), 5]]
BATCH = [[3, (20, 40), 5], [2, (44, 24), 1, (24, 24), 4], [6]]


def tiny_inputs(model: Any, rows: list[list[Any]] = SINGLE, side: str = "left") -> dict[str, Any]:
    """Keyword arguments of a forward, random but the same each time, padded on `side`."""
    generator = torch.Generator().manual_seed(2)
    sizes = [part for row in rows for part in row if isinstance(part, tuple)]
    per_row = [sum(isinstance(part, tuple) for part in row) for row in rows]
    pixels, counts = _pixels(model, sizes, per_row, generator)
    remaining = iter(counts)
    ids = []
    for row in rows:
        tokens: list[int] = []
        for part in row:
            if isinstance(part, tuple):
                found = next(remaining)
                tokens += [IMAGE] * found if isinstance(found, int) else found
            else:
                tokens += torch.randint(2, 80, (part,), generator=generator).tolist()
        ids.append(tokens)
    length = max(map(len, ids))
    fill = [[PAD] * (length - len(row)) for row in ids]
    left = side == "left"
    padded = [f + row if left else row + f for f, row in zip(fill, ids, strict=True)]
    masks = [
        [0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f)
        for f, row in zip(fill, ids, strict=True)
    ]
    inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)} | pixels
    if "image_grid_thw" in pixels:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return inputs


def _pixels(
    model: Any, sizes: list[tuple[int, int]], per_row: list[int], generator: torch.Generator
) -> tuple[dict[str, Any], list[int] | list[list[int]]]:
    """Random pixels of the images and the number of tokens of each, or the tokens themselves."""
    kind = model.config.model_type
    if not sizes:
        return {}, []
    if kind in SHUFFLED:
        return _shuffled_pixels(kind, sizes, per_row, generator)
    if model.config.vision_config.model_type == "pixtral":
        side = 4 * getattr(model.config, "spatial_merge_size", 1)
        largest = [max(n) for n in zip(*sizes, strict=True)]
        pixels = torch.randn(len(sizes), 3, *largest, generator=generator)
        for image, (height, width) in zip(pixels, sizes, strict=True):
            image[:, height:], image[..., width:] = 0, 0
        # A token that is text ends each row of those of the image.
        rows = [([IMAGE] * (w // side) + [BREAK]) * (h // side) for h, w in sizes]
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, rows
    if kind in ("llava", "vipllava", "deepseek_vl"):
        pixels = torch.randn(len(sizes), 3, 24, 24, generator=generator)
        return {"pixel_values": pixels}, [PATCHES] * len(sizes)
    if kind in ON_GRIDS:
        grids = torch.tensor([[1, 2 * (h // 8 + 1), 2 * (w // 8 + 1)] for h, w in sizes])
        patches = grids.prod(-1)
        pixels = torch.randn(int(patches.sum()), 3 * 2 * 16, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": grids}, (patches // 4).tolist()
    from compress.pruning.families import _tiles

    inputs: dict[str, Any] = {"image_sizes": torch.tensor(sizes)}
    if kind == "llava_onevision":
        inputs["batch_num_images"] = torch.tensor([n for n in per_row if n])
    crops = _tiles(model.model, inputs)
    pixels = torch.randn(len(sizes), max(crops), 3, 24, 24, generator=generator)
    inputs["pixel_values"] = pixels
    features = model.model.get_image_features(**inputs, return_dict=True).pooler_output
    return inputs, [len(feature) for feature in features]


def _shuffled_pixels(
    kind: str, sizes: list[tuple[int, int]], per_row: list[int], generator: torch.Generator
) -> tuple[dict[str, Any], list[list[int]]]:
    """Tiles of 24 pixels, and of a picture of several the whole behind them; 9 tokens each."""
    tiles = [-(-h // 24) * -(-w // 24) for h, w in sizes]
    crops = [n + (n > 1) for n in tiles]
    between = [] if kind == "internvl" else [BREAK]
    tokens = [([IMAGE] * 9 + between) * n for n in crops]
    pixels = torch.randn(sum(crops), 3, 24, 24, generator=generator)
    if kind in ("internvl", "ovis2"):
        return {"pixel_values": pixels}, tokens
    counts = iter(crops)
    rows = pixels.split([sum(next(counts) for _ in range(n)) for n in per_row])
    return {"pixel_values": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}, tokens


@contextmanager
def masked_run(
    model: Any,
    kept: list[Tensor],
    values: dict[tuple[int, int], Tensor] | None = None,
    added: Sequence[dict[tuple[int, int], Tensor]] = (),
) -> Iterator[None]:
    """Hides from each decoder layer the prompt positions that `kept[layer]` [B, L] leaves out.

    `values` {(row, position): [D]} replaces embeddings before the language model, `added` what is
    added to visual tokens behind each layer.
    """
    text = model.model.get_decoder()
    seen = 0

    def before_text(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        nonlocal seen
        start, seen = seen, seen + kwargs["inputs_embeds"].shape[1]
        if values and start == 0:
            embeds = kwargs["inputs_embeds"].clone()
            for (row, position), value in values.items():
                embeds[row, position] = value
            kwargs["inputs_embeds"] = embeds
        if start == 0 and (features := kwargs.get("deepstack_visual_embeds")):
            places = kwargs["visual_pos_masks"]
            for number, changed in zip(range(len(features)), added, strict=False):
                whole = torch.zeros_like(kwargs["inputs_embeds"])
                whole[places] = features[number]
                for place, value in changed.items():
                    whole[place] = value
                features[number] = whole[places]
        return args, kwargs

    def before_layer(number: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            prompt = kept[number]
            batch, length = prompt.shape
            new = args[0].shape[1]
            keys = torch.cat([prompt, torch.ones(batch, seen - length, dtype=torch.bool)], dim=1)
            causal = torch.arange(seen) <= torch.arange(seen - new, seen)[:, None]
            allowed = causal & keys[:, None, None]  # [B, 1, new, seen]
            # Not -inf: rows of padding see nothing, and must not become NaN.
            mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
            return args, kwargs | {"attention_mask": mask}

        return hook

    handles = [text.register_forward_pre_hook(before_text, with_kwargs=True)]
    for number, layer in enumerate(text.layers):
        handles.append(layer.register_forward_pre_hook(before_layer(number), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def generate(model: Any, inputs: dict[str, Any], steps: int = 8) -> tuple[Tensor, list[Tensor]]:
    """Greedy tokens [B, steps + 1] and the logits [B, V] of the prefill and each step."""
    output = model.generate(
        **inputs,
        max_new_tokens=steps + 1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], list(output.logits)
