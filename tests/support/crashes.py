"""Kills a forked child at its n-th operation on a folder's files, as a power button would.

    for count in itertools.count():
        if not killed_at(count, folder, lambda: run(recipe, folder)): break

Counted are files that are opened to be written, flushes to disk, moves, removals, new folders. A
kill at a flush loses the last bytes of what is being flushed. `os._exit` flushes, closes and tidies
nothing.
"""

import os
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

KILLED, FAILED = 137, 3
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Of the interpreter's audit events, those that change files; where in their arguments a path is.
EVENTS = {"os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0, "os.truncate": 0}


def killed_at(number: int, folder: Path, work: Callable[[], object]) -> bool:
    """Whether a child that does `work` is killed at operation `number` below `folder`.

    False: it has done all of it with fewer. AssertionError if `work` fails.
    """
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            torch.set_num_threads(1)  # the parent's threads are not here
            _kill_at(number, folder.resolve())
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), f"the child left with {code} instead of at operation {number}"
    return code == KILLED


def _kill_at(number: int, folder: Path) -> None:
    left = number
    here = threading.get_ident()
    fsync = os.fsync

    def operation(path: object) -> bool:
        """Counts an operation below the folder; whether it is the last."""
        nonlocal left
        if not isinstance(path, str | bytes | os.PathLike) or threading.get_ident() != here:
            return False
        whole = Path(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100  links are not followed
        if folder != whole and folder not in whole.parents:
            return False
        left -= 1
        return left < 0

    def heard(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and operation(path):
                os._exit(KILLED)
        elif event in EVENTS and operation(arguments[EVENTS[event]]):
            os._exit(KILLED)

    def flushed(descriptor: int) -> None:
        found = os.fstat(descriptor)
        if operation(os.readlink(f"/proc/self/fd/{descriptor}")):  # noqa: PTH115
            if stat.S_ISREG(found.st_mode):
                with suppress(OSError):  # open for reading: it was written before
                    os.ftruncate(descriptor, max(found.st_size - 7, 0))
            os._exit(KILLED)
        fsync(descriptor)

    os.fsync = flushed
    sys.addaudithook(heard)
