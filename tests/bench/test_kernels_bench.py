"""`bench kernels`: its arithmetic by hand, its clock, and the command on very small shapes."""

import json

import pytest
import torch

from compress.bench import clock as timing
from compress.bench.clock import Clock, Samples
from compress.bench.kernels import (
    against_floor,
    bench_kernels,
    random_codes,
    relative_error,
    tune_kernels,
)
from compress.bench.kernels_view import dense_name, plot_kernels
from compress.bench.settings import KernelBench, parse_numbers, parse_shapes
from compress.errors import UsageError
from compress.kernels.reference import reference_matmul
from support.calling import call, last_line

SMALL = KernelBench(shapes=((64, 96),), rows=(1, 3), bits=(3, 4), group_size=32, rounds=2)


@pytest.fixture
def small_device(monkeypatch):
    """Rates and caches of a device that is measured in no time."""
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 1 << 12)
    monkeypatch.setitem(timing.PRODUCT_SIZE, "cpu", 16)
    monkeypatch.setattr(timing, "PASS_SECONDS", 0.0)
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 1 << 14)


def row(seconds, M=1):
    return {
        "shape": [100, 1000],
        "rows": M,
        "seconds": {"packed": seconds, "dense bf16": 4 * seconds},
        "bytes": {"packed": 50_000, "bf16": 200_000, "activations": 2200 * M},
    }


def test_floor_is_bytes_over_bandwidth_where_memory_binds():
    found = against_floor(row(1e-5), bandwidth=1e10, rate=1e12)
    assert found["floor"] == pytest.approx(52_200 / 1e10)
    assert found["times_floor"] == pytest.approx(1e-5 * 1e10 / 52_200)
    assert found["share_of_bandwidth"] == pytest.approx(0.522)
    assert found["bytes_per_second"] == pytest.approx(5.22e9)
    assert found["ratio"] == pytest.approx({"packed": 1, "dense bf16": 4})
    assert found["memory_ratio"] == 0.25


def test_floor_is_operations_over_rate_where_products_bind():
    found = against_floor(row(1e-3, M=500), bandwidth=1e12, rate=1e12)
    assert found["floor"] == pytest.approx(2 * 500 * 100 * 1000 / 1e12)


def test_median_and_spread_forget_one_slow_sample():
    samples = Samples((1.0, 1.1, 1.2, 1.3, 60.0))
    assert (samples.median, samples.best) == (1.2, 1.0)
    assert samples.spread == pytest.approx((1.3 - 1.1) / 1.2)
    assert Samples((2.0,)).spread == 0


def test_copies_together_fill_the_cache_twice():
    clock = Clock("cpu")
    clock.cache = 1000
    assert [clock.copies(size) for size in (1, 100, 700, 5000)] == [64, 20, 3, 2]
    assert clock.copies(1 << 40) == 2


def test_contenders_take_turns_and_every_copy_is_called(small_device):
    called = []
    calls = {
        name: [lambda name=name, i=i: called.append((name, i)) for i in range(3)] for name in "ab"
    }
    samples = Clock("cpu", rounds=4).take_turns(calls)
    assert {name: len(taken.seconds) for name, taken in samples.items()} == {"a": 4, "b": 4}
    counts = {called.count((name, i)) for name in "ab" for i in range(3)}
    assert len(counts) == 1  # none is called more often than another
    timed = [name for name, i in called if i == 0][-8:]
    assert "".join(timed) == "abbaabba"  # what runs first changes


def test_error_is_that_of_the_packed_weight():
    codes = random_codes(40, 64, 4, 32, torch.float32, torch.device("cpu"))
    x = torch.randn(3, 64)
    y = reference_matmul(x, codes)
    assert relative_error(y, x, codes) == 0
    assert relative_error(1.5 * y, x, codes) == pytest.approx(0.5)


def test_figures_of_small_products(small_device):
    result = bench_kernels(SMALL)
    assert [(r["bits"], r["rows"]) for r in result["rows"]] == [(3, 1), (3, 3), (4, 1), (4, 3)]
    for measured in result["rows"]:
        assert {"packed", "dense bf16"} <= measured["seconds"].keys()
        assert "torch int4" not in measured["seconds"]  # it wants 128 inputs
        assert measured["error"].keys() == measured["seconds"].keys()
        assert max(measured["error"].values()) < 2**-6
        assert measured["bytes"]["bf16"] == 2 * 64 * 96
        assert measured["ratio"]["packed"] == 1
    assert result["conditions"]["bench"]["dtype"] == "bf16"
    assert dense_name(result.values) in result["rows"][0]["ratio"]


def test_torch_own_operator_is_measured_where_it_takes_the_weight(small_device):
    bench = KernelBench(shapes=((32, 128),), rows=(2,), bits=(4,), group_size=64, rounds=1)
    (measured,) = bench_kernels(bench)["rows"]
    assert measured["error"]["torch int4"] < 2**-6


def test_products_of_integers_are_measured_when_asked_for(small_device):
    bench = KernelBench(((32, 128),), (2,), (4,), group_size=64, activation_bits=8, rounds=1)
    (measured,) = bench_kernels(bench)["rows"]
    # 127 steps to the largest value of a token: a step is about 2 % of the typical one
    assert 1e-3 < measured["error"]["packed A8"] < 3e-2


def test_the_command_prints_writes_and_draws(small_device, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output, plot = tmp_path / "kernels.json", tmp_path / "kernels.svg"
    options = ["--shapes", "64x32,32x64", "--m", "1,2", "--bits", "2,8", "--group-size", "channel"]
    files = ["--output", output, "--plot", plot]
    assert call("bench", "kernels", *options, "--rounds", 1, "--dtype", "fp32", *files) == 0
    assert "dense fp32 /" in capsys.readouterr().out
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 8
    assert {r["group_size"] for r in rows} == {None}
    assert plot.read_text().lstrip().startswith("<?xml")


def test_json_is_one_object(small_device, capsys):
    options = ["--shapes", "32x32", "--m", "1", "--bits", "4", "--group-size", "32"]
    assert call("bench", "kernels", *options, "--rounds", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["shape"] == [32, 32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "4096"], "--shapes: expected NxK"),
        (["--m", "1,zero"], "--m: expected numbers above 0"),
        (["--bits", "5"], "bits: kernels take 2, 3, 4 and 8, found 5"),
        (["--group-size", "20"], "group size: expected a multiple of 8 or channel, found 20"),
        (["--dtype", "int8"], "dtype: expected fp16, bf16, fp32, found 'int8'"),
        (["--activation-bits", "9"], "activation bits: expected 2 to 8, found 9"),
        (
            ["--activation-bits", "8", "--group-size", "48"],
            "group size: with activation bits a multiple of 32, found 48",
        ),
        (["--tune"], "--tune measures GPU tiles"),
    ],
)
def test_wrong_options_are_usage_errors(arguments, message, capsys):
    assert call("bench", "kernels", *arguments) == 2
    assert message in last_line(capsys)


def test_shapes_and_numbers():
    assert parse_shapes("4096x14336, 8X16", "--shapes") == ((4096, 14336), (8, 16))
    assert parse_numbers("1, 16", "--m") == (1, 16)
    with pytest.raises(UsageError, match="found '0'"):
        parse_numbers("0", "--m")


def test_a_missing_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for run in (bench_kernels, tune_kernels):
        with pytest.raises(UsageError, match="torch finds no CUDA device"):
            run(KernelBench(device="cuda"))


def test_a_plot_without_matplotlib_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="pip install 'matplotlib'"):
        plot_kernels({"rows": []}, tmp_path / "plot.svg")


@pytest.mark.parametrize(("seconds", "kept"), [(0.5, ["fp32", "bf16"]), (40, ["fp32"])])
def test_an_emulated_product_is_no_bound(monkeypatch, seconds, kept):
    """A small one tells, so that no large one is waited for."""
    timed = []

    def take_turns(clock, calls):
        timed.append({name: len(call()) for name, (call,) in calls.items()})
        return {name: timing.Samples((seconds if name == "bf16" else 1,)) for name in calls}

    monkeypatch.setattr(timing.Clock, "take_turns", take_turns)
    monkeypatch.setitem(timing.PRODUCT_SIZE, "cpu", 24)
    assert list(timing.product_rate(timing.Clock())) == kept
    assert list(timing.product_rate(timing.Clock(), "fp32")) == ["fp32"]
    assert timed == [{"fp32": 4, "bf16": 4}, dict.fromkeys(kept, 24), {"fp32": 24}]
