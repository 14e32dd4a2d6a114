"""What the language model tells: how much the prompt's last token attends to each token.

From the q and k of one decoder layer, with its rotary embedding, so that no attention kernel has to
give its weights away; only the last token's row is computed.

    tap = LastTokenAttention(layer.self_attn); handles = tap.install(); ...; tap.scores(valid)
"""

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.errors import UsageError
from compress.models.attention import Attended, attending
from compress.models.structure import Linear
from compress.pruning.per_thread import PerThread
from compress.pruning.tower import rotate


class DecoderAttention(Protocol):
    """What is read of a decoder layer's attention."""

    head_dim: int
    scaling: float
    get_submodule: Callable[[str], nn.Module]


class LastTokenAttention:
    """Hooks on the projections of one decoder layer's attention."""

    def __init__(self, attention: nn.Module):
        if not follows(attention):
            raise UsageError(
                f"{type(attention).__name__} makes its queries and keys, by a norm for one, in a "
                "way that fastv and pyramiddrop do not follow here: choose another method"
            )
        self.attention = cast(DecoderAttention, attention)
        self._seen = PerThread[dict[str, Tensor]](dict)

    def install(self) -> list[RemovableHandle]:
        projections = {name: self.attention.get_submodule(f"{name}_proj") for name in "qk"}
        return [m.register_forward_hook(partial(self._keep, n)) for n, m in projections.items()]

    @property
    def seen(self) -> dict[str, Tensor]:
        """Of this thread's forward: q and k, and cos and sin [B or 1, S, d] of their positions."""
        return self._seen.value

    def turned(self, rotary: tuple[Tensor, Tensor]) -> None:
        """Notes the rotary embedding that the layer is about to get."""
        self.seen["cos"], self.seen["sin"] = rotary

    def _keep(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        if output.shape[1] > 1:  # a decoding step has nothing to rank
            self.seen[name] = output.detach()

    def scores(self, valid: Tensor) -> Tensor:
        """Attention from each row's last valid token, heads averaged: [B, S] fp32.

        `valid` [B, S]: slots that hold a token. Forgets what it saw.
        """
        size = self.attention.head_dim
        q, k = (self.seen[name].float().unflatten(-1, (-1, size)) for name in "qk")
        cos, sin = (self.seen[x].float().unsqueeze(2) for x in ("cos", "sin"))  # [B, S, 1, d]
        numbers = torch.arange(valid.shape[1], device=valid.device)
        last = (valid * numbers).argmax(dim=1)  # [B]
        rows = torch.arange(len(last), device=last.device)
        q, k = rotate(q, cos, sin)[rows, last], rotate(k, cos, sin)  # [B, h, d], [B, S, h_kv, d]
        k = k.repeat_interleave(q.shape[1] // k.shape[2], dim=2)
        logits = torch.einsum("bhd,bshd->bhs", q, k) * self.attention.scaling
        seen = valid & (numbers <= last[:, None])
        weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)
        self._seen.value = {}
        return weights.mean(dim=1)


class _SeenError(Exception):
    """Ends a forward that has shown what it was run for."""


def follows(attention: nn.Module) -> bool:
    """Whether a module attends with its projections, rotated half by half, and no more.

    Looked up on a copy whose projections give random numbers.
    """
    known: dict[int, object] = {id(p): p for p in attention.parameters()}
    draw, seen = torch.Generator().manual_seed(0), list[Attended]()
    try:
        copied = copy.deepcopy(attention, known)  # which shares the weights
        parts = {name: Linear(copied.get_submodule(f"{name}_proj"), draw) for name in "qkv"}
        for name, part in parts.items():
            copied.set_submodule(f"{name}_proj", part)
        size = cast(DecoderAttention, copied).head_dim
        x, cos, sin = (
            torch.randn(1, 3, n, generator=draw, dtype=torch.float64)
            for n in (parts["q"].in_features, size, size)
        )

        def note(attended: Attended) -> Tensor:
            seen.append(attended)
            raise _SeenError

        with attending(copied, note), contextlib.suppress(_SeenError):
            run = cast(Callable[..., object], copied)
            run(hidden_states=x, position_embeddings=(cos, sin), attention_mask=None)
        (found,) = seen
        q, k = (
            rotate(parts[n].gave[0].unflatten(-1, (-1, size)), cos.unsqueeze(2), sin.unsqueeze(2))
            for n in "qk"
        )
        pairs = (found.query, q.transpose(1, 2)), (found.key, k.transpose(1, 2))
        same = all(a.shape == b.shape and torch.allclose(a.double(), b) for a, b in pairs)
        return same and found.softcap is None
    except Exception:  # what another kind of module sets off is of any kind
        return False


def check_decoder(text: nn.Module) -> None:
    """UsageError if a decoder layer attends in a sliding window: its width counts slots.

    The same for one with linear attention, where all that has been read leaves its mark.
    """
    types = getattr(text.config, "layer_types", None)
    window = getattr(text.config, "sliding_window", None)
    if ("sliding_attention" in types) if types else window:
        raise UsageError(
            f"{type(text).__name__} has sliding-window layers: visual tokens cannot be pruned, a "
            "shorter prompt would widen the window"
        )
    if others := {*(types or ())} - {"full_attention"}:
        raise UsageError(
            f"{type(text).__name__} has layers of another kind ({', '.join(sorted(others))}): "
            "visual tokens cannot be pruned"
        )
