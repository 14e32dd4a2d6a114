"""What a pruned prompt costs: prefill FLOPs, KV-cache bytes, and how many tokens were kept.

Per decoder layer with n tokens, width d, query width d_q, key-value width d_kv, MLP width m:

    FLOPs = 2 n (2 d d_q + 2 d d_kv + 3 d m) + 2 n^2 d_q       causal: half of 4 n^2 d_q
    KV    = 2 n d_kv * bytes per element

The vision tower and the head are not counted. arXiv 2508.05211 (table 5) ignores grouped-query
attention and the causal mask, and so counts more: FLOPs = 2 (4 n d^2 + 2 n^2 d + 3 n d m).

    pruning.stats.kv_bytes, pruning.stats.flops, pruning.stats.as_dict()
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from transformers import PretrainedConfig

from compress.models.families import head_dim_of
from compress.pruning.prompt import PrunedPrompt
from compress.recipe.strategy import PruneStrategy


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that its costs depend on."""

    layers: int
    width: int  # d
    query_width: int  # d_q = heads * head size
    key_value_width: int  # d_kv = key-value heads * head size
    mlp_width: int  # m
    element_bytes: int

    @classmethod
    def of(cls, config: PretrainedConfig, element_bytes: int) -> "DecoderShape":
        """From a transformers text config."""
        heads = config.num_attention_heads
        head = head_dim_of(config)
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            query_width=heads * head,
            key_value_width=(getattr(config, "num_key_value_heads", None) or heads) * head,
            mlp_width=config.intermediate_size,
            element_bytes=element_bytes,
        )


def prefill_flops(shape: DecoderShape, tokens: Iterable[int]) -> int:
    """FLOPs of one prompt; `tokens`: how many each layer sees."""
    d, m = shape.width, shape.mlp_width
    linear = 2 * (2 * d * shape.query_width + 2 * d * shape.key_value_width + 3 * d * m)
    return sum(linear * n + 2 * n * n * shape.query_width for n in tokens)


def kv_bytes(shape: DecoderShape, slots: Iterable[int]) -> int:
    """Bytes of keys and values; `slots`: cache entries of each layer, padding included."""
    return sum(2 * n * shape.key_value_width * shape.element_bytes for n in slots)


@dataclass(frozen=True)
class ImageStats:
    """One image of a prompt."""

    row: int  # of the batch
    tokens: int  # before pruning
    kept: tuple[int, ...]  # at each decoder layer, recycled ones included
    merged: int = 0  # kept tokens that hold a mean of others
    empty_voters: int = 0  # crops where no patch reached the threshold: plain attention was used
    at_least: bool = False  # kept more than its share: one token, or the protected ones
    not_recycled: bool = False  # more cells than tokens that may stay


@dataclass(frozen=True)
class PromptStats:
    """One prefill: a batch of prompts."""

    shape: DecoderShape
    images: tuple[ImageStats, ...]
    tokens: tuple[tuple[int, ...], ...]  # of each row, at each layer; padding not counted
    tokens_unpruned: tuple[int, ...]  # of each row
    slots: tuple[int, ...]  # cache entries of each layer: rows x (tokens + padding)
    slots_unpruned: int

    @property
    def flops(self) -> int:
        return sum(prefill_flops(self.shape, row) for row in self.tokens)

    @property
    def flops_unpruned(self) -> int:
        rows = ([n] * self.shape.layers for n in self.tokens_unpruned)
        return sum(prefill_flops(self.shape, row) for row in rows)

    @property
    def kv_bytes(self) -> int:
        return kv_bytes(self.shape, self.slots)

    @property
    def kv_bytes_unpruned(self) -> int:
        return kv_bytes(self.shape, [self.slots_unpruned] * self.shape.layers)


class CostTotals(TypedDict):
    """`PruningStats` as plain values, for JSON."""

    prompts: int
    text_only_batches: int
    images: int
    visual_tokens: int
    average_kept: float
    merged_tokens: int
    crops_without_voters: int
    images_at_least: int
    images_not_recycled: int
    prefill_flops: int
    prefill_flops_unpruned: int
    kv_bytes: int
    kv_bytes_unpruned: int


@dataclass
class PruningStats:
    """All prefills since the context was entered. FLOPs and bytes are sums over prompts."""

    prompts: list[PromptStats] = field(default_factory=list)

    @property
    def images(self) -> Sequence[ImageStats]:
        return [image for prompt in self.prompts for image in prompt.images]

    @property
    def text_only(self) -> int:
        """Batches without an image: they ran unpruned."""
        return sum(not prompt.images for prompt in self.prompts)

    @property
    def average_kept(self) -> float:
        """Share of the visual tokens kept, averaged over layers and tokens; 1 without images."""
        total = sum(image.tokens * len(image.kept) for image in self.images)
        return sum(sum(image.kept) for image in self.images) / total if total else 1.0

    @property
    def flops(self) -> int:
        return sum(prompt.flops for prompt in self.prompts)

    @property
    def kv_bytes(self) -> int:
        return sum(prompt.kv_bytes for prompt in self.prompts)

    def as_dict(self) -> CostTotals:
        return {
            "prompts": sum(len(prompt.tokens) for prompt in self.prompts),
            "text_only_batches": self.text_only,
            "images": len(self.images),
            "visual_tokens": sum(image.tokens for image in self.images),
            "average_kept": self.average_kept,
            "merged_tokens": sum(image.merged for image in self.images),
            "crops_without_voters": sum(image.empty_voters for image in self.images),
            "images_at_least": sum(image.at_least for image in self.images),
            "images_not_recycled": sum(image.not_recycled for image in self.images),
            "prefill_flops": self.flops,
            "prefill_flops_unpruned": sum(p.flops_unpruned for p in self.prompts),
            "kv_bytes": self.kv_bytes,
            "kv_bytes_unpruned": sum(p.kv_bytes_unpruned for p in self.prompts),
        }


def without_voters(crops: int, images: int, strategy: PruneStrategy) -> str:
    """The line for `crops` of so many `images` in which no patch was above the threshold."""
    return (
        f"visual tokens: in {crops} crops of {images} images no patch is above voter_threshold "
        f"{strategy.voter_threshold:g}, so all patches voted there: lower it, or give "
        f"voter_quantile"
    )


def prompt_stats(shape: DecoderShape, prompt: PrunedPrompt) -> PromptStats:
    """The costs of a prompt once all its stages are done."""
    depth = range(shape.layers)
    views = [prompt.view(layer) for layer in depth]
    counts = [view.valid.sum(dim=1).tolist() for view in views]  # [layers][rows]
    images = tuple(
        ImageStats(
            row=image.row,
            tokens=len(image.tokens),
            kept=tuple(image.kept_at(layer) for layer in depth),
            merged=0 if image.merged is None else len(image.merged),
            empty_voters=image.tokens.empty_voters,
            at_least=image.at_least,
            not_recycled=image.not_recycled,
        )
        for image in prompt.images
    )
    return PromptStats(
        shape=shape,
        images=images,
        tokens=tuple(zip(*counts, strict=True)),
        tokens_unpruned=tuple(prompt.mask.sum(dim=1).tolist()),
        slots=tuple(view.index.numel() for view in views),
        slots_unpruned=prompt.mask.numel(),
    )
