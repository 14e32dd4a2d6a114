"""The benchmark of pruned visual tokens: what it counts, against sums by hand and the cache."""

import json

import pytest

from compress.bench import clock
from compress.bench.pruning import bench_pruning, random_llava, tower_flops
from compress.bench.settings import PruningBench
from compress.errors import UsageError
from support.calling import call, refuses
from support.refusals import refused
from support.tiny_vlm import write_vlm

TINY = PruningBench(
    width=64, layers=4, visual_tokens=36, text_tokens=5, vocabulary=32, new_tokens=2, repeats=2
)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setitem(clock.PRODUCT_SIZE, "cpu", 256)
    monkeypatch.setitem(clock.COPY_BYTES, "cpu", 2**20)


def test_what_is_counted_of_a_random_model():
    found = bench_pruning(TINY)
    rows = {row["keep"]: row for row in found["rows"]}
    assert list(rows) == [1.0, 0.5, 0.25, 0.1]
    # One head of 64 for keys and one for values, fp32, in 4 layers of 41 tokens.
    assert rows[1.0]["kv_bytes"] == 4 * 41 * 2 * 64 * 4
    for keep, row in rows.items():
        kept = round(row["average_kept"] * 36 * 4)  # over all layers
        assert row["kv_bytes"] == row["kv_bytes_predicted"] == (kept + 4 * 5) * 2 * 64 * 4
        assert abs(row["average_kept"] - keep) < 0.5 / 36 + 1e-9
        assert row["prefill"]["minimum"] <= row["prefill"]["median"] <= row["prefill"]["maximum"]
        assert row["prefill_floor"] > 0 and row["decode_floor"] > 0
        assert row["kv_ratio"] == rows[1.0]["kv_bytes"] / row["kv_bytes"]
        ratio = rows[1.0]["prefill"]["median"] / row["prefill"]["median"]
        assert row["prefill_speedup"] == pytest.approx(ratio)
    flops = [row["flops"] for row in found["rows"]]
    assert flops == sorted(flops, reverse=True)
    linears = 2 * (2 * 64 * 64 + 2 * 64 * 64 + 3 * 64 * 176)
    assert flops[0] == 4 * (41 * linears + 2 * 41**2 * 64)
    assert found["conditions"]["prompt_tokens"] == 41
    assert found["conditions"]["visual_tokens"] == 36


def test_the_towers_floor_counts_its_linears_and_the_projector():
    model = random_llava(TINY)
    tower = 2 * (4 * 64 * 64 + 2 * 64 * 256)  # two layers, q k v out and the MLP
    projector = 64 * 64 + 64 * 64
    assert tower_flops(model, 36) == 2 * 36 * (tower + projector)


def test_the_default_model_is_dominated_by_its_language_model():
    """Of the default sizes, without building them: 2 per weight and token."""
    bench = PruningBench()
    decoder = bench.layers * (3 * bench.width**2 + 3 * bench.width * (bench.width * 11 // 4))
    tower = 2 * (4 * 64**2 + 8 * 64**2) + 64 * bench.width + bench.width**2
    assert bench.visual_tokens >= 1000 and decoder > 50 * tower


def test_a_checkpoint_from_the_command_line(tmp_path, capsys):
    model = write_vlm(tmp_path / "model")
    options = ("--keep", "1,0.25", "--repeats", "1", "--new-tokens", "1")
    file = tmp_path / "bench.json"
    capsys.readouterr()
    argv = ("bench", "pruning", "--model", model, *options, "--method", "uniform")
    assert call(*argv, "--json", "--output", file) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(file.read_text())
    assert found["conditions"]["visual_tokens"] == 144
    assert [row["average_kept"] for row in found["rows"]] == [1.0, 0.25]
    assert call(*argv) == 0
    out = capsys.readouterr().out
    for words in ("100 %", "25 %", "floor", "KV cache", "predicted", "GFLOP/s", "144 visual"):
        assert words in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "m", "--random"), "--random"),
        (("--keep", "1,half"), "'1,half'"),
        (("--keep", "0"), [0.0]),
        (("--width", "100"), 100),
        (("--visual-tokens", "1000"), 1000),
        (("--method", "magic"), "'magic'"),
    ],
)
def test_what_makes_no_benchmark_is_refused(options, said, capsys):
    refuses(capsys, ["bench", "pruning", *options], said)


def test_a_budget_out_of_reach_is_refused():
    with refused(UsageError, "keep", 0.5):
        bench_pruning(PruningBench(**{**vars(TINY), "method": "fastv", "keep": (0.25,)}))
