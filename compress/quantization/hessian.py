"""The second-order statistics of a linear's input, and the triangular factor that GPTQ needs.

    H = (2/N) sum_j sum_t  w_jt  x_jt x_jt^T            RSQ (arXiv 2503.01820), Sec. 4.2

over N calibration windows j and their tokens t, with token weights of mean one in each window
(w = 1 gives GPTQ's Hessian, exactly). `factor` gives the upper triangular R with H + damping =
R R^T: the layer's error tr(E H E^T) is then ||E R||^2, whose column j holds E_j R_jj plus what the
columns before it have left, which is all that the column loop has to know.

    statistics = Hessian(columns=1024)
    statistics.add_batch(x, weights)          # x [B, T, K], weights [B, T] or None
    R, damping = factor(statistics.matrix(), damping=0.01)

Where a linear's target is the output W x0 of the 16-bit model, two matrices more say how far its
input has drifted from x0 (GPTAQ, arXiv 2504.02692; Qronos, 2505.11695), same windows and weights:

    D = (2/N) sum w (x0 - x) x^T        F = (2/N) sum w (x0 - x) (x0 - x)^T

D is the difference of the cross statistics (2/N) sum w x0 x^T and H, summed as such: where nothing
has drifted it is zero to the bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CompressError

# Diagonal blocks of H up to this size are computed whole, the rest in its lower triangle alone, so
# the work is (1 + block/K) / 2 of the full product; a GPU needs larger ones to be busy.
BLOCK = {"cpu": 128, "cuda": 1024}
# Damping grows by this factor when the Cholesky factorisation fails, up to the limit.
DAMPING_GROWTH = 2.0
DAMPING_LIMIT = 1.0


class Hessian:
    """Accumulates H over batches of calibration windows. Holds one [K, K] matrix.

    drift: holds D and F as well, two more of that size, until they are taken.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu", drift: bool = False):
        self.lower = torch.zeros(columns, columns, device=device)
        self.windows = 0
        self.block = BLOCK[self.lower.device.type]
        self.drift = Drift(columns, device) if drift else None

    def add_batch(self, x: Tensor, weights: Tensor | None = None, x0: Tensor | None = None) -> None:
        """Adds the tokens of x [B, T, K]; weights [B, T] have mean one in each window, or None.

        `x0` [B, T, K]: the same tokens in the 16-bit model, where the drift is asked for.
        """
        if self.drift is not None:
            assert x0 is not None, "a drift is one of two inputs"
            self.drift.add_batch(x, x0, weights)
        self.windows += x.shape[0]
        rows = x.reshape(-1, x.shape[-1]).to(self.lower.dtype)  # [tokens, K]
        if weights is not None:
            rows = rows * weights.reshape(-1, 1).sqrt()
        self._add_square(rows, 0, rows.shape[1])

    def _add_square(self, rows: Tensor, start: int, stop: int) -> None:
        """Columns start..stop against themselves: two smaller squares and what is below them, so
        that most of the work is in large products."""
        if stop - start <= self.block:
            square = rows[:, start:stop]
            self.lower[start:stop, start:stop].addmm_(square.T, square)
            return
        middle = start + self.block * -(-(stop - start) // (2 * self.block))
        self._add_square(rows, start, middle)
        self._add_square(rows, middle, stop)
        self.lower[middle:stop, start:middle].addmm_(rows[:, middle:stop].T, rows[:, start:middle])

    def sums(self) -> list[Tensor]:
        """What is accumulated, to be added to elsewhere; the windows are counted beside it."""
        return [self.lower, *(self.drift.sums() if self.drift else ())]

    def of_windows(self, windows: int) -> None:
        """Says of how many windows the sums are, where others have added to them."""
        self.windows = windows
        if self.drift is not None:
            self.drift.square.windows = windows

    def absorb(self, other: "Hessian") -> None:
        """Adds what another of that size has accumulated, which keeps it."""
        self.lower += other.lower
        self.windows += other.windows

    def copy(self) -> "Hessian":
        """Another with what this one has accumulated; its drift is not copied."""
        found = Hessian(len(self.lower), self.lower.device)
        found.absorb(self)
        return found

    def matrix(self) -> Tensor:
        """H, symmetric: [K, K]. Ends the accumulation: its memory becomes the result's."""
        H = self.lower
        for start in range(0, H.shape[0], self.block):
            block = slice(start, start + self.block)
            H[block, :start].mul_(2 / max(1, self.windows))
            H[:start, block] = H[block, :start].T
            # The diagonal block was computed whole; one triangle of it decides, so that H is
            # symmetric to the bit.
            square = H[block, block].tril().mul_(2 / max(1, self.windows))
            H[block, block] = square + square.tril(-1).T
        del self.lower
        return H

    def take_drift(self) -> tuple[Tensor, Tensor] | None:
        """D and F, each [K, K], whose memory is then the caller's; None where nothing drifted."""
        drift, self.drift = self.drift, None
        return None if drift is None else drift.matrices()


@dataclass
class Part:
    """Some linears of a group, and the Hessian of their input where they need one."""

    names: tuple[str, ...]
    weighted: bool
    H: Hessian | None


def needed(parts: list[Part]) -> bool:
    """Whether any of the parts has a Hessian."""
    return any(part.H is not None for part in parts)


class Drift:
    """Accumulates D and F: how far the inputs x of a linear are from those of the 16-bit model."""

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.cross = torch.zeros(columns, columns, device=device)
        self.square = Hessian(columns, device)

    def add_batch(self, x: Tensor, x0: Tensor, weights: Tensor | None) -> None:
        """x, x0 [B, T, K]; weights [B, T] or None."""
        difference = x0.to(self.cross.dtype) - x
        self.square.add_batch(difference, weights)
        if weights is not None:
            difference *= weights.unsqueeze(-1)
        K = x.shape[-1]
        self.cross.addmm_(difference.reshape(-1, K).T, x.reshape(-1, K).to(self.cross.dtype))

    def sums(self) -> list[Tensor]:
        """What is accumulated."""
        return [self.cross, self.square.lower]

    def matrices(self) -> tuple[Tensor, Tensor] | None:
        """D and F; None where x0 was x for every token."""
        windows = max(1, self.square.windows)
        F = self.square.matrix()
        return (self.cross.mul_(2 / windows), F) if F.any() else None


def factor(H: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular R with R R^T = H + damping * mean(diag H) * I, and the damping that worked.

    Args:
        H: [K, K] symmetric, its diagonal positive.
        damping: share of the diagonal's mean; doubled as long as H is not positive definite.

    Raises:
        CompressError: H is not positive definite with the largest damping, or is singular and
            damping is zero.
    """
    mean = H.diagonal().mean()
    while True:
        # Reversing rows and columns turns the lower factor that LAPACK gives into an upper one.
        # Its columns are what LAPACK wants contiguous, and H is symmetric: factored in place.
        lower = H.flip(0, 1).mT
        lower.diagonal().add_(damping * mean)
        failed = torch.empty((), dtype=torch.int32, device=H.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed and _well_conditioned(lower, damping):
            _turn(lower.mT)
            return lower, damping
        del lower
        if damping == 0 or damping >= DAMPING_LIMIT:
            raise CompressError(
                f"the Hessian of {H.shape[0]} columns is not positive definite with damping "
                f"{damping:g}: use more calibration tokens or a larger quantize.damping"
            )
        damping = min(damping * DAMPING_GROWTH, DAMPING_LIMIT)


def _turn(square: Tensor, at_once: int = 1 << 20) -> None:
    """Reverses rows and columns of a contiguous matrix in place: all of its numbers, in a row."""
    numbers = square.view(-1)
    count = len(numbers)
    for start in range(0, count // 2, at_once):
        stop = min(start + at_once, count // 2)
        front, back = numbers[start:stop], numbers[count - stop : count - start]
        held = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(held)


def _well_conditioned(lower: Tensor, damping: float) -> bool:
    """Without damping, rounding can make a singular H look positive definite; its pivots tell."""
    pivots = lower.diagonal().square()
    if damping > 0:
        return bool(pivots.isfinite().all())
    limit = pivots.numel() * torch.finfo(pivots.dtype).eps
    return bool(pivots.isfinite().all() and pivots.min() > limit * pivots.max())
