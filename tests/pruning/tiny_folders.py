"""Tiny multimodal checkpoints on disk, with processors that need no torchvision, and samples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import IMAGE, PAD, VIDEO, tiny_model


def tiny_folder(folder: Path, family: str = "llava", chat_template: str | None = None) -> Path:
    """A LLaVA or Qwen2-VL checkpoint: weights, config, tokenizer of words, PIL image processor."""
    model = tiny_model(family)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    if family == "llava":
        _llava_processor(chat_template).save_pretrained(folder)
    else:
        _write_qwen_processor(folder)
    return folder


def _llava_processor(chat_template: str | None) -> Any:
    import transformers as hf

    square = {"height": 24, "width": 24}
    return hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(size=square, crop_size=square),
        _tokenizer({IMAGE: "<image>"}),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def _write_qwen_processor(folder: Path) -> None:
    """Tokenizer and image processor apart, as the published checkpoints have them."""
    import transformers as hf

    special = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}
    _tokenizer(special).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 4096}
    images = hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    images.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text()) | {"processor_class": "Qwen2VLProcessor"}
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
