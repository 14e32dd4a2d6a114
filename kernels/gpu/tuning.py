"""Tiles that were measured on a device, kept on disk: read when a GPU product first asks.

    $XDG_CACHE_HOME/modelpress/tuning.json
    {"version": 2, "entries": {"NVIDIA H100 80GB HBM3|4096x14336|4 bits|128|16 rows": {...tiles}}}

Nobody writes it but `modelpress bench kernels --tune`. Without it the tiles that come with the
project hold (tiles.json), and else the table of matmul.py.
A file or an entry that is not as expected is left aside with one warning, and counted; kernels work
without it.

    tiles = find("NVIDIA H100 80GB HBM3", 4096, 14336, 4, 128, bucket(13))
    save({key(...): Tiles(...)})
"""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from compress.kernels.user_cache import cache_directory, cache_path, write_atomically

VERSION = 2
MEASURED = "NVIDIA H200"
HOPPER = re.compile(r"NVIDIA (H100|H200|GH200)\b")  # alike but for their memory
# All that a file may say: powers of two that compile for every width.
CHOICES: dict[str, tuple[int | None, ...]] = {
    "block_m": (8, 16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128, 256),
    "warps": (1, 2, 4, 8),
    "stages": (1, 2, 3, 4, 5),
    "split": (None, 1, 2, 4, 8, 16, 32),
}
ACCUMULATORS = 128  # outputs of a thread: more spill out of its registers


@dataclass(frozen=True)
class Tiles:
    """How to launch a product of up to `rows` rows.

    split: programs that share the inputs of a tile; None: as many as fill the device.
    """

    rows: int
    block_m: int
    block_n: int
    warps: int
    stages: int
    split: int | None = None


# What tuning tries: the fastest at 8192 x 8192 with 4 bits on an H100, and at 4096 x 4096 with 3
# and 4 bits on an H200. Above 32 rows they were timed while products could overlap (`settled`).
CANDIDATES = (
    Tiles(8, block_m=8, block_n=64, warps=2, stages=2),
    Tiles(8, block_m=8, block_n=32, warps=2, stages=3),
    Tiles(8, block_m=8, block_n=32, warps=1, stages=2),
    Tiles(8, block_m=8, block_n=64, warps=4, stages=3),
    Tiles(8, block_m=8, block_n=128, warps=4, stages=2),
    Tiles(16, block_m=16, block_n=64, warps=4, stages=3),
    Tiles(16, block_m=16, block_n=32, warps=1, stages=2),
    Tiles(16, block_m=16, block_n=32, warps=2, stages=3),
    Tiles(16, block_m=16, block_n=64, warps=2, stages=2),
    Tiles(32, block_m=32, block_n=64, warps=4, stages=3),
    Tiles(32, block_m=32, block_n=128, warps=8, stages=3),
    Tiles(32, block_m=32, block_n=128, warps=4, stages=2),
    Tiles(64, block_m=64, block_n=64, warps=4, stages=3),
    Tiles(64, block_m=64, block_n=128, warps=8, stages=3),
    Tiles(64, block_m=64, block_n=256, warps=8, stages=3),
    Tiles(128, block_m=128, block_n=128, warps=8, stages=3),
    Tiles(128, block_m=128, block_n=128, warps=4, stages=3),
    Tiles(128, block_m=64, block_n=64, warps=4, stages=3),
    Tiles(256, block_m=128, block_n=128, warps=8, stages=3),
    Tiles(256, block_m=128, block_n=64, warps=4, stages=3),
    Tiles(256, block_m=256, block_n=128, warps=8, stages=3),
    Tiles(256, block_m=128, block_n=256, warps=8, stages=3),
    Tiles(512, block_m=256, block_n=64, warps=4, stages=3),
    Tiles(512, block_m=128, block_n=128, warps=8, stages=3),
    Tiles(512, block_m=128, block_n=256, warps=8, stages=3),
    Tiles(512, block_m=256, block_n=128, warps=8, stages=3),
)


@dataclass
class Cache:
    """The file's entries, and how many things in it were left aside."""

    entries: dict[str, Tiles]
    ignored: int = 0


def bucket(rows: int) -> int:
    """Products of up to this many rows share tiles: the next power of two."""
    return 1 << max(rows - 1, 0).bit_length()


def key(device: str, N: int, K: int, bits: int, group_size: int | None, rows: int) -> str:
    """An entry's name; rows is a bucket."""
    return f"{device}|{N}x{K}|{bits} bits|{group_size or 'channel'}|{rows} rows"


@cache
def find(device: str, N: int, K: int, bits: int, group_size: int | None, rows: int) -> Tiles | None:
    """The tiles that were measured for this product, if any: on this device, else ours."""
    product = (N, K, bits, group_size, rows)
    own = contents().entries.get(key(device, *product))
    return own or shipped().get(key(MEASURED if HOPPER.match(device) else device, *product))


@cache
def shipped() -> dict[str, Tiles]:
    """What comes with the project: measured on MEASURED, for every GPU of that kind."""
    return read(Path(__file__).with_name("tiles.json")).entries


@cache
def contents() -> Cache:
    """The file, read once in a process."""
    return read(path())


def path() -> Path:
    """Where the file lies, whether or not it exists."""
    return cache_path("tuning.json")


def read(file: Path) -> Cache:
    """The entries of a file; empty where there is none. Warns once of all that it left aside."""
    found = Cache({})
    try:
        document = json.loads(file.read_bytes())
        if document["version"] != VERSION:
            raise ValueError(f"expected version {VERSION}, found {document['version']}")
        entries = dict(document["entries"])
    except FileNotFoundError:
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        found.ignored = 1
        _warn(file, f"{type(error).__name__}: {error}")
        return found
    for name, entry in entries.items():
        tiles = _tiles(entry)
        if tiles is None:
            found.ignored += 1
        else:
            found.entries[name] = tiles
    if found.ignored:
        _warn(file, f"{found.ignored} of {len(entries)} entries hold no tiles")
    return found


def save(entries: Mapping[str, Tiles]) -> Path:
    """Adds entries to the file, replacing those of the same name; returns its path.

    Raises OSError where the user's cache cannot be written.
    """
    cache_directory()
    merged = read(path()).entries | dict(entries)
    document = {
        "version": VERSION,
        "entries": {name: asdict(tiles) for name, tiles in sorted(merged.items())},
    }
    write_atomically(path(), json.dumps(document, indent=1).encode() + b"\n")
    forget()
    return path()


def forget() -> None:
    """The file is read again at the next product."""
    contents.cache_clear()
    find.cache_clear()


# ---- candidates ---------------------------------------------------------------------------------


def candidates(rows: int) -> tuple[Tiles, ...]:
    """What tuning measures for a bucket."""
    least = min((tiles.rows for tiles in CANDIDATES if tiles.rows >= rows), default=0)
    return tuple(tiles for tiles in CANDIDATES if tiles.rows == least)


def _tiles(entry: object) -> Tiles | None:
    """An entry as tiles, or None if it is anything else."""
    if not isinstance(entry, dict) or set(entry) != {"rows", *CHOICES}:
        return None
    values = [entry["rows"], *(entry[name] for name in CHOICES)]
    if not all(value is None or type(value) is int for value in values) or entry["rows"] is None:
        return None
    allowed = (entry[name] in choices for name, choices in CHOICES.items())
    return Tiles(**entry) if all(allowed) and _fits(Tiles(**entry)) else None


def _fits(tiles: Tiles) -> bool:
    """Whether a thread's share of the tile fits its registers."""
    return tiles.block_m * tiles.block_n <= ACCUMULATORS * 32 * tiles.warps


def _warn(file: Path, what: str) -> None:
    warnings.warn(
        f"{file} is left aside, kernels run untuned: {what}; remove it, or run "
        f"`modelpress bench kernels --tune`",
        RuntimeWarning,
        stacklevel=3,
    )
