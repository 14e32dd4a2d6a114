"""The values of a model folder's JSON files, checked before transformers goes by them.

What decides a model's shape has a type and a range here, and must fit the tensors in the files: a
number that is wrong is named with its key before anything of its size is made. Keys that are not
listed are left to transformers.

    check_config(read_json(file), file)
    check_extent(config, CheckpointReader(folder), file)
    check_tokenizer(folder)
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from compress.errors import UsageError
from compress.storage.files import read_json
from compress.storage.safetensors import CheckpointReader

Check = tuple[str, Callable[[object], bool]]  # what is expected, and whether a value is that


def _whole(least: int, most: int) -> Check:
    expected = f"a whole number from {least:,} to {most:,}"
    return expected, lambda v: isinstance(v, int) and v is not True and least <= v <= most


def _number(least: float, most: float) -> Check:
    expected = f"a number from {least:g} to {most:g}"
    return expected, lambda v: _is_number(v) and least <= v <= most


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _or(first: Check, second: Check) -> Check:
    return f"{first[0]} or {second[0]}", lambda v: first[1](v) or second[1](v)


def _of(kind: type, expected: str) -> Check:
    return expected, lambda v: isinstance(v, kind)


NULL: Check = ("null", lambda v: v is None)
FLAG, TEXT, OBJECT = _of(bool, "true or false"), _of(str, "a text"), _of(dict, "an object")
LIST = _of(list, "a list")
TEXTS: Check = (
    "a list of texts",
    lambda v: isinstance(v, list) and all(isinstance(part, str) for part in v),
)
TOKEN = _whole(-1, 2**31)
TOKENS: Check = ("a list of these", lambda v: isinstance(v, list) and all(map(TOKEN[1], v)))
SHARE = _number(0, 1)
WIDTH, HEADS = _whole(1, 2**20), _whole(1, 2**14)

# Far above any model there is: they bound what a wrong number can cost.
CONFIG: dict[str, Check] = {
    "model_type": TEXT,
    "architectures": _or(TEXTS, NULL),
    "hidden_size": WIDTH,
    "intermediate_size": _whole(1, 2**22),
    "num_hidden_layers": _whole(1, 10_000),
    "num_attention_heads": HEADS,
    "num_key_value_heads": _or(HEADS, NULL),
    "head_dim": _or(_whole(1, 2**14), NULL),
    "vocab_size": _whole(1, 2**26),
    "max_position_embeddings": _whole(1, 2**32),
    "num_channels": _whole(1, 2**10),
    "rms_norm_eps": _or(SHARE, NULL),  # null: its norms are LayerNorm
    "layer_norm_eps": SHARE,
    "initializer_range": SHARE,
    "attention_dropout": _or(SHARE, NULL),
    "rope_theta": _or(_number(1e-6, 1e15), NULL),
    "rope_scaling": _or(OBJECT, NULL),
    "rope_parameters": _or(OBJECT, NULL),
    "sliding_window": _or(_whole(0, 2**32), NULL),
    "max_window_layers": _or(_whole(0, 10_000), NULL),
    "tie_word_embeddings": _or(FLAG, NULL),
    "attention_bias": _or(FLAG, NULL),
    "mlp_bias": _or(FLAG, NULL),
    "use_cache": _or(FLAG, NULL),
    "use_sliding_window": _or(FLAG, NULL),
    "layer_types": _or(TEXTS, NULL),
    "hidden_act": TEXT,
    "dtype": _or(TEXT, NULL),
    "torch_dtype": _or(TEXT, NULL),
    "bos_token_id": _or(_or(TOKEN, TOKENS), NULL),
    "eos_token_id": _or(_or(TOKEN, TOKENS), NULL),
    "pad_token_id": _or(TOKEN, NULL),
    "text_config": OBJECT,
    "vision_config": OBJECT,
}
ROPE: dict[str, Check] = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": _or(_number(1e-6, 1e15), NULL),
    "factor": _or(_number(1e-6, 1e9), NULL),
    "low_freq_factor": _or(_number(1e-6, 1e9), NULL),
    "high_freq_factor": _or(_number(1e-6, 1e9), NULL),
    "original_max_position_embeddings": _or(_whole(1, 2**32), NULL),
}
PARTS: dict[str, dict[str, Check]] = {
    "text_config": CONFIG,
    "vision_config": CONFIG | {"intermediate_size": _or(CONFIG["intermediate_size"], NULL)},
    "rope_scaling": ROPE,
    "rope_parameters": ROPE,
}
# What Python itself raises where a library meets a value that it did not foresee, and what it says
# then is about the library.
STUMBLES: tuple[type[Exception], ...] = (TypeError, AttributeError, IndexError, AssertionError)
STUMBLES += (ZeroDivisionError, RecursionError, UnboundLocalError, KeyError)
NOT_THE_KIND = "a value is not of the kind that its key needs"
MARKS = ":,.;()[]<>'\"`"  # around a word

GENERATION: dict[str, Check] = {
    "bos_token_id": CONFIG["bos_token_id"],
    "eos_token_id": CONFIG["eos_token_id"],
    "pad_token_id": CONFIG["pad_token_id"],
}
SPECIAL = _or(_or(TEXT, OBJECT), NULL)
TOKENIZER: dict[str, dict[str, Check]] = {
    "tokenizer.json": {"model": OBJECT, "added_tokens": _or(LIST, NULL)},
    "tokenizer_config.json": {
        "tokenizer_class": _or(TEXT, NULL),
        "model_max_length": _or(_number(1, 1e31), NULL),
        "chat_template": _or(_or(TEXT, LIST), NULL),
        "added_tokens_decoder": _or(OBJECT, NULL),
    }
    | {f"{name}_token": SPECIAL for name in ("bos", "eos", "unk", "pad")},
    "special_tokens_map.json": {f"{name}_token": SPECIAL for name in ("bos", "eos", "unk", "pad")},
    "added_tokens.json": {},
    "vocab.json": {},
}


EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def check_config(config: Mapping[str, object], place: str | Path) -> None:
    """UsageError for a value that no model has: it names `place`, the key, and what is expected."""
    _check(config, CONFIG, f"{place}: ")
    for name in ("", "text_config", "vision_config"):
        part = config.get(name) if name else config
        if not isinstance(part, dict):
            continue
        where = f"{place}: {name}." if name else f"{place}: "
        heads, shared = part.get("num_attention_heads"), part.get("num_key_value_heads")
        if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
            raise UsageError(
                f"{where}num_key_value_heads: expected a divisor of num_attention_heads "
                f"({heads}), found {shared}"
            )
        chosen = part.get("num_experts_per_tok")
        for key in EXPERT_COUNTS:
            count = part.get(key)
            if count is not None and (not isinstance(count, int) or count < 0):
                raise UsageError(
                    f"{where}{key}: expected a whole number, found {json.dumps(count)}"
                )
            fits = isinstance(chosen, int) and 1 <= chosen <= (count or chosen)
            if count and chosen is not None and not fits:
                raise UsageError(
                    f"{where}num_experts_per_tok: expected 1 to {key} ({count}), "
                    f"found {json.dumps(chosen)}"
                )
        kinds, layers = part.get("layer_types"), part.get("num_hidden_layers")
        if isinstance(kinds, list) and isinstance(layers, int) and len(kinds) != layers:
            raise UsageError(
                f"{where}layer_types: expected one for each of num_hidden_layers ({layers}), "
                f"found {len(kinds)}"
            )
        slides = isinstance(kinds, list) and "sliding_attention" in kinds
        unused = str(part.get("model_type")).startswith("qwen")  # whose default is not to slide
        if slides and unused and not part.get("use_sliding_window"):
            raise UsageError(
                f"{where}use_sliding_window: expected true, since layer_types has "
                f"sliding_attention, found {json.dumps(part.get('use_sliding_window'))}"
            )
        if slides and part.get("sliding_window", 1) is None:
            raise UsageError(
                f"{where}sliding_window: expected a number of tokens, since layer_types has "
                f"sliding_attention, found null"
            )


def check_generation(folder: Path) -> None:
    """UsageError for a generation_config.json with values that transformers stops at."""
    file = folder / "generation_config.json"
    values = read_json(file)
    if values is None:
        return
    from transformers import GenerationConfig  # slow to import

    _check(values, GENERATION, f"{file}: ")
    try:
        GenerationConfig.from_dict(values)
    except Exception as error:  # what a wrong value sets off is of any kind
        raise UsageError(f"{file} cannot be read: {reason_of(error)}") from error


def check_extent(config: Mapping[str, object], reader: CheckpointReader, place: Path) -> None:
    """UsageError for a size that the tensors in the files cannot have, packed or not."""
    most = 32 * max((max(reader.shape(n), default=1) for n in reader.names), default=1)
    text = config.get("text_config")
    where, part = ("text_config.", text) if isinstance(text, dict) else ("", config)
    limits = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), most)
    for key, limit in (limits | {"num_hidden_layers": len(reader.names)}).items():
        value = part.get(key)
        if isinstance(value, int) and value > limit:
            raise UsageError(
                f"{place}: {where}{key}: expected what the tensors beside it have, at most "
                f"{limit:,}, found {value:,}"
            )


def check_tokenizer(folder: Path) -> None:
    """UsageError for a tokenizer's file whose values are of the wrong kind.

    Raises CheckpointError for one that holds no JSON object.
    """
    for name, checks in TOKENIZER.items():
        if (found := read_json(folder / name)) is not None:
            _check(found, checks, f"{folder / name}: ")


def _check(values: Mapping[str, object], checks: Mapping[str, Check], place: str) -> None:
    for key, (expected, accepts) in checks.items():
        if key not in values:
            continue
        value = values[key]
        if not accepts(value):
            found = json.dumps(value)
            found = found if len(found) <= 60 else f"{found[:57]}..."
            raise UsageError(f"{place}{key}: expected {expected}, found {found}")
        if isinstance(value, dict) and key in PARTS:
            _check(value, PARTS[key], f"{place}{key}.")


def reason_of(error: Exception) -> str:
    """What a library says of a folder or a name, in one line, without names of its exceptions."""
    if isinstance(error, KeyError):
        return f"{error.args[0] if error.args else ''!r} is missing or not known"
    if "trust_remote_code" in str(error):
        return "it needs Python code of its own (auto_map), and such code is never run here"
    if type(error) in STUMBLES:
        return NOT_THE_KIND
    return without_names(str(error)) or NOT_THE_KIND


def without_names(text: str) -> str:
    """A message on one line of at most 300 letters, without the names of exceptions."""
    words = [w for w in text.split() if not w.strip(MARKS).endswith(("Error", "Exception"))]
    return " ".join(words)[:300]
