"""Reading and writing safetensors files without ever holding more than one tensor.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON naming each tensor's
dtype, shape and byte range, then the data. A checkpoint is one `model.safetensors`, or shards and
a `model.safetensors.index.json` that says which shard holds which tensor; where that is missing,
all shards `model-0000k-of-0000n.safetensors` say it themselves.

Policy: whatever contradicts the headers (a missing shard, a tensor the index promises and the
shard lacks, a file whose bytes are not those of its header, neither more nor less) is a
CheckpointError when the folder is opened; a NaN or an infinity is one when its tensor is read.
Data is read through a plain file handle, not a memory map, so what is dropped is gone: reading
eighty layers costs the memory of one. Files are written under a temporary name, flushed to disk and
renamed, and the same tensors give the same bytes.

    reader = CheckpointReader("path/to/model")
    weight = reader.tensor("model.layers.0.mlp.up_proj.weight")
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from compress.errors import CheckpointError, UsageError
from compress.storage.files import atomic_write, file_digest, read_json, write_json
from compress.storage.safetensors_header import (
    DTYPES,
    TensorEntry,
    file_state,
    read_header,
)

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHUNK = 4 * 2**20  # bytes held at once while copying
HASHING = 4  # files hashed at once


# ---- reading ------------------------------------------------------------------------------------


class CheckpointReader:
    """The tensors of a model folder; opening it reads headers only.

    `rename` turns the files' names into those that tensors go by here.

    Raises CheckpointError if the folder holds no safetensors file, lacks a shard or a tensor its
    index names, or holds a truncated or damaged file.
    """

    def __init__(self, folder: str | Path, rename: Callable[[str], str] = str):
        self.folder = Path(folder)
        self.files = weight_files(self.folder)
        headers = {file.name: read_header(file) for file in self.files}
        entries: dict[str, TensorEntry] = {}
        if SINGLE_FILE in headers or not (self.folder / INDEX_FILE).is_file():
            for shard, found in headers.items():
                if twice := sorted(entries.keys() & found.keys()):
                    raise CheckpointError(
                        f"{self.folder}: tensor {twice[0]!r} is in {shard} and in "
                        f"{entries[twice[0]].file.name}"
                    )
                entries |= found
        else:
            for name, shard in _weight_map(self.folder).items():
                if name not in headers[shard]:
                    raise CheckpointError(
                        f"{self.folder / INDEX_FILE} says that {shard} holds tensor {name!r}, "
                        f"but it does not: download the checkpoint again"
                    )
                entries[name] = headers[shard][name]
        self._written = {rename(name): name for name in entries}
        if len(self._written) < len(entries):
            twice = sorted(set(entries) - set(self._written.values()))
            raise CheckpointError(
                f"{self.folder} holds {twice[0]!r} under two names: save it again with transformers"
            )
        self._entries = {name: entries[self._written[name]] for name in sorted(self._written)}

    def written_name(self, name: str) -> str:
        """What the file calls a tensor."""
        return self._written[name]

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies; CheckpointError if the checkpoint has no such tensor."""
        if name not in self._entries:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}")
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header; CheckpointError for one torch does not have."""
        return _torch_dtype(name, self.entry(name))

    def nbytes(self, name: str | None = None) -> int:
        """Bytes of one tensor's data, or of all tensors together."""
        if name is not None:
            return self.entry(name).nbytes
        return sum(entry.nbytes for entry in self._entries.values())

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor into memory of its own, in the dtype of the file, on the CPU.

        Raises CheckpointError if it holds a NaN or an infinity.
        """
        entry = self.entry(name)
        tensor = _read_tensor(name, entry)
        if tensor.is_floating_point() and tensor.numel():
            check_finite(tensor, name, entry.file)
        return tensor

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor [n, ...], as `tensor` reads all of them."""
        entry = self.entry(name)
        start, stop, _ = rows.indices(entry.shape[0])
        part = _read_tensor(name, _rows_of(entry, start, stop))
        if part.is_floating_point() and part.numel():
            check_finite(part, name, entry.file)
        return part

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same numbers; reads a few MiB of both at a time."""
        entries = self.entry(first), self.entry(second)
        if entries[0].shape != entries[1].shape:
            return False
        pieces = zip(_pieces(first, entries[0]), _pieces(second, entries[1]), strict=True)
        return all(bool((a == b).all()) for a, b in pieces)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """All tensors of the module `prefix`, under their full names.

        A prefix ends at a dot: `model.layers.1` does not take in `model.layers.10`.
        """
        stem = prefix.removesuffix(".")
        return {
            name: self.tensor(name)
            for name in self._entries
            if not stem or name == stem or name.startswith(stem + ".")
        }

    def fingerprint(self) -> str:
        """A sha256 of config.json and of every byte of the weights, in hexadecimal.

        Reads all of it, once. Raises CheckpointError for a file that has changed since it was
        opened.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        config = self.folder / "config.json"
        digest = hashlib.sha256(config.read_bytes() if config.is_file() else b"")
        files = sorted(self.files)
        with ThreadPoolExecutor(HASHING) as pool:  # hashing and reading let other threads run
            for path, found in zip(files, pool.map(file_digest, files), strict=True):
                digest.update(f"{path.name} {found}".encode())
        for entry in self._entries.values():
            _check_unchanged(entry, entry.file.stat())
        return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, in memory of their own."""
    return {name: _read_tensor(name, entry) for name, entry in sorted(read_header(path).items())}


def _read_tensor(name: str, entry: TensorEntry) -> Tensor:
    tensor = torch.empty(math.prod(entry.shape), dtype=_torch_dtype(name, entry))
    with entry.file.open("rb") as file:
        _check_unchanged(entry, os.fstat(file.fileno()))
        file.seek(entry.start)
        if file.readinto(_raw_bytes(tensor)) != entry.nbytes:
            raise CheckpointError(f"{entry.file} ended while tensor {name!r} was read")
    return tensor.reshape(entry.shape)


def read_item(name: str, entry: TensorEntry, index: int) -> Tensor:
    """One item along a tensor's first axis, in memory of its own; its numbers are not looked at."""
    return _read_tensor(name, _rows_of(entry, index, index + 1))[0]


def _rows_of(entry: TensorEntry, start: int, stop: int) -> TensorEntry:
    """Items along a tensor's first axis, as a tensor of their own."""
    count, *shape = entry.shape
    size = entry.nbytes // count
    rows = stop - start
    return replace(
        entry, shape=(rows, *shape), start=entry.start + start * size, nbytes=rows * size
    )


def _check_unchanged(entry: TensorEntry, found: os.stat_result) -> None:
    if file_state(found) != entry.state:
        raise CheckpointError(
            f"{entry.file} was changed while it was being read: its tensors may be of two models; "
            "start again once nobody writes to it"
        )


def _pieces(name: str, entry: TensorEntry) -> Iterator[Tensor]:
    """A tensor's numbers in order, flat, CHUNK of them at a time at most."""
    dtype, left = _torch_dtype(name, entry), math.prod(entry.shape)
    with entry.file.open("rb") as file:
        _check_unchanged(entry, os.fstat(file.fileno()))
        file.seek(entry.start)
        while left:
            piece = torch.empty(min(left, CHUNK), dtype=dtype)
            if file.readinto(_raw_bytes(piece)) != piece.nbytes:
                raise CheckpointError(f"{entry.file} ended while tensor {name!r} was read")
            left -= len(piece)
            yield piece


def _torch_dtype(name: str, entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"tensor {name!r} in {entry.file} has dtype {entry.dtype}, which torch cannot read"
        )
    return DTYPES[entry.dtype]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights; one file wins over an index, as in transformers."""
    if not folder.is_dir():
        raise UsageError(f"no such model folder: {folder}")
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        shards = [folder / shard for shard in sorted(set(_weight_map(folder).values()))]
        for shard in shards:
            if not shard.is_file():
                raise CheckpointError(
                    f"{folder / INDEX_FILE} names the shard {shard.name}, which is missing: "
                    f"download the checkpoint again"
                )
        return shards
    if any(folder.glob("pytorch_model*.bin")):
        raise UsageError(
            f"{folder} holds pytorch_model.bin only, and only safetensors are read: load it with "
            f"transformers and save it again with save_pretrained"
        )
    if shards := sorted(folder.glob("model-*-of-*.safetensors")):
        return _whole_set(folder, shards)
    raise UsageError(f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _whole_set(folder: Path, shards: list[Path]) -> list[Path]:
    """The shards, if they are all that their names count."""
    found = {path.name for path in shards}
    count = shards[0].stem.rpartition("-")[2]
    expected = [
        f"model-{i + 1:0{len(count)}d}-of-{count}.safetensors"
        for i in range(int(count) if count.isdecimal() and len(count) < 6 else 0)
    ]
    if found != {*expected}:
        odd = sorted(found.symmetric_difference(expected))
        fault = f"lacks {odd[0]}" if odd[0] in expected else f"holds {odd[0]} beside others"
        raise CheckpointError(f"{folder} has no {INDEX_FILE}, and {fault}: download it again")
    return shards


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX_FILE
    weight_map = (read_json(path) or {}).get("weight_map")
    # A shard lies beside its index; anything else is a damaged or a hostile file.
    if not (
        isinstance(weight_map, dict)
        and weight_map
        and all(isinstance(s, str) and Path(s).name == s for s in weight_map.values())
    ):
        raise CheckpointError(f"{path} has no valid `weight_map` of tensor names to shards")
    return weight_map


def check_finite(tensor: Tensor, name: str, file: Path) -> None:
    """CheckpointError for numbers among which is a NaN or an infinity."""
    values = tensor.float() if tensor.element_size() == 1 else tensor
    low, high = values.aminmax()  # both are NaN if any value is
    if not (torch.isfinite(low) and torch.isfinite(high)):
        bad = values.numel() - int(torch.isfinite(values).sum())
        raise CheckpointError(
            f"tensor {name!r} in {file} holds {bad:,} NaN or infinite values out of "
            f"{values.numel():,}: the checkpoint is damaged"
        )


def _raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous 1-D CPU tensor, shared, not copied."""
    return tensor.view(torch.uint8).numpy().data


# ---- writing ------------------------------------------------------------------------------------


def save_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Writes one safetensors file, atomically; the same tensors always give the same bytes."""
    flat = {name: tensor.detach().reshape(-1) for name, tensor in tensors.items()}
    entries = {
        name: TensorEntry(
            Path(path),
            DTYPE_NAMES[tensor.dtype],
            tuple(tensor.shape),
            0,
            tensor.numel() * tensor.element_size(),
        )
        for name, tensor in tensors.items()
    }
    header, order = _layout(entries)
    with atomic_write(Path(path)) as file:
        file.write(header)
        for name in order:
            file.write(_raw_bytes(flat[name].cpu().contiguous()))


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """What stands before the data in one file of these tensors, by their dtypes and shapes."""
    nowhere = Path()  # made once, since there may be a hundred thousand tensors
    entries = {
        name: TensorEntry(nowhere, DTYPE_NAMES[dtype], shape, 0, dtype.itemsize * math.prod(shape))
        for name, (dtype, shape) in tensors.items()
    }
    return len(_layout(entries)[0])


def _layout(entries: dict[str, TensorEntry]) -> tuple[bytes, list[str]]:
    """The header of a file with these tensors, and the order of their data.

    Wide dtypes come first, then names in order, so that every tensor starts at a multiple of its
    element size, which readers that map the file rely on.
    """

    def rank(name: str) -> tuple[int, str]:
        entry = entries[name]
        return (-entry.nbytes // max(math.prod(entry.shape), 1), name)

    order = sorted(entries, key=rank)
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        entry = entries[name]
        end = offset + entry.nbytes
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text, order


def merge_shards(parts: list[Path], folder: str | Path, shard_size_bytes: int) -> list[Path]:
    """Merges safetensors files into the final shards of a model folder, and returns their paths.

    Tensors keep the order of `parts`; a shard is closed before it would pass `shard_size_bytes`
    (a tensor larger than that is alone in its shard). All in one shard: `model.safetensors` and no
    index. Bytes are copied in chunks of 4 MiB. Weight files of an earlier run in `folder` that
    would be read instead of these are removed. Raises CheckpointError if two parts hold a tensor
    of the same name.
    """
    folder = Path(folder)
    shards = _plan_shards(parts, shard_size_bytes)
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    paths = [folder / name for name in ([SINGLE_FILE] if count == 1 else names)]
    for path, entries in zip(paths, shards, strict=True):
        header, order = _layout(entries)
        with atomic_write(path) as file:
            file.write(header)
            for name in order:
                _copy_bytes(entries[name], file)
    if count > 1:
        size = sum(entry.nbytes for entries in shards for entry in entries.values())
        weight_map = {
            name: path.name for path, entries in zip(paths, shards, strict=True) for name in entries
        }
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_FILE, index)
    _remove_stale(folder, paths, parts)
    return paths


def _plan_shards(parts: list[Path], limit: int) -> list[dict[str, TensorEntry]]:
    shards: list[dict[str, TensorEntry]] = [{}]
    origin: dict[str, Path] = {}
    filled = 0
    for part in parts:
        for name, entry in sorted(read_header(Path(part)).items()):
            if name in origin:
                raise CheckpointError(f"tensor {name!r} is in both {origin[name]} and {part}")
            origin[name] = Path(part)
            if shards[-1] and filled + entry.nbytes > limit:
                shards.append({})
                filled = 0
            shards[-1][name] = entry
            filled += entry.nbytes
    return shards


def _copy_bytes(entry: TensorEntry, target: IO[bytes]) -> None:
    with entry.file.open("rb") as source:
        source.seek(entry.start)
        left = entry.nbytes
        while left:
            chunk = source.read(min(CHUNK, left))
            if not chunk:
                raise CheckpointError(f"{entry.file} ended while it was copied")
            target.write(chunk)
            left -= len(chunk)


def _remove_stale(folder: Path, kept: list[Path], parts: list[Path]) -> None:
    if len(kept) == 1:
        (folder / INDEX_FILE).unlink(missing_ok=True)
    spared = {path.resolve() for path in [*kept, *map(Path, parts)]}
    for path in [folder / SINGLE_FILE, *folder.glob("model-*-of-*.safetensors")]:
        if path.resolve() not in spared:
            path.unlink(missing_ok=True)
