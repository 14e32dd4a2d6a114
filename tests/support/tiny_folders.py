"""Tiny multimodal checkpoints on disk, with processors that need no torchvision, and samples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support.tiny_models import IMAGE, PAD, VIDEO, tiny_model


def tiny_folder(
    folder: Path, family: str = "llava", chat_template: str | None = None, noisy: bool = False
) -> Path:
    """A checkpoint of any family: weights, config, tokenizer of words, PIL image processor.

    `noisy`: norms are not 1, biases and newlines not 0, so that what becomes of them shows.
    """
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters() if noisy else ():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    if family.startswith("qwen"):
        _write_qwen_processor(folder, family)
    else:
        _llava_processor(family, chat_template).save_pretrained(folder)
    return folder


def _llava_processor(family: str, chat_template: str | None) -> Any:
    import transformers as hf

    pinpoints = [[24, 48], [48, 24], [48, 48]]
    special = {IMAGE: "<image>"}
    square = {"height": 24, "width": 24}
    if family in ("llava", "llava_siglip"):
        siglip = family == "llava_siglip"
        images: Any = (
            hf.SiglipImageProcessorPil(size=square)
            if siglip
            else hf.CLIPImageProcessorPil(size=square, crop_size=square)
        )
        kind, options = hf.LlavaProcessor, {"num_additional_image_tokens": 0 if siglip else 1}
        strategy = "full" if siglip else "default"
    elif family == "llava_next":
        images = hf.LlavaNextImageProcessorPil(
            size={"shortest_edge": 24}, crop_size=square, image_grid_pinpoints=pinpoints
        )
        kind, options = hf.LlavaNextProcessor, {"num_additional_image_tokens": 1}
        strategy = "default"
    else:
        images = hf.LlavaOnevisionImageProcessorPil(
            size=square, image_grid_pinpoints=[*pinpoints, [72, 72]]
        )
        kind = hf.LlavaOnevisionProcessor
        options = {"num_image_tokens": 36, "vision_aspect_ratio": "anyres_max_4"}
        strategy, special = "full", {IMAGE: "<image>", VIDEO: "<video>"}
    if family != "llava_onevision":
        options["patch_size"] = 4
    return _without_videos(kind)(
        images,
        _tokenizer(special),
        vision_feature_select_strategy=strategy,
        chat_template=chat_template,
        **options,
    )


def _without_videos(kind: Any) -> Any:
    """The class, but for a video processor, which needs torchvision."""
    from compress.models import pretrained as processors

    return processors._without_videos(kind) if "video" in str(kind.get_attributes()) else kind


def _write_qwen_processor(folder: Path, family: str) -> None:
    """Tokenizer and image processor apart, as the published checkpoints have them."""
    import transformers as hf

    special = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}
    _tokenizer(special).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 4096}
    images = hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    images.save_pretrained(folder)
    names = {
        "qwen2_vl": "Qwen2VLProcessor",
        "qwen2_5_vl": "Qwen2_5_VLProcessor",
        "qwen3_vl": "Qwen3VLProcessor",
        "qwen3_vl_moe": "Qwen3VLProcessor",
    }
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text()) | {"processor_class": names[family]}
    path.write_text(json.dumps(settings))


def _tokenizer(special: dict[int, str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {PAD: "<pad>", 1: "<s>", 2: "<unk>"} | special
    words = {names.get(i, f"w{i}"): i for i in range(96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106
        bos_token="<s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        additional_special_tokens=list(special.values()),
    )


def write_samples(folder: Path, count: int = 4) -> Path:
    """Random pictures and a file of JSON lines that names them, by paths relative to it."""
    from PIL import Image

    draw = np.random.default_rng(3)
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for number in range(count):
        pixels = draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        name = f"pictures/{number}.png"
        Image.fromarray(pixels).save(folder / name)
        lines.append({"image": name, "prompt": f"w{number + 10} w11 w12"})
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
