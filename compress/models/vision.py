"""Runs the vision tower of a multimodal model, and notes what its language model gets.

Images are encoded once, before the layer walk, with the values that are written; then the tower is
given back.

    tensors = model.vision_tensors()                    # of RotatedModel
    with vision_at_work(skeleton, tensors, "cpu"):
        encoded = encode(skeleton, inputs, lookup)      # what the language model would get
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from compress.errors import CheckpointError
from compress.models.config_values import without_names
from compress.models.own_forward import Told, layers_away, told_on
from compress.models.skeleton import Skeleton

Lookup = Callable[[Tensor], Tensor]  # rows of the embedding in fp32, by token ids on the CPU
Inputs = dict[str, Any]  # keyword arguments of a forward, or of `get_image_features`


@runtime_checkable
class EncodesImages(Protocol):
    """What a multimodal family's model can do: make features of pixels."""

    get_image_features: Callable[..., Any]


@dataclass(frozen=True)
class Added:
    """What the family adds to the stream behind a decoder layer: values [n, d] at slots [n]."""

    slots: Tensor
    values: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Added":
        """x [1, T, d], most rows of which are zero."""
        slots = (x[0] != 0).any(-1).nonzero()[:, 0]
        return cls(slots, x[0, slots])

    def whole(self, shape: torch.Size) -> Tensor:
        """All rows, those of zero as well: `shape` [1, T, d]."""
        return self.to(self.values.new_zeros(shape))

    def to(self, x: Tensor) -> Tensor:
        """x [1, T, d] with it, a new tensor on x's device."""
        return x.index_add(1, self.slots.to(x.device), self.values.to(x)[None])


@dataclass(frozen=True)
class Encoded:
    """A prompt as the language model gets it.

    Attributes:
        embeds: [1, T, d], what the first decoder layer reads.
        told: what it is called with beside them; None for text.
        added: what is added to the stream behind layer i, by i.
    """

    embeds: Tensor
    told: Told | None
    added: dict[int, Added] = field(default_factory=dict)


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
    """One prompt through everything before the decoder layers, by the family's own forward.

    Args:
        inputs: keyword arguments of a forward.
        lookup: rows of the embedding in fp32, by token ids; on the CPU.

    Raises CheckpointError if the model takes no such prompt.
    """
    base, spec = skeleton.base, skeleton.spec
    decoder = base.get_submodule(spec.layers.rpartition(".")[0].removeprefix(f"{spec.base}."))
    table = spec.embedding.rpartition(".")[2]
    embedding, state = decoder.get_submodule(table), dict(vars(base))
    calls: list[Inputs] = []
    note = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    scale = spec.embedding_scale if spec.scaled_by_module else 1.0
    setattr(decoder, table, _Rows(lookup, scale, cast(nn.Embedding, embedding)))
    skeleton.model.get_submodule(spec.rotary).to(device)
    try:
        with layers_away(skeleton.model, spec) as seen:
            base(**on_device(inputs, device), use_cache=False)
    except (ValueError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"{skeleton.folder}: the vision tower does not take what the processor beside it makes "
            f"of images: {without_names(str(error))}"
        ) from error
    finally:
        note.remove()
        setattr(decoder, table, embedding)
        # Some keep what they found out about a prompt (M-RoPE), for the tokens after it.
        for name in vars(base).keys() - state.keys():
            delattr(base, name)
        vars(base).update(state)
    handed = seen()
    (call,) = calls
    told = {name: call[name] for name in ("position_ids", "attention_mask") if _tensors(call, name)}
    return Encoded(
        handed.first.float().cpu(),
        told_on(cast(Told, told), "cpu"),
        {i: Added.of(x.float().cpu()) for i, x in handed.added.items()},
    )


def _tensors(call: Inputs, name: str) -> bool:
    return isinstance(call.get(name), Tensor | dict)


class _Rows(nn.Module):
    """In the place of the embedding: rows that are looked up."""

    def __init__(self, lookup: Lookup, scale: float, real: nn.Embedding):
        super().__init__()
        self.lookup = (lookup,)  # no submodule: it stays where it is
        self.scale, self.num_embeddings = scale, real.num_embeddings
        self.embedding_dim = real.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        (lookup,) = self.lookup
        rows = lookup(ids.cpu()).to(ids.device)
        return rows if self.scale == 1.0 else rows * self.scale
