"""Modules made without numbers: what will be filled from a file takes no memory before.

Weights are made by `torch.empty`, and a layer's experts may be one of 30 GB. Inside, it gives a
tensor on the meta device, and a random fill of such a tensor, which changes nothing, is left out.
What is computed (rotary frequencies, position ids) is real.

    with WithoutNumbers():
        layer = nn.Linear(16384, 53248)      # layer.weight.is_meta
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)


class WithoutNumbers(TorchFunctionMode):
    """A context in which `torch.empty` is on the meta device, unless the caller names one."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty and given.get("device") is None:
            given["device"] = "meta"
        elif func in FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **given)
