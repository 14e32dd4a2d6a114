"""From a weight and its Hessian to codes: the solvers, and the linear they give back.

    solver = SOLVERS["gptq"](SolverSettings())
    statistics = solver.prepare(H)                             # H [K, K], once for all it serves
    result = solver.solve(W, statistics, grid, group_size)     # W [N, K]
    result.weight()                                            # the dequantised weight, [N, K]

RTN rounds every weight to nearest and needs no data. GPTQ (arXiv 2210.17323) runs the column loop
of `gptq.py`; `refine_sweeps` adds the coordinate descent of `refine.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.quantization.gptq import Codes, column_loop, nearest
from compress.quantization.grid import UniformGrid
from compress.quantization.hessian import factor
from compress.quantization.refine import refine
from compress.registry import Registry

SOLVERS = Registry("solver")


@dataclass(frozen=True)
class SolverSettings:
    """What a recipe's `quantize` section says beyond the grid."""

    clip_search: str = "hessian"
    refine_sweeps: int = 5
    damping: float = 0.01
    act_order: bool = False


@dataclass
class QuantizedLinear:
    """A linear's integer weights and what is known about them.

    Attributes:
        codes: [N, K] int8, signed.
        scale: [N, G], in the checkpoint's dtype; G = 1 for one scale a row.
        zero: [N, G] int8, or None for a symmetric grid.
        error: tr((W-Q) H (W-Q)^T) over tr(W H W^T); None without a Hessian.
        damping: the damping that the factorisation needed; None where there was none.
        dead_columns: inputs that were zero on every calibration token; their weights became 0.
        changed: share of codes that each refinement sweep changed.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    error: float | None = None
    damping: float | None = None
    dead_columns: int = 0
    changed: tuple[float, ...] = ()

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantised weight as a reader computes it: (codes - zero) * scale, [N, K]."""
        N, K = self.codes.shape
        codes = self.codes.to(dtype).view(N, self.scale.shape[1], -1)
        if self.zero is not None:
            codes = codes - self.zero.to(dtype).unsqueeze(-1)
        return (codes * self.scale.to(dtype).unsqueeze(-1)).view(N, K)

    def rows(self, part: slice) -> "QuantizedLinear":
        """The linear of some output rows: how stacked linears are taken apart again."""
        zero = None if self.zero is None else self.zero[part]
        return QuantizedLinear(
            self.codes[part], self.scale[part], zero,
            self.error, self.damping, self.dead_columns, self.changed,
        )  # fmt: skip


def _finish(result: Codes, grid: UniformGrid) -> QuantizedLinear:
    return QuantizedLinear(
        codes=result.codes.T.to(torch.int8).contiguous(),
        scale=result.scale.T.to(grid.scale_dtype).contiguous(),
        zero=None if result.zero is None else result.zero.T.to(torch.int8).contiguous(),
    )


@dataclass
class Statistics:
    """What a solver keeps of a Hessian that several linears share: computed once for all of them.

    Attributes:
        H: [K, K], with ones on the diagonal of dead columns.
        dead: [K] inputs that were always zero.
        M, pivots: the factor of the damped (and, with act-order, permuted) H; see `gptq.py`.
        order: [K] the act-order, or None.
        damping: the damping that worked.
    """

    H: Tensor
    dead: Tensor
    M: Tensor
    pivots: Tensor
    order: Tensor | None
    damping: float


@SOLVERS.register("rtn")
class RoundToNearest:
    """Every weight to its nearest level; the clip search sees the weights alone."""

    needs_hessian = False

    def __init__(self, settings: SolverSettings):
        self.settings = settings

    def solve(
        self, W: Tensor, statistics: None, grid: UniformGrid, group_size: int | None
    ) -> QuantizedLinear:
        """W [N, K] -> codes."""
        Wt = W.T.contiguous()
        importance = torch.ones(Wt.shape[0], dtype=Wt.dtype, device=Wt.device)
        return _finish(nearest(Wt, grid, group_size, self.settings.clip_search, importance), grid)


@SOLVERS.register("gptq")
class Gptq:
    """The column loop with error feedback, then the refinement sweeps."""

    needs_hessian = True

    def __init__(self, settings: SolverSettings):
        self.settings = settings

    def prepare(self, H: Tensor) -> Statistics:
        """Factors H [K, K], which it takes over and changes.

        Raises:
            CompressError: H cannot be factored with any allowed damping.
        """
        dead = H.diagonal() == 0
        H.diagonal()[dead] = 1
        order = torch.argsort(H.diagonal(), descending=True) if self.settings.act_order else None
        R, damping = factor(H if order is None else H[order][:, order], self.settings.damping)
        diagonal = R.diagonal().clone()
        return Statistics(H, dead, R.div_(diagonal), diagonal.square(), order, damping)

    def solve(
        self, W: Tensor, statistics: Statistics, grid: UniformGrid, group_size: int | None
    ) -> QuantizedLinear:
        """W [N, K] and the statistics of its input -> codes."""
        H, settings = statistics.H, self.settings
        Wt = W.T.contiguous().to(H.dtype)
        Wt[statistics.dead] = 0
        result = column_loop(
            Wt, statistics.M, statistics.pivots, grid, group_size,
            settings.clip_search, H.diagonal(), statistics.order,
        )  # fmt: skip
        # From the damped objective of the loop to the error itself.
        E = Wt - result.dequantised(grid)
        added = statistics.damping * H.diagonal().mean()
        result.error -= float(added * E.square_().sum(dtype=torch.float64))
        del E
        changed = refine(result, Wt, H, grid, group_size, settings.refine_sweeps)
        power = float((Wt * (H @ Wt)).sum(dtype=torch.float64))
        linear = _finish(result, grid)
        # Rounding can leave a tiny negative error where the codes are exact.
        linear.error = max(0.0, result.error / power) if power > 0 else 0.0
        linear.damping, linear.dead_columns = statistics.damping, int(statistics.dead.sum())
        linear.changed = tuple(changed)
        return linear
