"""Wrong values in a folder's JSON files: one line with file, key, value; nothing allocated."""

import json
import shutil

import pytest

import compress
from compress.errors import CheckpointError, CompressError, DepthError, UsageError
from compress.models.skeleton import Skeleton
from support.moe_families import write_mixture
from support.refusals import check_line, refused
from support.tiny_checkpoints import change_config
from support.tiny_folders import tiny_folder

HUGE = 1_000_000_000
COUNTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "vocab_size", "max_position_embeddings")  # fmt: skip
WRONG = [(key, value) for key in COUNTS for value in (0, -1, "64", 1.5, None, True, [1], {})]
WRONG += [(key, HUGE) for key in COUNTS if not key.startswith("max_position")]
WRONG += [
    ("num_key_value_heads", 0), ("num_key_value_heads", 3), ("head_dim", 0), ("head_dim", HUGE),
    ("rms_norm_eps", "x"), ("rms_norm_eps", -1.0), ("rms_norm_eps", float("nan")),
    ("initializer_range", 7), ("tie_word_embeddings", "yes"), ("tie_word_embeddings", 3),
    ("attention_bias", 1), ("mlp_bias", "no"), ("hidden_act", 3), ("hidden_act", None),
    ("bos_token_id", "a"), ("eos_token_id", [1, "b"]), ("pad_token_id", 1.5), ("dtype", 16),
    ("model_type", 3), ("model_type", None), ("architectures", "Llama"), ("architectures", [1]),
    ("rope_parameters", 3), ("rope_parameters", []), ("rope_scaling", "linear"),
    ("layer_types", ["full_attention"]), ("layer_types", 1), ("sliding_window", -2),
    ("text_config", 1), ("vision_config", "x"),
]  # fmt: skip
# What is refused by transformers' own rules: the key or its value is in the line all the same.
OTHERS = [
    ("hidden_act", "gulu"), ("dtype", "float7"), ("num_attention_heads", 5), ("model_type", "lama"),
    ("rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}),
]  # fmt: skip


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint("llama"), tmp_path / "model")


@pytest.mark.parametrize("value", [0, 5, -1, 1.5, "2"])
def test_more_experts_for_a_token_than_there_are_are_named(tmp_path, value):
    folder = write_mixture(tmp_path / "model", "qwen3_moe")
    change_config(folder, num_experts_per_tok=value)
    place = folder / "config.json"
    with refused(UsageError, place, "num_experts_per_tok:", "(4)", json.dumps(value)):
        Skeleton.open(folder)


@pytest.mark.parametrize("value", [-4, 1.5, "4"])
def test_a_number_of_experts_that_is_none_is_named(tmp_path, value):
    folder = write_mixture(tmp_path / "model", "qwen3_moe")
    change_config(folder, num_local_experts=value)
    with refused(UsageError, folder / "config.json", "num_local_experts:", json.dumps(value)):
        Skeleton.open(folder)


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda v: json.dumps(v)[:20])
def test_a_wrong_value_is_named(folder, key, value):
    change_config(folder, **{key: value})
    shown = 3 if (key, value) == ("num_key_value_heads", 3) else json.dumps(value)
    shown = 1 if value == ["full_attention"] else shown
    with refused(UsageError, folder / "config.json", f"{key}:", shown):
        Skeleton.open(folder)
    with pytest.raises(CompressError) as caught:
        compress.load(folder)
    check_line(str(caught.value), key)


@pytest.mark.parametrize(
    ("key", "value"),
    [("pad_token_id", {"value": 0}), ("eos_token_id", ["x"]), ("cache_implementation", "attic")],
)
def test_a_wrong_value_of_the_generation_config_is_named(folder, key, value):
    file = folder / "generation_config.json"
    file.write_text(json.dumps({key: value}))
    for call in (Skeleton.open, compress.load):
        with refused(UsageError, file, key):
            call(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("use_sliding_window", False), ("sliding_window", None)]
)
def test_layers_that_slide_over_no_window_are_told(checkpoint, tmp_path, key, value):
    folder = shutil.copytree(checkpoint("qwen2-sliding"), tmp_path / "model")
    Skeleton.open(folder)
    change_config(folder, **{key: value})
    for call in (Skeleton.open, compress.load):
        with refused(UsageError, folder / "config.json", f"{key}:", json.dumps(value)):
            call(folder)


@pytest.mark.parametrize(("key", "value"), OTHERS, ids=lambda v: json.dumps(v)[:20])
def test_what_transformers_refuses_is_one_line(folder, key, value):
    change_config(folder, **{key: value})
    for call in (Skeleton.open, compress.load):
        with pytest.raises(CompressError) as caught:
            call(folder)
        check_line(str(caught.value), folder)
        assert "Error" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 900_000), ("vocab_size", 60_000_000),
                       ("intermediate_size", 4_000_000), ("num_hidden_layers", 9_000)]
)  # fmt: skip
def test_sizes_that_no_tensor_has_are_refused_before_they_are_made(folder, key, value):
    change_config(folder, **{key: value})
    for call in (Skeleton.open, compress.load):
        with refused(UsageError, folder / "config.json", f"{key}:", f"{value:,}"):
            call(folder)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_wrong_value_inside_a_multimodal_config(tmp_path, part):
    folder = tiny_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    change_config(folder, **{part: config[part] | {"num_hidden_layers": HUGE}})
    with refused(UsageError, folder / "config.json", f"{part}.num_hidden_layers:", HUGE):
        Skeleton.open(folder)


@pytest.mark.parametrize("depth", [50, 500, 100_000])
def test_deep_json_is_refused(folder, depth):
    (folder / "config.json").write_text('{"a":' * depth + "1" + "}" * depth)
    for call, kind in ((Skeleton.open, UsageError), (compress.load, DepthError)):
        with refused(kind, folder / "config.json"):
            call(folder)


TOKENIZERS = [
    ("tokenizer.json", []), ("tokenizer.json", {"model": []}), ("tokenizer.json", {"model": "BPE"}),
    ("tokenizer.json", {}), ("tokenizer.json", {"model": {"type": "x"}}), ("tokenizer.json", 3),
    ("tokenizer_config.json", []), ("tokenizer_config.json", {"tokenizer_class": 3}),
    ("tokenizer_config.json", {"model_max_length": "x"}), ("tokenizer_config.json", "x"),
    ("tokenizer_config.json", {"bos_token": 3}), ("tokenizer_config.json", {"chat_template": 3}),
    ("tokenizer_config.json", {"added_tokens_decoder": []}),
    ("special_tokens_map.json", []), ("special_tokens_map.json", {"pad_token": [1]}),
    ("added_tokens.json", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content"), TOKENIZERS, ids=lambda v: json.dumps(v)[:30])
def test_a_wrong_tokenizer_file_is_one_line(folder, name, content):
    (folder / name).write_text(json.dumps(content))
    for call in (lambda: Skeleton.open(folder).tokenizer(), lambda: compress.load(folder)):
        with pytest.raises(CompressError) as caught:
            call()
        check_line(str(caught.value), folder)
        assert "Error" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_deep_or_broken_tokenizer_file(folder):
    deep = '{"a":' * 10_000 + "1" + "}" * 10_000
    kinds = {"{": CheckpointError, deep: DepthError, "\udcff": CheckpointError}
    for text, kind in kinds.items():
        (folder / "tokenizer_config.json").write_bytes(text.encode(errors="surrogateescape"))
        with refused(kind, folder / "tokenizer_config.json"):
            Skeleton.open(folder).tokenizer()
