"""Prompts with images from a file of JSON lines, as a model's forward takes them.

    {"image": "photos/1.png", "prompt": "What is in the picture?"}

`image` may be a list; paths are relative to the file. With `answers`, a line's `answer` follows its
prompt. A processor with a chat template puts the prompt into a user's turn, images first. Without
one the prompt is taken as it is, with the image token in front of it for each image if it holds
none. The name `demo-scenes` stands for questions about training scenes of the demo model, drawn
from the seed.

    samples = read_samples("samples.jsonl", processor, count=30, seed=0)
"""

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.data.text import check_characters
from compress.errors import UsageError
from compress.models.config_values import STUMBLES, reason_of
from compress.models.vision import Inputs
from compress.recipes.demo import scenes
from compress.storage.files import file_digest

if TYPE_CHECKING:  # slow to import
    from PIL.Image import Image

DEMO_SCENES = "demo-scenes"
Processor = Any  # a ProcessorMixin with an `image_token`, which that class does not declare


def read_samples(
    path: str | Path, processor: Processor, count: int, seed: int = 0, *, answers: bool = False
) -> list[Inputs]:
    """At most `count` prompts, a random choice if the file has more, in the order of the file.

    Raises:
        UsageError: a file that cannot be read, or a line without image or prompt; it is named.
    """
    if str(path) == DEMO_SCENES:
        return _demo_scenes(processor, count, seed, answers)
    path = Path(path)
    rows = _rows(path)
    if len(rows) > count:
        chosen = random.Random(seed).sample(range(len(rows)), count)  # noqa: S311
        rows = [rows[i] for i in sorted(chosen)]
    return [_inputs(f"{path}:{n}", path.parent, row, processor, answers) for n, row in rows]


def sample_digests(path: str | Path) -> dict[str, str]:
    """The sha256 of a file of prompts, and of each image that it names; {} for `demo-scenes`.

    Raises UsageError as `read_samples` does, but not for an image that is not there.
    """
    if str(path) == DEMO_SCENES:
        return {}
    path = Path(path)
    digests = {path.name: file_digest(path)}
    for _, row in _rows(path):
        image = row.get("image")
        for name in image if isinstance(image, list) else [image]:
            if isinstance(name, str) and (path.parent / name).is_file():
                digests[name] = file_digest(path.parent / name)
    return digests


def prompt_inputs(
    processor: Processor, prompt: str, images: "list[Image]", answer: str | None = None
) -> Inputs:
    """Keyword arguments of a forward for one prompt with these images.

    Raises ValueError as `text_inputs` does.
    """
    return text_inputs(processor, prompt_text(processor, prompt, len(images), answer), images)


def text_inputs(processor: Processor, text: str, images: "list[Image]") -> Inputs:
    """The same for a text that is in its template already.

    Raises ValueError if the text has not one image token for each image: not every processor does;
    and if the processor cannot work with its own settings.
    """
    if text.count(processor.image_token) != len(images):
        raise ValueError(
            f"expected {len(images)} image tokens ({processor.image_token}), one for each image, "
            f"found {text.count(processor.image_token)}"
        )
    try:
        return dict(processor(text=[text], images=images, return_tensors="pt"))
    except STUMBLES as error:  # a wrong value in its files
        raise ValueError(f"the processor fails: {reason_of(error)}") from error


def _demo_scenes(processor: Processor, count: int, seed: int, answers: bool) -> list[Inputs]:
    return [
        prompt_inputs(
            processor, item["question"], [item["image"]], item["answer"] if answers else None
        )
        for item in scenes.examples("train", seed, count)
    ]


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The file's objects with the numbers of their lines; empty lines are left out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as JSON lines: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number}: not a line of JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            found = json.dumps(row)[:60]
            raise UsageError(
                f'{path}:{number}: expected {{"image": path, "prompt": text}}, found {found}'
            )
        for key in ("prompt", "answer"):
            if isinstance(row.get(key), str):
                check_characters(row[key], f"{path}:{number}: {key}")
        rows.append((number, row))
    if not rows:
        raise UsageError(f"{path}: expected prompts, found an empty file")
    return rows


def open_image(path: Path, called: str) -> "Image":
    """An image in RGB, upright as its EXIF data say, as transformers opens it.

    Raises UsageError, in which it is `called` so, if it cannot be read, or if its pixels are not 8
    bits deep: PIL would cut them off at 255, which leaves a blank picture.
    """
    from PIL import Image, ImageOps  # slow to import

    try:
        with Image.open(path) as file:
            if file.mode == "F" or file.mode.startswith("I"):
                raise UsageError(
                    f"{called} has pixels of {'floats' if file.mode == 'F' else 'more than 8 bits'}"
                    f" (PIL's mode {file.mode}), which a processor would take for blank: save it "
                    "with 8 bits a channel"
                )
            return ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{called} cannot be opened: {error}") from error


def _inputs(
    place: str, folder: Path, row: dict[str, Any], processor: Processor, answers: bool
) -> Inputs:
    image = row.get("image")
    names = [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UsageError(f"{place}: expected an image's path, or a list of them, found {image!r}")
    images = [open_image(folder / name, f"{place}: image {name}") for name in names]
    answer = row.get("answer") if answers else None
    if answer is not None and not isinstance(answer, str):
        raise UsageError(f"{place}: expected an answer as text, found {answer!r}")
    try:
        return prompt_inputs(processor, row["prompt"], images, answer)
    except ValueError as error:  # image tokens and images that differ in number
        raise UsageError(f"{place}: {' '.join(str(error).split())}") from error


def prompt_text(processor: Processor, prompt: str, images: int, answer: str | None) -> str:
    """The text that the model reads, with a placeholder for each image."""
    if getattr(processor, "chat_template", None):
        content = [*image_parts(images), {"type": "text", "text": prompt}]
        turns = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    else:
        text = raw_text(processor, prompt, images)
    # Behind the generation prompt, where the model itself would put it.
    return text if answer is None else text + (answer if text[-1:].isspace() else f" {answer}")


def image_parts(images: int) -> list[dict[str, str]]:
    """The images of a turn, as templates want them in front of its text."""
    return [{"type": "image"}] * images


def raw_text(processor: Processor, prompt: str, images: int) -> str:
    """A prompt as it is, with the image token in front of it for each image if it holds none."""
    token = processor.image_token
    return prompt if token in prompt else f"{token} " * images + prompt


def in_batches(samples: list[Inputs]) -> list[Inputs]:
    """Prompts of equal shapes as one forward, in the order of their first: nothing is padded."""
    groups: dict[object, list[Inputs]] = {}
    for sample in samples:
        shapes = tuple((name, tuple(value.shape)) for name, value in sorted(sample.items()))
        groups.setdefault(shapes, []).append(sample)
    return [
        {name: torch.cat([sample[name] for sample in group]) for name in group[0]}
        for group in groups.values()
    ]
