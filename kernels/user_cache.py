"""Where this project keeps what it made for one machine: a folder of the user, and no one else's.

$XDG_CACHE_HOME/modelpress, or ~/.cache/modelpress

path = cache_directory("native")      # created, mode 0700
"""

import hashlib
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

    Raises OSError if it cannot be created, PermissionError if others could put files into it, or
    could have: what lies there is loaded as code.
    """
    path = cache_path()
    for place in (path, *(path := path / part for part in parts)):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_owner(place)
    return path


def check_file(path: Path, digest: str) -> None:
    """PermissionError for a file of the cache that somebody else may have put there or changed.

    It must be a file of this user's that nobody else may write, with this sha256.
    """
    _check_owner(path)
    if not stat.S_ISREG(path.lstat().st_mode):
        raise PermissionError(f"{path} is not a plain file: remove it")
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise PermissionError(f"{path} is not what was compiled: remove it")


def _check_owner(path: Path) -> None:
    """PermissionError where another user owns a file or folder, or may write to it.

    To close it to others would be too late: what they have put there stays.
    """
    if os.name != "posix":
        return
    found = path.stat()
    owners = {found.st_uid, path.lstat().st_uid}  # of a link as well
    if owners != {os.geteuid()} or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be written by other users: remove it")


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
