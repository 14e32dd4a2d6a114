"""Images with fewer tokens than a stage's least: they keep what they can, and are counted."""

import pytest
import torch

from compress.pruning.engine import prune_visual_tokens
from compress.pruning.search import search_strategy
from compress.recipe.strategy import METHODS, PruneStrategy
from support.tiny_models import LAYERS, masked_run, tiny_inputs, tiny_model

# Icons, very wide and very tall pictures, alone and beside a large one.
SHAPES = {
    "icon": [[3, (4, 4), 5]],
    "wide": [[3, (4, 200), 5]],
    "tall": [[3, (200, 4), 5]],
    "beside": [[3, (96, 96), 5], [2, (4, 4), 3]],
    "two": [[3, (96, 96), 5, (4, 4), 1], [6]],
}
FEW = PruneStrategy(stages=(0, 2), ratios=(0.1, 1.0))
CELLS = PruneStrategy(stages=(0, 2), ratios=(0.35, 0.6), cell=3.0)
NONE = PruneStrategy(stages=(0, 1, 3), ratios=(0.01, 0.1, 0.5), cell=1.0)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strategy", [FEW, CELLS, NONE], ids=["few", "cells", "none"])
def test_pictures_of_every_shape_run_and_equal_the_masked_full_run(family, shape, strategy):
    model = tiny_model(family)
    inputs = tiny_inputs(model, SHAPES[shape])
    without = strategy.model_copy(update={"cell": None})  # mixed tokens have no masked full run
    with prune_visual_tokens(model, strategy) as pruning:
        assert logits(model, inputs).isfinite().all()
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    with prune_visual_tokens(model, without) as pruning:
        found = logits(model, inputs)
    with masked_run(model, [pruning.last.kept(layer) for layer in range(LAYERS)]):
        torch.testing.assert_close(found, logits(model, inputs), atol=1e-5, rtol=1e-5)
    for image in pruning.last.images:
        counts = strategy.counts(len(image.tokens), LAYERS)
        newlines = int(image.tokens.newline.sum())
        assert tuple(n for _, n in image.kept) == tuple(max(n, newlines) for n in counts)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_least_of_a_small_picture(method):
    stages = (1,) if method in ("fastv", "pyramiddrop") else (0,)
    strategy = PruneStrategy(method=method, stages=stages, ratios=(0.05,))
    for family in ("qwen2_vl", "llava_onevision"):
        model = tiny_model(family)
        for rows in SHAPES.values():
            with prune_visual_tokens(model, strategy) as pruning:
                assert logits(model, tiny_inputs(model, rows)).isfinite().all()
            assert all(image.kept[-1][1] >= 1 for image in pruning.last.images)


def test_small_pictures_are_counted_and_leave_the_large_one_as_it_is_alone():
    model = tiny_model("qwen2_vl")
    with prune_visual_tokens(model, CELLS) as pruning:
        logits(model, tiny_inputs(model, SHAPES["beside"]))
    large, small = pruning.stats.images
    totals = pruning.stats.as_dict()
    assert (large.at_least, large.not_recycled, large.merged > 0) == (False, False, True)
    assert small.kept == (1,) * LAYERS and small.tokens == 1
    assert totals["images_at_least"] == int(small.at_least)
    assert totals["images_not_recycled"] == int(small.not_recycled)
    with prune_visual_tokens(model, FEW) as pruning:
        logits(model, tiny_inputs(model, SHAPES["beside"]))
    assert [image.at_least for image in pruning.stats.images] == [False, True]
    assert pruning.stats.as_dict()["images_at_least"] == 1


def test_a_picture_with_more_cells_than_tokens_is_not_recycled():
    model = tiny_model("qwen2_vl")
    strategy = CELLS.model_copy(update={"cell": 1.0})
    with prune_visual_tokens(model, strategy) as pruning:
        logits(model, tiny_inputs(model, [[3, (96, 96), 5]]))
    (image,) = pruning.stats.images
    assert (image.not_recycled, image.merged) == (True, 0)
    assert image.kept[0] == strategy.counts(image.tokens, LAYERS)[0]


def test_a_search_with_a_small_picture_finds_what_works_on_all_shapes():
    pytest.importorskip("optuna")
    model = tiny_model("qwen2_vl")
    samples = [tiny_inputs(model, rows) for rows in ([[3, (96, 96), 5]], [[3, (4, 4), 5]])]
    found = search_strategy(model, samples, 0.4, trials=2)
    for rows in SHAPES.values():
        with prune_visual_tokens(model, found.strategy):
            assert logits(model, tiny_inputs(model, rows)).isfinite().all()
