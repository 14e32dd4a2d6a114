"""Corpora become calibration windows [N, T], and RSQ's dataset expansion of them.

Windows start at random places of the token stream (or, in a corpus of separate documents, of a
random document that is long enough), drawn by a generator of their own from the recipe's seed.
Documents are tokenised without special tokens; `bos` puts the tokenizer's BOS in front of each
window instead, whose length stays T. The published calibration sets have none.

Expansion by M (RSQ, arXiv 2503.01820, figure 1): each window also appears shifted in
a circle by k * floor(T / M) tokens, k = 1 .. M-1, so that its tokens visit other positions.

    windows = draw_windows(load_documents("python-stdlib", "train"), tokenizer, 128, 512)
    windows = expand(windows, 8)        # [1024, 512]
"""

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.data.chat import KEYS, Message, Templated, conversation
from compress.data.source import CalibrationSource
from compress.data.text import BLANK_LINE, DATASETS, Corpus, load_documents, load_rows
from compress.errors import UsageError
from compress.models.skeleton import Skeleton
from compress.recipe.sections import Calibration

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

PROBE_TOKENS = 64  # of the self-check, where no calibration data gives any
BATCH = 64  # documents handed to the tokenizer at once
PHRASE = 32  # tokens that do not follow one another twice by chance
MOST_REPEATED = 0.5  # share of phrases that may be there more than once before it is said


@dataclass(frozen=True)
class Conversations:
    """What became of the conversations that were drawn: how many `tokens` they have that are no
    padding, how many were `cut` to the length of a window, how many were `left_out` because
    nothing of the assistant's stands in the first so many tokens, and how many fewer there are than
    the recipe asks for."""

    tokens: int
    cut: int
    left_out: int
    fewer: int = 0


@dataclass(frozen=True)
class CalibrationWindows:
    """`input_ids` [N, T] int64 and `mask` [N, T] bool: False = padding or not a target token.

    The first `prefix` tokens of each window (BOS) stay where they are when windows are expanded.
    `conversations` is of windows that each hold one, padded behind.
    """

    input_ids: Tensor
    mask: Tensor
    prefix: int = 0
    conversations: Conversations | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return self.input_ids.numel()

    @property
    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """Ids and masks [B, T], as they are held."""
        return [(self.input_ids, self.mask)]

    def batches(self, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Ids and masks [B, T] of at most so many tokens each, but of one window at least."""
        size = max(1, tokens // self.input_ids.shape[1])
        return list(zip(self.input_ids.split(size), self.mask.split(size), strict=True))

    def digest(self) -> bytes:
        """All that the model reads."""
        return self.input_ids.numpy().tobytes() + self.mask.numpy().tobytes()

    def facts(self) -> dict[str, object]:
        """For modelpress.json."""
        digest = hashlib.sha256(self.input_ids.numpy().tobytes())
        if not self.mask.all():
            digest.update(self.mask.numpy().tobytes())
        counted: dict[str, object] = {"tokens": self.tokens, "counted_tokens": int(self.mask.sum())}
        if self.conversations is not None:
            counted |= asdict(self.conversations)
        shape = list(self.input_ids.shape)
        return {"windows": shape, "sha256": digest.hexdigest(), **counted}

    def first(self, count: int) -> "CalibrationWindows":
        """The first so many windows, or all."""
        return CalibrationWindows(self.input_ids[:count], self.mask[:count], self.prefix)


def draw_windows(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    samples: int,
    length: int,
    bos: bool = False,
    seed: int = 0,
    context: int | None = None,
) -> CalibrationWindows:
    """N = `samples` random windows of T = `length` tokens (BOS included); same seed, same windows.

    Raises UsageError: T above the model's `context`, text shorter than one window, no BOS token.
    """
    _check_length(length, context)
    if bos:
        _check_bos(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    drawn = length - int(bos)
    if corpus.one_stream:
        stream = token_stream(corpus, tokenizer)
        if stream.numel() < drawn:
            raise UsageError(
                f"dataset {corpus.name!r}: expected at least {drawn} tokens for one window, "
                f"found {stream.numel()}: use a longer text or a smaller calibration.length"
            )
        sources = [stream] * samples
    else:
        sources = _long_documents(corpus, tokenizer, samples, drawn, generator)
    rows = []
    for ids in sources:
        start = int(torch.randint(ids.numel() - drawn + 1, (), generator=generator))
        rows.append(ids[start : start + drawn])
    input_ids = torch.stack(rows)  # [N, T]
    if bos:
        first = torch.full((samples, 1), tokenizer.bos_token_id)
        input_ids = torch.cat([first, input_ids], dim=1)
    return CalibrationWindows(input_ids, torch.ones_like(input_ids, dtype=torch.bool), int(bos))


def expand(windows: CalibrationWindows, M: int) -> CalibrationWindows:
    """[N, T] -> [N * M, T]: behind each window its M - 1 circular shifts to the right."""
    if M == 1:
        return windows
    prefix = windows.prefix
    step = (windows.input_ids.shape[1] - prefix) // M

    def shifted(rows: Tensor) -> Tensor:
        head, body = rows[:, :prefix], rows[:, prefix:]
        copies = [torch.cat([head, body.roll(k * step, dims=1)], dim=1) for k in range(M)]
        return torch.stack(copies, dim=1).flatten(0, 1)

    return CalibrationWindows(shifted(windows.input_ids), shifted(windows.mask), prefix)


def token_stream(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", limit: int | None = None
) -> Tensor:
    """All documents as one stream of token ids [tokens] int64, blank lines between them, no BOS.

    `limit` stops after so many tokens without reading on.
    """
    stream = array("q")  # a number in a list takes 36 bytes
    total, last = 0, len(corpus.texts) - 1
    for first in range(0, len(corpus.texts), BATCH):
        batch = [
            corpus.texts[i] + (BLANK_LINE if i < last else "")
            for i in range(first, min(first + BATCH, last + 1))
        ]
        encoded = [i for ids in encode(tokenizer, batch) for i in ids]
        stream.extend(encoded)
        total += len(encoded)
        if limit is not None and total >= limit:
            break
    return torch.frombuffer(stream, dtype=torch.int64)[:limit] if stream else torch.empty(0).long()


def encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    # verbose=False: a stream is longer than the model's context on purpose, no warning about it.
    return tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    ).input_ids


def _long_documents(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    samples: int,
    length: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """`samples` random documents of at least `length` tokens; each once if there are enough."""
    found: list[Tensor] = []
    for i in torch.randperm(len(corpus.texts), generator=generator).tolist():
        text = corpus.texts[i]
        # A token is at least one byte, so a short text needs no tokenizing.
        if len(text.encode()) < length:
            continue
        ids = encode(tokenizer, [text])[0]
        if len(ids) >= length:
            found.append(torch.tensor(ids, dtype=torch.int64))
        if len(found) == samples:
            break
    if not found:
        raise UsageError(
            f"dataset {corpus.name!r}: no document has {length} tokens: "
            "use a smaller calibration.length"
        )
    return [found[i % len(found)] for i in range(samples)]


def random_windows(vocabulary: int) -> CalibrationWindows:
    """A few random tokens, always the same, for a run that calibrates nothing."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator)
    return CalibrationWindows(ids, torch.ones_like(ids, dtype=torch.bool))


def text_windows(source: CalibrationSource, skeleton: Skeleton) -> CalibrationWindows:
    """Windows of text, drawn and expanded as the `calibration` section says, or of a conversation
    each."""
    c = source.settings
    context = getattr(skeleton.config, "max_position_embeddings", None)
    if (rows := conversations_of(source)) is not None:
        parts = skeleton.spec.vision is not None
        return conversation_windows(rows, skeleton.tokenizer(), c, context, parts=parts)
    corpus = load_documents(source.location, "train", c.text_field)
    windows = draw_windows(
        corpus, skeleton.tokenizer(), c.samples, c.length, c.bos, c.seed, context
    )
    return expand(windows, c.expansion)


def conversations_of(source: CalibrationSource) -> Sequence[tuple[str, object]] | None:
    """The rows, each with its place, of a dataset of conversations; None for text.

    Those of a file or a hub dataset are, if `text_field` names them, or if they have no text there
    and have `messages` or `conversations`. Raises UsageError for what cannot be read, and where
    loss_mask asks for an assistant's tokens of text.
    """
    c = source.settings
    rows = None
    if source.location not in DATASETS and not source.location.endswith(".txt"):
        rows = load_rows(source.location, "train", c.text_field, KEYS)
    if rows is None and c.loss_mask == "assistant":
        raise UsageError(
            f"calibration.loss_mask: assistant is for conversations, and {c.dataset!r} is text: "
            "name rows with messages or conversations (calibration.text_field: messages where they "
            "have text as well), or use loss_mask: all"
        )
    return rows


def conversation_windows(
    rows: Sequence[tuple[str, object]],
    tokenizer: "PreTrainedTokenizerBase",
    settings: Calibration,
    context: int | None,
    *,
    parts: bool = False,
) -> CalibrationWindows:
    """A conversation a window, from its start as the model meets it, [N, T]: cut to
    `settings.length` tokens, padded behind to the longest, and the padding does not count. The
    first token always does.

    N is `settings.samples`, or what there is: conversations are drawn once each. `parts`: as
    `chat.render` takes it. Raises UsageError, which names the row, for what the template refuses.
    """
    length, assistant = settings.length, settings.loss_mask == "assistant"
    _check_length(length, context)
    if settings.expansion > 1:
        raise UsageError(
            "calibration.expansion: a shifted conversation is none: use 1, or calibrate on text"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    found: list[Templated] = []
    cut = left_out = 0
    for i in torch.randperm(len(rows), generator=generator).tolist():
        place, row = rows[i]
        messages = _messages(row, place)
        chat = Templated.of(tokenizer, messages, place, assistant=assistant, parts=parts)
        if settings.bos:
            chat = _with_bos(chat, tokenizer)
        if not any(chat.mask[:length]):
            left_out += 1
            continue
        cut += len(chat.ids) > length
        # The first token counts, whoever wrote it: all later ones attend to it, and layers keep
        # activations there that are hundreds of times larger than elsewhere. With weight 0 it is
        # rounded to anything: SmolLM2-135M at 4 bits had a perplexity of 11,352 then.
        found.append(Templated(chat.ids[:length], [True, *chat.mask[1:length]]))
        if len(found) == settings.samples:
            break
    if not found:
        raise UsageError(
            f"dataset {settings.dataset!r}: none of {len(rows)} conversations has a token of the "
            f"assistant's among its first {length}: use a larger calibration.length, or "
            "loss_mask: all"
        )
    T = max(len(chat.ids) for chat in found)
    padding = next(
        (t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0
    )
    ids = torch.full((len(found), T), padding)
    mask = torch.zeros(len(found), T, dtype=torch.bool)
    for j, chat in enumerate(found):
        ids[j, : len(chat.ids)] = torch.tensor(chat.ids)
        mask[j, : len(chat.ids)] = torch.tensor(chat.mask)
    tokens, fewer = sum(len(chat.ids) for chat in found), settings.samples - len(found)
    facts = Conversations(tokens, cut, left_out, fewer)
    return CalibrationWindows(ids, mask, conversations=facts)


def _messages(row: object, place: str) -> list[Message]:
    if not isinstance(row, Mapping):
        raise UsageError(f"{place}: expected an object with messages, found {json.dumps(row)[:60]}")
    return conversation(row, place)


def _with_bos(chat: Templated, tokenizer: "PreTrainedTokenizerBase") -> Templated:
    """The conversation behind BOS, which its template may have written itself."""
    _check_bos(tokenizer)
    bos: int = tokenizer.bos_token_id
    if chat.ids[:1] == [bos]:
        return chat
    return Templated([bos, *chat.ids], [all(chat.mask), *chat.mask])


def _check_length(length: int, context: int | None) -> None:
    if context is not None and length > context:
        raise UsageError(
            f"calibration.length: expected at most the model's context ({context}), found {length}"
        )


def _check_bos(tokenizer: "PreTrainedTokenizerBase") -> None:
    if tokenizer.bos_token_id is None:
        raise UsageError(
            "calibration.bos: this model's tokenizer has no BOS token: set it to false"
        )


def repeated_share(ids: Tensor, mask: Tensor | None = None) -> float:
    """How much of windows [N, T] is there again elsewhere in them, from 0 to 1.

    `mask` [N, T]: phrases that begin or end with a token that does not count are none.

    Counts phrases of 32 tokens: windows of one text that overlap share theirs, and so do documents
    that are drawn twice and a text that repeats itself.
    """
    length = min(PHRASE, ids.shape[1])
    mixed = ids * -7046029254386353131  # wraps round, as all of this does: a hash of each phrase
    found = torch.zeros_like(ids[:, : ids.shape[1] - length + 1])
    for place in range(length):
        found.mul_(6364136223846793005).add_(mixed[:, place : place + found.shape[1]])
        found ^= found >> 29
    if mask is not None:
        found = found[mask[:, : found.shape[1]] & mask[:, length - 1 :]]
    return 1 - len(found.unique()) / found.numel() if found.numel() else 0.0


def doubts(windows: CalibrationWindows, expansion: int, inputs: int, vocabulary: int) -> list[str]:
    """What is said before Hessians are made of windows that tell too little, a line each.

    Args:
        windows: expanded, `expansion` for each that was drawn.
        inputs: of the linears that read the first layer's normed input, which depends on the token
            alone: fewer distinct tokens leave directions that no token points in.
        vocabulary: of the model; one of fewer tokens than twice `inputs` is asked for half of it.
    """
    found = []
    ids = windows.input_ids[::expansion]
    distinct, needed = len(ids[windows.mask[::expansion]].unique()), min(inputs, vocabulary // 2)
    if distinct < needed:
        found.append(
            f"calibration: {distinct} distinct tokens, fewer than the {inputs} inputs of a linear: "
            "most directions of its weights are not calibrated; use a text with more words"
        )
    share = repeated_share(ids, windows.mask[::expansion])
    if share > MOST_REPEATED:
        found.append(
            f"calibration: {share:.0%} of the windows' text is there more than once: they overlap "
            "or the text repeats itself; use a longer text or fewer samples"
        )
    if chats := windows.conversations:
        if chats.cut:
            found.append(
                f"calibration: {chats.cut} of {len(windows)} conversations are longer than "
                "calibration.length and were cut"
            )
        if chats.left_out:
            found.append(
                f"calibration: {chats.left_out} conversations were left out: nothing of the "
                "assistant's stands in their first tokens, as many as calibration.length"
            )
        if chats.fewer:
            found.append(
                f"calibration: {len(windows)} conversations are all there are, {chats.fewer} fewer "
                "than calibration.samples"
            )
    return found


def check_token_ids(parts: list[tuple[Tensor, Tensor]], vocabulary: int) -> None:
    """UsageError for ids and masks [B, T] without tokens, or with tokens not in the vocabulary."""
    shapes = [(list(ids.shape), list(mask.shape)) for ids, mask in parts]
    if not parts or any(0 in ids or ids != mask for ids, mask in shapes):
        raise UsageError(f"calibration data: expected ids and a mask [N, T], found {shapes[:1]}")
    highest = max(int(ids.max()) for ids, _ in parts)
    if highest >= vocabulary:
        raise UsageError(
            f"the tokenizer gives token {highest}, but the model knows {vocabulary}: "
            "tokenizer and model do not belong together"
        )
