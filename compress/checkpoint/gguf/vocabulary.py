"""A tokenizer as a GGUF file holds it: tokens, their kinds, merges or scores.

llama.cpp has tokenizers of its own and learns from the file which one to be. Two kinds are known:

    gpt2     byte-level BPE, with merges; `pre` names one of its rules for cutting text into words
    llama    BPE over characters with bytes as a fallback, as SentencePiece makes it, with scores:
             the better a token's score, the earlier it is merged; here, less its place in the list
             of merges

What the tokenizer of transformers does beyond these, and would be lost, is refused.

    vocabulary = read_vocabulary(folder, rows=2048)     # rows of the embedding
    vocabulary.add_to(writer)
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.models.pretrained import TOKENIZER_FILES, guarded

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

# Kinds of token, as numbered in the file.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # SentencePiece's mark of a space
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# The expressions by which tokenizers cut text into words, and llama.cpp's names for them.
WORDS = {
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}


@dataclass
class Vocabulary:
    """`tokens` and `kinds` have one entry for each row of the embedding.

    model: gpt2 (with `merges`, and `pre`) or llama (with `scores`). special: bos, eos, unk and pad,
    those there are. add: whether a text is given bos, eos or a leading space.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add: dict[str, bool] = field(default_factory=dict)
    chat_template: str | None = None

    def add_to(self, writer: "GGUFWriter") -> None:
        """Writes it to the metadata of a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_scores(self.scores)  # an empty list is left out
        writer.add_token_merges(self.merges)
        setters: dict[str, Callable[[Any], None]] = {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "unk": writer.add_unk_token_id,
            "pad": writer.add_pad_token_id,
            "add bos": writer.add_add_bos_token,
            "add eos": writer.add_add_eos_token,
            "add space": writer.add_add_space_prefix,
        }
        values = self.special | {f"add {name}": value for name, value in self.add.items()}
        for name, value in values.items():
            setters[name](value)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer of a model folder, as transformers loads it, for an embedding of `rows` rows.

    Raises UsageError if there is none, or one that llama.cpp would not follow; CheckpointError if
    it is damaged or larger than the embedding.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UsageError(
            f"{folder} has no tokenizer, which a GGUF file needs: copy the files of the model it "
            f"was made from ({', '.join(TOKENIZER_FILES)})"
        )
    from transformers import AutoTokenizer  # takes seconds, which other formats need not wait

    tokenizer = guarded(folder, AutoTokenizer.from_pretrained)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown(folder, f"a {type(tokenizer).__name__}")
    rules = json.loads(backend.to_str())
    if rules["model"]["type"] != "BPE":
        raise _unknown(folder, f"a {rules['model']['type']} model")
    build = _fallback_bpe if rules["model"].get("byte_fallback") else _byte_level_bpe
    vocabulary = build(folder, rules)
    vocabulary.tokens, vocabulary.kinds = _tokens(folder, tokenizer, rules, rows)
    if vocabulary.model == "llama":
        vocabulary.scores = _scores(vocabulary.tokens, vocabulary.merges)
        vocabulary.merges = []
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            vocabulary.special[name] = number
    ids = tokenizer("a")["input_ids"]
    ends = {"bos": ids[0], "eos": ids[-1]}
    vocabulary.add |= {name: ends[name] == vocabulary.special.get(name) for name in ends}
    template = getattr(tokenizer, "chat_template", None)
    vocabulary.chat_template = template if isinstance(template, str) else None
    return vocabulary


def _unknown(folder: Path, what: str) -> UsageError:
    return UsageError(
        f"the tokenizer in {folder} has {what}, which has no equivalent in llama.cpp that is known "
        f"here: export to another format"
    )


def _tokens(
    folder: Path, tokenizer: "PreTrainedTokenizerBase", rules: dict[str, Any], rows: int
) -> tuple[list[str], list[int]]:
    """Each row's token and kind; rows that no token has get a name of their own."""
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= rows:
        raise UsageError(
            f"the tokenizer in {folder} has ids up to {max(vocabulary.values())}, the embedding "
            f"{rows} rows: copy the tokenizer of the model it was made from"
        )
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [UNUSED] * rows
    bytes_too = rules["model"].get("byte_fallback", False)
    for token, i in vocabulary.items():
        tokens[i] = token
        kinds[i] = BYTE if bytes_too and _is_byte(token) else NORMAL
    for added in rules["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        tokens[added["id"]] = added["content"]
    if unknown := rules["model"].get("unk_token"):
        kinds[vocabulary[unknown]] = UNKNOWN
    return tokens, kinds


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


# ---- byte-level BPE -----------------------------------------------------------------------------


def _byte_level_bpe(folder: Path, rules: dict[str, Any]) -> Vocabulary:
    normalizer = rules.get("normalizer")
    if normalizer and normalizer["type"] != "NFC":  # llama.cpp leaves text as it is; most is NFC
        raise _unknown(folder, f"a {normalizer['type']} normalizer")
    steps = _steps(rules.get("pre_tokenizer"), "pretokenizers")
    words = _words(steps)
    if words is None:
        found = " and ".join(step["type"] for step in steps) or "no pre-tokenizer"
        raise _unknown(folder, found + " of its own")
    merges = [_merge(merge) for merge in rules["model"]["merges"]]
    return Vocabulary("gpt2", words, [], [], [f"{a} {b}" for a, b in merges])


def _words(steps: list[dict[str, Any]]) -> str | None:
    """llama.cpp's name for the way in which text is cut into words; None if it has none."""
    *before, last = steps or [{"type": "none"}]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):  # the expression of GPT-2
        digits = [{"type": "Digits", "individual_digits": True}]
        return "gpt-2" if not before else "smollm" if before == digits else None
    if len(before) != 1 or before[0]["type"] != "Split" or before[0].get("invert"):
        return None
    return WORDS.get(before[0]["pattern"].get("Regex"))


def _steps(rule: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """The members of a sequence, or the one rule there is."""
    if rule is None:
        return []
    return rule[members] if rule["type"] == "Sequence" else [rule]


def _merge(merge: str | list[str]) -> tuple[str, str]:
    """Both parts of a merge: a list, or in older files one string."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


# ---- BPE with bytes as a fallback ---------------------------------------------------------------


def _fallback_bpe(folder: Path, rules: dict[str, Any]) -> Vocabulary:
    space = False
    for step in _steps(rules.get("normalizer"), "normalizers"):
        if step == {"type": "Prepend", "prepend": SPACE}:
            space = True
        elif step != {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
            raise _unknown(folder, f"a {step['type']} normalizer")
    for step in _steps(rules.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] != "Metaspace" or step.get("split"):
            raise _unknown(folder, f"a {step['type']} pre-tokenizer")
        space = space or step.get("prepend_scheme", "always") != "never"
    merges = ["".join(_merge(merge)) for merge in rules["model"]["merges"]]
    return Vocabulary("llama", "default", [], [], merges, add={"space": space})


def _scores(tokens: list[str], merged: list[str]) -> list[float]:
    """Less the place of the first merge that makes a token; those that no merge makes come last."""
    place: dict[str, int] = {}
    for i, token in enumerate(merged):
        place.setdefault(token, i)
    return [-float(place.get(token, len(merged))) for token in tokens]
