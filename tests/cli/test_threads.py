"""Threads: as many as a container may use, asleep while they wait, and --threads."""

import os
import subprocess
import sys

import pytest
import torch

from compress.cli import threads
from compress.cli.main import main

SET = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture
def bare(monkeypatch):
    """A process in which nobody has set anything; what is set in it does not stay."""
    for name in SET:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "_processors", lambda: 8)
    return monkeypatch


def groups(folder, limits):
    """A tree of control groups as version 2 mounts them: group -> the text of cpu.max."""
    for name, text in limits.items():
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "cpu.max").write_text(text)
    own = folder / "own"
    own.write_text("0::/a/b\n")
    return folder, own


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, None),
        ({"": "max 100000\n"}, None),
        ({"": "200000 100000\n"}, 2),  # a container, whose group is the root
        ({"a": "max 100000\n", "a/b": "250000 100000\n"}, 3),
        ({"a": "150000 100000\n", "a/b": "400000 100000\n"}, 2),  # of a group around it
        ({"a/b": "1000 100000\n"}, 1),
        ({"c": "100000 100000\n"}, None),  # another one
    ],
)
def test_the_processors_that_a_control_group_may_use(tmp_path, limits, expected):
    assert threads.quota(*groups(tmp_path, limits)) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", None), ("300000", 3), ("50000", 1)])
def test_the_processors_of_a_control_group_of_the_first_version(tmp_path, quota, expected):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert threads.quota(tmp_path, tmp_path / "none") == expected


def test_what_is_settled(bare, tmp_path):
    folder, own = groups(tmp_path, {"a/b": "200000 100000\n"})
    bare.setattr(threads, "CGROUPS", folder)
    bare.setattr(threads, "OWN", own)
    threads.settle()
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert os.environ["GOMP_SPINCOUNT"] == str(threads.SPINS)
    assert "OMP_WAIT_POLICY" not in os.environ


def test_what_a_user_has_set_stays(bare, tmp_path):
    folder, own = groups(tmp_path, {"a/b": "200000 100000\n"})
    bare.setattr(threads, "CGROUPS", folder)
    bare.setattr(threads, "OWN", own)
    bare.setenv("OMP_NUM_THREADS", "5")
    bare.setenv("OMP_WAIT_POLICY", "active")
    threads.settle()
    assert os.environ["OMP_NUM_THREADS"] == "5"
    assert "GOMP_SPINCOUNT" not in os.environ


def test_a_container_that_may_use_more_than_there_is_sets_nothing(bare, tmp_path):
    folder, own = groups(tmp_path, {"a/b": "900000 100000\n"})
    bare.setattr(threads, "CGROUPS", folder)
    bare.setattr(threads, "OWN", own)
    threads.settle()
    assert "OMP_NUM_THREADS" not in os.environ


def test_threads_are_those_of_torch(bare):
    before = torch.get_num_threads()
    try:
        threads.set_threads(3)
        assert torch.get_num_threads() == 3
        assert os.environ["OMP_NUM_THREADS"] == "3"
    finally:
        torch.set_num_threads(before)


def test_the_option_comes_before_torch(tmp_path):
    """In a process of its own, where torch reads the number as it is loaded."""
    program = (
        "import sys; from compress.cli.main import main\n"
        "assert 'torch' not in sys.modules\n"
        "assert main(['plan', '--threads', '1', 'nowhere.yaml']) == 2\n"
        "import torch; print(torch.get_num_threads())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name not in SET},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["1"]


def test_no_threads_are_refused(capsys):
    assert main(["run", "demo-rsq", "--threads", "0"]) == 2
    assert "--threads" in capsys.readouterr().err
