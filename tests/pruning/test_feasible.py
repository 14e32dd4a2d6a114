"""Every point of the cube is a strategy that keeps the budget, and every strategy is a point."""

import math

import numpy as np
import pytest
import torch

from compress.errors import UsageError
from compress.pruning.feasible import FeasibleSet, Layout, ratios_of
from compress.pruning.recycle import grid_cells, keep_with_cells
from compress.pruning.tower import VisualTokens
from compress.recipe.strategy import PruneStrategy, average_kept
from support.refusals import refused


def grid(height, width, newlines=False, segment=0):
    """Tokens of one grid in raster order, each row with a newline token behind it if asked for."""
    columns = width + newlines
    row = torch.arange(height).repeat_interleave(columns)
    column = torch.arange(columns).repeat(height)
    label = torch.full_like(row, segment)
    return VisualTokens(label.masked_fill(column == width, -1), row, column)


def joined(*parts):
    fields = [torch.cat([getattr(p, name) for p in parts]) for name in ("segment", "row", "column")]
    return VisualTokens(*fields)


IMAGES = {
    "square": [grid(12, 12)],
    "several": [grid(12, 12), grid(3, 20), grid(1, 7)],
    "tiles": [joined(grid(6, 6), grid(9, 12, newlines=True, segment=1))],
}
STAGES = [(0,), (0, 9, 18), (2, 5), (0, 1, 2, 3), (27,)]


def feasible(keep=0.4, stages=(0, 9, 18), layers=28, images="square", **options):
    return FeasibleSet(keep=keep, stages=stages, layers=layers, images=IMAGES[images], **options)


def corners_and_more(dimensions, draw):
    """All corners of the cube, its middle, and random points."""
    for corner in range(2**dimensions):
        yield [float(corner >> i & 1) for i in range(dimensions)]
    yield [0.5] * dimensions
    for _ in range(40):
        yield [draw.random() for _ in range(dimensions)]


@pytest.mark.parametrize("keep", [0.97, 0.5, 0.3])
@pytest.mark.parametrize(
    ("stages", "recycle"),
    [*((s, False) for s in STAGES), *((s, True) for s in STAGES if s[0] == 0)],
)
@pytest.mark.parametrize("images", IMAGES)
def test_every_point_keeps_the_budget_and_fits_every_image(keep, stages, images, recycle):
    draw = np.random.default_rng(0)
    try:
        found = feasible(keep, stages, images=images, recycle=recycle)
    except UsageError:
        # Late stages keep more than this whatever they do.
        assert keep < (stages[0] + 28 * found_floor(images, recycle)) / 28 + 1e-6
        return
    for positions in corners_and_more(found.dimensions, draw):
        shares = found.shares(positions)
        strategy = PruneStrategy(stages=stages, ratios=ratios_of(shares))
        assert average_kept(stages, strategy.ratios, 28) == pytest.approx(keep, abs=1e-12)
        found.check(shares)
        for image in IMAGES[images]:
            counts = strategy.counts(len(image), 28)
            newlines = int(image.newline.sum())
            assert all(count >= max(newlines, 1) for count in counts)
        if recycle:
            for position in (0.0, draw.random(), 1.0):
                cell = found.cell(position, shares[0])
                for image in IMAGES[images]:
                    recycles(image, cell, strategy)


def found_floor(images, recycle):
    layouts = [Layout(image, True) for image in IMAGES[images]]
    return max((x.least(100.0 if recycle else None)) / x.tokens for x in layouts)


def recycles(image, cell, strategy):
    """Runs the recycling that the engine runs; raises if cells and count do not fit."""
    count = strategy.counts(len(image), 28)[0]
    if count < len(image):
        cells = grid_cells(image.segment, image.row, image.column, cell)
        kept, places = keep_with_cells(torch.rand(len(image)), cells, count, image.newline)
        assert int(kept.sum()) + len(places) == count


def test_every_strategy_has_its_point():
    """Random ratios that keep the budget: their positions, solved stage by stage, lie in [0, 1]."""
    draw = np.random.default_rng(1)
    stages, layers, tried = (0, 9, 18), 28, 0
    while tried < 200:
        first, second = draw.uniform(0.05, 1), draw.uniform(0.05, 1)
        keep = average_kept(stages, (first, second, draw.uniform(0.05, 1)), layers)
        wanted = [first, first * second]
        last = (keep * layers - 9 * sum(wanted)) / 10
        if last < 1 / 144:
            continue
        tried += 1
        found = feasible(keep)
        positions = []
        for stage, share in enumerate(wanted):
            low, high = (found.shares([*positions, x, *[0.0] * (1 - stage)])[stage] for x in (0, 1))
            assert low - 1e-9 <= share <= high + 1e-9
            positions.append((share - low) / (high - low) if high > low else 0.0)
        assert found.shares(positions) == pytest.approx([*wanted, last], abs=1e-9)


def test_published_ratios_are_inside():
    """arXiv 2508.05211, the shipped strategy at 25 %."""
    found = feasible(0.2507)
    first, second = 0.26510, 0.26510 * 0.98334
    low, high = (found.shares([x, 0.0])[0] for x in (0, 1))
    assert low < first < high
    x = (first - low) / (high - low)
    low, high = (found.shares([x, y])[1] for y in (0, 1))
    assert low < second < high
    shares = found.shares([x, (second - low) / (high - low)])
    assert ratios_of(shares) == pytest.approx([0.26510, 0.98334, 0.87733], abs=2e-3)


@pytest.mark.parametrize("images", IMAGES)
def test_the_least_cell_is_the_least(images):
    """Just below it, one image has too many cells; larger ones never have more."""
    found = feasible(0.3, images=images, recycle=True)
    for first in (0.31, 0.5, 0.8, 0.95):
        low = found.cell(0.0, first)
        fits = [all(x.fits(first, a) for x in found.layouts) for a in (low, low * 1.01, 20.0)]
        assert fits == [True] * 3
        if low > 1.001:
            assert not all(x.fits(first, low * (1 - 1e-4)) for x in found.layouts)


def test_each_number_of_cells_to_a_side_is_as_likely():
    found = feasible(0.3, recycle=True)  # 12 x 12
    positions = np.linspace(0, 1, 10_001)
    cells = np.array([math.ceil(12 / found.cell(p, 0.95)) for p in positions])
    most = cells.max()
    counts = np.bincount(cells)[2:most]  # the ends have what is left of theirs
    assert most >= 8 and counts.max() - counts.min() <= 1
    assert found.cell(1.0, 0.95) == pytest.approx(12)


def test_a_given_cell_raises_the_first_floor():
    """144 tokens in 16 cells: never fewer than 16 after stage 0."""
    found = feasible(0.12, cell=3.0)
    for positions in corners_and_more(2, np.random.default_rng(0)):
        share = found.shares(positions)[0]
        assert math.floor(144 * share + 0.5) >= 16
    with refused(UsageError, [0, 9, 18], "keep 0.03"):
        feasible(0.03, cell=3.0)
    feasible(0.03)


def test_an_image_too_small_for_a_budget_keeps_its_least_and_bounds_no_other():
    for keep in (0.1, 0.143):  # one of 7 tokens keeps .1429 at least
        found = feasible(keep, images="several", stages=(0,))
        assert PruneStrategy(ratios=ratios_of(found.shares([]))).counts(7, 28) == (1,)


def test_budgets_that_leave_every_image_no_token_are_refused():
    with refused(UsageError, [0], "keep 0.001"):
        feasible(0.001, images="several", stages=(0,))
    with refused(UsageError, [14], "keep 0.5"):
        feasible(0.5, stages=(14,))


def test_protected_newlines_stay_only_if_they_are_protected():
    needed = 10 / 153  # 9 of 9 + 108 + 36 tokens are newlines, and one of each grid is recycled
    with pytest.raises(UsageError):
        feasible(needed - 0.02, stages=(0,), images="tiles")
    feasible(needed - 0.02, stages=(0,), images="tiles", protect_newlines=False)


def test_shares_from_elsewhere_are_checked():
    found = feasible(0.2, cell=3.0)
    with refused(UsageError, "stage 0", 0.1):
        found.check([0.1, 0.1, 0.1])
    with refused(UsageError, "stage 2", 0.001):
        found.check([0.5, 0.4, 0.001])
