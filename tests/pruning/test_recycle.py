"""Recycling: every budget is met exactly, and the cells agree with a loop over them."""

import pytest
import torch

from compress.errors import UsageError
from compress.pruning.recycle import grid_cells, keep_with_cells, merge_cells
from support.refusals import refused

ROWS, COLUMNS = 6, 8
N = ROWS * COLUMNS


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def grid(size):
    index = torch.arange(N)
    row, column = index // COLUMNS, index % COLUMNS
    return grid_cells(torch.zeros(N), row, column, size), row, column


NOTHING = torch.zeros(N, dtype=torch.bool)


@pytest.mark.parametrize("size", [2.0, 2.5, 3.0, 7.9, 100.0])
def test_cells_are_the_floors_of_equation_6(size):
    cells, row, column = grid(size)
    same = cells[:, None] == cells[None]
    y, x = (row // size), (column // size)
    assert torch.equal(same, (y[:, None] == y) & (x[:, None] == x))


def test_cells_of_two_segments_are_never_merged():
    zero = torch.zeros(2)
    assert len(set(grid_cells(torch.tensor([0, 1]), zero, zero, 100.0).tolist())) == 2


@pytest.mark.parametrize("size", [1.0, 2.5, 3.0, 100.0])
def test_every_budget_is_met_exactly(size):
    cells, _, _ = grid(size)
    importance = torch.rand(N)
    least = len(cells.unique())
    for count in range(least, N + 1):
        kept, places = keep_with_cells(importance, cells, count, NOTHING)
        assert int(kept.sum()) + len(places) == count
        assert not kept[places].any()
        # One recycled token in each cell that lost something, and none elsewhere.
        assert sorted(cells[places].tolist()) == sorted(cells[~kept].unique().tolist())
    with refused(UsageError, least, N, least - 1):
        keep_with_cells(importance, cells, least - 1, NOTHING)


def test_least_important_go_first_and_fixed_ones_never():
    cells, _, _ = grid(3.0)
    importance, fixed = torch.rand(N), torch.rand(N) < 0.2
    kept, _ = keep_with_cells(importance, cells, 24, fixed)
    assert kept[fixed].all()
    free = ~fixed
    assert importance[free & kept].min() > importance[free & ~kept].max()


def test_recycled_tokens_equal_the_loop_over_cells():
    cells, _, _ = grid(2.5)
    importance, values = torch.rand(N), torch.randn(N, 5)
    kept, places = keep_with_cells(importance, cells, 20, NOTHING)
    merged = merge_cells(values, importance, cells, kept, places)
    assert len(places) > 4
    for place, token in zip(places.tolist(), merged, strict=True):
        members = [i for i in range(N) if not kept[i] and cells[i] == cells[place]]
        assert importance[place] == max(importance[i] for i in members)
        weight = sum(importance[i] for i in members)
        expected = sum(importance[i] * values[i] for i in members) / weight
        torch.testing.assert_close(token, expected)


def test_a_mean_lies_between_its_tokens_and_equal_tokens_stay_the_same():
    cells, _, _ = grid(3.0)
    importance = torch.rand(N)
    kept, places = keep_with_cells(importance, cells, 18, NOTHING)
    same = merge_cells(torch.ones(N, 2) * 7, importance, cells, kept, places)
    torch.testing.assert_close(same, torch.full_like(same, 7))


@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_vanishing_importances_give_a_finite_mean(scale):
    cells, _, _ = grid(100.0)
    values, importance = torch.randn(N, 3), scale * torch.ones(N)
    kept, places = keep_with_cells(importance, cells, 1, NOTHING)
    torch.testing.assert_close(
        merge_cells(values, importance, cells, kept, places)[0], values.mean(0)
    )


def test_a_picture_smaller_than_a_cell_leaves_one_recycled_token():
    kept, places = keep_with_cells(
        torch.tensor([1.0, 3.0, 2.0, 0.5]), torch.zeros(4, dtype=torch.long), 2, NOTHING[:4]
    )
    assert kept.tolist() == [False, True, False, False]
    assert places.tolist() == [2]


def test_nothing_is_pruned_at_full_budget():
    cells, _, _ = grid(3.0)
    kept, places = keep_with_cells(torch.rand(N), cells, N, NOTHING)
    assert kept.all() and len(places) == 0
