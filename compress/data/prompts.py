"""Prompts with images as calibration data: one prompt a batch, each as long as it is.

    {"image": "photos/1.png", "prompt": "What is in the picture?", "answer": "A cat."}

A line's `answer`, if there is one, stands behind its prompt. Every token counts, the visual ones as
well: they are what the language model's linears read.

    data = calibration_data(source, skeleton)                # ImagePrompts, or windows of text
    data.batches(1024); data.digest(); data.facts()
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.data.samples import prompt_inputs, read_samples
from compress.data.source import CalibrationSource
from compress.data.windows import CalibrationWindows, random_windows, text_windows
from compress.errors import UsageError, import_package
from compress.models.skeleton import Skeleton
from compress.models.vision import Inputs

IMAGES_ALL_COUNT = (
    "calibration.loss_mask: assistant is for conversations of text, and calibration.dataset holds "
    "prompts with images, all of whose tokens count: use loss_mask: all"
)
PROBE_SIDE = 112  # pixels of the probe's image, which processors resize to what they need


@dataclass(frozen=True)
class ImagePrompts:
    """Prompts as a forward takes them: `input_ids` [1, T], pixels, sizes of each."""

    inputs: tuple[Inputs, ...]

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

    def facts(self) -> dict[str, object]:
        """For modelpress.json."""
        return {"prompts": len(self), "tokens": self.tokens, "sha256": self.digest().hex()}


CalibrationData = CalibrationWindows | ImagePrompts


def calibration_data(source: CalibrationSource, skeleton: Skeleton) -> CalibrationData:
    """Reads the calibration data: prompts with images, or windows of text.

    A run that uses none gets a few random tokens, for its self-check.

    Raises UsageError for what cannot be read, or is longer than the model's context.
    """
    if not source.used:
        return random_windows(skeleton.config.vocab_size)
    if not source.images:
        return text_windows(source, skeleton)
    if source.settings.loss_mask != "all":
        raise UsageError(IMAGES_ALL_COUNT)
    settings, path = source.settings, source.location
    read = read_samples(
        path, skeleton.processor(), settings.samples, settings.seed, answers=source.answers
    )
    context = getattr(skeleton.config, "max_position_embeddings", None)
    for inputs in read:
        length = inputs["input_ids"].shape[1]
        if context is not None and length > context:
            raise UsageError(
                f"{path}: a prompt has {length} tokens with its images, more than the model's "
                f"context of {context}: use smaller images"
            )
    return ImagePrompts(tuple(read))


def probe_prompt(skeleton: Skeleton) -> Inputs:
    """A prompt with a picture of noise, the same every time: for the self-check.

    Raises UsageError if the checkpoint has no processor that works, or pillow is not installed.
    """
    Image = import_package("PIL.Image", "a multimodal model")
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
