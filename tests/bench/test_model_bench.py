"""The benchmark of whole models: what it counts, in which process, and what it sets beside it."""

import json
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from compress.bench import alone
from compress.bench import model as benchmark
from compress.bench.model import bench_model, measure
from compress.bench.settings import ModelBench
from compress.errors import CompressError, UsageError
from compress.kernels.cpu.products import pack_cpu, pack_integers
from compress.kernels.linear import QuantLinear
from compress.loading.load import load
from support.calling import call, refuses
from support.refusals import refused
from support.tiny_checkpoints import load_whole, recipe_for

BRIEF = {"prompts": (1, 4), "new_tokens": 2, "repeats": 2, "dtype": "fp32"}


@pytest.fixture
def rates(monkeypatch):
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda clock: 1e9)
    monkeypatch.setattr(benchmark, "product_rate", lambda clock: {"fp32": 1e3, "bf16": 5e2})


def test_what_is_counted_of_a_dense_model(checkpoint, rates):
    folder = checkpoint()
    row = measure(ModelBench(str(folder), **BRIEF))
    model = load_whole(folder)
    numbers = {name: p.numel() for name, p in model.named_parameters()}
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert row["weights"] == 4 * sum(numbers.values()) + buffers
    read = row["weights"] - 4 * numbers["model.embed_tokens.weight"]
    assert row["decode_floor"] == read / 1e9
    body = sum(n for name, n in numbers.items() if name.endswith("_proj.weight"))
    head = numbers["lm_head.weight"]  # asked for one token, however long the prompt is
    assert row["prefill_floor"] == {n: 2 * (body * n + head) / 1e3 for n in (1, 4)}
    assert list(row["prefill"]) == [1, 4]
    for spread in (*row["prefill"].values(), row["decode"]):
        assert 0 < spread["minimum"] <= spread["median"] <= spread["maximum"]


def test_packed_weights_count_as_they_are_held(finished, rates):
    """In the layouts that this processor is given, whichever they are."""
    packed, dense, rounded = (
        measure(ModelBench(str(finished), **BRIEF, **options))
        for options in ({}, {"dense": True}, {"activation_bits": 8})
    )
    assert packed["weights"] < dense["weights"] / 2
    assert packed["prefill_floor"] == dense["prefill_floor"]  # the operations are the same
    assert rounded["prefill_floor"] == {n: t / 2 for n, t in packed["prefill_floor"].items()}
    model, _ = load(finished, dtype=torch.float32)
    codes = [m.codes() for m in model.modules() if isinstance(m, QuantLinear)]
    floats = sum(pack_cpu(c, torch.float32).nbytes for c in codes)
    integers = sum(pack_integers(c).nbytes for c in codes)
    assert rounded["weights"] - packed["weights"] == integers - floats
    assert (rounded["activation_bits"], packed["activation_bits"]) == (8, None)


def test_tied_embeddings_are_read_as_the_head(checkpoint, rates):
    row = measure(ModelBench(str(checkpoint(tied=True)), **BRIEF))
    assert row["decode_floor"] == row["weights"] / 1e9


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_embedding_is_read_only_where_it_is_the_head(checkpoint, press, rates, tied):
    tables = {"embedding": {"bits": 8}, "head": {"bits": 8}}
    recipe = recipe_for(checkpoint(tied=tied), quantize={"method": "rtn", **tables})
    folder = press(recipe)
    row = measure(ModelBench(str(folder), **BRIEF))
    model, _ = load(folder, dtype=torch.float32)
    own = model.get_input_embeddings().packed_bytes()
    assert (own == 0) == tied
    assert row["decode_floor"] == (row["weights"] - own) / 1e9


def test_two_models_each_in_a_process_of_its_own(finished, checkpoint, tmp_path, capsys):
    output = tmp_path / "bench.json"
    command = ["bench", "model", finished, "--baseline", checkpoint(), "--prompts", "1,4"]
    command += ["--new-tokens", 2, "--repeats", 2, "--activation-bits", 8, "--output", output]
    assert call(*command) == 0
    said = capsys.readouterr().out
    assert "activations 8 bits" in said
    result = json.loads(output.read_text())
    mine, theirs = result["rows"]
    assert theirs["activation_bits"] is None
    assert theirs["ratio"]["decode"] == theirs["ratio"]["prefill"]["4"] == 1
    for key in ("weights", "resident"):
        assert mine["ratio"][key] == theirs[key] / max(mine[key], 1)
    assert mine["ratio"]["decode"] == theirs["decode"]["median"] / mine["decode"]["median"]
    assert result["conditions"]["dtype"] == "bf16"


def test_what_a_process_refuses_is_one_line(capsys):
    refuses(capsys, ["bench", "model", "nowhere/at/all"], "nowhere/at/all")


def test_a_process_that_dies_is_named(monkeypatch, checkpoint):
    class Dead:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        def submit(self, *_):
            raise BrokenProcessPool

    monkeypatch.setattr(alone, "ProcessPoolExecutor", Dead)
    with refused(CompressError, "process"):
        bench_model(ModelBench("here"))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"dtype": "int8"}, ("dtype", "'int8'")), ({"prompts": (0,)}, ("prompts", 0))],
)
def test_what_measures_nothing_is_refused(change, said):
    with refused(UsageError, *said):
        bench_model(ModelBench("here", **change))


def test_one_model_has_no_ratios(checkpoint, rates, monkeypatch):
    monkeypatch.setattr(benchmark, "alone", lambda measure, bench: measure(bench))
    result = bench_model(ModelBench(str(checkpoint()), **BRIEF))
    assert "ratio" not in result["rows"][0]
    assert result.table().row_count == 9
