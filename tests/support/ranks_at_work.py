"""Runs recipes one after the other in each of several ranks, or in one process.

    python -m torch.distributed.run --nproc-per-node 2 ranks_at_work.py JOBS.json

JOBS.json: [{"model", "sections", "output", "samples", "options"}]; with `killed_at` or `fails_at`,
[rank, layer], that rank kills itself there, or has an error. `evaluate`: a measurement instead,
whose figures go to `output`, and how many requests each rank has answered beside it. `search`: the
settings of a search for a pruning strategy on the prompts in `data`, whose trials go to `output`.
`compare`: files of recipes that are compared with the `seeds`; what is found goes beside `output`.

    at_work(tmp_path, 2, [{"model": ..., "output": ...}])       # from a test
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from compress.comparison.compare import compare
from compress.data.samples import read_samples
from compress.errors import CompressError
from compress.eval.progress import telling
from compress.loading.load import load
from compress.observer import Observer
from compress.pipeline.evaluation import evaluate
from compress.pipeline.run import run
from compress.pruning.search import search_strategy
from compress.ranks import together
from compress.recipe.strategy import PruneStrategy
from support.tiny_checkpoints import all_count, random_ids, recipe_for

LENGTH = 64  # 16 windows a batch


def torchrun(ranks: int, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """A command of Python's in each of several ranks, of a thread each."""
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    environment |= {"OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [sys.executable, *launcher, *command],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def at_work(folder: Path, ranks: int, jobs: list[dict[str, Any]]) -> subprocess.CompletedProcess:
    """The jobs in each of several ranks."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    return torchrun(ranks, str(Path(__file__)), str(file))


class Stop(Observer):
    """Ends this process where it begins a layer, or is through with a trial."""

    def __init__(self, killed_at: int | None, fails_at: int | None):
        self.killed_at, self.fails_at = killed_at, fails_at

    def layers(self, done: int, total: int) -> None:
        self._reached(done)

    def trial(self, done: int, total: int, score: float, best: float) -> None:
        self._reached(done)

    def _reached(self, done: int) -> None:
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
    stop = Stop(*(place if rank == own else None for rank, place in stops))
    if "search" in job:
        search(job, stop)
        return
    if "compare" in job:
        options = {"seeds": job["seeds"], "observer": stop} | job.get("options", {})
        found = compare(job["compare"], job["output"], **options)
        Path(f"{job['output']}.{own}").write_text(json.dumps(found.as_dict()))
        return
    run(
        recipe_for(Path(job["model"]), **job["sections"]),
        job["output"],
        windows=all_count(random_ids(job["samples"], LENGTH)),
        self_check=False,
        check_source=False,
        observer=stop,
        **job.get("options", {}),
    )


def search(job: dict[str, Any], observer: Observer) -> None:
    """The trials go to `output`, and what each rank is told beside it.

    `data_of_rank`: prompts of the ranks that have others.
    """
    with together() as ranks:
        data = job.get("data_of_rank", [job["data"]] * ranks.size)[ranks.rank]
        model, processor = load(job["model"], prune=False)
        found = search_strategy(
            model,
            read_samples(data, processor, job["samples"]),
            0.5,
            start=PruneStrategy(**job["start"]),
            path=job["output"],
            processor=processor,
            observer=observer,
            ranks=ranks,
            **job["search"],
        )
    result = Path(job["output"]).with_suffix(f".{ranks.rank}")
    result.write_text(json.dumps(found.as_dict()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in json.loads(Path(sys.argv[1]).read_text()):
        work(each)
