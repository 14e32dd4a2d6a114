"""A checkpoint whose weights are not here: its tensors as something else describes them.

Names, dtypes and shapes can be asked for as of any checkpoint; numbers cannot.

    reader = AbsentWeights(folder, {"lm_head.weight": (torch.bfloat16, (32000, 4096))})
    reader.shape("lm_head.weight"), reader.nbytes()
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import CompressError, UsageError
from compress.storage.companions import INDICES, WEIGHTS
from compress.storage.safetensors import DTYPE_NAMES, CheckpointReader, weight_files
from compress.storage.safetensors_header import TensorEntry

Described = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def holds_weights(folder: Path) -> bool:
    """Whether there is any file of weights, of any framework, or an index of such files."""
    patterns: Iterable[str] = (*WEIGHTS, *INDICES)
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def holds_all_weights(folder: Path) -> bool:
    """Whether the files of weights are those that names and index promise."""
    try:
        return bool(weight_files(folder))
    except CompressError:
        return False


class AbsentWeights(CheckpointReader):
    """The tensors of a folder without weights. Raises UsageError where numbers are asked for."""

    def __init__(self, folder: str | Path, tensors: Described):
        self.folder, self.files = Path(folder), []
        self._written = {name: name for name in tensors}
        self._entries = {
            name: TensorEntry(
                self.folder, DTYPE_NAMES[dtype], shape, 0, dtype.itemsize * math.prod(shape)
            )
            for name, (dtype, shape) in sorted(tensors.items())
        }

    def tensor(self, name: str) -> Tensor:
        raise self._missing()

    def equal(self, first: str, second: str) -> bool:
        raise self._missing()

    def fingerprint(self) -> str:
        raise self._missing()

    def _missing(self) -> UsageError:
        return UsageError(f"{self.folder} has no weights, and they are needed here")
