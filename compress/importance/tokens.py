"""Who matters in a sequence: one weight per token for the Hessian of a layer (RSQ).

Each strategy gives a raw score s_t, higher = more important. Per sample, over unmasked tokens:

    r_t     = r_min + (r_max - r_min) * (s_t - min s) / (max s - min s)   all r_max if s is constant
    w_t     = r_t^power                             1: the released code, 2: the paper's X R^2 X^T
    w_hat_t = w_t * n / sum w                       mean 1: every sample has the same total weight

    H = (2 / N) sum_j sum_t w_hat_jt x_jt x_jt^T

One vector per sample serves all linears of a layer: Sung et al., "RSQ: Learning from Important
Tokens Leads to Better Quantized LLMs", arXiv 2503.01820, equation 4 (r) and figure 1.
With an attention sink its token takes r_max and the others fall near r_min: `effective_sample_size`
says how few tokens carry the weight. B samples of T tokens, h heads on h_kv key heads, width d.

    w = token_weights("attention_concentration", context, minimum=0.01, maximum=1.0, power=1)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.registry import TOKEN_IMPORTANCE


@dataclass(frozen=True)
class LayerContext:
    """What a strategy may look at when one decoder layer is about to be quantised.

    The two callables are only paid for by the strategies that use them. `token_counts` [vocabulary]
    holds how often each id occurs in ALL windows (see `count_tokens`).
    """

    hidden_states: Tensor  # [B, T, d], the layer's input Z
    input_ids: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool, False = padding or not a target token
    queries_keys: Callable[[], tuple[Tensor, Tensor, float]]  # q, k after RoPE, and the scaling
    output: Callable[[], Tensor]  # [B, T, d], the layer's output at full precision
    sliding_window: int | None = None
    token_counts: Tensor | None = None


class TokenImportance(Protocol):
    """A strategy: raw scores [B, T], higher = more important. Masked positions are ignored."""

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
            q, k, scaling, sliding_window=context.sliding_window, query_mask=context.mask
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


def _positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's place among the unmasked ones of its sample [B, T], and their number [B, 1]."""
    return mask.cumsum(dim=-1) - 1, mask.sum(dim=-1, keepdim=True)


def count_tokens(input_ids: Tensor, mask: Tensor, vocabulary: int) -> Tensor:
    """How often each token id occurs at the unmasked places of all windows: [vocabulary] int64."""
    return torch.bincount(input_ids[mask], minlength=vocabulary)


@torch.no_grad()
def attention_concentration(
    q: Tensor,
    k: Tensor,
    scaling: float,
    block: int = 128,
    sliding_window: int | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """Column sums of the causal attention map over queries and heads (RSQ's AttnCon): [B, T] fp32.

    s_t = sum_m sum_i A[m, i, t], A = softmax(scaling * q k^T) of q [B, h, T, d_h] and k
    [B, h_kv, T, d_h] after RoPE. Queries go through in blocks that see only the keys they may
    attend to, so no T x T map exists: O(h * block * T) memory. `sliding_window`: query i sees keys
    i - sliding_window + 1 .. i. Queries that `query_mask` [B, T] marks False do not count;
    padding, if any, is on the right.
    """
    B, h, T, d_h = q.shape
    h_kv = k.shape[1]
    keys = k.float().transpose(-1, -2)  # [B, h_kv, d_h, T]
    position = torch.arange(T, device=q.device)
    sums = torch.zeros(B, T, device=q.device)
    counted = torch.ones(B, T, device=q.device) if query_mask is None else query_mask.float()
    for start in range(0, T, block):
        end = min(start + block, T)
        first = 0 if sliding_window is None else max(0, start - sliding_window + 1)
        # The h / h_kv queries that share a key head stand in its rows: keys are never repeated.
        rows = q[:, :, start:end].float().reshape(B, h_kv, -1, d_h)  # [B, h_kv, h/h_kv * b, d_h]
        logits = (rows @ keys[..., first:end]).mul_(scaling)
        logits = logits.view(B, h, end - start, end - first)
        distance = position[start:end, None] - position[first:end]  # query minus key
        hidden = distance < 0
        if sliding_window is not None:
            hidden |= distance >= sliding_window
        logits.masked_fill_(hidden, -torch.inf)
        # softmax and the sum over its rows in one: exp, then a product with 1 / (row sum)
        logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
        share = counted[:, None, start:end] / logits.sum(dim=-1)  # [B, h, b]
        sums[:, first:end] += (share.unsqueeze(-2) @ logits).sum(dim=(1, 2))
    return sums


def normalise(scores: Tensor, minimum: float, maximum: float, mask: Tensor) -> Tensor:
    """Min-max per sample over unmasked tokens into [minimum, maximum] (RSQ eq. 4): [B, T] fp32.

    Constant scores give `maximum` everywhere; masked tokens give 0. Raises CompressError if a score
    is not finite.
    """
    scores = scores.float()
    if not scores[mask].isfinite().all():
        raise CompressError(
            "token importance: expected finite scores, found NaN or infinity: "
            "the layer's activations have overflowed"
        )
    low = scores.masked_fill(~mask, torch.inf).amin(dim=-1, keepdim=True)
    high = scores.masked_fill(~mask, -torch.inf).amax(dim=-1, keepdim=True)
    share = ((scores - low) / (high - low)).clamp(0, 1)
    r = torch.where(high > low, minimum + share * (maximum - minimum), maximum)
    return r.masked_fill(~mask, 0.0)


def mean_one(weights: Tensor, mask: Tensor) -> Tensor:
    """w_hat = w * n / sum w per sample, n = its number of unmasked tokens: [B, T] fp32.

    Equal weights give exactly 1, so that uniform importance is plain GPTQ to the bit. Raises
    CompressError if the weights of a sample are all zero, or if one is negative or not finite.
    """
    weights = weights.float().masked_fill(~mask, 0.0)
    if not (weights.isfinite().all() and (weights >= 0).all()):
        raise CompressError("token weights: expected finite numbers from 0, found others")
    total = weights.double().sum(dim=-1, keepdim=True)
    empty = (total == 0).flatten().nonzero().flatten().tolist()
    if empty:
        cause = "all weights are zero" if mask[empty[0]].any() else "all tokens are masked"
        raise CompressError(
            f"token weights: sample {empty[0]}: {cause} ({len(empty)} of {len(total)} samples): "
            "raise token_importance.minimum, or leave the sample out"
        )
    # fp64 adds up to 2^29 equal fp32 numbers without rounding, so that w * n / sum is exactly 1.
    return (weights.double() * mask.sum(dim=-1, keepdim=True) / total).float()


def effective_sample_size(weights: Tensor) -> float:
    """(sum w)^2 / sum w^2 per sample, averaged over samples: T if uniform, 1 if one token rules."""
    w = weights.double()
    return (w.sum(dim=-1).square() / w.square().sum(dim=-1)).mean().item()


def token_weights(
    name: str, context: LayerContext, minimum: float, maximum: float, power: int
) -> Tensor:
    """w_hat [B, T] fp32 of a layer by the strategy `name`: score, normalise, power, mean one."""
    scores = TOKEN_IMPORTANCE[name]().score(context)
    r = normalise(scores, minimum, maximum, context.mask)
    return mean_one(r**power, context.mask)
