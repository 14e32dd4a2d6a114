"""One process's share of a layer's work: whose tokens its Hessians have, and which rows it solves.

`Whole` is all of it, where there is one process. A class with its methods shares it among several
(`sharing.py`), in three places: a Hessian is complete once `complete` has been called, a
count is everybody's once `total` has, and `solved` is called with the pieces of a group that this
process is to solve and gives back those of all.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.quantization.grid import UniformGrid
from compress.quantization.hessian import Hessian
from compress.quantization.solvers import HessianFactor, QuantizedLinear, Solver, Target
from compress.scheme import Scheme


@dataclass(frozen=True)
class Piece:
    """Output rows of linears that share an input and a scheme, stacked; solved at a time.

    `alternative`: the solver's alternative to what it finds for them, which belongs to one linear.
    """

    scheme: Scheme
    rows: slice
    alternative: bool

    @property
    def count(self) -> int:
        return self.rows.stop - self.rows.start


def solve_piece(
    piece: Piece,
    W: Tensor,
    solver: Solver,
    statistics: HessianFactor | None,
    scale_dtype: torch.dtype,
    target: Target | None,
) -> QuantizedLinear | None:
    """What the solver finds for a piece's rows W [n, K]; None: it has no alternative."""
    grid = UniformGrid(piece.scheme.bits, piece.scheme.symmetric, scale_dtype)
    work = solver.alternative if piece.alternative else solver.solve
    return work(W, statistics, grid, piece.scheme.group_size, target)


class Whole:
    """All tokens, and all rows."""

    def hessian(self, columns: int, device: torch.device | str, drift: bool = False) -> Hessian:
        """A Hessian of a linear's input, empty."""
        return Hessian(columns, device, drift)

    def complete(self, H: Hessian) -> None:
        """Makes H that of all tokens, whichever process has them."""

    def total(self, counts: list[int]) -> list[int]:
        """Counts of tokens, of all processes."""
        return counts

    def parts(self, rows: slice, columns: int, device: torch.device) -> list[slice]:
        """Output rows as pieces for the processes."""
        return [rows]

    def solved(
        self,
        pieces: Sequence[Piece],
        columns: int,
        solve: Callable[[Iterable[int]], dict[int, QuantizedLinear]],
        device: torch.device,
    ) -> list[QuantizedLinear | None]:
        """What is found for each piece; None: an alternative that the solver has not.

        `solve`: those of some numbers, which this process is to do.
        """
        found = solve(range(len(pieces)))
        return [found.get(number) for number in range(len(pieces))]


WHOLE = Whole()
