"""One writer at a time: a lease on a result's folder, or on one file.

A lease is a lock of the operating system on `OUT/.modelpress/lock`, so it ends with its process,
however that ends. `holder.json` beside it says who has it; a second process is refused with that in
the message. A process that holds a folder may ask for it again: a comparison holds the folders that
its runs write to.

    with lease(output) as held:
        held.abandoned            # whether an earlier process left something unfinished here
    with file_lease(trials):
        ...
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from compress.errors import UsageError
from compress.ranks import joined
from compress.storage.files import sweep, writing

WORK_FOLDER = ".modelpress"
LOCK, HOLDER = "lock", "holder.json"
PATIENCE = 0.5  # seconds; an owner that is leaving is gone by then
# Variables by which launchers tell a process how many it is one of, and which.
RANKS = {
    "WORLD_SIZE": "RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
}


@dataclass(frozen=True)
class Lease:
    """A folder that nobody else writes to.

    `abandoned`: an earlier process was stopped in it and has left its work folder.
    """

    folder: Path
    abandoned: bool


_held: dict[tuple[int, Path], Lease] = {}  # by thread and folder
os.register_at_fork(after_in_child=_held.clear)


@contextmanager
def lease(folder: Path) -> Iterator[Lease]:
    """Holds `folder`, which is made if need be; one that nothing was written to goes again.

    Raises:
        UsageError: another process or thread holds it, or this is one of several ranks that know
            nothing of each other.
        CheckpointError: it cannot be written to.
    """
    refuse_ranks()
    key = threading.get_ident(), folder.resolve()
    if key in _held:
        yield _held[key]
        return
    work = folder / WORK_FOLDER
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    abandoned = work.is_dir()
    lock = _acquired(work / LOCK, f"output folder {folder}", work / HOLDER)
    try:
        with writing(folder):
            _say_who(work / HOLDER)
            sweep(folder)
        _held[key] = Lease(folder, abandoned)
        yield _held[key]
    finally:
        _held.pop(key, None)
        _release(lock, work / LOCK, work / HOLDER)
        for path in (work, *new):
            with suppress(OSError):
                if not any(path.iterdir()):
                    path.rmdir()


@contextmanager
def file_lease(path: Path) -> Iterator[None]:
    """Holds a file that several processes might add to. Raises as `lease` does."""
    refuse_ranks()
    lock_file = path.with_name(f".{path.name}.lock")
    holder = path.with_name(f".{path.name}.holder")
    lock = _acquired(lock_file, str(path), holder)
    try:
        with writing(holder):
            _say_who(holder)
        yield
    finally:
        _release(lock, lock_file, holder)


def refuse_ranks() -> None:
    """UsageError for one of several processes that a launcher has started on the same work.

    Those that have joined each other share it, and two never ask for the same lease.
    """
    if joined():
        return
    for size, rank in RANKS.items():
        ranks = os.environ.get(size, "")
        if rank in os.environ and ranks.isdigit() and int(ranks) > 1:
            raise UsageError(
                f"{size}={ranks}: this runs in one process, and ranks would write over each other: "
                "start it without torchrun or mpirun"
            )


def _acquired(path: Path, what: str, holder: Path) -> FileLock:
    """The lock in `path`, held. Tries for a moment: its owner may be about to leave."""
    until = time.monotonic() + PATIENCE
    with writing(path):
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
                return lock
            except FileNotFoundError:
                pass
            except Timeout:
                if time.monotonic() > until:
                    raise UsageError(f"{what} is in use by {_who(holder)}") from None
            time.sleep(0.02)


def _release(lock: FileLock, path: Path, holder: Path) -> None:
    # While it is held: whoever has opened the file by then finds it gone, and opens a new one.
    for file in (holder, path):
        with suppress(OSError):
            file.unlink()
    lock.release()


def _say_who(holder: Path) -> None:
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    holder.write_text(json.dumps(facts), encoding="utf-8")


def _who(holder: Path) -> str:
    remedy = "wait for it, or choose another --output"
    try:
        facts = json.loads(holder.read_text(encoding="utf-8"))
        who = f"process {facts['pid']} on {facts['host']} since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun, or is leaving
        who = "another process"
    return f"{who}: {remedy}"
