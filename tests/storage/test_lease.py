"""One writer at a time: the second is told who the first is, and a killed one frees its folder."""

import json
import multiprocessing
import os
import signal
import socket
import stat
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from compress.errors import CheckpointError, UsageError
from compress.storage import lease as leases
from compress.storage.files import atomic_write, sweep
from compress.storage.lease import RANKS, file_lease, lease

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


@pytest.fixture(autouse=True)
def no_patience(monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE", 0)


@contextmanager
def another_process(hold, place: Path):
    """A process that holds `place` inside; its id."""
    here, there = multiprocessing.Pipe()
    process = os.fork()
    if process == 0:
        try:
            with hold(place):
                there.send("held")
                there.recv()
        finally:
            os._exit(0)
    assert here.poll(20)
    try:
        yield process
    finally:
        here.send("leave")
        with suppress(ChildProcessError):  # it was killed
            os.waitpid(process, 0)


@pytest.mark.parametrize("hold", [lease, file_lease])
def test_the_second_process_is_told_who_the_first_one_is(tmp_path, hold):
    place = tmp_path / "out"
    with another_process(hold, place) as owner:
        said = rf"out is in use by process {owner} on"
        with pytest.raises(UsageError, match=said) as error, hold(place):
            pass
        assert socket.gethostname() in str(error.value) and "\n" not in str(error.value)
    with hold(place):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hold", [lease, file_lease])
def test_a_killed_owner_frees_what_it_held(tmp_path, hold):
    place = tmp_path / "out"
    with another_process(hold, place) as owner:
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        with hold(place) as held:
            assert hold is file_lease or held.abandoned
    assert [path for path in tmp_path.rglob("*") if path != place] == []


def test_another_thread_is_another_owner(tmp_path):
    refused = []

    def ask():
        try:
            with lease(tmp_path):
                pass
        except UsageError as error:
            refused.append(str(error))

    with lease(tmp_path):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"process {os.getpid()} " in refused[0]


def test_an_owner_may_ask_again_under_any_name(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    with lease(folder) as outer:
        for name in (folder, Path("out"), tmp_path / "link", tmp_path / "x" / ".." / "out"):
            with lease(name) as inner:
                assert inner == outer
            assert (folder / ".modelpress" / "lock").exists()
    assert not folder.exists()


def test_a_link_to_a_folder_is_that_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with (
        another_process(lease, tmp_path / "link"),
        pytest.raises(UsageError, match="in use"),
        lease(tmp_path / "out"),
    ):
        pass


def test_a_folder_that_nothing_was_written_to_goes_again_and_others_stay(tmp_path):
    with lease(tmp_path / "a" / "b" / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with lease(tmp_path / "empty"):
        pass
    with lease(tmp_path / "c" / "out"):
        (tmp_path / "c" / "out" / "mine").touch()
    assert [path.name for path in tmp_path.rglob("*") if path.name != "c"] == [
        "empty", "out", "mine"
    ]  # fmt: skip


def test_what_an_owner_left_is_known_to_the_next_one(tmp_path):
    with lease(tmp_path) as held:
        assert not held.abandoned
        (tmp_path / ".modelpress" / "journal.jsonl").touch()
    with lease(tmp_path) as held:
        assert held.abandoned
        (tmp_path / ".modelpress" / "journal.jsonl").unlink()
    with lease(tmp_path) as held:
        assert not held.abandoned


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 3}'])
def test_an_owner_that_has_not_said_who_it_is(tmp_path, text):
    with another_process(lease, tmp_path):
        (tmp_path / ".modelpress" / "holder.json").write_text(text)
        with pytest.raises(UsageError, match="in use by another process"), lease(tmp_path):
            pass


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot write"), lease(tmp_path / "out"):
        pass


@pytest.mark.parametrize("size", RANKS)
def test_one_of_several_ranks_is_refused(tmp_path, monkeypatch, size):
    """As torchrun, accelerate or mpirun would start it."""
    monkeypatch.setenv(size, "2")
    monkeypatch.setenv(RANKS[size], "0")
    for hold in (lease, file_lease):
        with pytest.raises(UsageError, match=f"{size}=2"), hold(tmp_path / "out"):
            pass
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(size, "1")  # torchrun with one process is as good as none
    with lease(tmp_path / "out"):
        pass
    monkeypatch.setenv(size, "2")
    monkeypatch.delenv(RANKS[size])  # a variable that somebody exported, and no launcher
    with lease(tmp_path / "out"):
        pass


# ---- names that are written to ------------------------------------------------------------------


def test_nobody_can_foresee_the_name_that_is_written_first(tmp_path):
    """A link under the old, predictable name is neither followed nor removed."""
    target = tmp_path / "elsewhere"
    (tmp_path / "facts.json.tmp").symlink_to(target)
    names = set()
    for _ in range(2):
        with atomic_write(tmp_path / "facts.json") as file:
            names.add(file.name)
            file.write(b"{}")
    assert len(names) == 2 and not target.exists()
    assert (tmp_path / "facts.json").read_bytes() == b"{}"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_written_files_have_the_mode_of_any_other(tmp_path, mask):
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "facts.json"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "facts.json").stat().st_mode) == 0o666 & ~mask


def test_the_next_owner_removes_what_a_killed_one_was_writing(tmp_path):
    ours = tmp_path / ".modelpress.json.0123456789abcdef.tmp"
    theirs = [tmp_path / name for name in ("a.tmp", ".notes.tmp", ".x.0123.tmp")]
    for file in (ours, *theirs):
        file.write_text(json.dumps({}))
    with lease(tmp_path):
        assert sorted(tmp_path.glob("*.tmp")) == sorted(theirs)
    sweep(tmp_path)
    assert all(file.exists() for file in theirs)
