"""The benchmark of a run: its floor against sums by hand, and one run of a very small one."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig

from compress.bench import clock, quantize
from compress.bench.quantize import (
    bench_quantize,
    floor_operations,
    layer_bytes,
    linears,
    quantize_bench_table,
    rounding_seconds,
    write_synthetic_model,
)
from compress.bench.settings import QuantizeBench
from compress.errors import CompressError
from compress.models.skeleton import Skeleton
from compress.storage.safetensors import CheckpointReader
from support.refusals import refused

TINY = QuantizeBench(
    hidden=64, mlp=96, layers=2, heads=4, kv_heads=2, vocabulary=128, samples=4, length=32,
    group_size=32,
)  # fmt: skip


def test_floor_by_hand():
    """d = 8, MLP 12, 2 heads on 1, 5 windows of 3 tokens: every linear written out.

    q [8, 8], k and v [4, 8], o [8, 8], gate and up [12, 8], down [8, 12].
    """
    bench = QuantizeBench(
        hidden=8, mlp=12, layers=3, heads=2, kv_heads=1, samples=5, length=3, group_size="channel"
    )
    tokens = 15
    weights = 8 * 8 + 2 * 4 * 8 + 8 * 8 + 2 * 12 * 8 + 8 * 12
    operations = floor_operations(bench)
    # q K^T and the average of V, each 2 * T^2 * d for a window
    attention = 5 * 2 * 2 * 3 * 3 * 8 / 2  # half of it: causal
    assert operations["forward"] == 3 * (2 * weights * tokens + attention)
    assert operations["hessians"] == 3 * (3 * 8**2 + 12**2) * tokens
    cholesky = 3 * 8**3 / 3 + 12**3 / 3
    loops = (8 + 4 + 4) * 64 + 8 * 64 + 24 * 64 + 8 * 144
    assert operations["solves"] == pytest.approx(3 * (cholesky + loops))
    assert layer_bytes(bench) == 4 * weights


def test_the_floor_counts_the_linears_of_the_synthetic_model(tmp_path):
    write_synthetic_model(tmp_path, TINY)
    skeleton = Skeleton(tmp_path)
    shapes = [skeleton.model.get_submodule(name).weight.shape for name in skeleton.linear_names()]
    assert shapes.pop() == (TINY.vocabulary, TINY.hidden)  # the head
    assert sum(s.numel() for s in shapes) == TINY.layers * sum(N * K for N, K in linears(TINY))
    assert skeleton.dtype is torch.bfloat16
    assert AutoConfig.from_pretrained(tmp_path).max_position_embeddings == TINY.length


def test_the_floor_is_linear_in_depth_and_samples():
    base = floor_operations(TINY)
    deeper = floor_operations(dataclasses.replace(TINY, layers=2 * TINY.layers))
    assert deeper == {name: 2 * value for name, value in base.items()}
    longer = floor_operations(dataclasses.replace(TINY, samples=2 * TINY.samples))
    assert longer == base | {n: 2 * base[n] for n in ("forward", "hessians")}


def test_the_same_seed_writes_the_same_model(tmp_path):
    prints = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_synthetic_model(tmp_path / name, TINY, seed)
        prints.append(CheckpointReader(tmp_path / name).fingerprint())
    assert prints[0] == prints[1] != prints[2]


@pytest.fixture
def brief(monkeypatch):
    """A matmul rate from small products."""
    monkeypatch.setitem(clock.PRODUCT_SIZE, "cpu", 512)


def test_a_very_small_bench_runs(brief):
    (found,) = bench_quantize(TINY)["runs"]
    assert found["conditions"].items() >= dataclasses.asdict(TINY).items()
    rate = found["conditions"]["matmul_rate"]
    assert rate == max(found["conditions"]["matmul_rates"]) > 1e8
    floor = found["floor"]
    assert floor["seconds"] == pytest.approx(sum(floor_operations(TINY).values()) / rate)
    assert sum(floor["parts"].values()) == pytest.approx(floor["seconds"])
    assert found["ratio"] == pytest.approx(found["seconds"] / floor["seconds"])
    assert found["ratio"] > 1
    assert 0 < found["layers_seconds"] < found["seconds"] < 60
    assert 1e8 < found["peak_memory"]["host"] < 2e9  # of the child alone
    assert found["peak_memory"]["device"] == 0
    assert 0 < found["mean_error"] < 0.1  # 4 bits
    assert min(found["rounding"][way] for way in ("kernel", "eager")) > 0
    names = quantize_bench_table({"runs": [found]}).columns[0]._cells
    assert {"rounding a linear in order", "the same by torch's operators"} <= {*names}


def test_rounding_in_order_is_timed_both_ways(monkeypatch):
    """Each way gets every block of the same linear, and one more to warm up."""
    seen = {}
    for name in ("round_eagerly", "round_in_order"):

        def noted(base, *rest, name=name):
            seen.setdefault(name, []).append(base.clone())

        monkeypatch.setattr(quantize, name, noted)
    found = rounding_seconds("cpu", size=96, group=32)
    assert (found["size"], found["group_size"]) == (96, 32)
    assert min(found["eager"], found["kernel"]) > 0
    eager, kernel = seen["round_eagerly"], seen["round_in_order"]
    assert [block.shape for block in eager] == [(32, 96)] * 4
    assert all(map(torch.equal, eager, kernel))


def test_a_bench_that_fails_says_why_in_one_line(brief):
    with refused(CompressError, "quantize.group_size", 128):
        bench_quantize(dataclasses.replace(TINY, group_size=128))
