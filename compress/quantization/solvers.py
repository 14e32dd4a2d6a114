"""From a weight and its Hessian to codes: the solvers, and the linear they give back.

    solver = SOLVERS["gptq"](SolverSettings())
    statistics = solver.prepare(H)                             # H [K, K], once for all it serves
    result = solver.solve(W, statistics, grid, group_size)     # W [N, K]
    result.weight()                                            # the dequantised weight, [N, K]

RTN rounds every weight to nearest and needs no data. GPTQ (arXiv 2210.17323) runs the column loop
of `gptq.py`; `refine_sweeps` adds the coordinate descent of `refine.py`.

With a `Target` the outputs aimed at are those of the 16-bit model, W x0, and not W x. With D and F
of `hessian.py`, E = W - Q, and sums weighted as H is,

    sum ||W x0 - Q x||^2 = tr(E H E^T) + 2 tr(W D E^T) + tr(W F W^T)
    W' = W + strength W D (H + damping)^-1

and W' is what the column loop and the sweeps represent instead of W: at full strength the minimiser
of that sum plus damping ||W - Q||^2. What cannot be reached, F and what D leaves of it, is
part of the errors given back.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from operator import mul
from typing import Protocol

import torch
from torch import Tensor

from compress.quantization.gptq import QuantizedColumns, column_loop, nearest
from compress.quantization.grid import UniformGrid
from compress.quantization.hessian import factor
from compress.quantization.refine import refine
from compress.quantization.rounding import quadratic
from compress.recipe.quantize import Quantize
from compress.registry import Registry

SOLVERS: Registry[type["Solver"]] = Registry("solver")
# Output rows do not depend on one another, so they are solved some at a time: on a CPU few enough
# that the working set of a block stays in its cache, and the temporaries small.
WEIGHTS_AT_A_TIME = {"cpu": 1 << 21, "cuda": 1 << 27}
LEAST_ROWS = 256
SAME = 1e-3  # errors that differ by less are equal


@dataclass(frozen=True)
class SolverSettings:
    """What a recipe's `quantize` section says beyond the grid."""

    clip_search: str = "hessian"
    refine_sweeps: int = 5
    damping: float = 0.01
    act_order: bool = False
    target_strength: float = 1.0  # with a `Target`


@dataclass
class QuantizedLinear:
    """A linear's integer weights and what is known about them.

    Attributes:
        codes: [N, K] int8, signed.
        scale: [N, G], in the checkpoint's dtype; G = 1 for one scale a row.
        zero: [N, G] int8, or None for a symmetric grid.
        error, power: [N] fp64, sum w (y - Q x)^2 and sum w y^2 of each output y: the diagonals of
            (W-Q) H (W-Q)^T and of W H W^T where y = W x; None without a Hessian.
        damping: the damping that the factorisation needed; None where there was none.
        dead_columns: inputs that were zero on every calibration token; their weights became 0.
        changed: share of codes that each refinement sweep changed.
        rounded: rounding to nearest took the place of a solution that was worse.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    error: Tensor | None = None
    power: Tensor | None = None
    damping: float | None = None
    dead_columns: int = 0
    changed: tuple[float, ...] = ()
    rounded: bool = False

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantised weight as a reader computes it: (codes - zero) * scale, [N, K]."""
        N, K = self.codes.shape
        codes = self.codes.to(dtype).view(N, self.scale.shape[1], -1)
        if self.zero is not None:
            codes -= self.zero.to(dtype).unsqueeze(-1)
        return codes.mul_(self.scale.to(dtype).unsqueeze(-1)).view(N, K)

    def relative_error(self) -> float | None:
        """Error over power, summed over outputs; 0 where the linear gives nothing but zeros."""
        if self.error is None or self.power is None:
            return None
        power = float(self.power.sum())
        # Rounding can leave a tiny negative error where the codes are exact.
        return max(0.0, float(self.error.sum()) / power) if power > 0 else 0.0

    def rows(self, part: slice) -> "QuantizedLinear":
        """The linear of some output rows; takes stacked linears apart."""
        return replace(
            self,
            codes=self.codes[part],
            scale=self.scale[part],
            zero=None if self.zero is None else self.zero[part],
            error=None if self.error is None else self.error[part],
            power=None if self.power is None else self.power[part],
        )

    @classmethod
    def join(cls, parts: "list[QuantizedLinear]") -> "QuantizedLinear":
        """The linear of all the parts' rows; they share one Hessian and grid."""
        if len(parts) == 1:
            return parts[0]
        rows = [part.codes.shape[0] for part in parts]
        sweeps = zip_longest(*(part.changed for part in parts), fillvalue=0.0)
        changed = tuple(sum(map(mul, rows, shares)) / sum(rows) for shares in sweeps)
        return replace(
            parts[0],
            codes=torch.cat([part.codes for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            zero=_joined([part.zero for part in parts]),
            error=_joined([part.error for part in parts]),
            power=_joined([part.power for part in parts]),
            changed=changed,
        )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """The rows of all parts; None if the parts have none."""
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def _finish(result: QuantizedColumns, grid: UniformGrid) -> QuantizedLinear:
    return QuantizedLinear(
        codes=result.codes().to(torch.int8).T.contiguous(),
        scale=result.scale.T.to(grid.scale_dtype).contiguous(),
        zero=None if result.zero is None else result.zero.T.to(torch.int8).contiguous(),
    )


@dataclass
class HessianFactor:
    """What a solver keeps of a Hessian that several linears share: computed once for all of them.

    Attributes:
        H: [K, K], with ones on the diagonal of dead columns.
        dead: [K] inputs that were always zero.
        M: [K, K] unit upper triangular, from the factor of the damped (and, with act-order,
            permuted) H; see `gptq.py`.
        pivots: [K] the squared diagonal of that factor.
        order: [K] the order of columns, or None for their own.
        damping: the damping that the factorisation needed, and what it added to H's diagonal.
    """

    H: Tensor
    dead: Tensor
    M: Tensor
    pivots: Tensor
    order: Tensor | None
    damping: float
    added: float

    def divide(self, A: Tensor) -> Tensor:
        """(H + damping)^-1 A for A [K, N], by the factor that is there: two triangular solves."""
        A = A if self.order is None else A[self.order]
        A = torch.linalg.solve_triangular(self.M, A, upper=True, unitriangular=True)
        A.div_(self.pivots[:, None])
        A = torch.linalg.solve_triangular(self.M.T, A, upper=False, unitriangular=True)
        if self.order is None:
            return A
        result = torch.empty_like(A)
        result[self.order] = A
        return result


@dataclass
class Target:
    """The outputs W x0 of the 16-bit model, as what a linear is to give for its own inputs x.

    Attributes:
        cross: [N, K], W D.
        rest: [N] fp64, the diagonal of W F W^T.
    """

    cross: Tensor
    rest: Tensor

    @classmethod
    def of(cls, W: Tensor, D: Tensor, F: Tensor) -> "Target":
        """For W [N, K], whose inputs have drifted by D and F [K, K]."""
        W = W.to(D.dtype)
        rest = torch.cat([quadratic(F, part.T.contiguous()) for part in some_rows(W)])
        return cls(W @ D, rest)

    def rows(self, part: slice) -> "Target":
        """Of some outputs."""
        return Target(self.cross[part], self.rest[part])

    def beyond(self, Et: Tensor) -> Tensor:
        """sum w (y - Q x)^2 of each output y of W x0, less (E H E^T)_nn, for Et = (W - Q)^T [K, N].

        [N] fp64.
        """
        return 2 * (self.cross.T * Et).sum(0, dtype=torch.float64) + self.rest


class Solver(Protocol):
    """Codes from weights. `prepare` is asked for only where `needs_hessian`."""

    needs_hessian: bool

    def __init__(self, settings: SolverSettings) -> None: ...

    def prepare(self, H: Tensor) -> HessianFactor:
        """Factors H [K, K], which it takes over and changes."""
        ...

    def solve(
        self,
        W: Tensor,
        statistics: HessianFactor | None,
        grid: UniformGrid,
        group_size: int | None,
        target: Target | None = None,
    ) -> QuantizedLinear:
        """W [N, K] and the statistics of its input -> codes. `target`: None is W x."""
        ...

    def alternative(
        self,
        W: Tensor,
        statistics: HessianFactor | None,
        grid: UniformGrid,
        group_size: int | None,
        target: Target | None = None,
    ) -> QuantizedLinear | None:
        """Other codes for W [N, K], with their errors, for `settled` to choose from; or None."""
        return None


def settled(found: QuantizedLinear, other: QuantizedLinear | None) -> QuantizedLinear:
    """What `solve` found for a whole linear, or its alternative where that is less off."""
    if other is None:
        return found
    assert found.error is not None and other.error is not None
    # By more than what the sums themselves are off.
    if not float(other.error.sum()) < float(found.error.sum()) * (1 - SAME):
        return found
    return replace(
        other,
        power=found.power,
        damping=found.damping,
        dead_columns=found.dead_columns,
        rounded=True,
    )


def rows_at_a_time(rows: int, columns: int, device: str) -> int:
    """Of so many output rows, how many are solved at a time on this kind of device."""
    most = max(LEAST_ROWS, WEIGHTS_AT_A_TIME[device] // columns)
    return -(-rows // -(-rows // most))


def some_rows(W: Tensor) -> tuple[Tensor, ...]:
    """W [N, K] in parts of as many rows as are solved at a time."""
    return W.split(rows_at_a_time(W.shape[0], W.shape[1], W.device.type))


def _parts(W: Tensor, target: Target | None) -> Iterator[tuple[Tensor, Target | None]]:
    """The same, with the target of each."""
    start = 0
    for part in some_rows(W):
        stop = start + len(part)
        yield part, None if target is None else target.rows(slice(start, stop))
        start = stop


def _error(H: Tensor, Et: Tensor, target: Target | None) -> Tensor:
    """sum w (y - Q x)^2 of each output y, for Et = (W - Q)^T [K, N]: [N] fp64."""
    error = quadratic(H, Et)
    return error if target is None else error + target.beyond(Et)


def make_solver(section: Quantize) -> Solver | None:
    """The solver that a recipe's `quantize` section names; None for `method: none`."""
    if section.method == "none":
        return None
    settings = SolverSettings(
        section.clip_search,
        section.refine_sweeps,
        section.damping,
        section.act_order,
        section.target.strength,
    )
    return SOLVERS[section.method](settings)


@SOLVERS.register("rtn")
class RoundToNearest(Solver):
    """Every weight to its nearest level; the clip search sees the weights alone."""

    needs_hessian = False

    def __init__(self, settings: SolverSettings):
        self.settings = settings

    def prepare(self, H: Tensor) -> HessianFactor:
        raise NotImplementedError("rounding to nearest reads no Hessian")

    def solve(
        self,
        W: Tensor,
        statistics: HessianFactor | None,
        grid: UniformGrid,
        group_size: int | None,
        target: Target | None = None,
    ) -> QuantizedLinear:
        """W [N, K] -> codes."""
        importance = W.new_ones(W.shape[1])
        clip = self.settings.clip_search
        parts = (part.T.contiguous() for part in some_rows(W))
        return QuantizedLinear.join(
            [_finish(nearest(Wt, grid, group_size, clip, importance), grid) for Wt in parts]
        )


@SOLVERS.register("gptq")
class Gptq:
    """The column loop with error feedback, then the refinement sweeps."""

    needs_hessian = True

    def __init__(self, settings: SolverSettings):
        self.settings = settings

    def prepare(self, H: Tensor) -> HessianFactor:
        """Factors H [K, K], which it takes over and changes.

        Raises:
            CompressError: H cannot be factored with any allowed damping.
        """
        dead = H.diagonal() == 0
        H.diagonal()[dead] = 1
        order = torch.argsort(H.diagonal(), descending=True) if self.settings.act_order else None
        R, damping = factor(H if order is None else H[order][:, order], self.settings.damping)
        diagonal = R.diagonal().clone()
        added = damping * float(H.diagonal().mean())
        return HessianFactor(H, dead, R.div_(diagonal), diagonal.square_(), order, damping, added)

    def solve(
        self,
        W: Tensor,
        statistics: HessianFactor | None,
        grid: UniformGrid,
        group_size: int | None,
        target: Target | None = None,
    ) -> QuantizedLinear:
        """W [N, K] and the statistics of its input -> codes."""
        assert statistics is not None, "gptq needs a Hessian"
        return QuantizedLinear.join(
            [
                self._solve_rows(part, statistics, grid, group_size, aim)
                for part, aim in _parts(W, target)
            ]
        )

    def alternative(
        self,
        W: Tensor,
        statistics: HessianFactor | None,
        grid: UniformGrid,
        group_size: int | None,
        target: Target | None = None,
    ) -> QuantizedLinear:
        """W rounded to nearest, and how far it is off from the target."""
        assert statistics is not None, "gptq needs a Hessian"
        H, parts = statistics.H, []
        for part, aim in _parts(W, target):
            Wt = part.T.clone(memory_format=torch.contiguous_format).to(H.dtype)
            Wt[statistics.dead] = 0
            result = nearest(
                Wt, grid, group_size, self.settings.clip_search, torch.ones_like(Wt[:, 0])
            )
            parts.append(_finish(result, grid))
            parts[-1].error = _error(H, Wt.sub_(result.dequantised()), aim)
        return QuantizedLinear.join(parts)

    def _solve_rows(
        self,
        W: Tensor,
        statistics: HessianFactor,
        grid: UniformGrid,
        group_size: int | None,
        target: Target | None,
    ) -> QuantizedLinear:
        H, settings = statistics.H, self.settings
        # A copy even where W.T is contiguous already, as for one row: it is changed below.
        Wt = W.T.clone(memory_format=torch.contiguous_format).to(H.dtype)
        Wt[statistics.dead] = 0
        aim = Wt
        if target is not None:
            shift = statistics.divide(target.cross.T)
            aim = torch.add(Wt, shift, alpha=settings.target_strength)
        result = column_loop(
            aim,
            statistics.M,
            grid,
            group_size,
            settings.clip_search,
            importance=H.diagonal(),
            order=statistics.order,
            pivots=statistics.pivots if target is None else None,
        )
        changed = refine(result, aim, H, grid, group_size, settings.refine_sweeps)
        linear = _finish(result, grid)
        linear.power = _error(H, Wt, target)
        E = Wt.sub_(result.dequantised())
        if changed or result.error is None:
            linear.error = _error(H, E, target)
        else:  # known for the damped H
            linear.error = result.error - statistics.added * E.square_().sum(0)
        linear.damping, linear.dead_columns = statistics.damping, int(statistics.dead.sum())
        linear.changed = tuple(count / W.numel() for count in changed)
        return linear
