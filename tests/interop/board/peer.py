"""What the scripts of the peers share: arguments, calibration windows, and the line of facts.

It imports no package of the project: each peer runs in an environment of its own.

    with peer.making(asked, "name", settings, packages) as folder: ...

leaves OUT/name, and OUT/name.json beside it: one JSON object on one line with

    name, settings, versions
    bits           of a quantised weight, as the program calls it
    bytes          of the file or files that hold tensors, whole
    seconds        wall clock, from loading the model to the written result, imports left out
    cpu_seconds    of this process and the programs that it called, in the same span
    peak_memory    bytes: the largest resident set of this process or of a program that it called
    conditions     threads, processor, and that other work ran beside it if it did
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

TENSOR_FILES = ("*.safetensors", "*.gguf")


def arguments(
    description: str,
    cases: Sequence[str],
    folders: Sequence[str] = (),
    options: Mapping[str, dict[str, Any]] | None = None,
) -> argparse.Namespace:
    """model, text, out, case: one case a process, or its peak of memory would be another's.

    `folders` are further ones that the program needs, in front of these; `options` more arguments.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    for folder in folders:
        parser.add_argument(folder, type=Path)
    parser.add_argument("model", type=Path, help="folder of the 16-bit model")
    parser.add_argument("text", type=Path, help="folder that cut.py wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("case", choices=cases)
    for option, settings in (options or {}).items():
        parser.add_argument(option, **settings)
    parser.add_argument("--beside", default="", help="what else the machine did, for the record")
    return parser.parse_args()


def windows(asked: argparse.Namespace) -> list[list[int]]:
    """The calibration windows, lists of token ids: 64 of 512 on the board."""
    return json.loads((asked.text / "windows.json").read_text())


@contextlib.contextmanager
def making(
    asked: argparse.Namespace,
    name: str,
    bits: str | int,
    settings: dict[str, Any],
    packages: Sequence[str],
    versions: dict[str, str] | None = None,
) -> Iterator[Path]:
    """A new folder for a result, which it counts and describes when it is there.

    `packages` are asked for their versions; `versions` are those of other programs. What is added
    to `settings` while it is made is written too.
    """
    folder = asked.out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wall, cpu = time.perf_counter(), sum(_cpu_seconds())
    yield folder
    wall, cpu = time.perf_counter() - wall, sum(_cpu_seconds()) - cpu
    facts = {
        "name": name,
        "bits": bits,
        "settings": settings,
        "versions": (versions or {}) | {package: version(package) for package in packages},
        "bytes": sum(f.stat().st_size for kind in TENSOR_FILES for f in folder.glob(kind)),
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_memory": 1024 * max(_used(who).ru_maxrss for who in BOTH),
        "conditions": {
            "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
            "processor": _processor(),
            "python": platform.python_version(),
        }
        | ({"beside": asked.beside} if asked.beside else {}),
    }
    line = json.dumps(facts)
    (asked.out / f"{name}.json").write_text(line + "\n")
    print(line)


BOTH = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN


def _used(who: int) -> resource.struct_rusage:
    return resource.getrusage(who)


def _cpu_seconds() -> list[float]:
    return [_used(who).ru_utime + _used(who).ru_stime for who in BOTH]


def _processor() -> str:
    """The processor's name, as Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
