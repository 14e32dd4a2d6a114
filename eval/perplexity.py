"""Perplexity: exp of the mean negative log-likelihood of a text, with all its conditions.

    NLL(t) = -log p(x_t | what the model sees before it),   perplexity = exp(sum NLL / tokens)

The mean is over all scored tokens, never over windows or documents: a document counts as much as
it is long. Cross entropy is in fp32, sums in fp64. The standard error is over windows or documents
(see statistics.py) and, for the perplexity itself, value * error of the mean (delta method).

The same model has a perplexity per token, per word and per byte, and each changes with context
length, stride and BOS; a figure without them cannot be compared. `line()` states them all.

    result = perplexity(model, Text(token_ids, length=512))
    print(result.line())   # perplexity 12.345 ± 0.210 per token (mean NLL 2.5133 ± ..., 512 ...)
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from compress.errors import UsageError
from compress.eval.statistics import (
    Estimate,
    clustered_mean,
    exp_of,
    paired_clustered_difference,
)
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
class PerplexityResult:
    """A perplexity and what it takes to measure it again.

    `window_nll` [nats] and `window_tokens` hold the totals of each window (or document), for
    paired differences between models measured on the same windows.
    """

    value: float
    mean_nll: float  # nats per scored token
    stderr: float | None  # of mean_nll, over windows; None where there is only one
    tokens: int  # scored
    windows: int
    length: int  # tokens the model sees in a window, BOS included; the longest for documents
    stride: int | None  # text tokens from window to window; None for documents
    bos: bool
    unit: str = "window"  # or "document"
    basis: str = "token"
    per_word: float | None = None
    per_byte: float | None = None
    bits_per_byte: float | None = None
    window_nll: tuple[float, ...] = ()
    window_tokens: tuple[int, ...] = ()

    @property
    def value_stderr(self) -> float | None:
        """Standard error of the perplexity itself: value * stderr (delta method)."""
        return None if self.stderr is None else self.value * self.stderr

    def line(self) -> str:
        """One line: the figure, its error, and every condition it depends on."""
        ratio, nll = ("n/a" if e is None else f"{e:.3g}" for e in (self.value_stderr, self.stderr))
        cut = cut_line(self.unit, self.windows, self.length, self.stride)
        line = (
            f"perplexity {self.value:.4f} ± {ratio} per {self.basis} "
            f"(mean NLL {self.mean_nll:.4f} ± {nll} nats, {self.tokens} tokens scored, "
            f"{cut}, {'BOS' if self.bos else 'no BOS'} added)"
        )
        if self.per_word is not None:
            line += f"; {self.per_word:.4f} per word"
        if self.bits_per_byte is not None:
            line += f"; {self.bits_per_byte:.4f} bits per byte"
        return line

    def to_dict(self) -> dict[str, Any]:
        """Figures and conditions for JSON: all but the totals of single windows."""
        figures = asdict(self)
        del figures["window_nll"], figures["window_tokens"]
        return figures | {"value_stderr": self.value_stderr}


def perplexity(
    model: torch.nn.Module,
    text: Text,
    batch_size: int = 8,
    *,
    bytes: int | None = None,
    words: int | None = None,
    each: Each | None = None,
) -> PerplexityResult:
    """Perplexity of a text, cut into windows or documents (see windows.py).

    Of documents it is exp(NLL of all documents / tokens of all documents). The first id of a
    document is context only, so ids as a tokenizer gives them, with its BOS where it adds one, need
    no `bos`. (On the stories that models/stories260k samples, BOS in front, this is 3.697 in 16
    bits; without BOS it is 3.718, and the mean of each story's own perplexity is 3.718 too.)

    Args:
        model: a causal language model: `model(input_ids=...).logits` is [B, L, V].
        batch_size: windows or documents a forward pass; the logits of one batch are held, never
            more. Documents are padded on the right, padding masked and not scored.
        bytes, words: size of the text that a stream of ids encodes. Given, the perplexity per word
            and per byte are reported too: exp(mean NLL * tokens in the text / words).
        each: told the NLL [nats] of every prediction.

    Raises:
        UsageError: the text is shorter than a window, no document has two tokens, or length and
            stride make no sense.
        CompressError: the logits hold a NaN.
    """
    totals, counts = negative_log_likelihoods(model, text.batches(batch_size), each)
    result = perplexity_of(totals, counts, text)
    return _per_word_and_byte(result, len(text.ids), bytes, words)


def perplexity_of(totals: Sequence[float], counts: Sequence[int], text: Text) -> PerplexityResult:
    """The perplexity of the total NLL [nats] and the scored tokens of each row of a text."""
    mean = clustered_mean(totals, counts)
    return PerplexityResult(
        value=exp_of(mean.mean),
        mean_nll=mean.mean,
        stderr=mean.stderr,
        tokens=sum(counts),
        windows=len(counts),
        window_nll=tuple(totals),
        window_tokens=tuple(counts),
        **text.conditions(),
    )


def negative_log_likelihoods(
    model: torch.nn.Module, batches: Iterable[Batch], each: Each | None = None
) -> tuple[list[float], list[int]]:
    """Total NLL [nats] and number of scored tokens of each row; `each` as in `perplexity`."""
    totals: list[float] = []
    counts: list[int] = []
    with measuring(model):
        for batch in batches:
            logits = logits_of(model, batch)  # [B, L, V]
            totals += nll_of(logits, batch, "the model", each)
            counts += batch.scored.sum(dim=1).tolist()
            del logits  # before the next forward pass makes its own
    return totals, counts


def nll_of(logits: torch.Tensor, batch: Batch, whose: str, each: Each | None = None) -> list[float]:
    """Total NLL [nats] of each row of a batch, of logits [B, L, V].

    `whose` is for a NaN's line; `each` is told the NLL of every prediction.
    """
    targets = batch.input_ids[:, 1:]
    rows = [0.0] * targets.shape[0]
    for row, at in scored_chunks(batch.scored, logits.shape[-1]):
        losses = torch.nn.functional.cross_entropy(
            logits[row, at.to(logits.device)].float(),
            targets[row, at].to(logits.device),
            reduction="none",
        )
        rows[row] += check_no_nan(losses, whose).double().sum().item()
        if each is not None:
            each(batch.first + row, at, losses)
    return rows


def perplexity_difference(model: PerplexityResult, baseline: PerplexityResult) -> Estimate:
    """Mean NLL of the model minus the baseline's, per token in nats, paired by window.

    exp of it is the ratio of the perplexities.

    Raises:
        UsageError: the two were not measured on the same windows.
    """
    if model.window_tokens != baseline.window_tokens or model.bos != baseline.bos:
        raise UsageError(
            "the two perplexities were not measured on the same windows: evaluate both models "
            "on the same text with the same length, stride and BOS"
        )
    return paired_clustered_difference(model.window_nll, baseline.window_nll, model.window_tokens)


def _per_word_and_byte(
    result: PerplexityResult, tokens: int, size: int | None, words: int | None
) -> PerplexityResult:
    """The same NLL spread over words or bytes, by the text's own tokens per word and per byte."""
    if words is not None:
        result = replace(result, per_word=exp_of(result.mean_nll * tokens / words))
    if size is not None:
        nats = result.mean_nll * tokens / size
        result = replace(result, per_byte=exp_of(nats), bits_per_byte=nats / math.log(2))
    return result
