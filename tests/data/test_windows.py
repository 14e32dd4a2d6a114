"""Windows: where they come from, determinism, BOS, RSQ's expansion, and the token stream."""

import logging

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from compress.data.text import Corpus
from compress.data.windows import (
    CalibrationWindows,
    doubts,
    draw_windows,
    expand,
    repeated_share,
    token_stream,
)
from compress.errors import UsageError
from support.refusals import refused

BOS, BOS_TEXT = 256, "<s>"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, and a BOS that it would put in front of every text if it were let to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    bpe = Tokenizer(models.BPE(vocab={**vocabulary, BOS_TEXT: BOS}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TEXT} $A", special_tokens=[(BOS_TEXT, BOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS_TEXT, model_max_length=16)


def stream_corpus(*texts: str) -> Corpus:
    return Corpus("test", list(texts), one_stream=True)


def test_the_stream_is_all_documents_with_blank_lines_between(tokenizer):
    texts = [f"document {i}" for i in range(150)]  # more than one batch
    stream = token_stream(stream_corpus(*texts), tokenizer)
    assert stream.dtype == torch.int64
    assert tokenizer.decode(stream) == "\n\n".join(texts)


def test_a_limited_stream_is_a_prefix_and_reads_no_further(tokenizer):
    class Counting(list):
        read = 0

        def __getitem__(self, i):
            self.read = max(self.read, i + 1)
            return super().__getitem__(i)

    texts = Counting("document" for _ in range(1000))
    corpus = Corpus("test", texts, one_stream=True)
    part = token_stream(corpus, tokenizer, limit=100)
    assert texts.read < 1000
    assert torch.equal(part, token_stream(corpus, tokenizer)[:100])


def test_long_texts_give_no_warning(tokenizer, caplog):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        token_stream(stream_corpus("a" * 1000), tokenizer)
    assert not caplog.records


@pytest.mark.parametrize("one_stream", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_windows_are_stretches_of_the_text(tokenizer, one_stream, bos):
    texts = ["".join(chr(97 + (i * i + n) % 26) for i in range(60)) for n in range(5)]
    corpus = Corpus("test", texts, one_stream)
    windows = draw_windows(corpus, tokenizer, samples=9, length=12, bos=bos, seed=1)
    assert windows.input_ids.shape == windows.mask.shape == (9, 12)
    assert windows.input_ids.dtype == torch.int64 and windows.mask.all()
    assert len(windows) == 9
    for row in windows.input_ids:
        assert (row[0] == BOS) == bos
        text = tokenizer.decode(row[int(bos) :])
        sources = ["\n\n".join(texts)] if one_stream else texts
        assert any(text in source for source in sources)


@pytest.mark.parametrize("one_stream", [True, False])
def test_windows_follow_from_the_seed_alone(tokenizer, one_stream):
    corpus = Corpus("test", ["some text that is long enough " * 9] * 5, one_stream)

    def draw(seed):
        return draw_windows(corpus, tokenizer, 8, 10, seed=seed).input_ids

    state = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    torch.manual_seed(1)
    assert torch.equal(draw(0), first)
    assert not torch.equal(draw(1), first)


def test_every_place_of_the_text_can_start_a_window(tokenizer):
    windows = draw_windows(stream_corpus("abcdef"), tokenizer, samples=100, length=3)
    found = {tokenizer.decode(row) for row in windows.input_ids}
    assert found == {"abc", "bcd", "cde", "def"}


def test_documents_are_used_once_each_while_there_are_enough(tokenizer):
    texts = [letter * 10 for letter in "abcdefgh"] + ["short"] * 50
    corpus = Corpus("test", texts, one_stream=False)
    windows = draw_windows(corpus, tokenizer, samples=8, length=10)
    assert sorted(tokenizer.decode(row)[0] for row in windows.input_ids) == list("abcdefgh")
    assert len(draw_windows(corpus, tokenizer, samples=20, length=10)) == 20


@pytest.mark.parametrize("one_stream", [True, False])
def test_text_shorter_than_a_window_is_an_error(tokenizer, one_stream):
    corpus = Corpus("short.txt", ["abc"], one_stream)
    with refused(UsageError, "short.txt", "4 tokens", "calibration.length"):
        draw_windows(corpus, tokenizer, 1, 4)
    assert len(draw_windows(corpus, tokenizer, 1, 3)) == 1


def test_windows_longer_than_the_context_are_an_error(tokenizer):
    with refused(UsageError, "calibration.length", 16, 17):
        draw_windows(stream_corpus("a" * 99), tokenizer, 1, 17, context=16)


def test_bos_needs_a_bos_token(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with refused(UsageError, "calibration.bos", "BOS"):
        draw_windows(stream_corpus("a" * 99), bare, 1, 8, bos=True)


def test_expansion_by_one_changes_nothing():
    windows = CalibrationWindows(torch.arange(8)[None], torch.ones(1, 8, dtype=torch.bool))
    assert expand(windows, 1) is windows


def test_expansion_of_the_papers_figure():
    windows = CalibrationWindows(torch.arange(8)[None], torch.ones(1, 8, dtype=torch.bool))
    assert expand(windows, 4).input_ids.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [6, 7, 0, 1, 2, 3, 4, 5],
        [4, 5, 6, 7, 0, 1, 2, 3],
        [2, 3, 4, 5, 6, 7, 0, 1],
    ]


@pytest.mark.parametrize("M", [2, 3, 7])
@pytest.mark.parametrize("prefix", [0, 1])
def test_expansion_shifts_each_window_and_its_mask_together(M, prefix):
    N, T = 3, 16
    ids = torch.stack([torch.randperm(100)[:T] for _ in range(N)])
    mask = ids % 3 > 0
    out = expand(CalibrationWindows(ids, mask, prefix), M)
    assert out.input_ids.shape == (N * M, T)
    step = (T - prefix) // M
    for j in range(N):
        for k in range(M):
            row = out.input_ids[j * M + k]
            assert torch.equal(row[:prefix], ids[j, :prefix])  # BOS stays in front
            assert torch.equal(row[prefix:], ids[j, prefix:].roll(k * step))
            assert torch.equal(out.mask[j * M + k], row % 3 > 0)


def windows_of(ids, expansion=1):
    return expand(CalibrationWindows(ids, torch.ones_like(ids, dtype=torch.bool)), expansion)


def random_ids(*shape, high=1000):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("expansion", [1, 4])
def test_calibration_that_tells_enough_is_not_doubted(expansion):
    ids = random_ids(16, 256)
    assert repeated_share(ids) == 0
    assert doubts(windows_of(ids, expansion), expansion, 128, 1000) == []
    few = random_ids(16, 256, high=50)  # of a vocabulary that has no more
    assert doubts(windows_of(few, expansion), expansion, 128, 53) == []


def overlapping():
    stream = random_ids(600)
    return torch.stack([stream[start : start + 256] for start in range(0, 320, 20)])


DOUBTED = {
    "one token": (torch.full((16, 256), 7), ("1 distinct", 128, "100%")),
    "two tokens in turn": (torch.tensor([[3, 9]]).repeat(16, 128), ("2 distinct", 128, "%")),
    "few words": (random_ids(16, 256, high=20), ("20 distinct", 128)),
    "windows that overlap": (overlapping(), ("more than once",)),
    "the same document": (random_ids(1, 256).repeat(4, 1), ("75%",)),
    "shorter than a phrase": (random_ids(1, 16, high=400).repeat(9, 1), ("distinct", "89%")),
}


@pytest.mark.parametrize("case", DOUBTED)
@pytest.mark.parametrize("expansion", [1, 4])
def test_calibration_that_tells_too_little_is_said(case, expansion):
    ids, named = DOUBTED[case]
    said = " ".join(doubts(windows_of(ids, expansion), expansion, 128, 1000))
    assert all(str(part) in said for part in ("calibration", *named))


@pytest.mark.parametrize("one_stream", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_more_windows_begin_with_the_fewer_and_so_does_each_run_of_shifts(
    tokenizer, one_stream, bos
):
    """Expansion, its control of as many other windows, and neither, then differ in nothing else."""
    texts = ["".join(chr(97 + (i * i + n) % 26) for i in range(60)) for n in range(40)]
    corpus = Corpus("test", texts, one_stream)
    few, many = (draw_windows(corpus, tokenizer, N, 17, bos=bos, seed=3) for N in (4, 32))
    assert torch.equal(many.input_ids[:4], few.input_ids)
    expanded = expand(few, 8)
    assert expanded.input_ids.shape == many.input_ids.shape
    assert torch.equal(expanded.input_ids[::8], few.input_ids)
    for row, parent in zip(expanded.input_ids, few.input_ids.repeat_interleave(8, 0), strict=True):
        assert row.sort().values.tolist() == parent.sort().values.tolist()
