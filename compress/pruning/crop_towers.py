"""Vision towers that see crops of a fixed size: CLIP, SigLIP, and those of several families.

tap = PatchTower(base, settings, crops, pack)         # a token for each patch
tap = ShuffledTower(base, settings, merge)            # a token for a square of patches
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from compress.errors import UsageError
from compress.importance.patches import (
    cut_patches,
    grey_levels,
)
from compress.models.vision import Inputs
from compress.pruning.per_thread import PerThread
from compress.pruning.tower import (
    CLIP,
    IMAGENET,
    SIGLIP,
    TapSettings,
    Usual,
    VisualTokens,
    crop_maps,
    feature_layer,
    grid_tokens,
    module_list,
    normalisation,
    one_side,
    tapped_layer,
)

Crops = Callable[[PreTrainedModel, Inputs], list[int]]
Pack = Callable[[PreTrainedModel, list[Tensor], Inputs], Sequence[Tensor]]


@dataclass(frozen=True)
class Layout:
    """Where a tower that sees crops of a fixed size has what is read of it.

    Attributes:
        layers: in the tower.
        attention: in a layer.
        gives: the modules of `attention` whose outputs are q and k as they are multiplied.
        prefix: tokens before the patches: a CLS token.
        usual: mean and std of its pixels.
    """

    layers: str = "encoder.layers"
    attention: str = "self_attn"
    gives: str = "{}_proj"
    prefix: int = 0
    usual: Usual = SIGLIP


# By the `model_type` of the tower.
LAYOUTS: dict[str, Layout] = {
    "clip_vision_model": Layout(prefix=1, usual=CLIP),
    "siglip_vision_model": Layout(),
    "idefics3_vision": Layout(),
    "smolvlm_vision": Layout(),
    # Its norms of q and k do nothing where the config has none.
    "internvl_vision": Layout("encoder.layer", "attention", "{}_norm", 1, IMAGENET),
    "ovis2_vision": Layout("transformer.encoder.layers", "attention", usual=CLIP),
}


class PatchTower:
    """Towers that see crops of a fixed size, of which every patch becomes a token.

    Args:
        crops: `crops(base, inputs)` is the number of crops of each image.
        pack: `pack(base, maps, inputs)` turns maps [crops, N, channels] into [n, channels], newline
            tokens marked by NaN.
        tower: its name.
        features: which of the tower's outputs become features: "default" all but the CLS token's,
            "full" all; None: as the config says.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        settings: TapSettings,
        crops: Crops,
        pack: Pack,
        tower: str = "vision_tower",
        features: str | None = None,
    ):
        self.base, self.settings = base, settings
        self.crops, self.pack = crops, pack
        vision = base.config.vision_config
        if vision.model_type not in LAYOUTS:
            raise UsageError(
                f"expected a vision tower of {', '.join(LAYOUTS)}, found {vision.model_type!r}: "
                "its attention cannot be read"
            )
        self.layout = LAYOUTS[vision.model_type]
        kept = features or base.config.vision_feature_select_strategy
        if kept != ("default" if self.layout.prefix else "full"):
            raise UsageError(
                f"vision_feature_select_strategy {kept!r} does not fit a {vision.model_type}: "
                "expected one feature for each patch ('default' drops CLIP's CLS token, 'full' "
                "keeps all of SigLIP's)"
            )
        self.patch_size = one_side(vision.patch_size)
        self.side = one_side(vision.image_size) // self.patch_size
        self.heads: int = vision.num_attention_heads
        self.tower = base.get_submodule(tower)
        inside = getattr(self.tower, "vision_model", self.tower)
        self.layers = module_list(inside, self.layout.layers)
        features_of = feature_layer(base, len(self.layers))
        self.layer = tapped_layer(features_of, settings.layer, len(self.layers))
        self._seen = PerThread[dict[str, Tensor]](dict)

    @property
    def seen(self) -> dict[str, Tensor]:
        """What reached the tower in this thread's forward, and its attention."""
        return self._seen.value

    def install(self) -> list[RemovableHandle]:
        attention = self.layers[self.layer].get_submodule(self.layout.attention)
        handles = [self.tower.register_forward_pre_hook(self._before, with_kwargs=True)]
        if self.settings.signals:
            for name in "qk":
                giver = attention.get_submodule(self.layout.gives.format(name))
                handles.append(giver.register_forward_hook(partial(self._keep, name)))
        return handles

    def _before(self, module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        self._seen.value = {"pixels": args[0] if args else kwargs["pixel_values"]}

    def _keep(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.seen[name] = output.detach()

    def images(self, inputs: Inputs) -> list[VisualTokens]:
        """One entry per image, in the order of the prompt; forgets what it saw."""
        pixels = self.seen["pixels"]
        signals, empty = self._signals(pixels)
        self._seen.value = {}
        crops = self.crops(self.base, inputs)
        # The first channel exists for its NaNs: they tell which tokens are newlines.
        flags = torch.zeros(len(pixels), self.side**2, 1, device=pixels.device)
        maps = torch.cat([flags, *signals.values()], dim=-1).split(crops)
        packed = self.pack(self.base, list(maps), inputs)
        result = []
        for count, tokens, none in zip(crops, packed, empty.split(crops), strict=True):
            place = anyres_places(tokens[:, 0].isnan(), self.side, several=count > 1)
            parts = tokens[:, 1:].nan_to_num().split([s.shape[-1] for s in signals.values()], -1)
            named = dict(zip(signals, parts, strict=True))
            result.append(
                VisualTokens(
                    *place,
                    importance=named["importance"][:, 0] if "importance" in named else None,
                    attention=named["attention"][:, 0] if "attention" in named else None,
                    keys=named.get("keys"),
                    empty_voters=int(none.sum()),
                )
            )
        return result

    def _signals(self, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Maps [crops, N, channels] by name, and the crops [crops] without voters."""
        wanted, settings = self.settings.signals, self.settings
        empty = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
        maps: dict[str, Tensor] = {}
        if not wanted:
            return maps, empty
        q, k = (self.seen[x].unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in "qk")
        patches = partial(self._patches, pixels)
        return crop_maps(q, k, k, settings, self.layout.prefix, patches)

    def _patches(self, pixels: Tensor) -> Tensor:
        """Grey levels [crops, N, pixels] of the patches."""
        grey = grey_levels(pixels, *normalisation(self.settings, self.layout.usual))
        return cut_patches(grey, self.patch_size)


class ShuffledTower(PatchTower):
    """Towers that see crops, squares of whose patches become one token (pixel shuffle).

    Nothing that the model is given tells which crops are of one picture: each is an image of its
    own. `merge(config)` is the side of such a square, in patches.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        settings: TapSettings,
        merge: Callable[[PreTrainedConfig], int],
        tower: str = "vision_tower",
        features: str | None = None,
    ):
        super().__init__(base, settings, _never, _never, tower, features)
        self.merge = merge(base.config)

    def _before(self, module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        super()._before(module, args, kwargs)
        mask = kwargs.get("patch_attention_mask")
        if mask is not None and not bool(mask.all()):
            raise UsageError(
                "pixel_attention_mask: expected crops without padding, as the model's processor "
                "makes them: visual tokens of padded ones cannot be pruned"
            )

    def images(self, inputs: Inputs) -> list[VisualTokens]:
        """One entry per crop, in the order of the prompt; forgets what it saw."""
        pixels = self.seen["pixels"]
        signals, empty = self._signals(pixels)
        self._seen.value = {}
        height, width = (n // self.patch_size for n in pixels.shape[-2:])
        return [
            grid_tokens(
                {name: signal[i] for name, signal in signals.items()},
                (height, width),
                self.merge,
                pixels.device,
                int(empty[i]),
            )
            for i in range(len(pixels))
        ]


def anyres_places(newline: Tensor, side: int, several: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Segment, row and column [n] of an image's tokens.

    First `side` x `side` tokens of the whole image; then, if it has several crops, its tiles as
    one grid with a newline token after each row; otherwise at most one newline token.
    """
    index = torch.arange(newline.numel(), device=newline.device)
    base = index < side**2
    rest = index - side**2
    width = side
    tiles = len(index) - side**2
    if several and tiles:  # a very wide picture has none: its padding is all there is
        width = int(newline[side**2 :].nonzero()[0]) + 1 if newline.any() else tiles
    segment = torch.where(base, 0, 1).masked_fill(newline, -1)
    row = torch.where(base, index // side, rest.clamp(min=0) // width)
    column = torch.where(base, index % side, rest.clamp(min=0) % width)
    return segment, row, column


def _never(*_: object) -> NoReturn:
    raise AssertionError("crops are counted, and packed, by the tower itself")
