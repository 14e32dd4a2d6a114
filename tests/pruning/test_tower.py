"""The taps: attention as the eager kernel computes it, and maps that stay 1:1 with the tokens."""

from itertools import groupby

import pytest
import torch

from compress.errors import UsageError
from compress.pruning.families import FAMILIES, images_of_runs, tokens_of_a_crop
from compress.pruning.tower import TapSettings
from support.refusals import refused
from support.tiny_models import (
    IMAGE,
    ON_GRIDS,
    OWN_TOWERS,
    PATCHES,
    PIXTRAL,
    SHUFFLED,
    tiny_inputs,
    tiny_model,
)

LLAVA = ("llava", "llava_siglip", "llava_next", "llava_onevision")
QWEN = tuple(family for family in ON_GRIDS if family != "glm46v")
MERGING = [family for family in (*SHUFFLED, *PIXTRAL) if family != "llava_pixtral"]
ROWS = [[2, (20, 40), 3], [1, (44, 24), 1, (24, 24), 2]]
ALL = frozenset({"importance", "attention", "keys"})


def tap_of(model, signals=ALL, threshold=1.1, weight=0.0, **options):
    layer = options.pop("layer", None)
    settings = TapSettings(signals, threshold, "mean", weight, layer, **options)
    return FAMILIES[model.config.model_type](model.model, settings)


@torch.no_grad()
def look(model, inputs, tap):
    """What the tap saw, and the model's features of the same images."""
    drop = ("input_ids", "attention_mask", "mm_token_type_ids")
    arguments = {name: value for name, value in inputs.items() if name not in drop}
    handles = tap.install()
    features = model.model.get_image_features(**arguments, return_dict=True).pooler_output
    images = tap.images(arguments)
    for handle in handles:
        handle.remove()
    return images, features


def votes(A, threshold=1.1):
    """The definition, for one crop's attention [N, N] among its patches."""
    received = A.mean(0)
    voters = received > threshold * received.mean()
    return A[voters].mean(0) if voters.any() else received


@pytest.mark.parametrize("family", [*LLAVA, *QWEN, *OWN_TOWERS])
@pytest.mark.parametrize("signals", [frozenset(), ALL], ids=["none", "all"])
def test_one_entry_per_visual_token(family, signals):
    model = tiny_model(family)
    images, features = look(model, tiny_inputs(model, ROWS), tap_of(model, signals))
    sizes, expected = [len(tokens) for tokens in images], [len(feature) for feature in features]
    if family in ("idefics3", "smolvlm"):  # features of a prompt lie in one tensor
        assert sum(sizes) == sum(expected) and set(sizes) == {9}
    else:
        assert sizes == expected
    for tokens in images:
        places = torch.stack([tokens.segment, tokens.row, tokens.column], dim=1)[~tokens.newline]
        assert len(places.unique(dim=0)) == len(places)
        for segment in places[:, 0].unique():
            grid = places[places[:, 0] == segment][:, 1:]
            height, width = (grid.max(0).values + 1).tolist()
            # A full grid in raster order.
            assert torch.equal(grid[:, 0] * width + grid[:, 1], torch.arange(height * width))
        if signals:
            assert tokens.importance.shape == tokens.attention.shape == (len(tokens),)
            assert torch.isfinite(tokens.importance).all()


@pytest.mark.parametrize("family", ["llava", "llava_siglip"])
@pytest.mark.parametrize("layer", [None, 0, -1])
def test_patch_towers_agree_with_the_eager_kernel(family, layer):
    model = tiny_model(family, "eager")
    inputs = tiny_inputs(model, ROWS)
    images, _ = look(model, inputs, tap_of(model, layer=layer))
    with torch.no_grad():
        output = model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    default = 1 if family == "llava" else 2  # the layer that makes the features
    maps = output.attentions[default if layer is None else layer].mean(1)
    first = int(family == "llava")
    for tokens, A in zip(images, maps, strict=True):
        torch.testing.assert_close(tokens.importance, votes(A[first:, first:]))
        attention = A[0, 1:] if first else A.mean(0)
        torch.testing.assert_close(tokens.attention, attention)


@pytest.mark.parametrize("family", QWEN)
def test_merging_towers_agree_with_the_eager_kernel(family, monkeypatch):
    import importlib

    model = tiny_model(family, "eager")
    kernel = f"transformers.models.{family}.modeling_{family}"
    eager = importlib.import_module(kernel).eager_attention_forward
    seen = []

    def spy(module, *args, **kwargs):
        output, weights = eager(module, *args, **kwargs)
        if module is tapped:
            seen.append(weights[0].mean(0))
        return output, weights

    monkeypatch.setattr(f"{kernel}.eager_attention_forward", spy)
    tap = tap_of(model)
    tapped = model.model.visual.blocks[tap.layer].attn
    inputs = tiny_inputs(model, ROWS)
    images, _ = look(model, inputs, tap)
    assert len(seen) == 3  # one matrix per image: all of it
    for tokens, A in zip(images, seen, strict=True):
        expected, received = (x.view(-1, 4).mean(1) for x in (votes(A), A.mean(0)))
        if family == "qwen2_5_vl":  # the kernel's order is that of the windows
            expected, received = expected.sort().values, received.sort().values
            tokens = tokens.take(tokens.importance.argsort())
            torch.testing.assert_close(tokens.attention.sort().values, received)
        else:
            torch.testing.assert_close(tokens.attention, received)
        torch.testing.assert_close(tokens.importance, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", OWN_TOWERS)
@pytest.mark.parametrize("layer", [None, 0])
def test_towers_of_their_own_agree_with_the_eager_kernel(family, layer):
    """Maps of the tower's own kernel, of each crop or image; a token has the mean of its patches,
    which lie where the features say."""
    model = tiny_model(family, "eager")
    inputs = tiny_inputs(model, ROWS)
    tap, seen = tap_of(model, layer=layer), []
    tapped = tap.layers[tap.layer].get_submodule(
        "self_attn" if hasattr(tap.layers[0], "self_attn") else "attention"
    )
    handle = tapped.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    images, _ = look(model, inputs, tap)
    handle.remove()
    (maps,) = (A.mean(1) for A in seen)  # heads averaged
    if family in PIXTRAL:
        grids = [(h // 4, w // 4) for h, w in inputs["image_sizes"].tolist()]
        ends = torch.tensor([h * w for h, w in grids]).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        maps = [maps[0, a:b, a:b] for a, b in zip(starts, ends, strict=True)]
        for A in maps:
            torch.testing.assert_close(A.sum(-1), torch.ones(len(A)))  # to nothing else
    else:
        grids = [(6, 6)] * len(maps)
    first = int(family in ("internvl", "vipllava"))
    merge = getattr(tap, "merge", 1)
    assert merge == (2 if family in MERGING else 1)
    assert len(images) == len(maps)
    assert tap.layer == (
        layer if layer is not None else 1 if family == "vipllava" else len(tap.layers) - 1
    )
    for tokens, A, (height, width) in zip(images, maps, grids, strict=True):
        attention = A[0, 1:] if first else A.mean(0)
        for found, of_patches in (
            (tokens.importance, votes(A[first:, first:])),
            (tokens.attention, attention),
        ):
            rows, columns = height // merge, width // merge
            field = of_patches.view(height, width)
            expected = torch.stack(
                [
                    field[r * merge : (r + 1) * merge, c * merge : (c + 1) * merge].mean()
                    for r in range(rows)
                    for c in range(columns)
                ]
            )
            torch.testing.assert_close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", MERGING)
def test_a_token_has_the_place_of_the_pixels_that_it_is_of(family):
    """Its features change with pixels of its square, through a tower that looks nowhere else."""
    model = tiny_model(family)
    inputs = tiny_inputs(model, [[1, (24, 24), 2]])
    tap = tap_of(model, frozenset())
    for layer in tap.layers:
        attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
        attention.get_submodule("v_proj").weight.zero_()
    changed = inputs["pixel_values"].clone()
    changed[..., 8:16, 16:24] += 1.0  # row 1, column 2 of 3 x 3
    (tokens,), before = look(model, inputs, tap)
    _, after = look(model, inputs | {"pixel_values": changed}, tap)
    moved = (after[0] - before[0]).abs().amax(-1) > 1e-6
    assert moved.nonzero().tolist() == [[5]]
    assert (int(tokens.row[5]), int(tokens.column[5])) == (1, 2)


@pytest.mark.parametrize("family", MERGING)
def test_entropy_favours_the_square_that_is_not_flat(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model, [[1, (24, 16) if family in PIXTRAL else (24, 24), 2]])
    pixels = torch.full_like(inputs["pixel_values"], 0.1)  # all 0 would be no picture (Idefics3)
    noise = torch.Generator().manual_seed(0)
    pixels[..., 8:16, 8:16] = torch.randn(3, 8, 8, generator=noise)
    tap = tap_of(model, frozenset({"importance"}), weight=100.0)
    (tokens,), _ = look(model, inputs | {"pixel_values": pixels}, tap)
    best = int(tokens.importance.argmax())
    assert (int(tokens.row[best]), int(tokens.column[best])) == (1, 1)


@pytest.mark.parametrize("family", ["llava", "llava_siglip", *OWN_TOWERS])
def test_a_plan_counts_the_images_that_are_pruned(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model, [[2, (20, 40), 3]])
    images, _ = look(model, inputs, tap_of(model, frozenset()))
    parts = groupby((inputs["input_ids"][0] == IMAGE).tolist())
    runs = [len(list(run)) for visual, run in parts if visual]
    assert images_of_runs(model.config, runs) == [len(tokens) for tokens in images]
    crop = tokens_of_a_crop(model.config)
    assert crop == (None if family in PIXTRAL else (len(images[0]), 24))


def test_padded_crops_are_refused():
    model = tiny_model("idefics3")
    inputs = tiny_inputs(model)
    mask = torch.ones((*inputs["pixel_values"].shape[:2], 24, 24), dtype=torch.bool)
    mask[:, :, :, 12:] = False
    with refused(UsageError, "pixel_attention_mask"):
        look(model, inputs | {"pixel_attention_mask": mask}, tap_of(model))


def test_the_order_does_not_depend_on_windows_when_all_blocks_attend_everywhere():
    images = []
    for window in (8, 16, 1024):
        model = tiny_model("qwen2_5_vl")
        model.model.visual.fullatt_block_indexes = [0, 1, 2]
        model.model.visual.window_size = window
        found, _ = look(model, tiny_inputs(model, ROWS), tap_of(model))
        images.append(torch.cat([tokens.importance for tokens in found]))
    assert images[0].std() > 1e-4
    torch.testing.assert_close(images[0], images[2])
    torch.testing.assert_close(images[1], images[2])


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_maps_take_the_way_of_the_features(family):
    """A map that is one channel of the features comes out as that channel."""
    model = tiny_model(family)
    inputs = tiny_inputs(model, ROWS)
    tap = tap_of(model)
    projected = []
    handle = model.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: projected.append(output)
    )
    tap._signals = lambda pixels: (
        {"importance": projected[0][..., :1]},
        torch.zeros(len(pixels), dtype=torch.bool),
    )
    images, features = look(model, inputs, tap)
    handle.remove()
    for tokens, feature in zip(images, features, strict=True):
        place = ~tokens.newline
        torch.testing.assert_close(tokens.importance[place], feature[place, 0])
        newline = model.model.image_newline
        assert torch.equal(feature[tokens.newline], newline.expand(int((~place).sum()), -1))
        assert int(tokens.newline.sum()) > 0


def test_onevision_shrinks_large_images_and_their_maps():
    model = tiny_model("llava_onevision")
    images, features = look(model, tiny_inputs(model, [[1, (72, 72)]]), tap_of(model))
    # 3 x 3 crops of 6 x 6 patches are more than 4 crops' worth: 18 x 18 becomes 12 x 12.
    assert len(features[0]) == PATCHES + 12 * 13 == len(images[0])
    assert int(images[0].newline.sum()) == 12


def noisy_patch(model, inputs, number):
    """The same images, grey but for one patch (or 2x2 unit) of the last, which is noise."""
    pixels = torch.zeros_like(inputs["pixel_values"])
    noise = torch.Generator().manual_seed(0)
    if pixels.ndim == 2:
        pixels[-4 * number - 4 : len(pixels) - 4 * number] = torch.randn(
            4, pixels.shape[1], generator=noise
        )
    else:
        row, column = divmod(PATCHES - 1 - number, 6)
        pixels[-1, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = torch.randn(
            3, 4, 4, generator=noise
        )
    return inputs | {"pixel_values": pixels}


@pytest.mark.parametrize("family", ["llava", "llava_siglip", *QWEN])
@pytest.mark.parametrize("number", [0, 4])
def test_entropy_favours_the_patch_that_is_not_flat(family, number):
    model = tiny_model(family)
    inputs = noisy_patch(model, tiny_inputs(model, ROWS), number)
    tap = tap_of(model, frozenset({"importance"}), weight=100.0)
    images, _ = look(model, inputs, tap)
    last = images[-1].importance
    assert int(last.argmax()) == len(last) - 1 - number


def test_entropy_uses_the_processors_statistics():
    model = tiny_model("llava")
    inputs = tiny_inputs(model)
    given = {"pixel_mean": torch.zeros(3), "pixel_std": torch.full((3,), 1e-6)}  # all is black
    flat, _ = look(model, inputs, tap_of(model, weight=1.0, **given))
    plain, _ = look(model, inputs, tap_of(model))
    torch.testing.assert_close(flat[0].importance, plain[0].importance + 1 / PATCHES)


@pytest.mark.parametrize("family", ["llava", "llava_siglip"])
def test_entropy_is_that_of_the_8_bit_picture_that_the_processor_was_given(family):
    import transformers as hf
    from PIL import Image

    from compress.pruning.engine import prune_visual_tokens
    from compress.recipe.strategy import PruneStrategy

    kind = hf.CLIPImageProcessorPil if family == "llava" else hf.SiglipImageProcessorPil
    processor = kind(do_resize=False, do_center_crop=False)
    picture = torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(0))
    picture[:12] //= 16
    image = Image.fromarray(picture.to(torch.uint8).numpy())
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    model = tiny_model(family)
    inputs = tiny_inputs(model) | {"pixel_values": pixels}
    patches = picture.view(6, 4, 6, 4, 3).permute(0, 2, 1, 3, 4).reshape(PATCHES, 16, 3)
    entropy = []
    for patch in patches.double().mean(-1).round().long():
        p = patch.bincount(minlength=256) / 16
        entropy.append(-(p[p > 0] * p[p > 0].log2()).sum())
    plain, _ = look(model, inputs, tap_of(model))
    expected = plain[0].importance + 2 * torch.stack(entropy).softmax(0)
    for given in (None, processor):  # the tower's usual statistics are this processor's
        with torch.no_grad():
            strategy = PruneStrategy(ratios=(0.5,), voter_threshold=1.1, entropy_weight=2.0)
            with prune_visual_tokens(model, strategy, given) as pruning:
                model(**inputs)
        torch.testing.assert_close(pruning.last.images[0].tokens.importance, expected)
