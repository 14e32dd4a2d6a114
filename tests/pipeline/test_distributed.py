"""Ranks that torchrun starts share a run: the bytes of one process, and what happens when one dies.

Ranks import torch anew, so the recipes of all tests go through few launches.
"""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from compress.cli.main import main
from compress.errors import UsageError
from compress.memory import chosen_device, idle_gpus
from compress.quantization.sharing import dealt
from compress.ranks import Ranks, launched
from support import documents, ranks_at_work
from support.moe_families import write_mixture
from support.ranks_at_work import at_work
from support.refusals import check_line, refused
from support.tiny_checkpoints import (
    dequantised,
    recipe_for,
    weight_files,
    widths_of,
    write_checkpoint,
)

RSQ = {"rotate": "hadamard", "quantize": {"bits": 3, "token_importance": "attention_concentration"}}
DRIFTED = {"quantize": {"bits": 3, "target": "full_precision"}}


def scored(importance: str, method: str, quantize: dict[str, Any] | None = None, **more: Any):
    """A recipe whose layers' widths are scored on 40 windows, in three batches."""
    allocate = {"importance": importance, "method": method, "samples": 40, "average_bits": 3}
    quick = {"refine_sweeps": 1, "token_importance": RSQ["quantize"]["token_importance"]}
    return {"allocate": allocate | more, "quantize": quantize or quick}


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
    "scores of what tokens change": (
        "dense", scored("layer_embedding_change", "knapsack", widths=[2, 3, 4]), 40,
    ),
    "scores of outputs": (
        "dense", scored("output_error", "greedy", widths=[2, 3, 4], unit="fused_group"), 40,
    ),
    "scores of outputs, rounded to nearest": (
        "dense", scored("output_error", "greedy", {"method": "rtn"}, widths=[2, 3]), 3,
    ),
    "scores of hidden states": (
        "dense", scored("hidden_state_error", "knapsack", widths=[2, 4]), 40,
    ),
    "scores of logits, on disk": (
        "dense",
        scored("logit_divergence", "knapsack", widths=[2, 4])
        | {"calibration": {"offload": "disk"}},
        40,
    ),
    "an evolving allocation": (
        "dense", scored("output_error", "evolve", widths=[2, 3, 4], generations=3, offspring=3), 40,
    ),
}  # fmt: skip
SCORED = [name for name, (_, sections, _) in CASES.items() if "allocate" in sections]

MEASURED = {
    "model": str(documents.ROOT / "recipes/demo/lm"),
    "evaluate": {"tasks": ["demo_code"], "limit": 5, "batch_size": 1},
}


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
    jobs += [job_of(models, name, folder / f"plain {name}") for name in SCORED]
    jobs.append(MEASURED | {"output": str(folder / "scores.json")})
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
    assert facts[0]["allocation"] == facts[1]["allocation"]


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


@pytest.mark.parametrize("name", SCORED)
def test_without_an_order_scores_differ_by_their_rounding(alone, two, name):
    """A Hessian's last bits may turn a code, and the error of its linear with it."""
    ours, theirs = (
        json.loads((folder / "modelpress.json").read_text())["allocation"]["scores"]
        for folder in (two / f"plain {name}", alone / name)
    )
    assert list(ours) == list(theirs)
    if name == "scores of what tokens change":  # no Hessian is in them
        assert ours == theirs
    for unit, score in theirs.items():
        assert ours[unit] == pytest.approx(score, rel=0.02), unit


def test_ranks_share_the_requests_of_tasks(two, tmp_path):
    ranks_at_work.work(MEASURED | {"output": str(tmp_path / "scores.json")})
    ours, theirs = (json.loads((f / "scores.json").read_text()) for f in (two, tmp_path))
    assert ours["results"] == theirs["results"]
    assert ours["conditions"].pop("ranks") == 2
    assert ours["conditions"] == theirs["conditions"]
    (all_of_them,) = json.loads((tmp_path / "scores.0").read_text()).values()
    answered = [json.loads((two / f"scores.{rank}").read_text()) for rank in range(2)]
    for found in answered:  # five items: three, and two filled up to as many
        assert list(found.values()) == [all_of_them * 3 // 5]


@pytest.fixture(scope="module")
def died(models, tmp_path_factory) -> Path:
    """A run of three ranks, of which one was killed behind the second layer."""
    folder = tmp_path_factory.mktemp("died")
    job = job_of(models, "rsq", folder / "out", options={"deterministic": True})
    done = at_work(folder, 3, [job | {"killed_at": [1, 2]}])
    assert done.returncode != 0
    assert "another rank has ended" in done.stderr or "SIGTERM" in done.stderr
    assert [path.name for path in (folder / "out").iterdir()] == [".modelpress"]
    journal = (folder / "out/.modelpress/journal.jsonl").read_text()
    assert len(journal.splitlines()) == 3  # the header, and two layers
    return folder / "out"


def test_one_process_goes_on_where_a_rank_died(alone, died, models, tmp_path, one_thread):
    output = shutil.copytree(died, tmp_path / "out")
    ranks_at_work.work(job_of(models, "rsq", output))
    assert weight_files(output) == weight_files(alone / "rsq")
    layers = json.loads((output / "modelpress.json").read_text())["layers"]
    assert [layer.get("ranks") for layer in layers] == [3, 3, None]


def test_one_process_goes_on_where_a_rank_died_among_the_scores(
    alone, models, tmp_path, one_thread
):
    job = job_of(models, "scores of logits, on disk", tmp_path / "out")
    done = at_work(tmp_path, 3, [job | {"options": {"deterministic": True}, "killed_at": [1, 1]}])
    assert done.returncode != 0
    assert "another rank has ended" in done.stderr or "SIGTERM" in done.stderr
    ranks_at_work.work(job)
    assert weight_files(tmp_path / "out") == weight_files(alone / "scores of logits, on disk")


def test_fewer_ranks_go_on_where_one_died_and_tell_each_other_of_an_error(
    alone, died, models, tmp_path
):
    det = {"options": {"deterministic": True}}
    going_on = job_of(models, "rsq", shutil.copytree(died, tmp_path / "out"), **det)
    failing = job_of(models, "gptq", tmp_path / "failed", **det) | {"fails_at": [1, 1]}
    done = at_work(tmp_path, 2, [going_on, failing])
    assert weight_files(tmp_path / "out") == weight_files(alone / "rsq")
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "no place for this layer" in line]
    assert sum("RankError: rank 1: " in line for line in told) >= 1, done.stderr
    assert [path.name for path in (tmp_path / "failed").iterdir()] == [".modelpress"]


@pytest.mark.parametrize("command", ["plan", "export", "push", "bench"])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_ranks_would_do_twice_is_refused(command, rank, monkeypatch, capsys, handlers):
    """By the first one; the others say nothing, and leave it the time to."""
    as_started(monkeypatch, rank)
    monkeypatch.setattr("compress.ranks._rendezvous", unreachable)
    assert main([command, "x"]) == (0 if rank else 2)
    said = capsys.readouterr().err
    if rank:
        assert said == ""
    else:
        check_line(said.removesuffix("\n"), "WORLD_SIZE=2", command, "run", "eval")


@pytest.fixture
def handlers() -> Iterator[None]:
    """A rank keeps its handlers to its end, which a test survives."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def unreachable():
    raise RuntimeError("nobody is there")


# ---- the parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_blocks_in_order(count, size):
    shares = []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        shares.append(ranks.share(count))
    assert [i for share in shares for i in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


@given(st.lists(st.floats(1, 100), max_size=12), st.floats(0, 50), st.integers(1, 5))
def test_nobody_has_much_more_to_do_than_the_others(costs, first, ranks):
    """Greedy: the last piece of the busiest went to whoever was least busy."""
    owners = dealt(costs, first, ranks)
    assert len(owners) == len(costs)
    loads = [0.0] * ranks
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] = (loads[owner] or first) + cost
    if costs:
        assert max(loads) <= min(loads) + first + max(costs) + 1e-9


def test_a_launcher_is_one_that_says_all():
    assert launched() == (0, 1)


def test_auto_is_what_is_here(monkeypatch):
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert chosen_device("auto") == ("cuda" if gpus else "cpu")
    assert idle_gpus("cpu") is None
    with refused(UsageError, "device", "abacus"):
        chosen_device("abacus")


@pytest.mark.parametrize(
    "device, gpus, local, expected",
    [
        ("auto", 0, 1, "cpu"),
        ("auto", 2, 1, "cuda:1"),
        ("cuda", 2, 0, "cuda:0"),
        ("cpu", 2, 1, "cpu"),
    ],
)
def test_each_rank_has_a_gpu_of_its_own(monkeypatch, device, gpus, local, expected):
    with_gpus(monkeypatch, gpus, local)
    assert chosen_device(device) == expected


def test_ranks_do_not_share_a_gpu(monkeypatch):
    with_gpus(monkeypatch, 2, 2)
    with refused(UsageError, "rank", 2, "GPUs", "--device cpu"):
        chosen_device("auto")
    with refused(UsageError, "device", "cuda:1", 3, "ranks"):
        chosen_device("cuda:1")


def test_one_process_is_told_of_gpus_that_it_leaves_idle(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert "torchrun --nproc-per-node 4" in idle_gpus("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert idle_gpus("cuda") is None


def with_gpus(monkeypatch, gpus: int, local: int) -> None:
    as_started(monkeypatch, local)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr("compress.memory.check_device", lambda device: None)


def as_started(monkeypatch, rank: int) -> None:
    """As torchrun has started this process, on one machine."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": max(2, rank + 1)}
    for name, value in (place | ranks).items():
        monkeypatch.setenv(name, str(value))
