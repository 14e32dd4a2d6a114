"""Rounding the embedding: a table of the vocabulary, of which a token reads one row.

No product sums over its inputs, so no error can make up for another, and rounding each value to
nearest is the best there is for given scales.

    linear = round_table(table, Scheme(8, None), torch.bfloat16)     # table [V, d]

A head is solved like any linear, and some of its rows at a time too (`solve_table`).
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from compress.quantization.grid import UniformGrid
from compress.quantization.hessian import Hessian
from compress.quantization.shares import WHOLE, Piece, Whole, solve_piece
from compress.quantization.solvers import (
    QuantizedLinear,
    RoundToNearest,
    Solver,
    SolverSettings,
    Target,
    rows_at_a_time,
    settled,
)
from compress.scheme import Scheme

CLIP = "hessian"  # the search for the least squared error: without a Hessian all inputs count alike


class Rows(Protocol):
    """A weight [V, d] of which some rows are there at a time; a tensor is one too."""

    shape: tuple[int, int]

    def __getitem__(self, rows: slice) -> Tensor:
        """Some rows [n, d]."""
        ...


def round_table(table: Rows, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedLinear:
    """The rows of `table` [V, d], rounded to nearest; a part of them at a time, in fp32."""
    solver = RoundToNearest(SolverSettings(clip_search=CLIP))
    grid = UniformGrid(scheme.bits, scheme.symmetric, scale_dtype)
    every = _in_parts(slice(0, table.shape[0]), table, "cpu")
    return QuantizedLinear.join(
        [solver.solve(table[rows].float(), None, grid, scheme.group_size) for rows in every]
    )


def solve_table(
    table: Rows,
    scheme: Scheme,
    solver: Solver,
    H: Hessian | None,
    scale_dtype: torch.dtype,
    device: str = "cpu",
    shares: Whole = WHOLE,
) -> QuantizedLinear:
    """The same by a solver, for the Hessian of the table's input if it needs one.

    Args:
        H: where it has drifted, the target is the 16-bit model's output.
        device: where rows are solved.
        shares: which rows this process solves; it gets all of them back.

    Raises:
        CompressError: the Hessian cannot be factored.
    """
    V, K = table.shape
    there = torch.device(device)
    parts = [
        rows
        for share in shares.parts(slice(0, V), K, there)
        for rows in _in_parts(share, table, there.type)
    ]
    pieces = [Piece(scheme, rows, other) for other in (False, True) for rows in parts]

    def solve(numbers: Iterable[int]) -> dict[int, QuantizedLinear]:
        mine = list(numbers)
        if not mine:
            return {}
        drift = None if H is None else H.take_drift()
        statistics = None if H is None else solver.prepare(H.matrix())
        found: dict[int, QuantizedLinear] = {}
        for number in mine:
            W = table[pieces[number].rows].to(there, torch.float32)
            aim = None if drift is None else Target.of(W, *drift)
            result = solve_piece(pieces[number], W, solver, statistics, scale_dtype, aim)
            if result is not None:
                found[number] = result
        return found

    found = shares.solved(pieces, K, solve, there)
    first = [linear for linear in found[: len(parts)] if linear is not None]
    others = [linear for linear in found[len(parts) :] if linear is not None]
    del found
    return settled(QuantizedLinear.join(first), QuantizedLinear.join(others) if others else None)


def _in_parts(rows: slice, table: Rows, device: str) -> list[slice]:
    """Rows of the table, as many at a time as are solved on this kind of device."""
    step = rows_at_a_time(*table.shape, device)
    starts = range(rows.start, rows.stop, step)
    return [slice(start, min(start + step, rows.stop)) for start in starts]
