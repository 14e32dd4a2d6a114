"""How far a model's predictions are from its baseline's, token by token.

    KL(t) = sum_v p(v) (log p(v) - log q(v)),   p: the baseline's next-token distribution, q: the
                                                model's, after the same context; in nats

Perplexity asks only about the token that came; KL asks about the whole distribution, so it sees
damage that luck hides from perplexity and needs fewer tokens to be sure. Both models read the same
windows, one batch at a time; log-softmax in fp32, sums in fp64. Each mean comes with a standard
error over tokens, as if they were independent, and over windows, which are nearly so.

    result = kl_divergence(model, baseline, Text(token_ids, length=512))
    print(result.line())
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.eval.statistics import clustered_mean
from compress.eval.windows import (
    Batch,
    Each,
    Text,
    check_no_nan,
    cut_line,
    logits_of,
    measuring,
    scored_chunks,
)


@dataclass(frozen=True)
class DivergenceResult:
    """KL(baseline || model) per token and top-1 agreement, over the scored positions."""

    mean: float  # nats per token
    stderr: float | None  # over windows; None where there is only one
    token_stderr: float | None  # over tokens, as if independent
    maximum: float  # nats, at the worst token
    top1_agreement: float  # share of tokens where both put the same token first
    top1_stderr: float | None  # over windows
    tokens: int
    windows: int
    length: int
    stride: int | None
    bos: bool
    unit: str = "window"
    window_kl: tuple[float, ...] = ()  # totals [nats] of each window, in order

    def line(self) -> str:
        """One line: the figures, their errors and conditions."""
        error = "n/a" if self.stderr is None else f"{self.stderr:.2g}"
        cut = cut_line(self.unit, self.windows, self.length, self.stride)
        return (
            f"KL(baseline || model) {self.mean:.5f} ± {error} nats per token, "
            f"max {self.maximum:.3f}, top-1 agreement {100 * self.top1_agreement:.2f} % "
            f"({self.tokens} tokens, {cut}, {'BOS' if self.bos else 'no BOS'} added)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Figures and conditions for JSON: all but the totals of single windows."""
        figures = asdict(self)
        del figures["window_kl"]
        return figures


def kl_divergence(
    model: torch.nn.Module,
    baseline: torch.nn.Module | Callable[[Batch], Tensor],
    text: Text,
    batch_size: int = 8,
    seen: Callable[[Batch, Tensor, Tensor], None] | None = None,
    each: Each | None = None,
) -> DivergenceResult:
    """Mean KL(baseline || model) on the tokens of the text that `perplexity` scores.

    Args:
        model, baseline: causal language models of one vocabulary; their devices may differ. Of the
            baseline a function will do that gives the logits [B, L, V] of a batch.
        batch_size: windows or documents a forward pass; the logits of one batch of both models
            are held.
        seen: called with each batch and the logits [B, L, V] of the model and of the baseline, for
            what else is asked of the same forward passes.
        each: told the KL [nats] of every prediction.

    Raises:
        UsageError: the vocabularies differ, or the text is shorter than a window.
        CompressError: the logits of either hold a NaN.
    """
    totals: list[float] = []
    agreements: list[float] = []
    counts: list[int] = []
    squares, maximum = 0.0, 0.0
    models, logits_of_baseline = [model], baseline
    if isinstance(baseline, torch.nn.Module):
        models, logits_of_baseline = [model, baseline], partial(logits_of, baseline)
    with measuring(*models):
        for batch in text.batches(batch_size):
            theirs, ours = logits_of_baseline(batch), logits_of(model, batch)  # [B, L, V]
            if theirs.shape != ours.shape:
                raise UsageError(
                    f"the two models have vocabularies of {ours.shape[-1]} and "
                    f"{theirs.shape[-1]}: KL needs a baseline of the same vocabulary"
                )
            if seen is not None:
                seen(batch, ours, theirs)
            kl_of, same_of = [0.0] * ours.shape[0], [0.0] * ours.shape[0]
            for row, at in scored_chunks(batch.scored, ours.shape[-1]):
                q = ours[row, at.to(ours.device)]
                p = theirs[row, at.to(theirs.device)].to(ours.device)
                for logits, whose in ((q, "the model"), (p, "the baseline")):
                    check_no_nan(logits, whose)
                kl = token_divergence(p, q).double()
                kl_of[row] += kl.sum().item()
                same_of[row] += (p.argmax(-1) == q.argmax(-1)).sum().item()
                squares += kl.square().sum().item()
                maximum = max(maximum, kl.max().item())
                if each is not None:
                    each(batch.first + row, at, kl)
            totals += kl_of
            agreements += same_of
            counts += batch.scored.sum(dim=1).tolist()
            del theirs, ours  # before the next forward passes make their own
    mean, agreement = (clustered_mean(of, counts) for of in (totals, agreements))
    tokens = sum(counts)
    variance = max(0.0, squares - tokens * mean.mean**2) / max(1, tokens - 1)
    return DivergenceResult(
        mean=mean.mean,
        stderr=mean.stderr,
        token_stderr=(variance / tokens) ** 0.5 if tokens > 1 else None,
        maximum=maximum,
        top1_agreement=agreement.mean,
        top1_stderr=agreement.stderr,
        tokens=tokens,
        windows=len(counts),
        window_kl=tuple(totals),
        **text.conditions(),
    )


def token_divergence(baseline_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(baseline_logits) || softmax(logits)) in nats, fp32: [..., V] -> [...]."""
    log_p = baseline_logits.float().log_softmax(-1)
    log_q = logits.float().log_softmax(-1)
    p = log_p.exp()
    # A token masked to -inf in the baseline adds nothing; 0 * (-inf) would be NaN.
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
