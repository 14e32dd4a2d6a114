"""Rounding the embedding: a table of the vocabulary, of which a token reads one row.

No product sums over its inputs, so no error can make up for another, and rounding each value to
nearest is the best there is for given scales.

    linear = round_table(table, Scheme(8, None), torch.bfloat16)     # table [V, d]
"""

import torch
from torch import Tensor

from compress.quantization.grid import UniformGrid
from compress.quantization.solvers import QuantizedLinear, RoundToNearest, SolverSettings, some_rows
from compress.scheme import Scheme

CLIP = "hessian"  # the search for the least squared error: without a Hessian all inputs count alike


def round_table(table: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedLinear:
    """The rows of `table` [V, d], rounded to nearest; a part of them at a time, in fp32."""
    solver = RoundToNearest(SolverSettings(clip_search=CLIP))
    grid = UniformGrid(scheme.bits, scheme.symmetric, scale_dtype)
    return QuantizedLinear.join(
        [solver.solve(part.float(), None, grid, scheme.group_size) for part in some_rows(table)]
    )
