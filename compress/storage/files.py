"""Files that are either whole and on disk, or not there.

with atomic_write(path) as file:
    file.write(data)
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from compress.errors import CheckpointError


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name only once it is whole and on disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        remedy = "; free some space" if error.errno == errno.ENOSPC else ""
        raise CheckpointError(f"cannot write {path}: {error.strerror}{remedy}") from error
    finally:
        with suppress(OSError):  # gone after the rename; a failed tidy-up must not hide the error
            temporary.unlink()


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None if there is no file.

    Raises CheckpointError if it cannot be read, or holds no such object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not valid: expected a JSON object")
    return content


def sync_folder(folder: Path) -> None:
    """Puts a folder's list of names on disk: a rename survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
