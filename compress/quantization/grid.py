"""Uniform grids: which real numbers a b-bit code can stand for, and how to choose their scale.

    w  ~  s * (c - z),   c in {-2^(b-1), ..., 2^(b-1) - 1}

Symmetric grids have z = 0 and one more level on the negative side. Where the largest weight of a
row or group is positive, the scale is made negative, so that the longer side covers it: readers
only ever multiply by the scale, and at 2 bits the extra level is a quarter of the grid.

Everything here works on columns-first tensors, [K, N] for a linear of N outputs and K inputs, so
that the weights of one input column are contiguous. One scale covers all K rows it is given, for
each of the N outputs.

    grid = UniformGrid(bits=3)
    scale, zero = search_scale(grid, Wt, clip="hessian", importance=H.diagonal())
    levels = (Wt / scale).round().clamp(*grid.range(zero))      # weights are levels * scale
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from compress.kernels.cpu.rounding import best_scale, compiled

# Clip search, as shares of the scale that clips nothing. `magnitude`: 80 steps of 1/100 from 1.00
# and the error |e|^2.4 (the released RSQ code, after GPTQ-style code bases). `hessian`: coarse
# steps, then finer ones around the best of them.
MAGNITUDE_SHARES = tuple(1 - i / 100 for i in range(80))
MAGNITUDE_POWER = 2.4
MAGNITUDE_BITS = 8  # from which on it is not searched: it gains nothing there (docs/rsq.md)
COARSE_SHARES = tuple(1.05 - 0.075 * i for i in range(11))
FINE_OFFSETS = (-0.025, 0.025)
# Elements worked on at a time where torch's operators search: on a CPU of one share, so that the
# temporaries stay in the cache; on a GPU of all shares together, each temporary 32 MB.
CHUNK = {"cpu": 1 << 16, "cuda": 1 << 23}


@dataclass(frozen=True)
class UniformGrid:
    """Evenly spaced levels of `bits` bits; `scale_dtype` is that of scales in the checkpoint."""

    bits: int
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float32

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def stored(self, scale: Tensor) -> Tensor:
        """A scale as a reader of the checkpoint will see it; never zero.

        Rounding here and not at saving means that the codes are chosen for the scale that is used.
        """
        rounded = scale.to(self.scale_dtype).to(scale.dtype)
        tiny = torch.finfo(self.scale_dtype).tiny
        return torch.where(rounded.abs() < tiny, torch.full_like(rounded, tiny), rounded)

    def extent(self, Wt: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale and zero point that clip nothing: [K, N] -> [N], [N] or None."""
        low, high = Wt.amin(0), Wt.amax(0)
        if self.symmetric:
            # Code -2^(b-1) stands for the weight of largest magnitude, whichever its sign.
            return torch.where(high > -low, high, low) / self.low, None
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (self.high - self.low)
        return scale, self.zero_for(low, scale)

    def zero_for(self, low: Tensor, scale: Tensor) -> Tensor:
        """The integer zero point that puts the lowest code at `low`: [N]."""
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        return (self.low - low / safe).round().clamp(self.low, self.high)

    def range(self, zero: Tensor | None) -> tuple[float | Tensor, float | Tensor]:
        """The least and greatest level, a code minus the zero point: numbers, or zero's shape."""
        if zero is None:
            return self.low, self.high
        return self.low - zero, self.high - zero

    def clamp_(self, levels: Tensor, zero: Tensor | None) -> Tensor:
        """Puts levels into the grid's range, in place."""
        if zero is None:
            return levels.clamp_(self.low, self.high)
        return levels.clamp_(self.low - zero, self.high - zero)


def search_scale(
    grid: UniformGrid, Wt: Tensor, clip: str, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each output for the weights it is given.

    Args:
        grid: the levels.
        Wt: [K, N] weights that share one scale for each output.
        clip: `none` (nothing is clipped), `magnitude` (least sum |e|^2.4; as `none` from 8 bits
            on) or `hessian` (least sum importance * e^2).
        importance: [K] diag(H), the second moment of each input; used by `hessian`.

    Returns:
        scale [N], already rounded to what the checkpoint stores, and zero [N] or None.
    """
    Wt = Wt.contiguous()  # what a triangular solve gives is not
    scale, zero = grid.extent(Wt)
    if clip == "none" or (clip == "magnitude" and grid.bits >= MAGNITUDE_BITS):
        return grid.stored(scale), zero
    step = _outputs_at_once(Wt, clip)
    for start in range(0, Wt.shape[1], step):
        part = slice(start, start + step)
        search = _ClipSearch(grid, Wt[:, part].contiguous(), scale[part], clip, importance)
        scale[part], best_zero = search.best()
        if zero is not None and best_zero is not None:
            zero[part] = best_zero
    return scale, zero


def tried_together(Wt: Tensor) -> bool:
    """Whether all shares are: where launches would take the time, or where none is a temporary."""
    return Wt.is_cuda or compiled(Wt) is not None


def _outputs_at_once(Wt: Tensor, clip: str) -> int:
    """How many outputs of Wt [K, N] are searched at a time."""
    if compiled(Wt) is not None:
        return max(1, Wt.shape[1])
    shares = MAGNITUDE_SHARES if clip == "magnitude" else COARSE_SHARES
    each = Wt.shape[0] * (1 + len(shares) if tried_together(Wt) else 1)
    return max(1, CHUNK[Wt.device.type] // each)


@cache
def _row(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers as [S, 1], copied to a device once: a copy waits for all else it has to do."""
    return torch.tensor(values, device=device, dtype=dtype)[:, None]


class _ClipSearch:
    """Tries shares of the full scale on one set of outputs that its temporaries have room for."""

    def __init__(
        self,
        grid: UniformGrid,
        W: Tensor,
        full: Tensor,
        clip: str,
        importance: Tensor | None,
    ):
        self.grid, self.W, self.full, self.clip = grid, W, full, clip
        self.importance = importance
        self.low = None if grid.symmetric else W.amin(0).clamp(max=0)
        self.kernels, self.at_once = compiled(W), tried_together(W)
        self.wanted, self.levels = (None if self.at_once else torch.empty_like(W) for _ in range(2))

    def candidate(self, share: Tensor | float) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point for a share: [N], or [S, N] for shares [S, 1] or [S, N]."""
        scale = self.grid.stored(self.full * share)
        zero = None if self.low is None else self.grid.zero_for(self.low * share, self.full * share)
        return scale, zero

    def error(self, share: Tensor | float) -> Tensor:
        """The weighted error of each output, in the shape of its candidate."""
        scale, zero = self.candidate(share)
        wanted = torch.mul(self.W, (1 / scale).unsqueeze(-2), out=self.wanted)  # [K, N], [S, K, N]
        levels = torch.round(wanted, out=self.levels)
        e = self.grid.clamp_(levels, None if zero is None else zero.unsqueeze(-2)).sub_(wanted)
        if self.clip == "magnitude":
            return e.abs_().pow_(MAGNITUDE_POWER).sum(-2) * scale.abs() ** MAGNITUDE_POWER
        assert self.importance is not None, "clip search `hessian` weighs the inputs"
        return (self.importance @ e.mul_(e)) * scale.square()

    def scan(self, shares: list[Tensor | float], best: Tensor, least: Tensor) -> Tensor:
        """The best of some shares and of the one before, whose error is `least`, one by one."""
        for share in shares:
            error = self.error(share)
            better = error < least
            least.copy_(torch.where(better, error, least))
            best = torch.where(better, torch.as_tensor(share, dtype=best.dtype), best)
        return best

    def first_best(self, shares: Tensor) -> Tensor:
        """The first best of shares [S, 1] or [S, N] for each output, tried together: [N]."""
        if self.kernels is not None:
            assert self.clip == "magnitude" or self.importance is not None
            weights = None if self.clip == "magnitude" else self.importance
            tried, codes = self.candidate(shares), (self.grid.low, self.grid.high)
            best = best_scale(self.kernels, self.W, *tried, *codes, weights)
        else:
            error = self.error(shares)
            best = error.where(error.isfinite(), torch.inf).argmin(0)
        return shares.expand(len(shares), len(best)).gather(0, best[None]).squeeze(0)

    def best(self) -> tuple[Tensor, Tensor | None]:
        shares = MAGNITUDE_SHARES if self.clip == "magnitude" else COARSE_SHARES
        offsets = () if self.clip == "magnitude" else FINE_OFFSETS
        search = self._together if self.at_once else self._in_turn
        return self.candidate(search(shares, offsets))

    def _in_turn(self, shares: Sequence[float], offsets: Sequence[float]) -> Tensor:
        share, least = torch.ones_like(self.full), self.error(1.0)
        share = self.scan(list(shares), share, least)
        return self.scan([share + offset for offset in offsets], share, least)

    def _together(self, shares: Sequence[float], offsets: Sequence[float]) -> Tensor:
        place = self.full.device, self.full.dtype
        share = self.first_best(_row((1.0, *shares), *place))
        return self.first_best(share + _row((0.0, *offsets), *place)) if offsets else share
