"""A family's own forward, run without its layers or without all but its end.

What it hands on to each layer (RoPE tables, masks and what else it has) and what it makes of the
head's products need not be written down for a family then. Layers are away while it runs: recorders
that give zeros stand in their place, so that what comes to the next one is what the family adds to
the stream between two layers, as Qwen3-VL does with features of the tower (DeepStack).

    seen = handed_on(model, spec, x)                # seen.inputs[i]: what layer i is called with
    logits = finished(model, spec, products)        # scaled, or bent under a cap
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn

from compress.models.family_specs import ArchitectureSpec


class LayerInputs(TypedDict):
    """What a decoder layer's forward needs beside x [B, T, d]."""

    position_embeddings: tuple[Tensor, Tensor]  # cos and sin
    attention_mask: Tensor | None  # [1, 1, T, T]; None: plain causal attention
    position_ids: NotRequired[Tensor]  # and what else a family's own forward hands on


class Told(TypedDict, total=False):
    """What a language model is called with for a prompt with images, beside its embeddings.

    `position_ids`: [1, T] or, for M-RoPE, [rows, 1, T]. `attention_mask`: [1, T], or a mask for
    each kind of layer.
    """

    position_ids: Tensor
    attention_mask: Tensor | dict[str, Tensor]


def told_on(told: Told, device: str | torch.device) -> Told:
    """The same on a device."""

    def moved(value: object) -> object:
        if isinstance(value, dict):
            return {name: moved(inner) for name, inner in value.items()}
        return value.to(device) if isinstance(value, Tensor) else value

    return cast(Told, moved(told))


@dataclass(frozen=True)
class HandedOn:
    """What a forward did with its layers.

    Attributes:
        first: what the first one reads [1, T, d].
        inputs: what each is called with beside that.
        added: what is added to the stream behind layer i, by i; only where that is not zero.
    """

    first: Tensor
    inputs: list[LayerInputs]
    added: dict[int, Tensor]


class _Recorder(nn.Module):
    """In the place of decoder layers: notes what each is called with, and ends the forward."""

    def __init__(self, total: int):
        super().__init__()
        self.total = total
        self.first: Tensor | None = None
        self.gave: Tensor | None = None
        self.added: dict[int, Tensor] = {}
        self.seen: list[LayerInputs] = []

    def forward(self, hidden_states: Tensor, **inputs: object) -> Tensor:
        self.seen.append(cast(LayerInputs, inputs))
        if self.first is None:
            self.first, self.gave = hidden_states, torch.zeros_like(hidden_states)
        elif hidden_states is not self.gave and bool((hidden_states != 0).any()):
            self.added[len(self.seen) - 2] = hidden_states
        if len(self.seen) == self.total:
            raise _RecordedError
        assert self.gave is not None
        return self.gave


class _RecordedError(Exception):
    """All layers were called."""


@contextlib.contextmanager
def layers_away(model: nn.Module, spec: ArchitectureSpec) -> Iterator[Callable[[], HandedOn]]:
    """The model with recorders in the place of its layers; one forward ends at the last of them.

    Yields what tells what they saw.
    """
    place, _, name = spec.layers.rpartition(".")
    decoder = model.get_submodule(place)
    layers = cast(nn.ModuleList, model.get_submodule(spec.layers))
    recorder = _Recorder(len(layers))

    def seen() -> HandedOn:
        assert recorder.first is not None, "a model has layers"
        return HandedOn(recorder.first, recorder.seen, recorder.added)

    setattr(decoder, name, nn.ModuleList([recorder] * len(layers)))
    try:
        with contextlib.suppress(_RecordedError):
            yield seen
    finally:
        setattr(decoder, name, layers)


def handed_on(
    model: nn.Module, spec: ArchitectureSpec, x: Tensor, told: Told | None = None
) -> HandedOn:
    """What becomes of embeddings x [1, T, d] until and between the layers.

    `told`: what the language model is told of a prompt with images; None: x is text.
    """
    # Text goes in at the front, where some count its places otherwise, or choose its masks.
    place = spec.base if told is None else spec.layers.rpartition(".")[0]
    model.get_submodule(spec.rotary).to(x.device)
    with layers_away(model, spec) as seen:
        forward = cast(Callable[..., object], model.get_submodule(place))
        forward(inputs_embeds=x, use_cache=False, **told_on(told or {}, x.device))
    found = seen()
    plain = _causal_masks(found.inputs)
    for inputs in found.inputs:
        if id(inputs.get("attention_mask")) in plain:
            inputs["attention_mask"] = None
    return found


def _causal_masks(seen: list[LayerInputs]) -> set[int]:
    """The ids of the masks that hide what is behind a query and no more, as a wide window's do.

    Without such a mask attention is plain, unless it needs one in additive form.
    """
    masks = {id(mask): mask for i in seen if (mask := i.get("attention_mask")) is not None}
    return {
        number
        for number, mask in masks.items()
        if mask.dtype is torch.bool and torch.equal(mask, torch.ones_like(mask).tril())
    }


class _Products(nn.Module):
    """In the place of a model without its head: gives the head's products."""

    def __init__(self, products: Tensor):
        super().__init__()
        self.products = (products,)

    def forward(self, **inputs: object) -> object:
        from transformers.modeling_outputs import MoeModelOutputWithPast  # slow to import

        # It has what others have, and the router's scores, which are none here.
        return MoeModelOutputWithPast(last_hidden_state=self.products[0])


def finished(model: nn.Module, spec: ArchitectureSpec, products: Tensor) -> Tensor:
    """Logits [..., V] of the head's products, its bias added."""
    place = spec.layers.rpartition(".")[0]
    above, _, name = place.rpartition(".")
    parent, head = model.get_submodule(above), model.get_submodule(spec.head)
    decoder = model.get_submodule(place)
    given: Mapping[str, object] = {"input_ids": None}
    if place != spec.base:  # what a multimodal one makes of embeddings, and hands on
        width = decoder.get_submodule(spec.embedding.rpartition(".")[2]).embedding_dim
        given = {"inputs_embeds": products.new_zeros(1, 1, cast(int, width))}
    model.set_submodule(spec.head, nn.Identity())
    setattr(parent, name, _Products(products.reshape(1, -1, products.shape[-1])))
    try:
        logits: Tensor = model(**given, use_cache=False).logits
        return logits.view(products.shape)
    finally:
        model.set_submodule(spec.head, head)
        setattr(parent, name, decoder)
