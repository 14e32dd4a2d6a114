"""The model that is quantised: the source, its norms fused and its weights rotated.

It is the source itself where the recipe does not rotate. One layer is in memory at a time.

    model = RotatedModel(skeleton, recipe.rotate, torch.bfloat16, "cpu")
    (x,) = model.embed([ids])                            # [B, T, d]
    with model.layer(0) as layer:
        x = model.forward(layer, 0, x)
    with model.logits() as head:
        head(x)                                          # [B, T, V]
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from compress.errors import CompressError, UsageError
from compress.memory import moved
from compress.models.own_forward import Told
from compress.models.skeleton import Skeleton
from compress.recipe.sections import Model, Rotate
from compress.rotation.rotate import (
    effective,
    fuse_and_rotate_expert,
    fuse_and_rotate_layer,
    fused_gamma,
    head_rotation,
    make_rotation,
    rotate_vision,
)
from compress.rotation.table import Table


def storage_dtype(section: Model, skeleton: Skeleton) -> torch.dtype:
    """The dtype of unquantised tensors and scales in the output: by itself, the checkpoint's own.

    That of experts in fp64 is fp32: they get the dtype of their scales, in which torch has no
    product for them.
    """
    if section.dtype != "auto":
        return cast(torch.dtype, getattr(torch, section.dtype))
    mixed = any(kind.experts for kind in skeleton.spec.kinds)
    return torch.float32 if mixed and skeleton.dtype is torch.float64 else skeleton.dtype


def unrotatable(skeleton: Skeleton) -> str | None:
    """Why the recipe cannot rotate this model, as a line that names its family, or None."""
    if (why := skeleton.spec.unrotatable) is None:
        return None
    kind = skeleton.model_config.model_type
    return f"rotate: a {kind!r} cannot be rotated exactly: {why}: use rotate: none"


class RotatedModel:
    """What the recipe's rotation makes of a source model, tensor by tensor.

    Attributes:
        residual, heads: the rotations R1 and R2, None where there are none.
        dtype: of what stays unquantised, and of scales, in the output.
        device: where layers are computed.
    """

    def __init__(self, skeleton: Skeleton, rotate: Rotate, dtype: torch.dtype, device: str):
        self.skeleton, self.spec = skeleton, skeleton.spec
        self.dtype, self.device = dtype, device
        if rotate.kind != "none" and (why := unrotatable(skeleton)):
            raise UsageError(why)
        self.residual = make_rotation(rotate.kind, skeleton.config.hidden_size, rotate.seed)
        self.heads = head_rotation(rotate.kind, skeleton.head_dim, rotate.seed)

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor in the dtype of the output; CompressError where its values do not fit."""
        stored = tensor.to(self.skeleton.stored_dtype(name, self.dtype))
        # Least and largest, since `isfinite` of a whole vocabulary takes several times its bytes.
        if stored.numel() and not all(bool(edge.isfinite()) for edge in stored.aminmax()):
            raise CompressError(
                f"{name}: its values (up to {tensor.abs().max():.3g}) do not fit in "
                f"{str(self.dtype).removeprefix('torch.')}: choose another model.dtype"
            )
        return stored

    # ---- tensors --------------------------------------------------------------------------------

    def embedding(self) -> Table:
        """The embedding [V, d], rotated where the stream is."""
        name = f"{self.skeleton.table}.weight"
        return Table(self.skeleton.reader, name, residual=self.residual)

    def layer_tensors(self, index: int) -> dict[str, Tensor]:
        """A decoder layer's tensors by their names inside it, but for those of its experts.

        What is rotated is fp64.
        """
        tensors, spec = self.skeleton.read_layer(index, experts=False), self.spec.layer(index)
        if self.residual is None:
            return tensors
        return fuse_and_rotate_layer(
            tensors, spec.resting, self.residual, self.heads, self.skeleton.head_dim
        )

    def expert_tensors(self, index: int, number: int) -> dict[str, Tensor]:
        """The same of one expert of a decoder layer, by their names inside the layer."""
        tensors, spec = self.skeleton.read_expert(index, number), self.spec.layer(index)
        if self.residual is None:
            return tensors
        assert spec.experts is not None
        gamma = self.skeleton.reader.tensor(f"{self.spec.layers}.{index}.{spec.post_norm}.weight")
        factor = effective(gamma, spec.gain)
        return fuse_and_rotate_expert(tensors, spec.experts, number, factor, self.residual)

    def head(self) -> tuple[Table, dict[str, Tensor]]:
        """The head's weight [V, d], and the tensors of the last norm, which it may take in."""
        spec, skeleton = self.spec, self.skeleton
        norm = skeleton.read_all(spec.final_norm)
        name = f"{skeleton.table if skeleton.tied else spec.head}.weight"
        if self.residual is None:
            return Table(skeleton.reader, name), norm
        gamma = norm["weight"]
        table = Table(skeleton.reader, name, effective(gamma, spec.final_gain), self.residual)
        return table, {"weight": fused_gamma(gamma, spec.final_gain)}

    def head_bias(self) -> Tensor | None:
        """What the head adds to its products [V], as the source has it."""
        name = f"{self.spec.head}.bias"
        return self.skeleton.reader.tensor(name) if name in self.skeleton.parameters else None

    def vision_tensors(self, rounded: bool = True) -> dict[str, Tensor]:
        """The tower's and the projector's tensors by their modules' names, as they are stored.

        `rounded` to the output's dtype; otherwise what is rotated is fp64.

        They stay in 16 bits. Where the residual stream is rotated, so is what enters it here: the
        last linear of the projector and the newline vectors.
        """
        assert self.spec.vision is not None
        names = self.skeleton.vision_names()
        tensors = {name: self.skeleton.reader.tensor(name) for name in names}
        if self.residual is not None:
            tensors = rotate_vision(tensors, self.spec.vision, self.residual)
        if not rounded:
            return tensors
        return {name: self.stored(name, tensor) for name, tensor in tensors.items()}

    # ---- at work --------------------------------------------------------------------------------

    def embed(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Each [B, T] -> [B, T, d] in fp32, as the first layer gets it; the table is read once."""
        table = self.embedding().dense(torch.float32)
        for ids in batches:
            yield self.skeleton.scaled(table[ids])

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The decoder layer in fp32; empty again on leaving. Experts are read one at a time."""
        tensors = self.layer_tensors(index)
        for name in list(tensors):
            tensors[name] = moved(tensors[name], self.device)
        expert = partial(self.expert_tensors, index)
        with self.skeleton.layer(index, tensors, self.device, expert) as layer:
            yield layer

    def forward(self, layer: nn.Module, index: int, x: Tensor, told: Told | None = None) -> Tensor:
        """[B, T, d] -> [B, T, d]; `told` as for `Skeleton.layer_inputs`."""
        y = layer(x, **self.skeleton.layer_inputs(index, x, told))
        return y[0] if isinstance(y, tuple) else y

    @contextmanager
    def final_norm(self, tensors: dict[str, Tensor]) -> Iterator[nn.Module]:
        """The norm before the head with these tensors, in fp32; empty again on leaving."""
        norm = self.skeleton.model.get_submodule(self.spec.final_norm)
        here = {name: moved(tensor, self.device) for name, tensor in tensors.items()}
        norm.load_state_dict(here, assign=True)
        try:
            yield norm
        finally:
            norm.to("meta")

    @contextmanager
    def logits(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """What turns the last layer's output [..., d] into logits [..., V]."""
        table, tensors = self.head()
        weight = moved(table.dense(torch.float32), self.device)
        bias = self.head_bias()
        with self.final_norm(tensors) as norm:
            yield lambda x: self.finished(norm(x) @ weight.T, bias)

    def finished(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """The head's products as logits."""
        if bias is not None:
            products = products + bias.to(products.device, products.dtype)
        return self.skeleton.finished(products)
