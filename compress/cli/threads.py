"""How many threads a command computes with, and how they wait: settled before torch is loaded.

Torch's threads are those of libgomp, which reads its settings once, as it is loaded itself.

    settle()          # at the start of the program
    set_threads(2)    # --threads 2
"""

import math
import os
import sys
from pathlib import Path

# How often a thread that waits for the others looks before it sleeps: some microseconds. By default
# libgomp's look so long that two of them beside one busy process take three times as long.
SPINS = 2000
CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def settle() -> None:
    """Tells threads to wait asleep, and to be no more than a container may use.

    What the user has set (OMP_WAIT_POLICY, GOMP_SPINCOUNT, OMP_NUM_THREADS) stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    allowed = quota(CGROUPS, OWN)
    if allowed is not None and allowed < _processors():
        os.environ.setdefault("OMP_NUM_THREADS", str(allowed))


def set_threads(count: int) -> None:
    """So many threads here and in processes that start from now on."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:  # which has read that already
        sys.modules["torch"].set_num_threads(count)


def quota(cgroups: Path, own: Path) -> int | None:
    """The processors that this process may use at a time, by the control groups of Linux.

    Rounded up; None where nothing limits them. cgroups: where they are mounted; own: the file that
    names those of this process.
    """
    limits = [*_second(cgroups, own), *_first(cgroups / "cpu")]
    return max(1, math.ceil(min(limits))) if limits else None


def _second(cgroups: Path, own: Path) -> list[float]:
    """The limits of version 2, of its own group and of all around it."""
    names = [line.partition("::")[2] for line in _text(own).splitlines() if line.startswith("0::")]
    found = []
    for name in names:
        place = Path(name.strip().lstrip("/"))
        for group in (place, *place.parents):
            share, _, period = _text(cgroups / group / "cpu.max").partition(" ")
            if share.isdecimal():  # or it is `max`
                found.append(int(share) / int(period))
    return found


def _first(group: Path) -> list[float]:
    """The limit of version 1, where -1 is none."""
    share, period = (_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return [int(share) / int(period)] if share.isdecimal() and period.isdecimal() else []


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
