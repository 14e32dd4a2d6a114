"""Who matters in a sequence: a raw score s_t for each token of a calibration window (RSQ).

Strategies of Sung et al., "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs",
arXiv 2503.01820, each a class that gives scores [B, T], higher = more important, and controls.
`weighting.py` makes weights of them. B samples of T tokens, n of them unmasked, h heads on h_kv key
heads, width d.

    scores = TOKEN_IMPORTANCE["attention_concentration"]().score(context)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.registry import TOKEN_IMPORTANCE

CLUSTER_STEPS = 30  # of k-means, as in the released code
QUERIES = 128  # that attend at once
FORMS = {"first_half": "1_2"}  # chunks by another name


@dataclass(frozen=True)
class LayerContext:
    """What a strategy may look at when one decoder layer is about to be quantised.

    The two callables are only paid for by the strategies that use them. `token_counts` [vocabulary]
    holds how often each id occurs in ALL windows (see `count_tokens`). `seen` tells which keys a
    query sees, where that is not those before it, as within an image.
    """

    hidden_states: Tensor  # [B, T, d], the layer's input Z
    input_ids: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool, False = padding or not a target token
    queries_keys: Callable[[], tuple[Tensor, Tensor, float]]  # q, k after RoPE, and the scaling
    output: Callable[[], Tensor]  # [B, T, d], the layer's output at full precision
    sliding_window: int | None = None
    token_counts: Tensor | None = None
    softcap: float | None = None  # of attention's logits
    seen: Tensor | None = None  # [B or 1, T, T] bool, by query and key
    sinks: Tensor | None = None  # [h], in the softmax of each query beside its logits


class TokenImportance(Protocol):
    """A strategy: raw scores [B, T], higher = more important. Masked positions are ignored.

    One that takes settings of the recipe names them in `options`: its constructor's keywords.
    """

    def score(self, context: LayerContext) -> Tensor: ...


@TOKEN_IMPORTANCE.register("uniform")
class Uniform:
    """All tokens alike: plain GPTQ, or QuaRot if the model is rotated."""

    def score(self, context: LayerContext) -> Tensor:
        return torch.ones_like(context.mask, dtype=torch.float32)


@TOKEN_IMPORTANCE.register("attention_concentration")
class AttentionConcentration:
    """How much attention a token receives from all heads and later queries: the paper's best."""

    def score(self, context: LayerContext) -> Tensor:
        q, k, scaling = context.queries_keys()
        return attention_concentration(
            q,
            k,
            scaling,
            sliding_window=context.sliding_window,
            query_mask=context.mask,
            softcap=context.softcap,
            seen=context.seen,
            sinks=context.sinks,
        )


@TOKEN_IMPORTANCE.register("activation_norm")
class ActivationNorm:
    """||Z_t||: large activations matter."""

    def score(self, context: LayerContext) -> Tensor:
        return context.hidden_states.float().norm(dim=-1)


@TOKEN_IMPORTANCE.register("activation_difference")
class ActivationDifference:
    """-||Z_t - Z'_t||: the tokens that the layer changes least matter most."""

    def score(self, context: LayerContext) -> Tensor:
        return -(context.hidden_states.float() - context.output().float()).norm(dim=-1)


@TOKEN_IMPORTANCE.register("token_frequency")
class TokenFrequency:
    """-count of the token id in the whole calibration set: rare tokens matter."""

    def score(self, context: LayerContext) -> Tensor:
        assert context.token_counts is not None, "token_frequency needs LayerContext.token_counts"
        return -context.token_counts.to(context.input_ids.device)[context.input_ids].float()


@TOKEN_IMPORTANCE.register("token_similarity")
class TokenSimilarity:
    """||Z_t - mean Z||^2: tokens far from the others matter.

    Equal, up to a constant, to the paper's mean squared distance to all tokens, in O(T d).
    """

    def score(self, context: LayerContext) -> Tensor:
        Z, weight = context.hidden_states.float(), context.mask.unsqueeze(-1).float()
        mean = (Z * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1)
        return (Z - mean).square().sum(dim=-1)


@TOKEN_IMPORTANCE.register("dot")
class Dot:
    """sum_s <Z_t, Z_s>, the row sums of Z Z^T: tokens along the window's mean matter. O(T d)."""

    def score(self, context: LayerContext) -> Tensor:
        Z, weight = context.hidden_states.float(), context.mask.unsqueeze(-1).float()
        return (Z @ (Z * weight).sum(dim=1).unsqueeze(-1)).squeeze(-1)


@TOKEN_IMPORTANCE.register("cluster")
class Cluster:
    """||Z_t - c||^2 to the nearest of K centroids of the window: tokens outside clusters matter."""

    options = ("centroids", "seed")

    def __init__(self, centroids: int = 100, seed: int = 0):
        self.centroids, self.seed = centroids, seed

    def score(self, context: LayerContext) -> Tensor:
        scores = torch.zeros(context.mask.shape, device=context.mask.device)
        for j, mask in enumerate(context.mask):
            scores[j, mask] = nearest_centroid(
                context.hidden_states[j][mask].float(), self.centroids, self.seed
            )
        return scores


@TOKEN_IMPORTANCE.register("first_n")
class FirstN:
    """The first eighth of the sequence, 512 of 4096 tokens in the paper. A hard mask at r_min 0."""

    def score(self, context: LayerContext) -> Tensor:
        position, n = _positions(context.mask)
        return (position < (n // 8).clamp(min=1)).float()


@TOKEN_IMPORTANCE.register("first_last_n")
class FirstLastN:
    """The first and last 32nd, 128 + 128 of 4096 tokens in the paper. A hard mask at r_min 0."""

    def score(self, context: LayerContext) -> Tensor:
        position, n = _positions(context.mask)
        share = (n // 32).clamp(min=1)
        return ((position < share) | (position >= n - share)).float()


@TOKEN_IMPORTANCE.register("chunks")
class Chunks:
    """The named ones of P equal chunks of the sequence. A hard mask at r_min 0.

    "0_31_32": chunks 0 and 31 of 32; "first_half" leaves the first half out, as "1_2" does. Chunk c
    of n tokens is floor(c n / P) .. floor((c + 1) n / P) - 1.
    """

    options = ("chunks",)

    def __init__(self, chunks: str):
        *self.chosen, self.count = map(int, FORMS.get(chunks, chunks).split("_"))

    def score(self, context: LayerContext) -> Tensor:
        position, n = _positions(context.mask)
        chunk = ((position + 1) * self.count - 1) // n.clamp(min=1)
        return torch.isin(chunk, torch.tensor(self.chosen, device=chunk.device)).float()


@TOKEN_IMPORTANCE.register("position")
class Position:
    """What a token would receive if all queries looked at all tokens alike: a control, no paper's.

    s_t = sum over queries i >= t of 1 / (i + 1): the part of attention concentration that only
    tells where a token stands.
    """

    def score(self, context: LayerContext) -> Tensor:
        T = context.mask.shape[1]
        if context.seen is not None:
            keys = context.seen.sum(-1).clamp(min=1)
        else:
            keys = torch.arange(1, T + 1, device=context.mask.device)
            if context.sliding_window is not None:
                keys = keys.clamp(max=context.sliding_window)
        return viewers(context.mask / keys, context.sliding_window, context.seen).float()


def _positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's place among the unmasked ones of its sample [B, T], and their number [B, 1]."""
    return mask.cumsum(dim=-1) - 1, mask.sum(dim=-1, keepdim=True)


def viewers(queries: Tensor, sliding_window: int | None, seen: Tensor | None = None) -> Tensor:
    """The sum of `queries` [B, T] over those that can see each token: [B, T] fp64.

    Those at its place and behind it, so many as the window reaches; or as `seen` says.
    """
    if seen is not None:
        return (queries.double().unsqueeze(1) @ seen.double()).squeeze(1)
    before = torch.nn.functional.pad(queries.double().cumsum(dim=-1), (1, 0))  # [B, T + 1]
    T = queries.shape[1]
    first = torch.arange(T, device=queries.device)
    last = first + (T if sliding_window is None else sliding_window)
    return before[:, last.clamp(max=T)] - before[:, first]


def nearest_centroid(Z: Tensor, K: int, seed: int) -> Tensor:
    """Squared distances of Z [n, d] to the nearest of K centroids of k-means: [n].

    Starts from K different tokens drawn from all n. Raises CompressError for K >= n, where each
    token would be its own centroid.
    """
    n = len(Z)
    if n <= K:
        raise CompressError(
            f"token importance cluster: expected more tokens in a window than the {K} centroids, "
            f"found {n}: lower token_importance.centroids"
        )
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:K]
    centroids = Z[drawn.to(Z.device)]
    for _ in range(CLUSTER_STEPS):
        nearest = _nearest(Z, centroids)
        members = torch.zeros(K, n, device=Z.device)
        members[nearest, torch.arange(n, device=Z.device)] = 1.0
        size = members.sum(dim=1, keepdim=True)
        moved = torch.where(size > 0, members @ Z / size.clamp(min=1), centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return (Z - centroids[_nearest(Z, centroids)]).square().sum(dim=-1)


def _nearest(Z: Tensor, centroids: Tensor) -> Tensor:
    """Which centroid [K, d] is nearest to each of Z [n, d]: [n]."""
    return torch.addmm(centroids.square().sum(dim=-1), Z, centroids.T, alpha=-2).argmin(dim=-1)


def count_tokens(input_ids: Tensor, mask: Tensor, vocabulary: int) -> Tensor:
    """How often each token id occurs at the unmasked places of all windows: [vocabulary] int64."""
    return torch.bincount(input_ids[mask], minlength=vocabulary)


@torch.no_grad()
def attention_concentration(
    q: Tensor,
    k: Tensor,
    scaling: float,
    block: int = QUERIES,
    sliding_window: int | None = None,
    query_mask: Tensor | None = None,
    softcap: float | None = None,
    seen: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Column sums of the causal attention map over queries and heads (RSQ's AttnCon): [B, T] fp32.

    s_t = sum_m sum_i A[m, i, t], A = softmax(scaling * q k^T) of q [B, h, T, d_h] and k
    [B, h_kv, T, d_h] after RoPE. Queries go through in blocks that see only the keys they may
    attend to, so no T x T map exists: O(h * block * T) memory. `sliding_window`: query i sees keys
    i - sliding_window + 1 .. i. Queries that `query_mask` [B, T] marks False do not count;
    padding, if any, is on the right. `softcap` c: logits l are c tanh(l / c). `seen`, bool
    [B or 1, T, T]: what each query sees, where it is not that. `sinks` [h]: a logit more for each
    query, to no token; what it takes of the query's attention no token receives.
    """
    B, h, T, d_h = q.shape
    h_kv = k.shape[1]
    keys = k.float().transpose(-1, -2)  # [B, h_kv, d_h, T]
    position = torch.arange(T, device=q.device)
    sums = torch.zeros(B, T, device=q.device)
    counted = torch.ones(B, T, device=q.device) if query_mask is None else query_mask.float()
    for start in range(0, T, block):
        end = last = min(start + block, T)
        first = 0 if sliding_window is None else max(0, start - sliding_window + 1)
        if seen is not None:
            first, last = 0, T
        # The h / h_kv queries that share a key head stand in its rows: keys are never repeated.
        rows = q[:, :, start:end].float().reshape(B, h_kv, -1, d_h)  # [B, h_kv, h/h_kv * b, d_h]
        logits = (rows @ keys[..., first:last]).mul_(scaling)
        logits = logits.view(B, h, end - start, last - first)
        if softcap is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        distance = position[start:end, None] - position[first:last]  # query minus key
        hidden = distance < 0
        if sliding_window is not None:
            hidden |= distance >= sliding_window
        if seen is not None:
            hidden = ~seen[:, None, start:end]
        logits.masked_fill_(hidden, -torch.inf)
        # softmax and the sum over its rows in one: exp, then a product with 1 / (row sum)
        highest = logits.amax(dim=-1, keepdim=True)
        if sinks is not None:
            highest = highest.maximum(sinks.float()[:, None, None])
        logits.sub_(highest).exp_()
        total = logits.sum(dim=-1)
        if sinks is not None:
            total += (sinks.float()[:, None] - highest.squeeze(-1)).exp()
        share = counted[:, None, start:end] / total  # [B, h, b]
        sums[:, first:last] += (share.unsqueeze(-2) @ logits).sum(dim=(1, 2))
    return sums
