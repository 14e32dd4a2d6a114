"""Files that are either whole and on disk, or not there; and how large they may be.

with atomic_write(path) as file:
    file.write(data)
write_json(path, {"bits": 4})
"""

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from compress.errors import CheckpointError, DepthError, UsageError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LONGEST = 120  # bytes of a folder that is called after a recipe: files beside it have more
JSON_DEPTH = 32  # of objects and lists in each other
JSON_BYTES = 32 * 2**20  # a config.json has 1 to 500 kB, our own reports some MB
# By the end of the name: an index names each tensor of the largest models, a vocabulary each token.
LARGE_JSON = {".index.json": 128 * 2**20, "tokenizer.json": 128 * 2**20}
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raises CheckpointError, one line, for what the system refuses inside.

    It names `place`, or of a folder the file in it.
    """
    try:
        yield
    except OSError as error:
        where = error.filename if error.filename and place.is_dir() else place
        remedy = "; free some space" if error.errno == errno.ENOSPC else ""
        reason = error.strerror or f"{error}; the disk may be full"  # numpy's own has no strerror
        raise CheckpointError(f"cannot write {where}: {reason}{remedy}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name only once it is whole and on disk.

    Until then it has a name that nobody can foresee: where others may write to the folder, none of
    them can have put a link there.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):  # gone after the rename; a failed tidy-up must not hide the error
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file; it is on disk when this returns."""
    with writing(path), path.open("ab") as file:
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def sweep(folder: Path) -> None:
    """Removes what `atomic_write` was writing in `folder` when its process was killed.

    Nobody else may be writing there.
    """
    for file in folder.iterdir():
        if TEMPORARY.fullmatch(file.name):
            file.unlink()


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes a JSON object, indented for people, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None if there is no file.

    Raises CheckpointError if it cannot be read, holds no such object, or has more bytes than any of
    use, and its DepthError if it is deeper than that; what is too large is not parsed.
    """
    most = next((size for end, size in LARGE_JSON.items() if path.name.endswith(end)), JSON_BYTES)
    try:
        with path.open("rb") as file:
            text = file.read(most + 1)
        if len(text) > most:
            raise CheckpointError(f"{path} is not valid: expected at most {most:,} bytes")
        content = json.loads(text.decode())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError:
        raise _too_deep(path) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not valid: expected a JSON object")
    if _deeper(content, JSON_DEPTH):
        raise _too_deep(path)
    return content


def _too_deep(path: Path) -> DepthError:
    return DepthError(f"{path} is not valid: it is more than {JSON_DEPTH} levels deep")


def write_sealed(path: Path, content: Mapping[str, object]) -> None:
    """Writes a JSON object with a digest of it, which `read_sealed` goes by."""
    write_json(path, {"sha256": seal(content), "content": content})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote, None if there is no file.

    Raises CheckpointError for anything else, however little of it was changed.
    """
    found = read_json(path)
    if found is None:
        return None
    content = found.get("content")
    if not isinstance(content, dict) or found.get("sha256") != seal(content):
        raise changed(path)
    return content


def changed(path: Path) -> CheckpointError:
    """The error for work files that are not what this program left there."""
    return CheckpointError(f"{path} is not what was written: start again with --no-resume")


def seal(content: Mapping[str, object]) -> str:
    """The sha256 of a JSON object, whatever the order of its keys."""
    plain = json.loads(json.dumps(content))  # keys that are numbers become text
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _deeper(content: object, depth: int) -> bool:
    """Whether objects and lists lie in each other more than `depth` times."""
    level: list[dict[str, object] | list[object]] = [[content]]
    for _ in range(depth + 2):
        parts = [part.values() if isinstance(part, dict) else part for part in level]
        level = [v for values in parts for v in values if isinstance(v, dict | list)]
        if not level:
            return False
    return True


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Puts a folder's list of names on disk: a rename survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Puts a file's content on disk, however it was written."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def parse_size(text: str | int) -> int:
    """Bytes of a size such as "5GB" (10^9), "500 MiB" (2^20) or 1000000; UsageError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    size = round(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise UsageError(f"{text!r} is not a size: expected a number and KB, MB, GB, or GiB")
    return size


def folder_name(name: str) -> str:
    """A recipe's name, which may be any text, as the name of a folder; a long one is cut."""
    found = re.sub(r"[^\w.-]+", "-", name).strip(".-") or "recipe"
    if len(found.encode()) <= LONGEST:
        return found
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{found.encode()[:LONGEST].decode(errors='ignore')}-{digest}"
