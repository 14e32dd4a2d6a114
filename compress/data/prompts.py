"""Prompts with images as calibration data: one prompt a batch, each as long as it is.

    {"image": "photos/1.png", "prompt": "What is in the picture?", "answer": "A cat."}

A line's `answer`, if there is one, stands behind its prompt. Every token counts, the visual ones as
well: they are what the language model's linears read.

    data = recipe_data(recipe, skeleton, calibrated=True)    # ImagePrompts, or windows of text
    data.batches(1024); data.digest(); data.facts()
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.data.samples import DEMO_SCENES, prompt_inputs, read_samples
from compress.data.windows import CalibrationWindows, recipe_windows
from compress.errors import UsageError
from compress.recipe.strategy import LANGUAGE_ATTENTION

if TYPE_CHECKING:
    from compress.models.skeleton import Skeleton
    from compress.recipe.recipe import Recipe

PROBE_SIDE = 112  # pixels of the probe's image, which processors resize to what they need


@dataclass(frozen=True)
class ImagePrompts:
    """Keyword arguments of a forward each, for one prompt: `input_ids` [1, T], pixels, sizes."""

    inputs: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def tokens(self) -> int:
        """Tokens of all prompts, before any are pruned."""
        return sum(inputs["input_ids"].numel() for inputs in self.inputs)

    @property
    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """Ids and mask [1, T] of each prompt; nothing is padding."""
        ids = [inputs["input_ids"] for inputs in self.inputs]
        return [(x, torch.ones_like(x, dtype=torch.bool)) for x in ids]

    def batches(self, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """The prompts one by one, however few `tokens` they have: padding would have to be hidden
        from every layer."""
        return self.parts

    def digest(self) -> bytes:
        """A hash of all that the model reads."""
        digest = hashlib.sha256()
        for inputs in self.inputs:
            for name in sorted(inputs):
                value = inputs[name]
                if isinstance(value, Tensor):
                    digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
                    digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
                else:
                    digest.update(f"{name} {value!r}".encode())
        return digest.digest()

    def facts(self) -> dict[str, Any]:
        """For modelpress.json."""
        return {"prompts": len(self), "tokens": self.tokens, "sha256": self.digest().hex()}


CalibrationData = CalibrationWindows | ImagePrompts


def recipe_data(recipe: "Recipe", skeleton: "Skeleton", calibrated: bool) -> CalibrationData:
    """What a recipe's `calibration` section asks for: prompts with images, or windows of text.

    Raises UsageError for what cannot be read, or is longer than the model's context.
    """
    if not (calibrated and image_dataset(recipe, skeleton)):
        return recipe_windows(recipe, skeleton, calibrated)
    c = recipe.calibration
    path = recipe.resolve_path(c.dataset)
    read = read_samples(path, skeleton.processor(), c.samples, c.seed, answers=answered(recipe))
    context = getattr(skeleton.config, "max_position_embeddings", None)
    for inputs in read:
        length = inputs["input_ids"].shape[1]
        if context is not None and length > context:
            raise UsageError(
                f"{path}: a prompt has {length} tokens with its images, more than the model's "
                f"context of {context}: use smaller images"
            )
    return ImagePrompts(tuple(read))


def image_dataset(recipe: "Recipe", skeleton: "Skeleton") -> bool:
    """Whether `calibration.dataset` holds prompts with images, for a model that takes them."""

    if skeleton.spec.vision is not None and recipe.calibration.dataset == DEMO_SCENES:
        return True
    dataset = recipe.calibration.dataset
    if skeleton.spec.vision is None or not dataset.endswith((".jsonl", DEMO_SCENES)):
        return False
    return dataset == DEMO_SCENES or has_images(recipe.resolve_path(dataset))


def answered(recipe: "Recipe") -> bool:
    """Whether answers are read: not where the prompt's last token ranks the visual ones."""
    pruning = recipe.prune_visual_tokens
    method = pruning.strategy.method if pruning and pruning.strategy else None
    return method not in LANGUAGE_ATTENTION


def has_images(path: str | Path) -> bool:
    """Whether the first line of a file of JSON lines is a prompt with an image."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            row = json.loads(next((line for line in file if line.strip()), "null"))
    except (OSError, ValueError):  # who reads the whole file says what is wrong with it
        return False
    return isinstance(row, dict) and {"image", "prompt"} <= row.keys()


def probe_prompt(skeleton: "Skeleton") -> dict[str, Any]:
    """A prompt with a picture of noise, the same every time: for the self-check.

    Raises UsageError if the checkpoint has no processor that works, or pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError(
            "multimodal models need pillow, which is not installed: pip install "
            "'modelpress[vision]'"
        ) from error
    generator = torch.Generator().manual_seed(0)
    shape = (PROBE_SIDE, PROBE_SIDE, 3)
    noise = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    try:
        return prompt_inputs(skeleton.processor(), "What is this?", [image])
    except ValueError as error:  # a chat template without a place for the image, for one
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the processor of {skeleton.folder} takes no prompt with an image: {reason}"
        ) from error
