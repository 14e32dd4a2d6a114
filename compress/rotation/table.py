"""The embedding or the head as it lies in the file, fused and rotated some rows at a time.

A table of 150,000 words has gigabytes, and every use of it goes through its rows: none needs it
whole in a wide dtype.

    table = Table(reader, "lm_head.weight", factor, residual)       # [V, d]
    table[0:512]                                                     # [512, d]
    table.dense(torch.bfloat16)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from compress.rotation.rotate import VALUES_AT_ONCE, Rotation, fuse_and_rotate_head
from compress.storage.safetensors import CheckpointReader


class Table:
    """A weight of the vocabulary.

    Args:
        name: in the reader.
        factor: [d] what each column is multiplied by before the rotation, None for nothing.
        residual: the rotation of its rows, None for the rows as the file has them.

    Attributes:
        shape: (V, d).
        dtype: of rows that are not rotated; those that are come in fp64.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        name: str,
        factor: Tensor | None = None,
        residual: Rotation | None = None,
    ):
        self._reader, self._name = reader, name
        self._factor, self._residual = factor, residual
        V, d = reader.shape(name)
        self.shape, self.dtype = (V, d), reader.dtype(name)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        """Some rows [n, d]; CheckpointError if one holds a NaN or an infinity."""
        found = self._reader.rows(self._name, rows)
        if self._residual is None:
            return found
        factor = found.new_ones(self.shape[1]) if self._factor is None else self._factor
        return fuse_and_rotate_head(found, factor, self._residual)

    def slices(self) -> Iterator[slice]:
        """All rows, as many at a time as are rotated at once."""
        step = max(1, VALUES_AT_ONCE // self.shape[1])
        for start in range(0, len(self), step):
            yield slice(start, min(start + step, len(self)))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """All of it [V, d], in `dtype`."""
        whole = torch.empty(self.shape, dtype=dtype)
        for rows in self.slices():
            whole[rows] = self[rows]
        return whole
