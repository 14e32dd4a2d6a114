"""What token strategies look at, drawn at random: layer inputs, ids, masks, queries and keys."""

import torch

from compress.importance.tokens import LayerContext, count_tokens
from compress.importance.weighting import TokenSettings, token_weights

B, T, D = 3, 64, 8
# What some strategies must be told.
NEEDED = {"chunks": {"chunks": "0_3_8"}, "cluster": {"centroids": 5}}


def unused(*_):
    raise AssertionError("a strategy asked for something it does not need")


def context_of(Z=None, ids=None, mask=None, **parts) -> LayerContext:
    Z = torch.randn(B, T, D) if Z is None else Z
    ids = torch.zeros(Z.shape[:2], dtype=torch.int64) if ids is None else ids
    mask = torch.ones(Z.shape[:2], dtype=torch.bool) if mask is None else mask
    return LayerContext(
        hidden_states=Z,
        input_ids=ids,
        mask=mask,
        **{"queries_keys": unused, "output": unused} | parts,
    )


def heads(h, h_kv, length=T, d_h=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(B, h, length, d_h, generator=draw)
    return q, torch.randn(B, h_kv, length, d_h, generator=draw)


def whole_context(mask=None, seed=0) -> LayerContext:
    """A context that satisfies every strategy."""
    draw = torch.Generator().manual_seed(seed)
    Z, output = torch.randn(2, B, T, D, generator=draw)
    q, k = heads(4, 2, seed=seed)
    ids = torch.randint(9, (B, T), generator=draw)
    keep = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    return context_of(
        Z,
        ids,
        mask,
        queries_keys=lambda: (q, k, 0.5),
        output=lambda: output,
        token_counts=count_tokens(ids, keep, 9),
    )


def told(name) -> dict:
    """The strategy as a recipe names it, with what it must be told."""
    return {"name": name} | NEEDED.get(name, {})


def settings_of(name, minimum=0.01, **options) -> TokenSettings:
    """Settings with what the strategy must be told."""
    return TokenSettings(name, minimum, **(NEEDED.get(name, {}) | options))


def weights_of(name, context, minimum=0.01, **options):
    """w_hat [B, T]."""
    return token_weights(settings_of(name, minimum, **options), context).w
