"""A text family's own forward, run without its layers or without all but its end.

What it hands on to each layer (RoPE tables, masks and what else it has) and what it makes of the
head's products need not be written down for a family then.

    first, inputs = handed_on(model, spec, x)       # inputs[i]: what layer i is called with
    logits = finished(model, spec, products)        # scaled, or bent under a cap
"""

import contextlib
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn

from compress.models.families import ArchitectureSpec


class LayerInputs(TypedDict):
    """What a decoder layer's forward needs beside x [B, T, d]."""

    position_embeddings: tuple[Tensor, Tensor]  # cos and sin
    attention_mask: Tensor | None  # [1, 1, T, T]; None: plain causal attention
    position_ids: NotRequired[Tensor]  # and what else a text family's own forward hands on


class _Recorder(nn.Module):
    """In the place of decoder layers: notes what each is called with, and ends the forward."""

    def __init__(self, total: int):
        super().__init__()
        self.total = total
        self.first: Tensor | None = None
        self.seen: list[LayerInputs] = []

    def forward(self, hidden_states: Tensor, **inputs: object) -> Tensor:
        self.first = hidden_states if self.first is None else self.first
        self.seen.append(cast(LayerInputs, inputs))
        if len(self.seen) == self.total:
            raise _RecordedError
        return hidden_states


class _RecordedError(Exception):
    """All layers were called."""


def handed_on(
    model: nn.Module, spec: ArchitectureSpec, x: Tensor
) -> tuple[Tensor, list[LayerInputs]]:
    """What the first layer reads for embeddings x [1, T, d], and what each is called with."""
    place, _, name = spec.layers.rpartition(".")
    base = model.get_submodule(place)
    layers = cast(nn.ModuleList, model.get_submodule(spec.layers))
    model.get_submodule(spec.rotary).to(x.device)
    recorder = _Recorder(len(layers))
    setattr(base, name, nn.ModuleList([recorder] * len(layers)))
    try:
        with contextlib.suppress(_RecordedError):
            base(inputs_embeds=x, use_cache=False)
    finally:
        setattr(base, name, layers)
    plain = _causal_masks(recorder.seen)
    for inputs in recorder.seen:
        if id(inputs.get("attention_mask")) in plain:
            inputs["attention_mask"] = None
    assert recorder.first is not None, "a model has layers"
    return recorder.first, recorder.seen


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
    base, head = model.get_submodule(place), model.get_submodule(spec.head)
    setattr(model, spec.head, nn.Identity())
    setattr(model, place, _Products(products.reshape(1, -1, products.shape[-1])))
    try:
        logits: Tensor = model(input_ids=None, use_cache=False).logits
        return logits.view(products.shape)
    finally:
        setattr(model, spec.head, head)
        setattr(model, place, base)
