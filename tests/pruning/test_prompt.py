"""A prompt's bookkeeping: order is kept, fillers lie on the right side, and maps are inverse."""

import pytest
import torch

from compress.pruning.prompt import PromptImage, PrunedPrompt, compact, take, take_positions
from compress.pruning.tower import VisualTokens


def image(row, positions):
    n = len(positions)
    place = torch.arange(n)
    return PromptImage(row, torch.tensor(positions), VisualTokens(0 * place, 0 * place, place))


@pytest.mark.parametrize("align_right", [True, False])
def test_compacting_keeps_the_order_and_fills_the_other_side(align_right):
    keep = torch.rand(5, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    order = compact(keep, align_right)
    assert order.shape[1] == keep.sum(1).max()
    for row, slots in zip(keep, order, strict=True):
        kept = row.nonzero()[:, 0].tolist()
        slots = slots.tolist()
        assert (slots[len(slots) - len(kept) :] if align_right else slots[: len(kept)]) == kept


def prompt():
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, :3] = False
    return PrunedPrompt(mask, [image(0, [1, 2, 3, 4]), image(0, [6, 7]), image(1, [4, 5, 6])])


def test_stages_narrow_the_views_one_after_the_other():
    batch = prompt()
    assert batch.narrow(0) is None  # nothing has gone
    batch.images[0].alive = torch.tensor([0, 3])
    first = batch.narrow(0)
    batch.images[0].alive = torch.tensor([3])
    batch.images[2].alive = torch.tensor([1])
    second = batch.narrow(5)
    assert len(batch.views) == 2
    expected = {0: [[0, 1, 4, 5, 6, 7, 8, 9], [3, 4, 5, 6, 7, 8, 9]]}
    expected[5] = [[0, 4, 5, 6, 7, 8, 9], [3, 5, 7, 8, 9]]
    for layer, rows in expected.items():
        for row, positions in enumerate(rows):
            view = batch.view(layer)
            assert view.index[row][view.valid[row]].tolist() == positions
            assert batch.kept(layer)[row].nonzero()[:, 0].tolist() == positions
    assert batch.view(4) is batch.view(0) and batch.view(9) is batch.view(5)
    # Taking twice is taking what the last view names.
    x = torch.randn(2, 10, 3)
    twice = take(take(x, first), second)
    view = batch.view(5)
    assert torch.equal(twice[view.valid], take(x, view.index)[view.valid])


def test_slots_are_the_inverse_of_the_index():
    batch = prompt()
    batch.images[1].alive = torch.tensor([], dtype=torch.long)
    batch.narrow(2)
    slots, view = batch.slots(), batch.view(2)
    for row in range(2):
        for position in range(10):
            slot = int(slots[row, position])
            if batch.kept(2)[row, position]:
                assert int(view.index[row, slot]) == position
            else:
                assert slot == -1


def test_positions_of_all_kinds_are_taken():
    order = torch.tensor([[0, 3], [1, 2]])
    plain = torch.arange(4)[None]  # shared by the rows
    assert take_positions(plain, order).tolist() == [[0, 3], [1, 2]]
    rows = torch.stack([plain.expand(2, -1) + 10 * i for i in range(3)])  # M-RoPE
    assert take_positions(rows, order)[2].tolist() == [[20, 23], [21, 22]]


def test_image_counts_by_layer():
    picture = image(0, [1, 2, 3])
    picture.kept = [(0, 2), (4, 1)]
    assert [picture.kept_at(layer) for layer in (0, 3, 4, 9)] == [2, 2, 1, 1]
    picture.kept = [(4, 1)]
    assert picture.kept_at(3) == 3
