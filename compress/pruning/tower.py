"""What the vision tower tells: where each visual token lies, and how its patch is attended to.

A tap sits on one ViT layer with hooks on its projections, so whatever attention kernel runs is left
alone. It gives one `VisualTokens` per image, 1:1 with the image's placeholders in the prompt: the
maps go through the same packing as the features (the model's own function, for LLaVA), so unpad,
resize, newline tokens and 2x2 merging cannot put them out of step. arXiv 2508.05211, section 4.1.

    tap = PatchTower(base, settings); handles = tap.install(); ...; images = tap.images(inputs)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import (
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    image_utils,
)
from transformers.vision_utils import get_vision_window_index

from compress.errors import UsageError
from compress.importance.patches import (
    add_entropy,
    cut_patches,
    grey_levels,
    patch_entropy,
    received_attention,
    voted_attention,
)
from compress.models.vision import Inputs
from compress.pruning.per_thread import PerThread

# The first two have, or hold, the pixels' statistics; `load` gives a tokenizer for a text model.
Processor = ProcessorMixin | BaseImageProcessor | PreTrainedTokenizerBase


@dataclass(frozen=True)
class VisualTokens:
    """The n visual tokens of one image, in the order of the prompt.

    `segment` tells grids apart (0: the whole image, 1: its tiles, -1: newline tokens); `row` and
    `column` are places in that grid, in tokens.
    """

    segment: Tensor  # [n]
    row: Tensor  # [n]
    column: Tensor  # [n]
    importance: Tensor | None = None  # [n], votes + weight * softmax(entropy); 0 for newlines
    attention: Tensor | None = None  # [n], from the CLS token, or received if there is none
    keys: Tensor | None = None  # [n, d], the tapped layer's keys, heads averaged
    empty_voters: int = 0  # crops in which no patch reached the voters' threshold

    @property
    def newline(self) -> Tensor:
        return self.segment < 0

    def __len__(self) -> int:
        return self.segment.numel()

    def each(self, change: Callable[[Tensor], Tensor]) -> "VisualTokens":
        """All that is known of the tokens, changed alike."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        changed: Inputs = {name: change(value) for name, value in tensors.items()}
        return replace(self, **changed)

    def take(self, index: Tensor) -> "VisualTokens":
        """The tokens at `index` [m]."""
        return self.each(lambda known: known[index])


@dataclass(frozen=True)
class TapSettings:
    """What is wanted of the tower. `signals`: any of `importance`, `attention`, `keys`."""

    signals: frozenset[str]
    voter_threshold: float
    vote: str
    entropy_weight: float
    layer: int | None  # None: the layer that the features come from
    pixel_mean: Tensor | None = None  # [3], of the image processor; None: the tower's usual
    pixel_std: Tensor | None = None
    voter_quantile: float | None = None


class VisionTap(Protocol):
    """Hooks on a vision tower, and what they saw in the forward that has just run.

    `images` takes the arguments of `get_image_features`.
    """

    def install(self) -> list[RemovableHandle]: ...
    def images(self, inputs: Inputs) -> list[VisualTokens]: ...


Crops = Callable[[PreTrainedModel, Inputs], list[int]]
Pack = Callable[[PreTrainedModel, list[Tensor], Inputs], Sequence[Tensor]]
Usual = tuple[list[float], list[float]]  # mean and std of a tower's pixels

CLIP: Usual = (image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD)
SIGLIP: Usual = (image_utils.IMAGENET_STANDARD_MEAN, image_utils.IMAGENET_STANDARD_STD)
IMAGENET: Usual = (image_utils.IMAGENET_DEFAULT_MEAN, image_utils.IMAGENET_DEFAULT_STD)


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
        self.layers = _modules(inside, self.layout.layers)
        features_of = feature_layer(base, len(self.layers))
        self.layer = _tapped_layer(features_of, settings.layer, len(self.layers))
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
        grey = grey_levels(pixels, *_normalisation(self.settings, self.layout.usual))
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


class PixtralTower:
    """Pixtral's tower: images of any size, one behind the other, each attending to itself alone.

    Squares of `spatial_merge_size` patches become one token each, or in a LLaVA every patch; the
    tokens that end a row of them are text.
    """

    def __init__(self, base: PreTrainedModel, settings: TapSettings, tower: str = "vision_tower"):
        vision = base.config.vision_config
        if vision.model_type != "pixtral":
            raise UsageError(
                f"expected a Pixtral vision tower, found {vision.model_type!r}: its attention "
                "cannot be read"
            )
        self.settings, self.tower = settings, base.get_submodule(tower)
        self.patch_size: int = vision.patch_size
        self.heads: int = vision.num_attention_heads
        kept = getattr(base.config, "vision_feature_select_strategy", "full")
        if kept != "full":
            raise UsageError(
                f"vision_feature_select_strategy {kept!r} does not fit a Pixtral tower, which has "
                "no CLS token to drop: expected 'full'"
            )
        self.merge: int = getattr(base.config, "spatial_merge_size", 1)
        self.layers = _modules(self.tower, "transformer.layers")
        depth = len(self.layers)
        self.layer = _tapped_layer(feature_layer(base, depth), settings.layer, depth)
        self._seen = PerThread[Inputs](dict)

    @property
    def seen(self) -> Inputs:
        """What reached the tower in this thread's forward, and its attention."""
        return self._seen.value

    def install(self) -> list[RemovableHandle]:
        attention = self.layers[self.layer].get_submodule("attention")
        handles = [self.tower.register_forward_pre_hook(self._before, with_kwargs=True)]
        if self.settings.signals:
            handles.append(attention.register_forward_pre_hook(self._turned, with_kwargs=True))
            for name in "qk":
                projection = attention.get_submodule(f"{name}_proj")
                handles.append(projection.register_forward_hook(partial(self._keep, name)))
        return handles

    def _before(self, module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]
        sizes = kwargs.get("image_sizes")
        sizes = [pixels.shape[-2:]] * len(pixels) if sizes is None else sizes
        self._seen.value = {"pixels": pixels, "image_sizes": sizes}

    def _turned(self, module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        self.seen["position_embeddings"] = kwargs["position_embeddings"]

    def _keep(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.seen[name] = output.detach()

    def images(self, inputs: Inputs) -> list[VisualTokens]:
        """One entry per image, in the order of the prompt; forgets what it saw."""
        seen, self._seen.value = self.seen, {}
        pixels: Tensor = seen["pixels"]
        grids = [[int(n) // self.patch_size for n in size] for size in seen["image_sizes"]]
        sizes = [height * width for height, width in grids]
        if self.settings.signals:
            q, k = (seen[x].float().unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in "qk")
            cos, sin = (x.float() for x in seen["position_embeddings"])  # [patches, d]
            turned = rotate(q, cos, sin), rotate(k, cos, sin)
            parts = [x.split(sizes, dim=2) for x in (*turned, k)]
        result = []
        for i, (height, width) in enumerate(grids):
            maps: dict[str, Tensor] = {}
            empty = 0
            if self.settings.signals:
                # Keys as they were before they were turned: what, not where.
                patches = partial(self._patches, pixels[i : i + 1], height, width)
                q, k, plain = (part[i] for part in parts)
                found, none = crop_maps(q, k, plain, self.settings, 0, patches)
                maps, empty = {name: x[0] for name, x in found.items()}, int(none)
            grid = (height, width)
            result.append(grid_tokens(maps, grid, self.merge, pixels.device, empty, whole=True))
        return result

    def _patches(self, pixels: Tensor, height: int, width: int) -> Tensor:
        """Grey levels [1, N, pixels] of an image's patches."""
        pixels = pixels[..., : height * self.patch_size, : width * self.patch_size]
        grey = grey_levels(pixels, *_normalisation(self.settings, CLIP))
        return cut_patches(grey, self.patch_size)


class MergingTower:
    """The Qwen2-VL and Qwen2.5-VL towers: any resolution, 2x2 patches become one token.

    Patches come in merge-unit order. Qwen2.5-VL shuffles the units into windows and attends within
    them, except in its full-attention blocks, the last of which is tapped.
    """

    def __init__(self, base: PreTrainedModel, settings: TapSettings):
        self.settings, self.tower = settings, base.get_submodule("visual")
        self.vision = base.config.vision_config
        self.merge: int = self.vision.spatial_merge_size
        self.heads: int = self.vision.num_heads
        self.blocks = _modules(self.tower, "blocks")
        depth = len(self.blocks)
        full = getattr(self.tower, "fullatt_block_indexes", None)
        self.layer = _tapped_layer(max(full) if full else depth - 1, settings.layer, depth)
        self._seen = PerThread[Inputs](dict)

    @property
    def seen(self) -> Inputs:
        """What reached the tower in this thread's forward, and its attention."""
        return self._seen.value

    def install(self) -> list[RemovableHandle]:
        attention = self.blocks[self.layer].get_submodule("attn")
        handles = [self.tower.register_forward_pre_hook(self._before, with_kwargs=True)]
        if self.settings.signals:
            handles.append(attention.register_forward_pre_hook(self._arguments, with_kwargs=True))
            handles.append(attention.get_submodule("qkv").register_forward_hook(self._projected))
        return handles

    def _before(self, module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        self._seen.value = {"pixels": args[0] if args else kwargs["hidden_states"]}

    def _arguments(self, module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        self.seen.update({name: kwargs[name] for name in ("cu_seqlens", "position_embeddings")})

    def _projected(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.seen["qkv"] = output.detach()

    def images(self, inputs: Inputs) -> list[VisualTokens]:
        """One entry per image, in the order of the prompt; forgets what it saw."""
        grids = inputs["image_grid_thw"]
        signals, empty = self._signals(grids)
        self._seen.value = {}
        sizes = (grids.prod(-1) // self.merge**2).tolist()
        parts = {name: signal.split(sizes) for name, signal in signals.items()}
        result = []
        for i, (frames, height, width) in enumerate(grids.tolist()):
            shape = (frames, height // self.merge, width // self.merge)
            axes = [torch.arange(n, device=grids.device) for n in shape]
            time, row, column = (a.flatten() for a in torch.meshgrid(*axes, indexing="ij"))
            named = {name: part[i] for name, part in parts.items()}
            result.append(VisualTokens(time, row, column, **named, empty_voters=int(empty[i])))
        return result

    def _signals(self, grids: Tensor) -> tuple[dict[str, Tensor], list[int]]:
        """Maps by name, [tokens of all images] or [tokens, d], and chunks without voters."""
        wanted, settings = self.settings.signals, self.settings
        empty = [0] * len(grids)
        if not wanted:
            return {}, empty
        q, k, _ = self.seen["qkv"].float().unflatten(-1, (3, self.heads, -1)).unbind(1)
        cos, sin = (x.float().unsqueeze(1) for x in self.seen["position_embeddings"])
        maps: dict[str, Tensor] = {}
        if "keys" in wanted:
            maps["keys"] = k.mean(dim=1)  # before the rotary embedding: what, not where
        q, k = rotate(q, cos, sin).transpose(0, 1), rotate(k, cos, sin).transpose(0, 1)  # [h, N, d]
        ends = grids.prod(-1).cumsum(0).tolist()
        chunks: dict[str, list[Tensor]] = {"importance": [], "attention": []}
        bounds = self.seen["cu_seqlens"].tolist()
        for start, end in pairwise(bounds):
            pair = (q[None, :, start:end], k[None, :, start:end], q.shape[-1] ** -0.5)
            if "importance" in wanted:
                scores, none = voted_attention(
                    *pair,
                    threshold=settings.voter_threshold,
                    quantile=settings.voter_quantile,
                    vote=settings.vote,
                )
                chunks["importance"].append(scores[0])
                empty[next(i for i, last in enumerate(ends) if start < last)] += int(none)
            if "attention" in wanted:
                weights = torch.full((1, end - start), 1 / (end - start), device=q.device)
                chunks["attention"].append(received_attention(*pair, weights)[0])
        maps |= {name: torch.cat(parts) for name, parts in chunks.items() if parts}
        maps = {name: self._in_prompt_order(signal, grids) for name, signal in maps.items()}
        if "importance" in wanted and settings.entropy_weight:
            entropies = self._entropy().split(grids.prod(-1).tolist())
            scores = maps["importance"].split(grids.prod(-1).tolist())
            added = [
                add_entropy(s, e, settings.entropy_weight)
                for s, e in zip(scores, entropies, strict=True)
            ]
            maps["importance"] = torch.cat(added)
        unit = self.merge**2
        return {name: m.unflatten(0, (-1, unit)).mean(dim=1) for name, m in maps.items()}, empty

    def _in_prompt_order(self, signal: Tensor, grids: Tensor) -> Tensor:
        """Undoes Qwen2.5-VL's shuffle of merge units into windows."""
        window = getattr(self.tower, "window_size", None)
        if window is None:
            return signal
        index, _ = get_vision_window_index(
            grids,
            spatial_merge_size=self.merge,
            window_size=window,
            patch_size=self.vision.patch_size,
        )
        units = signal.unflatten(0, (-1, self.merge**2))
        restored = torch.empty_like(units)
        restored[index.to(units.device)] = units
        return restored.flatten(0, 1)

    def _entropy(self) -> Tensor:
        """[patches], in merge-unit order; the two frames of an image's patch are the same."""
        patch = self.vision.patch_size
        pixels = self.seen["pixels"]
        pixels = pixels.view(len(pixels), 3, -1, patch)  # [patches, 3, frames * patch, patch]
        grey = grey_levels(pixels, *_normalisation(self.settings, CLIP))
        return patch_entropy(grey.flatten(1))


def crop_maps(
    q: Tensor,
    k: Tensor,
    keys: Tensor,
    settings: TapSettings,
    prefix: int,
    patches: Callable[[], Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    """Maps [crops, N, channels] by name, and the crops [crops] without voters.

    Args:
        q, k: [crops, heads, prefix + N, d], as they are multiplied.
        keys: those that tell tokens apart, of the same shape.
        patches: gives the grey levels [crops, N, pixels]; asked for the entropy alone.
    """
    wanted, scaling = settings.signals, q.shape[-1] ** -0.5
    empty = torch.zeros(len(q), dtype=torch.bool, device=q.device)
    maps: dict[str, Tensor] = {}
    if "importance" in wanted:
        scores, empty = voted_attention(
            q,
            k,
            scaling,
            threshold=settings.voter_threshold,
            quantile=settings.voter_quantile,
            vote=settings.vote,
            prefix=prefix,
        )
        if settings.entropy_weight:
            scores = add_entropy(scores, patch_entropy(patches()), settings.entropy_weight)
        maps["importance"] = scores[..., None]
    if "attention" in wanted:
        looking = q[:, :, :1] if prefix else q
        weights = torch.full(looking.shape[::2], 1 / looking.shape[2], device=q.device)
        received = received_attention(looking, k, scaling, weights)[:, prefix:]
        maps["attention"] = received[..., None]
    if "keys" in wanted:
        maps["keys"] = keys[:, :, prefix:].float().mean(dim=1)
    return maps, empty


def grid_tokens(
    maps: dict[str, Tensor],
    grid: tuple[int, int],
    merge: int,
    device: torch.device,
    empty: int,
    whole: bool = False,
) -> VisualTokens:
    """The tokens of one grid of patches, `merge` x `merge` of which become one token.

    Args:
        maps: [N, channels] by name, of the patches; a token has the mean of its own.
        grid: rows and columns of patches.
        empty: how often no patch voted.
        whole: whether squares that the edge cuts are left out.
    """
    rows, columns = (n // merge if whole else -(-n // merge) for n in grid)
    axes = (torch.arange(rows, device=device), torch.arange(columns, device=device))
    row, column = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
    means = {}
    for name, patches in maps.items():
        field = patches.T.unflatten(1, grid)[None]  # [1, channels, rows, columns]
        mean = functional.avg_pool2d(field, merge, ceil_mode=not whole, count_include_pad=False)
        means[name] = mean[0].flatten(1).T
    return VisualTokens(
        torch.zeros_like(row),
        row,
        column,
        importance=means["importance"][:, 0] if "importance" in means else None,
        attention=means["attention"][:, 0] if "attention" in means else None,
        keys=means.get("keys"),
        empty_voters=empty,
    )


def feature_layer(base: PreTrainedModel, depth: int) -> int:
    """The layer whose output is `hidden_states[vision_feature_layer]`, the last if several."""
    index = getattr(base.config, "vision_feature_layer", -1)
    indices = [index] if isinstance(index, int) else index
    return max(i % (depth + 1) for i in indices) - 1


def one_side(size: int | Sequence[int]) -> int:
    """Of a square that a config gives by one number, or by two."""
    if isinstance(size, int):
        return size
    height, width = size
    if height != width:
        raise UsageError(f"expected square crops and patches in vision_config, found {size}")
    return height


def _never(*_: object) -> NoReturn:
    raise AssertionError("crops are counted, and packed, by the tower itself")


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout: x cos + (-x_2, x_1) sin."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def encoder_layers(tower: nn.Module) -> nn.ModuleList:
    """The layers of a CLIP or SigLIP tower."""
    return _modules(getattr(tower, "vision_model", tower), "encoder.layers")


def _modules(parent: nn.Module, name: str) -> nn.ModuleList:
    """The list of modules at `name`, which torch knows only as a module."""
    found = parent.get_submodule(name)
    assert isinstance(found, nn.ModuleList)
    return found


def _tapped_layer(default: int, wanted: int | None, depth: int) -> int:
    if wanted is None:
        return default
    if not -depth <= wanted < depth:
        raise UsageError(f"vit_layer {wanted}: the vision tower has {depth} layers")
    return wanted % depth


def _normalisation(settings: TapSettings, usual: Usual) -> tuple[Tensor, Tensor]:
    """Mean and std [3] of the pixels: the image processor's, or the tower family's usual ones."""
    given = (settings.pixel_mean, settings.pixel_std)
    mean, std = (torch.tensor(u) if g is None else g for g, u in zip(given, usual, strict=True))
    return mean, std
