"""Ranks that torchrun starts share a run: the bytes of one process, and what happens when one dies.

Ranks import torch anew, so the recipes of all tests go through few launches.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support import ranks_at_work
from support.moe_families import write_mixture
from support.tiny_checkpoints import (
    dequantised,
    recipe_for,
    weight_files,
    widths_of,
    write_checkpoint,
)

SCRIPT = Path(ranks_at_work.__file__)
RSQ = {"rotate": "hadamard", "quantize": {"bits": 3, "token_importance": "attention_concentration"}}
DRIFTED = {"quantize": {"bits": 3, "target": "full_precision"}}
# name -> model, sections of the recipe, windows: 16 of them are a batch
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "rtn": ("dense", {"quantize": {"method": "rtn"}}, 40),
    "gptq": ("dense", {}, 72),
    "rsq": ("dense", RSQ, 40),
    "rsq, head and table": (
        "dense",
        {
            "rotate": "none",
            "quantize": RSQ["quantize"] | {"head": {"bits": 8}, "embedding": {"bits": 8}},
        },
        40,
    ),
    "full precision, on disk": ("dense", DRIFTED | {"calibration": {"offload": "disk"}}, 40),
    "fewer batches than ranks": ("dense", RSQ, 3),
    "experts": ("mixture", {}, 40),
    "scarce experts": (
        "mixture",
        {"quantize": {"experts": {"least_rows": 660, "policy": "shared_hessian"}}},
        40,
    ),
    "widths by layer": (
        "dense",
        {
            "allocate": {
                "importance": "outlier_weight_count",
                "method": "top_n",
                "widths": [4, 2],
                "average_bits": 3,
            }
        },
        40,
    ),
}


def torchrun(ranks: int, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    environment |= {"OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [sys.executable, *launcher, *command],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def at_work(folder: Path, ranks: int, jobs: list[dict[str, Any]]) -> subprocess.CompletedProcess:
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    return torchrun(ranks, str(SCRIPT), str(file))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "dense": write_checkpoint(folder / "dense", "mistral", layers=3),
        "mixture": write_mixture(folder / "mixture", "mixtral", sliding_window=None),
    }


def job_of(models, name: str, output: Path, **options: Any) -> dict[str, Any]:
    model, sections, samples = CASES[name]
    job = {"model": str(models[model]), "sections": sections, "samples": samples}
    return job | {"output": str(output)} | options


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory) -> Path:
    """Every case as one process makes it."""
    folder = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in CASES:
        ranks_at_work.work(job_of(models, name, folder / name))
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def two(models, tmp_path_factory) -> Path:
    """Every case as two ranks make it, in order; and one, plain."""
    folder = tmp_path_factory.mktemp("two")
    det = {"options": {"deterministic": True}}
    jobs = [job_of(models, name, folder / name, **det) for name in CASES]
    jobs.append(job_of(models, "rsq", folder / "plain"))
    done = at_work(folder, 2, jobs)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_bytes_of_one_process(alone, two, name):
    assert weight_files(two / name) == weight_files(alone / name)
    facts = [json.loads((folder / name / "modelpress.json").read_text()) for folder in (alone, two)]
    for layer in facts[1]["layers"]:
        if layer["layer"] is not None:
            assert (layer.pop("ranks"), layer.pop("deterministic")) == (2, True)
    for layer in [each for made in facts for each in made["layers"]]:
        for module in [layer, *layer["modules"]]:
            module.pop("seconds", None)
    assert facts[0]["layers"] == facts[1]["layers"]
    assert facts[0]["warnings"] == facts[1]["warnings"]


def test_without_an_order_sums_differ_by_their_rounding(alone, two, models):
    """A code may fall to the other side, and those behind it follow; the errors stay the same."""
    facts = [
        json.loads((folder / "modelpress.json").read_text())["layers"]
        for folder in (two / "plain", alone / "rsq")
    ]
    for ours, theirs in zip(*facts, strict=True):
        assert ours["deterministic"] is False
        size = "effective_sample_size"
        assert ours[size] == pytest.approx(theirs[size], rel=0.01)
        for module, other in zip(ours["modules"], theirs["modules"], strict=True):
            assert module["name"] == other["name"]
            assert module["error"] == pytest.approx(other["error"], rel=0.05), module["name"]
    recipe = recipe_for(models["dense"], **CASES["rsq"][1])
    widths = widths_of(recipe, models["dense"])
    ours, theirs = (
        dequantised(load_file(folder / "model.safetensors"), widths)
        for folder in (two / "plain", alone / "rsq")
    )
    for name in ours:
        if ".layers.0.self_attn." in name:  # before anything has come through another layer
            off = (ours[name] - theirs[name]).norm() / theirs[name].norm()
            assert off < 0.02, name


def test_three_ranks_of_which_one_dies_go_on_as_they_were(alone, models, tmp_path):
    job = job_of(models, "rsq", tmp_path / "out", options={"deterministic": True})
    died = at_work(tmp_path, 3, [job | {"stop_at": [1, 2]}])
    assert died.returncode != 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".modelpress"]
    journal = (tmp_path / "out" / ".modelpress" / "journal.jsonl").read_text()
    assert len(journal.splitlines()) == 3  # the header, and two layers
    done = at_work(tmp_path, 3, [job])
    assert done.returncode == 0, done.stderr
    assert weight_files(tmp_path / "out") == weight_files(alone / "rsq")
