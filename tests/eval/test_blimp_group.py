"""BLiMP paradigms as a local group: how it is made, and that `eval` pairs it as a group."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress.cli.main import app

SCRIPT = Path(__file__).parents[1] / "interop" / "board" / "blimp.py"
PAIRS = [("the cats sleep", "the cats sleeps"), ("she sees him", "she see him")] * 3


@pytest.fixture(scope="module")
def blimp():
    spec = importlib.util.spec_from_file_location("blimp", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tasks(blimp, tmp_path):
    """Two paradigms of different size."""
    data = tmp_path / "data"
    data.mkdir()
    for name, count in (("agreement", 6), ("island", 3)):
        rows = [{"sentence_good": good, "sentence_bad": bad} for good, bad in PAIRS[:count]]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = blimp.write_tasks(data, tmp_path / "tasks")
    assert names == ["blimp_group_agreement", "blimp_group_island"]
    return tmp_path / "tasks"


def test_the_group_has_a_paired_difference_with_its_interval(
    blimp, tasks, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "scores.json"
    asked = ["eval", str(checkpoint("qwen2")), "--baseline", str(checkpoint()), "--no-record"]
    asked += ["--include-path", str(tasks), "--tasks", blimp.GROUP, "--output", str(output)]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    scores = json.loads(output.read_text())
    found = scores["difference"]["results"]
    group = found[blimp.GROUP]["acc"]
    parts = [
        (2 / 3, found["blimp_group_agreement"]["acc"]),
        (1 / 3, found["blimp_group_island"]["acc"]),
    ]
    ours, theirs = (part["results"][blimp.GROUP]["acc"] for part in (scores, scores["baseline"]))
    assert group["value"] == pytest.approx(ours - theirs)
    assert group["value"] == pytest.approx(sum(w * part["value"] for w, part in parts))
    assert group["stderr"] == pytest.approx(math.hypot(*(w * part["stderr"] for w, part in parts)))
    assert group["count"] == 9
    for way in ("right_to_wrong", "wrong_to_right"):
        assert group[way] == sum(part[way] for _, part in parts)
    assert f"{blimp.GROUP} acc" in result.stdout and "McNemar p" in result.stdout


def test_a_folder_without_paradigms_is_told(blimp, tmp_path):
    with pytest.raises(SystemExit, match="JSON lines"):
        blimp.write_tasks(tmp_path, tmp_path / "tasks")
