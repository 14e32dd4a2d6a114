"""Pictures of pruned prompts: each patch is drawn as what became of its token."""

import numpy as np
import pytest
import torch
from PIL import Image

from compress.errors import UsageError
from compress.pruning.engine import prune_visual_tokens
from compress.pruning.pictures import (
    CAPTION,
    DIMMED,
    MARGIN,
    PANEL,
    TINT,
    TINTED,
    draw_pruning,
    pictures_seen,
    watching,
)
from compress.recipe.strategy import PruneStrategy
from support.refusals import refused
from support.tiny_models import BATCH, OWN_TOWERS, SINGLE, tiny_inputs, tiny_model

STRATEGY = PruneStrategy(stages=(0, 2), ratios=(0.5, 0.5), voter_threshold=1.1, cell=3)
GREY = 200
SIDE = 6  # of a crop's grid


class Processor:
    image_mean, image_std, merge_size = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3], 2


def pruned(family, rows=SINGLE, strategy=STRATEGY):
    model = tiny_model(family)
    inputs = tiny_inputs(model, rows)
    with (
        torch.no_grad(),
        prune_visual_tokens(model, strategy) as pruning,
        watching(model, pruning) as watched,
    ):
        model(**inputs)
    return pruning.last, watched, inputs


def plain(color=GREY):
    return Image.new("RGB", (48, 48), (color,) * 3)


def patches(sheet, grid, row=0, panels=2):
    """Mean colour [panels, rows, columns, 3] of the patches of one row of panels."""
    side = round(PANEL / max(grid))
    height, width = grid[0] * side, grid[1] * side
    pixels = np.asarray(sheet, dtype=float)
    top = MARGIN + row * (height + CAPTION + MARGIN)
    found = []
    for panel in range(panels):
        left = MARGIN + panel * (width + MARGIN)
        part = pixels[top : top + height, left : left + width]
        found.append(part.reshape(grid[0], side, grid[1], side, 3).mean(axis=(1, 3)))
    return np.stack(found)


def expected(prompt, image, layer, color=GREY):
    """[tokens, 3]: what a patch of a plain grey picture must look like."""
    kept = prompt.kept(layer)[image.row, image.positions].numpy()
    merged = np.zeros_like(kept)
    merged[image.merged.numpy()] = True
    tinted = (1 - TINTED) * color + TINTED * np.array(TINT)
    shown = np.where(kept[:, None], np.full(3, color), DIMMED * color)
    return np.where((kept & merged)[:, None], tinted, shown)


def test_each_stage_shows_what_it_kept_and_recycled():
    prompt, _, _ = pruned("llava")
    (image,) = prompt.images
    assert len(image.merged) > 0
    found = patches(draw_pruning(plain(), prompt), (SIDE, SIDE))
    for panel, layer in enumerate((0, 2)):
        wanted = expected(prompt, image, layer).reshape(SIDE, SIDE, 3)
        assert np.allclose(found[panel], wanted, atol=0.51)
    dimmed = [(panel.max(axis=-1) < GREY / 2).sum() for panel in found]
    assert dimmed == [36 - 18, 36 - 9]


def test_the_picture_itself_shows_through():
    prompt, _, _ = pruned("llava")
    half = Image.new("RGB", (60, 60), (0, 0, 0))
    half.paste((255, 255, 255), (30, 0, 60, 60))
    found = patches(draw_pruning(half, prompt), (SIDE, SIDE))[0]
    kept = prompt.kept(0)[0, prompt.images[0].positions].view(SIDE, SIDE).numpy()
    merged = np.zeros(SIDE * SIDE, dtype=bool)
    merged[prompt.images[0].merged] = True
    plainly = kept & ~merged.reshape(SIDE, SIDE)
    assert plainly[:, 0].any() and (found[:, 0][plainly[:, 0]] < 2).all()
    assert plainly[:, -1].any() and (found[:, -1][plainly[:, -1]] > 253).all()


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_tiles_are_a_grid_of_their_own_below_the_whole_image(family):
    prompt, _, _ = pruned(family)
    (image,) = prompt.images
    tiles = image.tokens.segment == 1
    grid = tuple(int(x[tiles].max()) + 1 for x in (image.tokens.row, image.tokens.column))
    sheet = draw_pruning(plain(), prompt)
    whole = image.tokens.segment == 0
    wanted = expected(prompt, image, 2)
    assert np.allclose(
        patches(sheet, (SIDE, SIDE))[1].reshape(-1, 3), wanted[whole.numpy()], atol=0.51
    )
    side = round(PANEL / max(grid))
    below = sheet.crop((0, 48 * SIDE + CAPTION + MARGIN, sheet.width, sheet.height))
    assert below.height == grid[0] * side + CAPTION + 2 * MARGIN
    assert np.allclose(patches(below, grid)[1].reshape(-1, 3), wanted[tiles.numpy()], atol=0.51)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_merged_patches_are_one(family):
    prompt, _, inputs = pruned(family)
    (image,) = prompt.images
    _, height, width = (inputs["image_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
    found = patches(draw_pruning(plain(), prompt), (height, width))
    wanted = expected(prompt, image, 2).reshape(height, width, 3)
    assert np.allclose(found[1], wanted, atol=0.51)


@pytest.mark.parametrize("family", OWN_TOWERS)
def test_what_is_pruned_apart_is_drawn_apart(family):
    """As many pictures as images, each of the size of its own grid."""
    prompt, watched, inputs = pruned(family, BATCH)
    pictures = pictures_seen(watched.inputs, Processor())
    assert len(pictures) == len(prompt.images) >= 3
    real = [x for x in inputs["pixel_values"].flatten(0, -4) if x.any()]
    for number, (picture, values) in enumerate(zip(pictures, real, strict=True)):
        height, width = (
            inputs["image_sizes"][number].tolist() if "image_sizes" in inputs else (24, 24)
        )
        assert picture.size == (width, height)
        mean, std = (np.array(x) for x in (Processor.image_mean, Processor.image_std))
        corner = values[:, 0, 0].numpy() * std + mean
        assert np.allclose(np.asarray(picture)[0, 0], corner.clip(0, 1) * 255, atol=0.51)
        assert draw_pruning(picture, prompt, number).width > PANEL


def test_an_image_that_is_not_there_or_has_no_grid():
    prompt, _, _ = pruned("llava", BATCH)
    assert draw_pruning(plain(), prompt, 2).size == draw_pruning(plain(), prompt, 0).size
    with refused(UsageError, "image 3", "3 images"):
        draw_pruning(plain(), prompt, 3)
    prompt.images[0].tokens.column[0] = 1
    with refused(UsageError, "36 tokens", "6 x 6"):
        draw_pruning(plain(), prompt)


# ---- what the model saw -------------------------------------------------------------------------


def normalised(pixels):
    """[3, H, W] of 8-bit pixels [H, W, 3]."""
    mean, std = np.array(Processor.image_mean), np.array(Processor.image_std)
    return torch.tensor((pixels / 255 - mean) / std).permute(2, 0, 1)


def test_pixel_values_become_the_picture_again():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3))
    planes = torch.stack([normalised(p) for p in pixels])
    crops = torch.stack([planes, torch.zeros_like(planes)], dim=1)
    for values in (planes, crops):
        found = pictures_seen({"pixel_values": values}, Processor)
        assert np.array_equal(np.stack(found), pixels)


def test_the_patches_of_qwen_become_the_picture_again():
    """As transformers' own image processor cuts them, on pixels that it need not resize."""
    from transformers import Qwen2VLImageProcessorPil

    size = {"shortest_edge": 64, "longest_edge": 10**6}
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    draw = np.random.default_rng(1)
    pictures = [draw.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((24, 40), (16, 16))]
    inputs = processor([Image.fromarray(p) for p in pictures], return_tensors="pt")
    found = pictures_seen(dict(inputs), processor)
    for seen, picture in zip(found, pictures, strict=True):
        assert np.array_equal(np.asarray(seen), picture)


def test_other_layouts_are_refused():
    with refused(UsageError, [7, 3]):
        pictures_seen({"pixel_values": torch.zeros(7, 3)}, Processor)
    grids = {"image_grid_thw": torch.tensor([[1, 2, 2]])}
    with refused(UsageError, 50):
        pictures_seen({"pixel_values": torch.zeros(4, 50)} | grids, Processor)


# ---- watching -----------------------------------------------------------------------------------


def test_watching_keeps_the_first_prompt_and_counts_all(tmp_path):
    model = tiny_model("llava")
    inputs = tiny_inputs(model, BATCH)
    with torch.no_grad(), prune_visual_tokens(model, STRATEGY) as pruning:
        model(**inputs)
        encode = pruning.base.get_image_features
        with watching(model, pruning) as watched:
            model(**inputs)
            first = pruning.last
            model.generate(**tiny_inputs(model, SINGLE), max_new_tokens=2, do_sample=False)
        assert pruning.base.get_image_features is encode
        assert watched.prompt is first
        last = pruning.last
        with watching(model, pruning) as nothing:
            pass
        assert nothing.prompt is None and pruning.last is last
        assert torch.equal(watched.inputs["pixel_values"], inputs["pixel_values"])
    figures = watched.figures()
    assert (figures["prompts"], figures["images"]) == (3 + 1, 3 + 1)
    assert figures["strategy"] == STRATEGY.model_dump(mode="json")
    paths = watched.draw(tmp_path / "new", Processor, count=2)
    assert [Image.open(path).format for path in paths] == ["PNG", "PNG"]
    assert paths == [str(tmp_path / "new" / f"visual-tokens-{i}.png") for i in (0, 1)]


def test_a_model_that_does_not_prune_is_not_watched():
    model = tiny_model("llava")
    with watching(model) as watched:
        assert watched is None
