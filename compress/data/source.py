"""What a recipe's `calibration` section reads, settled once: where it lies and what it holds.

source = CalibrationSource(recipe.calibration, recipe.resolve_path, used=True, sees=False)
source.images, source.location
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from compress.data.samples import DEMO_SCENES
from compress.data.text import locate
from compress.recipe.sections import Calibration


@dataclass(frozen=True)
class CalibrationSource:
    """Calibration data before it is read.

    Attributes:
        settings: the recipe's section.
        resolve: finds the files that it names: the recipe's `resolve_path`.
        used: whether the run reads it at all.
        sees: whether the model takes images.
        answers: whether a prompt's answer is read behind it: not where the prompt's last token
            ranks the visual ones.
        given: whether a program has the windows already, so that no text is read.
        location: a name of DATASETS, a file's path or a hub id; RecipeError for a path that does
            not exist.
        images: whether it holds prompts with images, for a model that takes them.
    """

    settings: Calibration
    resolve: Callable[[str], str]
    used: bool
    sees: bool
    answers: bool = True
    given: bool = False

    @cached_property
    def location(self) -> str:
        return locate(self.settings.dataset, self.resolve)

    @cached_property
    def images(self) -> bool:
        if not self.sees:
            return False
        dataset = self.settings.dataset
        return dataset == DEMO_SCENES or (dataset.endswith(".jsonl") and has_images(self.location))


def has_images(path: str | Path) -> bool:
    """Whether the first line of a file of JSON lines is a prompt with an image."""
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            row = json.loads(next((line for line in file if line.strip()), "null"))
    except (OSError, ValueError, RecursionError):  # reading all of it says what is wrong
        return False
    return isinstance(row, dict) and {"image", "prompt"} <= row.keys()
