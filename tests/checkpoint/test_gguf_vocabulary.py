"""llama.cpp learns the tokenizer that the model was trained with, or the export is refused."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compress.checkpoint.gguf.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WORDS,
    read_vocabulary,
)
from compress.errors import UsageError
from support.refusals import refused
from support.tiny_checkpoints import byte_tokenizer

ENDS = dict(zip(("bos_token", "eos_token"), ("<s>", "</s>"), strict=True))
UNK = dict(zip(("unk_token",), ("<unk>",), strict=True))
DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "lm"


def save(folder: Path, tokenizer: Tokenizer, **special: str) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def byte_level(*before, regex: bool = False, prefix: bool = False) -> Tokenizer:
    """A byte-level BPE that cuts text into words in some way."""
    tokenizer = byte_tokenizer().backend_tokenizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    return tokenizer


def fallback(merges: list[tuple[str, str]], prepend: bool = True) -> Tokenizer:
    """A BPE over letters with bytes as a fallback, as made of a SentencePiece model."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), SPACE, *"abcde"]
    tokens += dict.fromkeys(a + b for a, b in merges if a + b not in tokens)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, **UNK)
    tokenizer = Tokenizer(bpe)
    steps = [normalizers.Prepend(SPACE)] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


# ---- byte-level BPE -----------------------------------------------------------------------------


def test_the_demo_tokenizer(tmp_path):
    vocabulary = read_vocabulary(DEMO, 2048)
    ours = AutoTokenizer.from_pretrained(DEMO)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", "gpt-2")
    assert vocabulary.tokens == ours.convert_ids_to_tokens(range(2048))
    assert vocabulary.kinds == [CONTROL] + [NORMAL] * 2047
    assert vocabulary.special == {"bos": 0, "eos": 0}
    assert vocabulary.add == {"bos": False, "eos": False}


def test_transformers_reads_the_same_tokenizer(tmp_path):
    """Its reader of GGUF is another implementation."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(1)
    read_vocabulary(DEMO, 2048).add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    ours = AutoTokenizer.from_pretrained(DEMO)
    for text in (Path(__file__).read_text(), "naïve 😀\t\n\n  12345'll <|endoftext|>"):
        ids = theirs(text)["input_ids"]
        assert ids == ours(text)["input_ids"]
        assert theirs.decode(ids) == text


def test_rows_without_a_token_are_named(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("<end>", special=True)])
    tokenizer.save_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path, 264)
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == 264
    assert vocabulary.tokens[258:260] == ["<tool>", "<end>"]
    assert vocabulary.kinds == (
        [NORMAL] * 256 + [CONTROL] * 2 + [USER_DEFINED, CONTROL] + [UNUSED] * 4
    )


@pytest.mark.parametrize("first", [True, False])
def test_whether_a_text_begins_with_bos(tmp_path, first):
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level(regex=True)
    if first:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)]
        )
    save(tmp_path, tokenizer, **ENDS)
    vocabulary = read_vocabulary(tmp_path, 260)
    assert vocabulary.special == {"bos": 256, "eos": 257}
    assert vocabulary.add == {"bos": first, "eos": False}


def test_a_chat_template_is_kept(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path)
    assert read_vocabulary(tmp_path, 260).chat_template == tokenizer.chat_template


@pytest.mark.parametrize(("pattern", "name"), WORDS.items())
def test_ways_of_cutting_words_have_names(tmp_path, pattern, name):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    assert read_vocabulary(save(tmp_path, byte_level(split)), 260).pre == name


def test_digits_apart(tmp_path):
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert read_vocabulary(save(tmp_path, byte_level(digits, regex=True)), 260).pre == "smollm"


# ---- bytes as a fallback ------------------------------------------------------------------------


def by_scores(word: str, tokens: list[str], scores: list[float]) -> list[str]:
    """SentencePiece's rule: of all neighbours that form a token, merge those of the best score."""
    parts, score = list(word), dict(zip(tokens, scores, strict=True))
    while True:
        joined = ["".join(pair) for pair in itertools.pairwise(parts)]
        pairs = [(-score[token], i) for i, token in enumerate(joined) if token in score]
        if not pairs:
            return parts
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_scores_merge_in_the_order_of_the_merges(tmp_path):
    merges = [("b", "c"), ("a", "b"), ("bc", "d"), (SPACE, "a"), ("a", "bc"), ("d", "d"),
              ("ab", "c"), ("dd", "e"), ("d", "e"), (SPACE + "a", "bc")]  # fmt: skip
    tokenizer = fallback(merges)
    save(tmp_path, tokenizer, **ENDS, **UNK)
    vocabulary = read_vocabulary(tmp_path, 300)
    assert (vocabulary.model, vocabulary.merges) == ("llama", [])
    assert len(vocabulary.tokens) == len(vocabulary.scores) == 300
    assert vocabulary.scores[vocabulary.tokens.index("abc")] == -4  # of two merges the first
    draw = np.random.default_rng(0)
    for _ in range(200):
        word = "".join(draw.choice([*"abcde"], draw.integers(1, 10)))
        found = by_scores(SPACE + word, vocabulary.tokens, vocabulary.scores)
        assert found == tokenizer.encode(word).tokens


def test_kinds_of_a_fallback_vocabulary(tmp_path):
    save(tmp_path, fallback([("a", "b")]), **ENDS, **UNK)
    kinds = read_vocabulary(tmp_path, 266).kinds
    assert kinds == [UNKNOWN] + [CONTROL] * 2 + [BYTE] * 256 + [NORMAL] * 7


@pytest.mark.parametrize("prepend", [True, False])
def test_the_space_before_a_text(tmp_path, prepend):
    save(tmp_path / "a", fallback([("a", "b")], prepend))
    assert read_vocabulary(tmp_path / "a", 266).add["space"] is prepend
    for scheme in ("first", "never"):
        tokenizer = fallback([("a", "b")], prepend)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
        save(tmp_path / scheme, tokenizer)
        either = prepend or scheme == "first"
        assert read_vocabulary(tmp_path / scheme, 266).add["space"] is either


# ---- what is refused ----------------------------------------------------------------------------


def unigram() -> Tokenizer:
    return Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))


def lowercase() -> Tokenizer:
    tokenizer = byte_level(regex=True)
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def stripped() -> Tokenizer:
    tokenizer = fallback([("a", "b")])
    tokenizer.normalizer = normalizers.Strip()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (unigram, "Unigram model"),
        (lowercase, "Lowercase normalizer"),
        (stripped, "Strip normalizer"),
        (lambda: byte_level(pre_tokenizers.Split(Regex("[0-9]"), "isolated")), "Split"),
        (lambda: byte_level(pre_tokenizers.Whitespace(), regex=True), "Whitespace"),
        (lambda: byte_level(regex=True, prefix=True), "ByteLevel"),
    ],
)
def test_what_llamacpp_would_cut_differently(tmp_path, make, said):
    save(tmp_path, make())
    with refused(UsageError, said):
        read_vocabulary(tmp_path, 300)
