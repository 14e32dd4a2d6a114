"""Runs the vision tower of a multimodal model, and notes what its language model gets.

Images are encoded once, before the layer walk, with the values that are written; then the tower is
given back.

    tensors = model.vision_tensors()                    # of RotatedModel
    with vision_at_work(skeleton, tensors, "cpu"):
        encoded = encode(skeleton, inputs, lookup)      # what the language model would get
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from compress.errors import CheckpointError
from compress.models.config_values import without_names
from compress.models.skeleton import Skeleton

Lookup = Callable[[Tensor], Tensor]  # rows of the embedding in fp32, by token ids on the CPU
Inputs = dict[str, Any]  # keyword arguments of a forward, or of `get_image_features`


@runtime_checkable
class EncodesImages(Protocol):
    """What a multimodal family's model can do: make features of pixels."""

    get_image_features: Callable[..., Any]


@dataclass(frozen=True)
class Encoded:
    """A prompt as the language model gets it: embeddings [1, T, d], and position ids if it is given
    any, [1, T] or, for M-RoPE, [3, 1, T]."""

    embeds: Tensor
    positions: Tensor | None


@contextmanager
def vision_at_work(skeleton: Skeleton, tensors: dict[str, Tensor], device: str) -> Iterator[None]:
    """Gives the skeleton's tower and projector these tensors in fp32, until it is left."""
    places = {name: name.rpartition(".")[::2] for name in tensors}
    parents = {name: skeleton.model.get_submodule(parent) for name, (parent, _) in places.items()}
    try:
        for name, tensor in tensors.items():
            value = nn.Parameter(tensor.to(device, torch.float32), requires_grad=False)
            parents[name].register_parameter(places[name][1], value)
        for name, buffer in list(skeleton.base.named_buffers()):
            parent, _, child = name.rpartition(".")
            skeleton.base.get_submodule(parent)._buffers[child] = buffer.to(device)
        yield
    finally:
        for name, tensor in tensors.items():
            empty = nn.Parameter(torch.empty(tensor.shape, device="meta"), requires_grad=False)
            parents[name].register_parameter(places[name][1], empty)


def rows_of(table: Tensor) -> Lookup:
    """Looks rows up in a dense embedding [vocabulary, d]."""
    return lambda ids: table[ids].float()


def on_device(inputs: Inputs, device: str | torch.device) -> Inputs:
    """The arguments with their tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


@torch.no_grad()
def encode(skeleton: Skeleton, inputs: Inputs, lookup: Lookup, device: str = "cpu") -> Encoded:
    """One prompt through everything before the language model, by the family's own forward.

    Args:
        inputs: keyword arguments of a forward.
        lookup: rows of the embedding in fp32, by token ids; on the CPU.

    Raises CheckpointError if the model takes no such prompt.
    """
    base = skeleton.base
    decoder = base.language_model
    base.language_model = recorder = _Recorder(lookup)
    try:
        base(**on_device(inputs, device), use_cache=False)
    except (ValueError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"{skeleton.folder}: the vision tower does not take what the processor beside it makes "
            f"of images: {without_names(str(error))}"
        ) from error
    finally:
        base.language_model = decoder
    positions = recorder.seen.get("position_ids")
    return Encoded(
        recorder.seen["inputs_embeds"].float().cpu(),
        None if positions is None else positions.cpu(),
    )


class _Recorder(nn.Module):
    """In the place of the language model: notes what it is called with."""

    def __init__(self, lookup: Lookup):
        super().__init__()
        self.lookup = (lookup,)  # no submodule: it stays where it is
        self.seen: Inputs = {}

    def get_input_embeddings(self) -> Callable[[Tensor], Tensor]:
        (lookup,) = self.lookup
        return lambda ids: lookup(ids.cpu()).to(ids.device)

    def forward(self, **kwargs: Any) -> object:
        from transformers.modeling_outputs import BaseModelOutputWithPast  # slow to import

        self.seen = kwargs
        return BaseModelOutputWithPast(last_hidden_state=kwargs["inputs_embeds"])
