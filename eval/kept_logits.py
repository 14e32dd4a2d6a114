"""The logits of a baseline, kept in a file while several models are measured against it.

A baseline reads the same windows anew for each model that is compared with it, and that is half of
what measuring them takes. The file has no name, so that it is gone with the process, and holds the
logits as they were computed: figures are the same to the bit. What finds no room in it is computed
again; logits of a GPU are not kept. Several ranks have a file each, and leave the disk half of what
it had left all the same.

    kept = KeptLogits(baseline, folder)
    for model in models:
        kl_divergence(model, kept.of(text, batch_size=8), text, batch_size=8)
"""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.eval.windows import Batch, Text, logits_of, measuring

MOST = 8_000_000_000  # bytes of a file


class KeptLogits:
    """What a model gives for the batches of one text; those of another text replace them."""

    def __init__(self, model: torch.nn.Module, folder: Path):
        self.model, self.folder = model, folder
        self._text: Text | None = None
        self._batch_size = 0

    def of(self, text: Text, batch_size: int) -> Callable[[Batch], Tensor]:
        """Gives the logits [B, L, V] of any batch of `text.batches(batch_size)`."""
        if self._text is not text or self._batch_size != batch_size:
            self._text, self._batch_size = text, batch_size
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
            self._places: dict[int, tuple[int, torch.Size, torch.dtype]] = {}
            self._most, self._end = MOST, 0
            self._left = shutil.disk_usage(self.folder).free // 2  # whoever takes the rest
        return self._logits

    def _logits(self, batch: Batch) -> Tensor:
        if batch.first in self._places:
            return self._read(*self._places[batch.first])
        with measuring(self.model):
            logits = logits_of(self.model, batch)
        if logits.device.type == "cpu" and self._has_room(logits.nbytes):
            self._write(batch.first, logits)
        return logits

    def _has_room(self, nbytes: int) -> bool:
        free = shutil.disk_usage(self.folder).free
        return self._end + nbytes <= self._most and free - nbytes >= self._left

    def _write(self, first: int, logits: Tensor) -> None:
        values = logits.contiguous().view(torch.uint8).numpy().data.cast("B")
        try:
            self._file.seek(self._end)
            while values:  # which a nearly full disk takes in parts
                values = values[self._file.write(values) :]
        except OSError:  # a disk that others have filled: what is there already stays good
            self._most = 0
            with suppress(OSError):
                self._file.truncate(self._end)
            return
        self._places[first] = self._end, logits.shape, logits.dtype
        self._end += logits.nbytes

    def _read(self, place: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        self._file.seek(place)
        values = np.fromfile(self._file, dtype=np.uint8, count=shape.numel() * dtype.itemsize)
        return torch.from_numpy(values).view(dtype).view(shape)
