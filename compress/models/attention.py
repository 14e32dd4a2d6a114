"""What an attention module attends with: its own queries and keys, seen where they meet.

Every attention module of transformers gives queries, keys and values, normed and rotated as its
family does it, to a function that its config names. For a moment that function is one of ours.

    with attending(module, note): module(hidden_states=x, **inputs)
    seen = seen_by(module, x, inputs)        # q [B, h, T, d_h], k [B, h_kv, T, d_h], scaling
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from compress.errors import CompressError

NAME = "modelpress"  # of our function, while it is there
SINKS = ("s_aux", "sinks")  # what functions call a number for each head beside its logits


@dataclass(frozen=True)
class Attended:
    """What a module gives its attention function.

    Attributes:
        query: [B, h, T, d_h], key and value: [B, h_kv, T, d_h].
        scaling: of their products; softcap: what these are bent under, or None.
        sinks: [h], what is in the softmax of each query beside its logits, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None
    sinks: Tensor | None = None


class _SeenError(Exception):
    """Ends a forward that has shown what it was run for."""


@contextmanager
def attending(module: nn.Module, instead: Callable[[Attended], Tensor]) -> Iterator[None]:
    """Gives what `module`, or one inside it, attends with to `instead`.

    `instead` returns the attention's output [B, T, h, d_h].
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # slow to import

    configs = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}

    def function(
        attention: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **others: object,
    ) -> tuple[Tensor, None]:
        sinks = next((s for name in SINKS if (s := others.get(name)) is not None), None)
        if not (sinks is None or isinstance(sinks, Tensor)):
            raise CompressError(f"{type(attention).__name__} has attention sinks of another kind")
        scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
        return instead(Attended(query, key, value, scale, softcap, sinks)), None

    before = {number: config._attn_implementation for number, config in configs.items()}
    ALL_ATTENTION_FUNCTIONS[NAME] = function
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for number, config in configs.items():
            config._attn_implementation = before[number]
        del ALL_ATTENTION_FUNCTIONS[NAME]


def seen_by(module: nn.Module, x: Tensor, inputs: Mapping[str, object]) -> Attended | None:
    """What an attention module attends with for what it reads, x [B, T, d].

    `inputs`: the further arguments of its layer. None for one that has no such function, as linear
    attention.
    """
    seen: list[Attended] = []

    def note(attended: Attended) -> Tensor:
        seen.append(attended)
        raise _SeenError

    with attending(module, note):
        try:
            cast(Callable[..., object], module)(hidden_states=x, **inputs)
        except _SeenError:
            return seen[0]
    return None
