"""The activations of all calibration windows between two decoder layers: in memory or on disk.

One fp32 tensor [B, T, d] for each batch of windows. On disk each is a raw file that is read when
its batch comes up; the values are the same to the bit, so where they live never changes a result.

    store = ActivationStore(folder=None)          # None: in memory
    store.append(x); x = store[0]; store[0] = y
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from compress.errors import CheckpointError
from compress.storage.files import writing

TOKENS_PER_BATCH = 1024  # calibration tokens that go through a layer at once
# With `offload: auto`, activations may take this share of the memory that is free at the start.
MEMORY_SHARE = 0.25


class ActivationStore:
    """A list of fp32 tensors, kept in memory or as files in `folder`.

    `numbers`: by which each batch is called in its file, where others write there too. `summed`:
    whether its checksums are taken, which only a store that another process will find has use for.
    """

    def __init__(
        self,
        folder: Path | None = None,
        name: str = "x",
        numbers: Sequence[int] | None = None,
        summed: bool = True,
    ):
        self.folder, self.name, self.numbers = folder, name, numbers
        self.summed = summed
        self._tensors: list[Tensor | None] = []
        self._shapes: list[torch.Size] = []
        self._sums: list[int | Tensor] = []  # on a GPU not waited for until somebody asks
        self._unread: set[int] = set()  # batches of an earlier process that nobody has read yet

    def __len__(self) -> int:
        return len(self._shapes)

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        number = index if self.numbers is None else self.numbers[index]
        return self.folder / f"{self.name}-{number:05d}.f32"

    def __getitem__(self, index: int) -> Tensor:
        """Batch `index`; the caller may change it only through `store[index] = ...`."""
        if self.folder is None:
            tensor = self._tensors[index]
            assert tensor is not None
            return tensor
        shape = self._shapes[index]
        values = np.fromfile(self._file(index), dtype=np.float32, count=shape.numel())
        x = torch.from_numpy(values)
        if index in self._unread:
            if len(x) < shape.numel() or int(checksum(x)) != self._sums[index]:
                raise CheckpointError(
                    f"{self._file(index)} is not what was written: start again with --no-resume"
                )
            self._unread.remove(index)
        return x.view(shape)

    @property
    def sums(self) -> list[int]:
        """The checksum of each batch."""
        return [int(found) for found in self._sums]

    def __setitem__(self, index: int, x: Tensor) -> None:
        self._shapes[index], self._sums[index] = x.shape, checksum(x) if self.summed else 0
        self._unread.discard(index)
        if self.folder is None:
            self._tensors[index] = x
            return
        # A file that is there is written over and not cut: its pages need not be found again,
        # which is most of the cost of writing to a file that never leaves the page cache.
        file = self._file(index)
        with writing(file), file.open("r+b" if file.exists() else "wb") as stream:
            stream.write(x.detach().cpu().contiguous().numpy().data)  # `tofile` may lose an end

    def append(self, x: Tensor) -> None:
        self._shapes.append(x.shape)
        self._tensors.append(None)
        self._sums.append(0)
        self[len(self) - 1] = x

    def put(self, index: int, x: Tensor) -> None:
        """Sets batch `index`, which may be the next new one."""
        if index == len(self):
            self.append(x)
        else:
            self[index] = x

    def dump(self, folder: Path, name: str) -> "ActivationStore":
        """The same batches as files; the store itself if it holds those files already."""
        if (self.folder, self.name) == (folder, name):
            return self
        copy = ActivationStore(folder, name, self.numbers)
        for x in self:
            copy.append(x)
        return copy

    @classmethod
    def found(
        cls,
        folder: Path,
        name: str,
        shapes: list[torch.Size],
        sums: list[int],
        numbers: Sequence[int] | None = None,
    ) -> "ActivationStore":
        """A store over files that an earlier process has written, whose `sums` are known.

        Raises CheckpointError if one is missing or was cut short; one that is damaged is noticed
        when it is read.
        """
        store = cls(folder, name, numbers)
        store._shapes, store._tensors = list(shapes), [None] * len(shapes)
        store._sums, store._unread = list(sums), set(range(len(shapes)))
        for index, shape in enumerate(shapes):
            file = store._file(index)
            if not file.is_file() or file.stat().st_size < shape.numel() * 4:
                raise CheckpointError(
                    f"{file} is missing or was cut short: start again with --no-resume"
                )
        return store

    def in_memory(self) -> "ActivationStore":
        """The same batches in memory."""
        store = ActivationStore(numbers=self.numbers)
        for x in self:
            store.append(x)
        return store

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def clear(self) -> None:
        """Forgets all batches; their files stay, to be written over."""
        self._tensors, self._shapes, self._sums, self._unread = [], [], [], set()


def checksum(x: Tensor) -> int | Tensor:
    """The sum of a fp32 tensor's bits as 32-bit numbers: any one that changes, changes it.

    A number, or where x is on a GPU one that is still there.

    Taken at the speed of memory, where a digest would take longer than the layer does.
    """
    found = x.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)
    return found if found.is_cuda else int(found)


def activations_on_disk(offload: str, nbytes: int) -> bool:
    """Whether `calibration.offload` sends activations of `nbytes` to disk."""
    if offload != "auto":
        return offload == "disk"
    return nbytes > MEMORY_SHARE * psutil.virtual_memory().available
