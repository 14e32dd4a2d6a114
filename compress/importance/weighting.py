"""From the scores of a strategy to one weight per token for the Hessian of a layer (RSQ).

Per sample, over its n unmasked tokens, with s_t of `tokens.py`:

    s_t     -> sign(s) |s|^p                        scale: square p = 2, sqrt p = 1/2
            -> -s_t                                 reverse
            -> s_t / v_t or s_t / sqrt(v_t)         normalize: linear, sqrt; v_t queries can see t
    r_t     = r_min + (r_max - r_min) (s_t - min s) / (max s - min s)   all r_max if s is constant
              quantile q: min and max are the 1-q and q quantiles; normalize none: r_t = s_t
            -> 0 for the floor(m n) lowest, 1 for the others               mask m
            -> 0 for the floor(m n) lowest                                 truncate m
            -> r_min + (r_max - r_min) * floor(B k_t / n) / (B - 1)        bins B; rank k_t from 0
    w_t     = r_t^power                             1: the released code, 2: the paper's X R^2 X^T
    w_hat_t = w_t * n / sum w                       mean 1: every sample has the same total weight
            -> min(cap, c w_hat_t), mean 1          weight_cap
            -> (1 - a) w_hat_t + a n / k            sample_size_floor; k tokens with w_t > 0

    H = (2 / N) sum_j sum_t w_hat_jt x_jt x_jt^T

One vector per sample serves all linears of a layer: arXiv 2503.01820, equation 4 (r) and figure 1.
With an attention sink its token takes r_max and the others fall near r_min: `effective_sample_size`
says how few tokens carry the weight, and `sinks`, `quantile`, the cap and the floor bound it.

Equal ranks do not exist: of equal scores the earlier one is lower. A sample whose scores are all
equal tells nothing: its tokens weigh the same whatever is asked for.

    weights = token_weights(TokenSettings("attention_concentration", minimum=0.01), context).w
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.importance.tokens import LayerContext, TokenImportance, viewers
from compress.registry import TOKEN_IMPORTANCE

# A sink is a token whose score is more than so many times the mean: of attention concentration,
# one that receives more than so many times its share. If all queries looked at all tokens alike,
# the first token would receive ln T + 0.58 times the mean, 8.9 at 4096 tokens: a place alone makes
# no sink. SmolLM2-135M on 512 tokens: the strongest of a window has 57 to 362 times the mean in
# layers 3 to 10 and 12 to 29, also in the middle of the window; in layers 0 and 11 at most 10.
SINK = 20.0
POWERS = {"square": 2.0, "sqrt": 0.5}
VIEWERS = {"linear": 1.0, "sqrt": 0.5}


@dataclass(frozen=True)
class TokenSettings:
    """How tokens are weighed: `quantize.token_importance` of a recipe, which checks and describes
    every field, without the linears that it is for."""

    name: str
    minimum: float = 0.0
    maximum: float = 1.0
    power: int = 1
    chunks: str | None = None
    centroids: int = 100
    seed: int = 0
    scale: Literal["square", "sqrt"] | None = None
    reverse: bool = False
    normalize: Literal["default", "linear", "sqrt", "none"] = "default"
    quantile: float | None = None
    mask: float | None = None
    truncate: float | None = None
    bins: int | None = None
    sinks: Literal["keep", "clamp", "drop"] = "keep"
    weight_cap: float | None = None
    sample_size_floor: float | None = None

    def strategy(self) -> TokenImportance:
        """The strategy, given those of these settings that it names in its `options`."""
        chosen = TOKEN_IMPORTANCE[self.name]
        return chosen(**{name: getattr(self, name) for name in getattr(chosen, "options", ())})


@dataclass(frozen=True)
class TokenWeights:
    """The weights of a batch, and what was done to them.

    Attributes:
        w: [B, T] fp32, w_hat: mean one over the unmasked tokens of each sample, 0 for the others.
        flat: [B] bool: the scores were all equal, so the weights are.
        sinks: [B] tokens that were taken for sinks; 0 unless asked for.
        capped: [B] tokens at the cap.
        uniform_share: [B] the share a of equal weights that the floor has mixed in.
    """

    w: Tensor
    flat: Tensor
    sinks: Tensor
    capped: Tensor
    uniform_share: Tensor


def token_weights(settings: TokenSettings, context: LayerContext) -> TokenWeights:
    """w_hat of a layer by the strategy that `settings` name.

    Raises CompressError: a score is not finite, all weights of a sample are zero, or so many are
    that the cap or the floor cannot be held.
    """
    mask = context.mask
    scores = settings.strategy().score(context).float()
    _check_finite(scores, mask)
    sinks = torch.zeros_like(mask) if settings.sinks == "keep" else find_sinks(scores, mask)
    ranged = mask & ~sinks  # whose scores span the range
    counted = ranged if settings.sinks == "drop" else mask
    if settings.scale is not None or settings.quantile is not None:
        scores = scores.double()  # a narrow range would show fp32's rounding
    if settings.scale is not None:
        scores = scores.sign() * scores.abs() ** POWERS[settings.scale]
    if settings.reverse:
        scores = -scores
    if settings.normalize in VIEWERS:
        seen = viewers(mask, context.sliding_window, context.seen)
        seen = seen.clamp(min=1)  # of a masked place
        scores = scores.double() / seen ** VIEWERS[settings.normalize]
    low, high = extent(scores, ranged, settings.quantile)
    flat = (low >= high).squeeze(-1)
    if settings.normalize == "none":
        r = scores.masked_fill(~counted, 0.0)
    else:
        r = _into_range(scores, low, high, settings.minimum, settings.maximum, counted)
    # What ranks tokens does so by score: within the range equal r may differ.
    shaped = _by_rank(r, scores, counted, settings)
    r = torch.where(flat.unsqueeze(-1), r, shaped)
    w = mean_one(r**settings.power, mask)
    capped = torch.zeros_like(mask)
    if settings.weight_cap is not None:
        w = hold_cap(w, mask, settings.weight_cap)
        capped = w >= settings.weight_cap * (1 - 1e-6)
    share = torch.zeros(len(w), device=w.device)
    if settings.sample_size_floor is not None:
        w, share = hold_sample_size(w, mask, settings.sample_size_floor)
    return TokenWeights(w, flat, sinks.sum(dim=-1), capped.sum(dim=-1), share)


# ---- from scores to r ----------------------------------------------------------------------------


def find_sinks(scores: Tensor, mask: Tensor) -> Tensor:
    """The unmasked tokens with |s| above 20 times its mean over the sample: [B, T] bool."""
    size = scores.double().abs().masked_fill(~mask, 0.0)
    mean = size.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    return mask & (size > SINK * mean)


def extent(scores: Tensor, among: Tensor, quantile: float | None = None) -> tuple[Tensor, Tensor]:
    """The least and the greatest score of each sample [B, 1], or its 1-q and q quantiles.

    A quantile between two scores is interpolated. inf and -inf for a sample without tokens.
    """
    low = scores.masked_fill(~among, torch.inf)
    if quantile is None:
        high = scores.masked_fill(~among, -torch.inf)
        return low.amin(dim=-1, keepdim=True), high.amax(dim=-1, keepdim=True)
    ordered, last = low.sort(dim=-1).values, among.sum(dim=-1, keepdim=True) - 1

    def at(q: float) -> Tensor:
        place = (q * last.double()).clamp(min=0)
        below = place.long()
        above = torch.minimum(below + 1, last.clamp(min=0))
        left, right = ordered.gather(-1, below).double(), ordered.gather(-1, above).double()
        return torch.lerp(left, right, place - below).to(scores.dtype)

    return at(1 - quantile), at(quantile)


def normalise(scores: Tensor, minimum: float, maximum: float, mask: Tensor) -> Tensor:
    """Min-max per sample over unmasked tokens into [minimum, maximum] (RSQ eq. 4): [B, T] fp32.

    Constant scores give `maximum` everywhere; masked tokens give 0. Raises CompressError if a score
    is not finite.
    """
    scores = scores.float()
    _check_finite(scores, mask)
    return _into_range(scores, *extent(scores, mask), minimum, maximum, mask)


def _check_finite(scores: Tensor, mask: Tensor) -> None:
    if not scores[mask].isfinite().all():
        raise CompressError(
            "token importance: expected finite scores, found NaN or infinity: "
            "the layer's activations have overflowed"
        )


def _into_range(
    scores: Tensor, low: Tensor, high: Tensor, minimum: float, maximum: float, mask: Tensor
) -> Tensor:
    share = ((scores - low) / (high - low)).clamp(0, 1)
    r = torch.where(high > low, minimum + share * (maximum - minimum), maximum)
    return r.masked_fill(~mask, 0.0)


def _by_rank(r: Tensor, scores: Tensor, mask: Tensor, settings: TokenSettings) -> Tensor:
    """r after `mask`, `truncate` or `bins`: at most one of them is set."""
    share = settings.mask if settings.mask is not None else settings.truncate
    if share is None and settings.bins is None:
        return r
    n = mask.sum(dim=-1, keepdim=True)
    order = scores.masked_fill(~mask, torch.inf).argsort(dim=-1, stable=True)
    rank = order.argsort(dim=-1)
    if share is None:
        assert settings.bins is not None
        values = torch.linspace(settings.minimum, settings.maximum, settings.bins, device=r.device)
        # Masked places rank behind the last bin.
        shaped = values[(rank * settings.bins // n.clamp(min=1)).clamp(max=settings.bins - 1)]
    else:
        # A share such as 0.7 of 10 tokens is 7, whatever 0.7 is in binary.
        lowest = rank < (share * n.double() + 1e-9).long()
        shaped = (torch.ones_like(r) if settings.mask is not None else r).masked_fill(lowest, 0.0)
    return shaped.masked_fill(~mask, 0.0)


# ---- from r to w_hat -----------------------------------------------------------------------------


def mean_one(weights: Tensor, mask: Tensor) -> Tensor:
    """w_hat = w * n / sum w per sample, n = its number of unmasked tokens: [B, T] fp32.

    Equal weights give exactly 1, so that uniform importance is plain GPTQ to the bit. Raises
    CompressError if the weights of a sample are all zero, or if one is negative or not finite.
    """
    weights = weights.float().masked_fill(~mask, 0.0)
    if not (weights.isfinite().all() and (weights >= 0).all()):
        raise CompressError(
            "token weights: expected finite numbers from 0, found others: with "
            "token_importance.normalize none, a strategy's scores are its weights"
        )
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


def hold_cap(w: Tensor, mask: Tensor, cap: float) -> Tensor:
    """min(cap, c w) of w [B, T] with the c per sample that keeps its mean at one: [B, T] fp32.

    Tokens that weigh nothing still do. Raises CompressError where too few weigh anything.
    """
    n = mask.sum(dim=-1, keepdim=True).double()
    _check_support(w, n, n / cap, f"weight_cap {cap:g}")
    ordered = w.double().sort(dim=-1, descending=True).values
    behind = ordered.flip(-1).cumsum(dim=-1).flip(-1)  # the sum of this one and all smaller ones
    place = torch.arange(w.shape[-1], device=w.device).double()
    # c if the tokens before this place are at the cap, and no others.
    c = (n - place * cap) / behind
    fits = (c * ordered <= cap * (1 + 1e-12)) & (ordered > 0)
    chosen = c.gather(-1, fits.int().argmax(dim=-1, keepdim=True))
    return (w.double() * chosen).clamp(max=cap).float()


def hold_sample_size(w: Tensor, mask: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The smallest mixture of w [B, T] with equal weights whose effective size is share * n.

    (1 - a) w + a n / k over the k tokens with w > 0, so that those who weigh nothing still do. With
    v the variance of w k / n over them, the mixture's effective size is k / (1 + (1 - a)^2 v).

    Returns: the mixture [B, T] fp32, and a [B]. Raises CompressError where k < share * n.
    """
    n = mask.sum(dim=-1, keepdim=True).double()
    k = _check_support(w, n, share * n, f"sample_size_floor {share:g}").double()
    carried = w > 0
    excess = (w.double() * k / n - 1).masked_fill(~carried, 0.0)
    v = excess.square().sum(dim=-1, keepdim=True) / k
    kept = ((k / (share * n) - 1).clamp(min=0) / v).sqrt().clamp(max=1)  # 1 - a
    kept = kept.nan_to_num(1.0)  # 0 / 0: equal weights, and all are asked for
    mixed = torch.where(carried, n / k * (1 + kept * excess), 0.0).float()
    return torch.where(kept < 1, mixed, w), (1 - kept).flatten().float()


def _check_support(w: Tensor, n: Tensor, least: Tensor, setting: str) -> Tensor:
    """How many tokens of each sample weigh anything [B, 1]; CompressError where it is too few."""
    k = (w > 0).sum(dim=-1, keepdim=True)
    short = (k < least - 1e-6).flatten().nonzero().flatten().tolist()
    if short:
        j = short[0]
        raise CompressError(
            f"token weights: sample {j}: only {int(k[j])} of {int(n[j])} tokens weigh anything, "
            f"too few for token_importance.{setting} ({len(short)} of {len(k)} samples): raise "
            "token_importance.minimum"
        )
    return k


def effective_sample_size(weights: Tensor) -> float:
    """(sum w)^2 / sum w^2 per sample, averaged over samples: T if uniform, 1 if one token rules."""
    w = weights.double()
    return (w.sum(dim=-1).square() / w.square().sum(dim=-1)).mean().item()
