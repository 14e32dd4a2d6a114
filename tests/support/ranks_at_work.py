"""Runs recipes one after the other in each of several ranks, or in one process.

    python -m torch.distributed.run --nproc-per-node 2 ranks_at_work.py JOBS.json

JOBS.json: [{"model", "sections", "output", "samples", "options"}]; `stop_at`: [rank, layer] of one
that kills itself there.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from compress.observer import Observer
from compress.pipeline.run import run
from support.tiny_checkpoints import all_count, random_ids, recipe_for

LENGTH = 64  # 16 windows a batch


class Stop(Observer):
    """Kills this process when it begins a layer."""

    def __init__(self, layer: int):
        self.layer = layer

    def layers(self, done: int, total: int) -> None:
        if done == self.layer:
            os.kill(os.getpid(), signal.SIGKILL)


def work(job: dict[str, Any]) -> None:
    rank = int(os.environ.get("RANK", 0))
    stop = job.get("stop_at", [-1, 0])
    run(
        recipe_for(Path(job["model"]), **job["sections"]),
        job["output"],
        windows=all_count(random_ids(job["samples"], LENGTH)),
        self_check=False,
        check_source=False,
        observer=Stop(stop[1]) if stop[0] == rank else Observer(),
        **job.get("options", {}),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in json.loads(Path(sys.argv[1]).read_text()):
        work(each)
