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
from compress.storage.lease import HOLDER, WORK_FOLDER, lease
from compress.storage.output_folder import check_output

SEEN = 10.0  # seconds for a file of one machine to be seen on the others


@contextmanager
def held(output: Path, overwrite: bool, ranks: Ranks) -> Iterator[bool]:
    """Holds the folder, for all ranks; yields whether an earlier process was stopped in it."""
    if not ranks.first:
        _check_shared(output / WORK_FOLDER / HOLDER, ranks.tell(str), ranks.rank)
        yield False
        return
    check_output(output, overwrite, unfinished=True)  # before anything is made there
    with lease(output) as held:
        check_output(output, overwrite, held.abandoned)
        ranks.tell((output / WORK_FOLDER / HOLDER).read_text)
        yield held.abandoned


def _check_shared(holder: Path, said: str, rank: int) -> None:
    """UsageError where a rank does not see the folder that the first one holds."""
    until = time.monotonic() + SEEN
    while time.monotonic() < until:
        with suppress(OSError):
            if holder.read_text() == said:
                return
        time.sleep(0.1)
    raise UsageError(
        f"rank {rank} on {socket.gethostname()} does not see the output folder "
        f"{holder.parents[1]} of rank 0: choose an --output that all machines share"
    )


def check_ranks(inputs: RunInputs, data: CalibrationData, mark: str, ranks: Ranks) -> None:
    """UsageError for ranks that read different things, and for what they cannot share."""
    ranks.check_alike(mark, "recipe, model, text or version of a package")
    pruned = inputs.recipe.prune_visual_tokens is not None
    if ranks.size > 1 and pruned and isinstance(data, ImagePrompts):
        raise UsageError(
            "prune_visual_tokens: calibration prompts are pruned by one process: start it without "
            "torchrun, or calibrate on text"
        )
