"""Where this project keeps what it made for one machine: a folder of the user, and no one else's.

$XDG_CACHE_HOME/modelpress, or ~/.cache/modelpress

path = cache_directory("native")      # created, mode 0700
"""

import os
import stat
import tempfile
from pathlib import Path


def cache_path(*parts: str) -> Path:
    """The path of a file or folder in the cache, whether or not it exists."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the specification says to ignore a relative path
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root.joinpath("modelpress", *parts)


def cache_directory(*parts: str) -> Path:
    """The folder, created if need be, that only this user may write to.

    Raises OSError if it cannot be created, PermissionError if others could put files into it: what
    lies there is loaded as code.
    """
    path = cache_path(*parts)
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = path.stat()
    if os.name == "posix" and (
        found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        raise PermissionError(f"{path} can be written by other users: chmod 700 it, or remove it")
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that readers see whole or not at all; its folder must exist."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
