"""The vision tower run once for each batch of pictures, however many strategies look at them.

What lies below the layer that makes the features depends on the pixels alone, so its output is kept
by the pixels' hash; that layer itself runs each time, because strategies read its queries and keys.
Results are the same to the bit.

    with tower_cached(model, cache): model.generate(**inputs)      # cache: an OutputCache
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.models.vision import Inputs
from compress.pruning.per_thread import PerThread
from compress.pruning.tower import encoder_layers

MOST_BYTES = 2**30
CACHED = ("clip_vision_model", "siglip_vision_model")


class OutputCache:
    """Tensors by name, as many as fit into `most_bytes`; those that come later are not kept."""

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.left = most_bytes
        self.kept: dict[str, Tensor] = {}

    def put(self, name: str, value: Tensor) -> None:
        size = value.numel() * value.element_size()
        if name not in self.kept and size <= self.left:
            self.kept[name] = value
            self.left -= size


@dataclass
class _Forward:
    """The forward that goes on in a thread: its pixels' hash, and what is known of them."""

    name: str = ""
    known: Tensor | None = None


@contextmanager
def tower_cached(model: PreTrainedModel, cache: OutputCache) -> Iterator[None]:
    """A context in which a LLaVA's tower reads what it has seen from `cache`; others run as usual.

    Only for the layer that the features come from: no strategy may tap an earlier one.
    Hooks on the layers below it see nothing while the context is open.
    """
    tower = getattr(model.model, "vision_tower", None)
    layers = _below_the_features(model, tower)
    if tower is None or not layers:
        yield
        return
    forwards = PerThread(_Forward)

    def before(module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]
        now = forwards.value
        now.name = _digest(pixels)
        now.known = cache.kept.get(now.name)

    def reading(forward: Callable[..., Tensor], first: bool, last: bool) -> Callable[..., Tensor]:
        def layer(hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
            now = forwards.value
            if now.known is not None:
                return now.known if first else hidden
            output = forward(hidden, *args, **kwargs)
            if last:
                cache.put(now.name, output.detach())
            return output

        return layer

    handle = tower.register_forward_pre_hook(before, with_kwargs=True)
    for number, layer in enumerate(layers):
        layer.forward = reading(layer.forward, number == 0, number == len(layers) - 1)
    try:
        yield
    finally:
        handle.remove()
        for layer in layers:
            del layer.forward  # the class's own is there again


def _below_the_features(model: PreTrainedModel, tower: PreTrainedModel | None) -> list[nn.Module]:
    """The tower's layers before the one whose output becomes features; [] if that is not one."""
    index = getattr(model.config, "vision_feature_layer", None)
    if tower is None or not isinstance(index, int) or tower.config.model_type not in CACHED:
        return []
    layers = list(encoder_layers(tower))
    return layers[: max(index % (len(layers) + 1) - 1, 0)]


def _digest(pixels: Tensor) -> str:
    digest = hashlib.blake2b(f"{pixels.dtype} {list(pixels.shape)}".encode(), digest_size=16)
    digest.update(pixels.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
