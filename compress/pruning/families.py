"""Which multimodal models can be pruned: one row each, how their images become visual tokens.

tap = tower_of(model)(model.model, settings); tower_for("llava")
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from compress.errors import UsageError
from compress.models.families import MULTIMODAL
from compress.models.vision import Inputs
from compress.pruning.crop_towers import Crops, Pack, PatchTower, ShuffledTower
from compress.pruning.sized_towers import MergingTower, PixtralTower
from compress.pruning.tower import TapSettings, VisionTap, one_side

# Makes the tap for a vision tower.
Tower = Callable[[PreTrainedModel, TapSettings], VisionTap]


def _one_crop_each(base: PreTrainedModel, inputs: Inputs) -> list[int]:
    return [1] * len(inputs["pixel_values"])


def _as_they_are(base: PreTrainedModel, maps: list[Tensor], inputs: Inputs) -> list[Tensor]:
    return [crops[0] for crops in maps]


def _tiles(base: PreTrainedModel, inputs: Inputs) -> list[int]:
    """Crops per image: the whole image and its tiles; of several images in a prompt, see below."""
    # Its own import: only these families need that model's code.
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    sizes, config = inputs["image_sizes"], base.config
    side = config.vision_config.image_size
    # LLaVA-OneVision tiles an image only if it is alone in its prompt.
    several = inputs.get("batch_num_images")
    alone = [True] * len(sizes) if several is None else [n == 1 for n in several for _ in range(n)]
    return [
        image_size_to_num_patches(size, config.image_grid_pinpoints, side) if tiled else 1
        for size, tiled in zip(sizes, alone, strict=True)
    ]


def _next_packing(base: PreTrainedModel, maps: list[Tensor], inputs: Inputs) -> list[Tensor]:
    return _packed(base, maps, inputs, vision_feature_select_strategy="default")


def _onevision_packing(base: PreTrainedModel, maps: list[Tensor], inputs: Inputs) -> list[Tensor]:
    aspect = inputs.get("vision_aspect_ratio") or base.config.vision_aspect_ratio
    return _packed(base, maps, inputs, vision_aspect_ratio=aspect)


def _packed(
    base: PreTrainedModel, maps: list[Tensor], inputs: Inputs, **options: str
) -> list[Tensor]:
    """The maps as the model packs its features, newline tokens marked by NaN."""
    pack = cast(Callable[..., tuple[list[Tensor], Tensor]], base.pack_image_features)
    newline = torch.full(maps[0].shape[-1:], torch.nan, device=maps[0].device)
    packed, _ = pack(maps, inputs["image_sizes"], image_newline=newline, **options)
    return packed


def _patches(
    crops: Crops, pack: Pack, tower: str = "vision_tower", features: str | None = None
) -> Tower:
    return partial(PatchTower, crops=crops, pack=pack, tower=tower, features=features)


def _scale_factor(config: PreTrainedConfig) -> int:
    return config.scale_factor


def _downsampled(config: PreTrainedConfig) -> int:
    return round(1 / config.downsample_ratio)


def _hidden_stride(config: PreTrainedConfig) -> int:
    return config.vision_config.hidden_stride


# The side, in patches, of what becomes one token of a crop.
MERGES: dict[str, Callable[[PreTrainedConfig], int]] = {
    "idefics3": _scale_factor,
    "smolvlm": _scale_factor,
    "internvl": _downsampled,
    "ovis2": _hidden_stride,
}
_IDEFICS = partial(ShuffledTower, merge=_scale_factor, tower="vision_model", features="full")


def _llava(base: PreTrainedModel, settings: TapSettings) -> VisionTap:
    if _of_rows(base.config):
        return PixtralTower(base, settings)
    return PatchTower(base, settings, _one_crop_each, _as_they_are)


# By the `model_type` of the transformers class.
FAMILIES: dict[str, Tower] = {
    "llava": _llava,
    "llava_next": _patches(_tiles, _next_packing),
    "llava_onevision": _patches(_tiles, _onevision_packing),
    "qwen2_vl": MergingTower,
    "qwen2_5_vl": MergingTower,
    "qwen3_vl": MergingTower,
    "qwen3_vl_moe": MergingTower,
    "glm4v": MergingTower,
    "glm46v": MergingTower,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "internvl": partial(ShuffledTower, merge=_downsampled),
    "ovis2": partial(ShuffledTower, merge=_hidden_stride, features="full"),
    "mistral3": PixtralTower,
    "lighton_ocr": partial(PixtralTower, tower="vision_encoder"),
    "vipllava": _patches(_one_crop_each, _as_they_are, features="default"),
    "deepseek_vl": _patches(_one_crop_each, _as_they_are, tower="vision_model", features="full"),
}


def tower_for(model_type: str) -> Tower:
    """The row of a model type. Raises UsageError if it has none, with the reason where known."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    row = MULTIMODAL.get(model_type)
    why = f"expected one of {', '.join(FAMILIES)}" if row is None else row.unprunable
    raise UsageError(f"visual tokens of {model_type!r} models cannot be pruned: {why}")


def tower_of(model: object) -> Tower:
    """The row of a model. Raises UsageError, naming the supported ones, if it has none."""
    found = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    tower = tower_for(found)
    base = getattr(model, "model", None)
    if not (hasattr(base, "language_model") or hasattr(base, "text_model")):
        raise UsageError(
            f"expected a model with a language modelling head, found {type(model).__name__}: "
            "load it with AutoModelForImageTextToText"
        )
    return tower


def tokens_of_a_crop(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Visual tokens of one crop, and its side in pixels; None where images may have any size."""
    vision = config.vision_config
    if _of_rows(config) or not hasattr(vision, "image_size"):
        return None
    side = one_side(vision.image_size)
    patches = side // one_side(vision.patch_size)
    merge = MERGES.get(config.model_type)
    return (-(-patches // merge(config)) if merge else patches) ** 2, side


def images_of_runs(config: PreTrainedConfig, runs: list[int]) -> list[int]:
    """Visual tokens of each image of a prompt, by the lengths of its unbroken runs of them.

    Tiles that are pruned apart may touch; rows of Pixtral's images are parted by text, and all that
    a prompt has of them is taken for one image.
    """
    crop = tokens_of_a_crop(config) if config.model_type in MERGES else None
    if crop is not None and sum(runs) % crop[0] == 0:  # not so where a processor has its own size
        return [crop[0]] * (sum(runs) // crop[0])
    return [sum(runs)] if _of_rows(config) else runs


def _of_rows(config: PreTrainedConfig) -> bool:
    """Whether the tower is Pixtral's, whose images are rows that text parts."""
    return bool(config.vision_config.model_type == "pixtral")
