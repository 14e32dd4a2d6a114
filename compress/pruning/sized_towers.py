"""Vision towers that see images of any size: Pixtral's, and those of Qwen2-VL and its kin.

tap = PixtralTower(base, settings)
tap = MergingTower(base, settings)
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
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
from compress.pruning.tower import (
    CLIP,
    TapSettings,
    VisualTokens,
    crop_maps,
    feature_layer,
    grid_tokens,
    module_list,
    normalisation,
    rotate,
    tapped_layer,
)


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
        self.layers = module_list(self.tower, "transformer.layers")
        depth = len(self.layers)
        self.layer = tapped_layer(feature_layer(base, depth), settings.layer, depth)
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
        grey = grey_levels(pixels, *normalisation(self.settings, CLIP))
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
        self.blocks = module_list(self.tower, "blocks")
        depth = len(self.blocks)
        full = getattr(self.tower, "fullatt_block_indexes", None)
        self.layer = tapped_layer(max(full) if full else depth - 1, settings.layer, depth)
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
        grey = grey_levels(pixels, *normalisation(self.settings, CLIP))
        return patch_entropy(grey.flatten(1))
