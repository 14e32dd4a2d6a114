"""The sources of the running Python interpreter, as a text corpus that needs no network.

Every `.py` file of the standard library except tests and installed packages, in path order,
split by a hash of its path: one file in twenty is held out, the others are for training and
calibration. The split depends on names only, so it is the same on every machine with the same
Python version, and no held-out module ever leaks into calibration.

    train, held_out = python_stdlib("train"), python_stdlib("held_out")
"""

import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

MODULUS = 20
HELD_OUT = 13  # the residue whose share of the bytes is nearest 5 %: 0.59 MB of 12.1 MB in 3.11
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

Split = Literal["train", "held_out"]


def is_held_out(relative_path: str) -> bool:
    """Whether a module (path below the library's root, forward slashes) is in the held-out part."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % MODULUS == HELD_OUT


def stdlib_files(split: Split) -> list[Path]:
    """The files of one split, sorted by their path below the library's root."""
    root = Path(sysconfig.get_paths()["stdlib"])
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = sorted(path.as_posix() for path in relative if not SKIPPED_FOLDERS & set(path.parts))
    return [root / name for name in kept if is_held_out(name) == (split == "held_out")]


def python_stdlib(split: Split) -> list[str]:
    """The texts of one split, one document a file. Files that are not UTF-8 are left out."""
    texts = []
    for path in stdlib_files(split):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return texts
