"""Modules made without numbers: what will be filled from a file takes no memory before.

Weights are made by `torch.empty`, and a layer's experts may be one of 30 GB. Inside, it gives a
tensor on the meta device, and a random fill of such a tensor, which changes nothing, is left out.
Experts of Llama 4 are made by `torch.zeros`: it does the same from `LARGE` numbers on. What is
computed (rotary frequencies, position ids) is real.

    with WithoutNumbers():
        layer = nn.Linear(16384, 53248)      # layer.weight.is_meta
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)
# Where the functions live that fill weights; transformers has its own of the same names.
FILLING = ("torch.nn.init", "transformers.initialization")

LARGE = 2**24  # more than any buffer has


def _fills(func: Callable[..., object]) -> bool:
    """Whether a function only gives a tensor other numbers."""
    return func in FILLS or getattr(func, "__module__", None) in FILLING


def _numbers(size: tuple[object, ...]) -> int:
    """How many there are in a tensor of `zeros(*size)` or `zeros(size)`."""
    sizes = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
    return math.prod(cast(Iterable[int], sizes))


class WithoutNumbers(TorchFunctionMode):
    """A context in which `torch.empty`, and large `torch.zeros`, are on the meta device.

    Unless the caller names one.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = dict(kwargs or {})
        made = func is torch.empty or (func is torch.zeros and _numbers(args) >= LARGE)
        if made and given.get("device") is None:
            given["device"] = "meta"
        filled = args[0] if args else given.get("tensor")
        if isinstance(filled, Tensor) and filled.is_meta and _fills(func):
            return filled
        return func(*args, **given)
