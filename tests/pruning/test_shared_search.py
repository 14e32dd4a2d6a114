"""Ranks that torchrun starts share the prompts of a search: trials are those of one process."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from support import ranks_at_work
from support.ranks_at_work import at_work, torchrun
from support.tiny_folders import tiny_folder, write_samples

pytest.importorskip("optuna")
STAGED = {"stages": [0, 2], "ratios": [0.5, 0.5]}
# name -> start, settings of the search, prompts
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "tpe": (STAGED, {"trials": 4, "sampler": "tpe"}, 3),
    "gp": (STAGED, {"trials": 4, "sampler": "gp"}, 4),
    "a method that draws": (STAGED | {"method": "random"}, {"trials": 3}, 3),
    "fewer prompts than ranks": (STAGED, {"trials": 3}, 1),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    model = tiny_folder(tmp_path_factory.mktemp("vlm") / "model")
    return {"model": str(model), "data": str(write_samples(tmp_path_factory.mktemp("data")))}


def job_of(places: dict[str, str], name: str, folder: Path, **more: Any) -> dict[str, Any]:
    start, settings, samples = CASES[name]
    job = {"start": start, "search": settings, "samples": samples}
    return places | job | {"output": str(folder / f"{name}.jsonl")} | more


@pytest.fixture(scope="module")
def alone(places, tmp_path_factory) -> Path:
    """Every search as one process makes it."""
    folder = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in CASES:
        ranks_at_work.work(job_of(places, name, folder))
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def shared(request, places, tmp_path_factory) -> tuple[int, Path]:
    """Every search as so many ranks make it."""
    folder = tmp_path_factory.mktemp("shared")
    done = at_work(folder, request.param, [job_of(places, name, folder) for name in CASES])
    assert done.returncode == 0, done.stderr
    return request.param, folder


@pytest.mark.parametrize("name", CASES)
def test_ranks_try_what_one_process_tries(alone, shared, name):
    ranks, folder = shared
    assert (folder / f"{name}.jsonl").read_bytes() == (alone / f"{name}.jsonl").read_bytes()
    expected = json.loads((alone / f"{name}.0").read_text())
    for rank in range(ranks):  # and every one of them knows all
        assert json.loads((folder / f"{name}.{rank}").read_text()) == expected
    assert len({trial["score"] for trial in expected["trials"]}) > 1


def test_a_search_in_which_a_rank_was_killed_goes_on_with_fewer(alone, places, tmp_path):
    job = job_of(places, "tpe", tmp_path)
    done = at_work(tmp_path, 3, [job | {"killed_at": [1, 2]}])
    assert done.returncode != 0
    assert "another rank has ended" in done.stderr or "SIGTERM" in done.stderr
    assert len(Path(job["output"]).read_text().splitlines()) >= 3  # the header, and two trials
    failing = job_of(places, "gp", tmp_path) | {"fails_at": [1, 1]}
    done = at_work(tmp_path, 2, [job, failing])
    whole = (alone / "tpe.jsonl").read_bytes()
    assert Path(job["output"]).read_bytes() == whole
    assert "RankError: rank 1: no place for this" in done.stderr


def test_ranks_with_other_prompts_or_another_model_are_refused(places, tmp_path):
    other = shutil.copytree(Path(places["data"]).parent, tmp_path / "data") / "other.jsonl"
    lines = Path(places["data"]).read_text().splitlines()
    other.write_text("\n".join(lines[::-1]))
    job = job_of(places, "tpe", tmp_path) | {"data_of_rank": [places["data"], str(other)]}
    done = at_work(tmp_path, 2, [job])
    assert done.returncode != 0
    assert "rank 1 has another model, samples or settings of the search" in done.stderr
    assert not Path(job["output"]).exists()


def test_the_command_shares_and_the_first_rank_answers(places, tmp_path):
    options = ["--keep", "0.5", "--samples", "3", "--trials", "3", "--stages", "0,2", "--json"]
    command = ["-m", "compress", "search-pruning", places["model"], "--data", places["data"]]
    done = torchrun(2, *command, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    strategy = json.loads((tmp_path / "pruning.json").read_text())
    assert found["strategy"]["ratios"] == strategy["ratios"]
    assert len((tmp_path / "pruning.trials.jsonl").read_text().splitlines()) == 4
