"""The strategies that keep exactly a budget: positions in a unit cube become ratios and a cell.

With c_s the share of an image's tokens that is left after stage s, L_s the layers from there to the
next stage and B = keep * L - l_0, a strategy meets the budget if

    sum_s L_s c_s = B,    1 >= c_0 >= c_1 >= ... >= f,    c_0 >= f_0

where f leaves every image a token and its protected ones, f_0 also one for each recycling cell.
Stage by stage, the shares that leave a solution for the later stages are an interval

    max(b / (L_s + ... + L_S), f_s)  <=  c_s  <=  min(c_{s-1}, (b - f (L_{s+1} + ... + L_S)) / L_s)

with b what is left of B. A position in [0, 1] picks from it, and the last share follows. Nothing is
clamped, and every solution has its positions. Cells likewise: the more cells, the more tokens must
stay, so those that fit c_0 are all sides from a least one on.

    feasible = FeasibleSet(keep=0.25, stages=(0, 9, 18), layers=28, images=images)
    shares = feasible.shares([0.2, 0.9]); ratios_of(shares); feasible.cell(0.5, shares[0])
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import torch

from compress.errors import UsageError
from compress.pruning.recycle import grid_cells
from compress.pruning.tower import VisualTokens
from compress.recipe.strategy import ROUNDING

# A share at its floor must stand for its whole count, after a few roundings in fp64.
SHARE_MARGIN = 1e-9
# A cell just above a break must be above it in fp32 too, in which tokens are assigned to cells.
CELL_MARGIN = 1e-6


class Layout:
    """Where an image's tokens lie, and which of them are protected."""

    def __init__(self, tokens: VisualTokens, protect_newlines: bool):
        newline = tokens.newline.cpu()
        self.free = ~newline if protect_newlines else torch.ones_like(newline)
        self.tokens = len(tokens)
        self.protected = self.tokens - int(self.free.sum())
        self.places = torch.stack([tokens.segment, tokens.row, tokens.column]).cpu()
        self.side = int(self.places[1:].max()) + 1

    def least(self, cell: float | None) -> int:
        """How few tokens a stage can leave: the protected ones and one per cell, at least one."""
        if cell is None:
            return max(self.protected, 1)
        segment, row, column = self.places
        labels = grid_cells(segment, row, column, cell)[self.free]
        return max(self.protected + len(labels.unique()), 1)

    def count(self, share: float) -> int:
        """How many are left of this share at least: `PruneStrategy.counts` may round down."""
        return math.floor(self.tokens * share + ROUNDING)

    def fits(self, share: float, cell: float | None) -> bool:
        count = self.count(share)
        return count >= self.tokens or count >= self.least(cell)


class FeasibleSet:
    """The shares, and cells, with which `images` keep `keep` of their tokens over `layers`.

    Args:
        cell: a recycling cell that is given; None: no recycling.
        recycle: the cell is chosen, by `cell`; then `cell` is not read here.

    Raises:
        UsageError: no strategy with these stages meets the budget on these images.
    """

    def __init__(
        self,
        *,
        keep: float,
        stages: tuple[int, ...],
        layers: int,
        images: Sequence[VisualTokens],
        protect_newlines: bool = True,
        cell: float | None = None,
        recycle: bool = False,
    ):
        layouts = (Layout(image, protect_newlines) for image in images)
        # Images of one size are the same to all that follows.
        found = list({_key(layout): layout for layout in layouts}.values())
        self.spans = [b - a for a, b in pairwise((*stages, layers))]
        self.budget = keep * layers - stages[0]
        # Too small for the budget: such an image keeps its least, and sets no bounds for others.
        given = None if recycle else cell  # one that is chosen may be as large as an image
        fitting = [one for one in found if self._need(*_floors([one], given)) <= self.budget]
        self.layouts = fitting or found
        self.side = max(layout.side for layout in self.layouts)
        self.breaks = _breaks(self.side - 1)
        largest = float(self.side) if recycle else cell
        self.first_floor, self.floor = _floors(self.layouts, largest)
        need = self._need(self.first_floor, self.floor)
        if not need <= self.budget < sum(self.spans):
            least = (stages[0] + need) / layers
            raise UsageError(
                f"stages {list(stages)} and these images allow budgets from {least:.4g} to below "
                f"1, found keep {keep:.4g}: choose another budget, earlier stages, or no recycling"
            )

    @property
    def dimensions(self) -> int:
        """How many positions `shares` takes: one less than there are stages."""
        return len(self.spans) - 1

    def shares(self, positions: Sequence[float]) -> list[float]:
        """The shares that are left after each stage; `positions` [stages - 1] in [0, 1]."""
        shares: list[float] = []
        left, above = self.budget, 1.0
        for stage, position in enumerate(positions):
            span, rest = self.spans[stage], sum(self.spans[stage + 1 :])
            low = max(left / (span + rest), self._floor_of(stage))
            high = min(above, (left - self.floor * rest) / span)
            above = low + position * (high - low)
            shares.append(above)
            left -= above * span
        return [*shares, left / self.spans[-1]]

    def check(self, shares: Sequence[float]) -> None:
        """UsageError if these shares, given from elsewhere, leave an image too few tokens."""
        for stage, share in enumerate(shares):
            if share < self._floor_of(stage) * (1 - SHARE_MARGIN / 2):
                raise UsageError(
                    f"stage {stage} leaves {share:.4g} of an image's tokens, which is less than "
                    f"its protected and recycled ones ({self._floor_of(stage):.4g}): raise the "
                    "ratios, or let them be searched"
                )

    def cell(self, position: float, first_share: float) -> float:
        """A cell's side that leaves no more tokens than `first_share` allows; position in [0, 1].

        Linear in how many cells there are to a side, down to 1 at 1: a side of so many tokens has
        no other sizes to tell apart, and each is as likely to be drawn.
        """

        def fits(number: int) -> bool:
            side = self.breaks[number] * (1 + CELL_MARGIN)
            return all(layout.fits(first_share, side) for layout in self.layouts)

        # The last break always fits, one cell for a whole grid: `first_floor` sees to that.
        number = bisect_left(range(len(self.breaks) - 1), True, key=fits)
        low = self.breaks[number] * (1 + CELL_MARGIN)
        return 1 / ((1 - position) / low + position / max(self.side, low))

    def _floor_of(self, stage: int) -> float:
        return self.floor if stage else self.first_floor

    def _need(self, first: float, later: float) -> float:
        """The least budget of shares that are at least `first`, and `later` from stage 1 on."""
        return first * self.spans[0] + later * sum(self.spans[1:])


def _floors(layouts: Sequence[Layout], cell: float | None) -> tuple[float, float]:
    """The least shares that leave every image what must stay: after stage 0, and later."""
    first, later = (max(one.least(side) / one.tokens for one in layouts) for side in (cell, None))
    return first * (1 + SHARE_MARGIN), later * (1 + SHARE_MARGIN)


def ratios_of(shares: Sequence[float]) -> tuple[float, ...]:
    """What each stage keeps of what is there, from what is left of the whole."""
    # Equal shares may differ in their last bit: a ratio of 1 + 2e-16 means 1.
    return tuple(min(1.0, after / before) for before, after in pairwise((1.0, *shares)))


def _breaks(last: int) -> list[float]:
    """Sides at which a grid with indices 0 to `last` gets fewer cells: k / j >= 1, rising."""
    return sorted({k / j for k in range(1, last + 1) for j in range(1, k + 1)} | {1.0})


def _key(layout: Layout) -> tuple[bytes, bytes]:
    return layout.places.numpy().tobytes(), layout.free.numpy().tobytes()
