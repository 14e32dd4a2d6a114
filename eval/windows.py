"""How a text is cut into what a model is asked: windows of one stream, or documents on their own.

A window is what the model sees in one forward pass: `length` tokens, a BOS included where one is
asked for. With T = length (or length - 1 behind a BOS) text tokens a window, window k begins at
text token k * stride and predicts the tokens that no earlier window predicted:

    stride = T (default)   windows do not overlap; each predicts all its tokens but the first,
                           which has no context (behind a BOS: all of them)
    stride < T             windows slide; each but the first predicts its last `stride` tokens

Only whole windows are used: what is left at the end of the stream is dropped. A smaller stride
gives every token more context, so a perplexity means nothing without length, stride and BOS
(https://huggingface.co/docs/transformers/perplexity draws both).

    for batch in Text(token_ids, length=512).batches(8): ...
    for batch in Text(documents=lists_of_ids, length=512).batches(8): ...
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError, UsageError
from compress.eval.progress import tell

# Logits are turned to fp32 this many numbers at a time (64 MiB), whatever the vocabulary.
CHUNK_ELEMENTS = 2**24


# Told the values [n] of the predictions at positions [n] of a row of the text.
Each = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass. The logits at position i predict `input_ids[:, i + 1]`."""

    input_ids: Tensor  # [B, L]
    attention_mask: Tensor | None  # [B, L], None where no row is padded
    scored: Tensor  # [B, L - 1] bool: which predictions count
    first: int = 0  # row of the text that its own first one is


@dataclass(frozen=True, eq=False)
class Text:
    """Token ids and how they are cut: one stream in windows, or documents on their own.

    Attributes:
        ids: [tokens], one stream, many texts joined by the caller; or
        documents: lists of ids, each scored on its own, cut to `length`.
        length: tokens the model sees in a window or of a document, BOS included.
        stride: text tokens from one window to the next; None for windows that do not overlap.
            Documents take none.
        bos: id put in front of each window or document and never scored; None for none.

    Raises UsageError for a stream and documents at once, and for documents with a stride.
    """

    ids: Tensor | Sequence[int] = ()
    documents: Sequence[Sequence[int]] | None = None
    length: int = field(kw_only=True)
    stride: int | None = None
    bos: int | None = None

    def __post_init__(self) -> None:
        if self.documents is None:
            return
        if len(self.ids):
            raise UsageError("ids and documents were both given: expected one stream or the other")
        if self.stride is not None:
            raise UsageError(f"stride {self.stride}: documents are not cut in windows")

    def batches(self, size: int) -> Iterator[Batch]:
        """So many windows or documents at a time, in order.

        Raises UsageError where length or stride make no sense or there is nothing to predict.
        """
        if self.documents is not None:
            return document_batches(self.documents, self.length, self.bos, size)
        return window_batches(self.ids, self.length, self.stride, self.bos, size)

    def conditions(self) -> dict[str, Any]:
        """What a figure depends on beside the tokens: length, stride, bos, unit."""
        step = check_window(self.length, self.stride, self.bos)
        unit, stride = ("window", step) if self.documents is None else ("document", None)
        return {"length": self.length, "stride": stride, "bos": self.bos is not None, "unit": unit}


def cut_line(unit: str, count: int, length: int, stride: int | None) -> str:
    """How a text was cut, for the line of a figure."""
    if unit == "document":
        return f"{count} documents of at most {length} tokens"
    return f"{count} windows of {length} tokens, stride {stride}"


def check_window(length: int, stride: int | None, bos: int | None) -> int:
    """Text tokens from the start of one window to the next; a UsageError if that makes no sense."""
    text = length - (bos is not None)
    if length < 2:
        raise UsageError(f"a window of {length} tokens predicts nothing: expected length >= 2")
    if stride is not None and not 1 <= stride <= text:
        behind = " behind a BOS" if bos is not None else ""
        raise UsageError(
            f"stride {stride} does not fit windows of {text} text tokens{behind}: "
            f"expected 1 to {text}"
        )
    return stride or text


def window_batches(
    token_ids: Tensor | Sequence[int],
    length: int,
    stride: int | None,
    bos: int | None,
    batch_size: int,
) -> Iterator[Batch]:
    """The windows of one stream of tokens, in order."""
    stream = torch.as_tensor(token_ids, dtype=torch.long).cpu()
    step, text = check_window(length, stride, bos), length - (bos is not None)
    if stream.dim() != 1:
        raise UsageError(f"expected one stream of tokens [tokens], found shape {[*stream.shape]}")
    if stream.numel() < text:
        raise UsageError(
            f"the text has {stream.numel()} tokens, fewer than one window of {text}: "
            f"give more text or a smaller length"
        )
    windows = stream.unfold(0, text, step)  # [windows, T], a view
    for first in range(0, windows.shape[0], batch_size):
        rows = windows[first : first + batch_size]
        scored = torch.zeros(rows.shape[0], length - 1, dtype=torch.bool)
        # The last `step` tokens are new; all of the very first window is.
        scored[:, max(0, length - 1 - step) :] = True
        if first == 0:
            scored[0] = True
        if bos is not None:
            rows = torch.cat([rows.new_full((rows.shape[0], 1), bos), rows], dim=1)
        yield Batch(rows.contiguous(), None, scored, first)
        tell("windows", first + scored.shape[0], windows.shape[0])


def document_batches(
    documents: Sequence[Sequence[int]], length: int, bos: int | None, batch_size: int
) -> Iterator[Batch]:
    """Each document on its own row, cut to `length` tokens and padded on the right.

    The first token of a row (the BOS, if there is one) is context only. Padding is masked and
    comes after the text, so it changes nothing that a causal model predicts. Documents of fewer
    than two tokens predict nothing and are left out.
    """
    check_window(length, None, bos)
    head = [] if bos is None else [bos]
    rows = [[*head, *ids[: length - len(head)]] for ids in documents]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise UsageError("no document has two tokens or more: there is nothing to predict")
    for first in range(0, len(rows), batch_size):
        some = rows[first : first + batch_size]
        lengths = torch.tensor([len(row) for row in some])
        input_ids = torch.zeros(len(some), int(lengths.max()), dtype=torch.long)
        for i, row in enumerate(some):
            input_ids[i, : len(row)] = torch.tensor(row)
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        padded = not bool(mask.all())
        yield Batch(input_ids, mask.long() if padded else None, mask[:, 1:], first)
        tell("documents", first + len(some), len(rows))


@contextmanager
def measuring(*models: torch.nn.Module) -> Iterator[None]:
    """Models in evaluation mode and without gradients, as they were before on leaving."""
    training = [part for model in models for part in model.modules() if part.training]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def logits_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    """The logits of one forward pass, [B, L, V], on the model's device and in its dtype."""
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    inputs = {"input_ids": batch.input_ids.to(device)}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask.to(device)
    return model(**inputs, use_cache=False).logits


def scored_at_once(vocabulary: int) -> int:
    """How many predictions are few enough for their logits to be held in fp32."""
    return max(1, CHUNK_ELEMENTS // vocabulary)


def scored_chunks(scored: Tensor, vocabulary: int) -> Iterator[tuple[int, Tensor]]:
    """(row, positions) that cover every scored prediction, few enough to be held in fp32."""
    size = scored_at_once(vocabulary)
    for row in range(scored.shape[0]):
        for positions in scored[row].nonzero().flatten().split(size):
            yield row, positions


def check_no_nan(values: Tensor, what: str) -> Tensor:
    """The values, or a CompressError: a NaN would turn the whole mean into NaN, unexplained."""
    if bool(values.isnan().any()):
        raise CompressError(
            f"{what} gave NaN logits: the weights hold NaN or overflow in this dtype; "
            f"check the checkpoint or load it in float32"
        )
    return values
