"""Runs recipes one after the other in each of several ranks, or in one process.

    python -m torch.distributed.run --nproc-per-node 2 ranks_at_work.py JOBS.json

JOBS.json: [{"model", "sections", "output", "samples", "options"}]; with `killed_at` or `fails_at`,
[rank, layer], that rank kills itself there, or has an error. `evaluate`: a measurement instead,
whose figures go to `output`, and how many requests each rank has answered beside it.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from compress.errors import CompressError
from compress.eval.progress import telling
from compress.observer import Observer
from compress.pipeline.evaluation import evaluate
from compress.pipeline.run import run
from support.tiny_checkpoints import all_count, random_ids, recipe_for

LENGTH = 64  # 16 windows a batch


class Stop(Observer):
    """Ends this process where it begins a layer."""

    def __init__(self, killed_at: int | None, fails_at: int | None):
        self.killed_at, self.fails_at = killed_at, fails_at

    def layers(self, done: int, total: int) -> None:
        if done == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if done == self.fails_at:
            raise CompressError("no place for this layer")


def work(job: dict[str, Any]) -> None:
    own = int(os.environ.get("RANK", 0))
    if "evaluate" in job:
        totals: dict[str, int] = {}
        with telling(lambda what, done, total: totals.update({what: total})):
            scores = evaluate(job["model"], **job["evaluate"])
        file = Path(job["output"])
        file.with_suffix(f".{own}").write_text(json.dumps(totals))
        if scores:
            file.write_text(json.dumps(scores))
        return
    stops = [job.get(name, [None, None]) for name in ("killed_at", "fails_at")]
    run(
        recipe_for(Path(job["model"]), **job["sections"]),
        job["output"],
        windows=all_count(random_ids(job["samples"], LENGTH)),
        self_check=False,
        check_source=False,
        observer=Stop(*(layer if rank == own else None for rank, layer in stops)),
        **job.get("options", {}),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in json.loads(Path(sys.argv[1]).read_text()):
        work(each)
