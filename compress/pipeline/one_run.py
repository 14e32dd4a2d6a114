"""What makes the ranks of a launcher one run: one folder, one recipe, one model and text.

with held(output, overwrite, ranks) as abandoned:
    check_ranks(inputs, data, mark, ranks)
"""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compress.data.prompts import CalibrationData, ImagePrompts
from compress.errors import UsageError
from compress.pipeline.inputs import RunInputs
from compress.ranks import Ranks
from compress.recipe.recipe import Recipe
from compress.storage.lease import HOLDER, WORK_FOLDER, lease
from compress.storage.output_folder import check_output

SEEN = 10.0  # seconds for a file of one machine to be seen on the others


@contextmanager
def held(output: Path, overwrite: bool, ranks: Ranks) -> Iterator[bool]:
    """Holds the folder, for all ranks; yields whether an earlier process was stopped in it."""
    if not ranks.first:
        check_shared(output, ranks)
        yield False
        return
    check_output(output, overwrite, unfinished=True)  # before anything is made there
    with lease(output) as held:
        check_output(output, overwrite, held.abandoned)
        check_shared(output, ranks)
        yield held.abandoned


def check_shared(output: Path, ranks: Ranks) -> None:
    """UsageError where a rank does not see the folder, which the first one holds."""
    holder = output / WORK_FOLDER / HOLDER
    said, until = ranks.tell(holder.read_text), time.monotonic() + SEEN
    while time.monotonic() < until:
        with suppress(OSError):
            if holder.read_text() == said:
                return
        time.sleep(0.1)
    raise UsageError(
        f"rank {ranks.rank} on {socket.gethostname()} does not see the output folder "
        f"{output} of rank 0: choose an --output that all machines share"
    )


def check_ranks(inputs: RunInputs, data: CalibrationData, mark: str, ranks: Ranks) -> None:
    """UsageError for ranks that read different things, and for what they cannot share."""
    ranks.check_alike(mark, "recipe, model, text or version of a package")
    check_pruned(inputs.recipe, isinstance(data, ImagePrompts), ranks)


def check_pruned(recipe: Recipe, images: bool, ranks: Ranks) -> None:
    """UsageError for a run that prunes what it calibrates on, which ranks cannot share.

    `images`: whether it calibrates on prompts with images.
    """
    if ranks.size > 1 and images and recipe.prune_visual_tokens is not None:
        raise UsageError(
            "prune_visual_tokens: calibration prompts are pruned by one process: start it without "
            "torchrun, or calibrate on text"
        )
