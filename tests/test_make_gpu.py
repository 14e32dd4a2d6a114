"""`make gpu` where there is no GPU: the commands that it would run exist, and it stops at once."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from compress.cli.main import app

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or not (ROOT / "Makefile").exists(), reason="needs make"
)


def make(*arguments: str) -> subprocess.CompletedProcess:
    command = ["make", "gpu", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def steps(folder: str) -> list[list[str]]:
    """The commands, in order, each as words."""
    printed = make("--dry-run", f"BENCHMARKS={folder}").stdout.replace("\\\n", " ")
    return [shlex.split(line) for line in printed.splitlines()]


def test_tests_come_before_benchmarks_and_every_benchmark_writes_a_file(tmp_path):
    found = steps(str(tmp_path))
    tests = [i for i, words in enumerate(found) if words[1:3] == ["-m", "pytest"]]
    benches = [i for i, words in enumerate(found) if words[1:4] == ["-m", "compress", "bench"]]
    assert len(tests) == 1
    assert tests[0] < min(benches)
    files = [Path(found[i][found[i].index("--output") + 1]) for i in benches]
    assert len(set(files)) == len(benches) >= 3
    assert {file.parent for file in files} == {tmp_path}


def test_the_command_line_takes_every_benchmark(tmp_path):
    bench = typer.main.get_command(app).commands["bench"]
    for words in steps(str(tmp_path)):
        if words[1:4] == ["-m", "compress", "bench"]:
            context = bench.commands[words[4]].make_context(words[4], words[5:])
            assert context.params["device"] == "cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run it all")
def test_without_a_gpu_it_stops_before_it_does_anything(tmp_path):
    run = make(f"BENCHMARKS={tmp_path / 'none'}")
    assert run.returncode != 0
    said = [line for line in run.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert "needs a CUDA device" in said[0]
    assert not (tmp_path / "none").exists()
