"""A layer run with one of its linears taken out, or with other weights in some.

with catching(layer, "self_attn.o_proj") as caught: rows = caught(x, **inputs)
with without(layer, "mlp.down_proj") as mlp: wide = mlp(x)
with replaced(layer, {"mlp.up_proj": weight}): y = layer(x, **inputs)
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from compress.models.skeleton import linear_in


class CaughtError(Exception):
    """Ends a forward that has come to where its input was wanted."""


@contextmanager
def catching(layer: nn.Module, name: str) -> Iterator[Callable[..., Tensor]]:
    """The layer with one linear taken out; yields what gives that linear's input.

    It takes the layer's arguments, and runs the layer no further than there.
    """
    parent_name, _, child = name.rpartition(".")
    parent = layer.get_submodule(parent_name)
    linear = getattr(parent, child)
    catcher = _Catcher()
    setattr(parent, child, catcher)

    def caught(x: Tensor, **inputs: object) -> Tensor:
        try:
            layer(x, **inputs)
        except CaughtError:
            return catcher.taken()
        raise AssertionError(f"nothing runs through {name}")

    try:
        yield caught
    finally:
        setattr(parent, child, linear)


class _Catcher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.read = x
        raise CaughtError

    def taken(self) -> Tensor:
        """What came in, which is then held by nobody else."""
        read, self.read = self.read, None
        assert read is not None, "it was called"
        return read


@contextmanager
def without(layer: nn.Module, name: str) -> Iterator[nn.Module]:
    """The layer with one linear replaced by the identity; yields the linear's parent module."""
    parent_name, _, child = name.rpartition(".")
    parent = layer.get_submodule(parent_name)
    linear = getattr(parent, child)
    setattr(parent, child, nn.Identity())
    try:
        yield parent
    finally:
        setattr(parent, child, linear)


@contextmanager
def replaced(layer: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The layer with some linears' weights exchanged; names are relative to the layer."""
    before = {name: linear_in(layer, name).weight for name in weights}
    try:
        for name, weight in weights.items():
            linear_in(layer, name).weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for name, weight in before.items():
            linear_in(layer, name).weight = weight
