"""The header of a safetensors file: which tensors it holds, and where.

It is an 8-byte little-endian length and that many bytes of JSON, which name each tensor's dtype,
shape and byte range.

    entries = read_header(Path("model.safetensors"))
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from compress.errors import CheckpointError

HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library itself
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `start` and `nbytes` count bytes of the file, header included."""

    file: Path
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    start: int
    nbytes: int
    state: tuple[int, int] = (0, 0)  # of the file when its header was read: `file_state`


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, checked as strictly as the library checks them.

    Raises CheckpointError unless the header is JSON that names each tensor once, with integers for
    its shape and its bytes, and these follow each other without a gap and fill the file.
    """
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        size = found.st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise CheckpointError(damaged(path, "its header does not fit the file"))
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_each_once)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        described = header.pop("__metadata__", {})
        if not isinstance(described, dict) or not all(
            isinstance(value, str) for value in described.values()
        ):
            raise ValueError("__metadata__ holds more than texts")
        start, state = 8 + length, file_state(found)
        entries = {name: _entry(path, name, part, start, state) for name, part in header.items()}
        _check_fill(entries, start, size)
    except (ValueError, RecursionError) as error:
        fault = str(error) if type(error) is ValueError else "its header is not valid JSON"
        raise CheckpointError(damaged(path, fault)) from None
    return entries


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; ValueError for one that has a name twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its header holds {twice!r} twice")
    return found


def _entry(path: Path, name: str, part: object, begin: int, state: tuple[int, int]) -> TensorEntry:
    """One tensor of a header; `begin`: where data begins. ValueError for what is no tensor."""
    if not isinstance(part, dict):
        raise ValueError(f"its header has no object for {name!r}")
    dtype, shape, offsets = (part.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise ValueError(f"the dtype of {name!r} is not valid")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape of {name!r} is not valid: expected integers")
    pair: list = offsets if isinstance(offsets, list) and len(offsets) == 2 else [None]
    if not all(type(n) is int and n >= 0 for n in pair):
        raise ValueError(f"the byte range of {name!r} is not valid: expected two integers")
    start, end = pair
    known = DTYPES.get(dtype)
    if end < start or (known and math.prod(shape) * known.itemsize != end - start):
        raise ValueError(f"the byte range of {name!r} is not valid")
    return TensorEntry(path, dtype, tuple(shape), begin + start, end - start, state)


def _check_fill(entries: dict[str, TensorEntry], begin: int, size: int) -> None:
    """ValueError unless the tensors' bytes are those from `begin` to `size`, each of one tensor."""
    reached = begin
    for name, entry in sorted(entries.items(), key=lambda kv: (kv[1].start, kv[1].nbytes)):
        if entry.start + entry.nbytes > size:
            raise ValueError(
                f"truncated: the header says {entry.start + entry.nbytes:,} bytes, the file has "
                f"{size:,}"
            )
        if entry.start != reached:
            how = (
                "overlaps the tensor before it" if entry.start < reached else "begins behind a gap"
            )
            raise ValueError(f"the byte range of {name!r} is not valid: it {how}")
        reached += entry.nbytes
    if reached != size:
        raise ValueError(f"{size - reached:,} bytes follow the last tensor")


def file_state(found: os.stat_result) -> tuple[int, int]:
    """What changes with a file's content: its size, and when it was written to."""
    return found.st_size, found.st_mtime_ns


def damaged(path: Path, fault: str) -> str:
    return f"{path} is not a whole safetensors file: {fault}; download or write it again"
