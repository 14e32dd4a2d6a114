"""What the vision tower tells: where each visual token lies, and how its patch is attended to.

A tap sits on one ViT layer with hooks on its projections, so whatever attention kernel runs is left
alone. It gives one `VisualTokens` per image, 1:1 with the image's placeholders in the prompt: the
maps go through the same packing as the features (the model's own function, for LLaVA), so unpad,
resize, newline tokens and 2x2 merging cannot put them out of step. arXiv 2508.05211, section 4.1.

    tap = tower_of(model)(base, settings); handles = tap.install(); ...; tap.images(inputs)

`tower_of` is of families.py; the taps are in crop_towers.py and sized_towers.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import (
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    image_utils,
)

from compress.errors import UsageError
from compress.importance.patches import (
    add_entropy,
    patch_entropy,
    received_attention,
    voted_attention,
)
from compress.models.vision import Inputs

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


Usual = tuple[list[float], list[float]]  # mean and std of a tower's pixels

CLIP: Usual = (image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD)
SIGLIP: Usual = (image_utils.IMAGENET_STANDARD_MEAN, image_utils.IMAGENET_STANDARD_STD)
IMAGENET: Usual = (image_utils.IMAGENET_DEFAULT_MEAN, image_utils.IMAGENET_DEFAULT_STD)


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout: x cos + (-x_2, x_1) sin."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def encoder_layers(tower: nn.Module) -> nn.ModuleList:
    """The layers of a CLIP or SigLIP tower."""
    return module_list(getattr(tower, "vision_model", tower), "encoder.layers")


def module_list(parent: nn.Module, name: str) -> nn.ModuleList:
    """The list of modules at `name`, which torch knows only as a module."""
    found = parent.get_submodule(name)
    assert isinstance(found, nn.ModuleList)
    return found


def tapped_layer(default: int, wanted: int | None, depth: int) -> int:
    """The layer that is looked at, of so many: the one that is wanted, else `default`."""
    if wanted is None:
        return default
    if not -depth <= wanted < depth:
        raise UsageError(f"vit_layer {wanted}: the vision tower has {depth} layers")
    return wanted % depth


def normalisation(settings: TapSettings, usual: Usual) -> tuple[Tensor, Tensor]:
    """Mean and std [3] of the pixels: the image processor's, or the tower family's usual ones."""
    given = (settings.pixel_mean, settings.pixel_std)
    mean, std = (torch.tensor(u) if g is None else g for g, u in zip(given, usual, strict=True))
    return mean, std
