"""A multimodal family without a row of ours: loading says what the plan says, in every command."""

import json

import pytest
import torch
import transformers

import compress
from compress.cli.main import main
from compress.errors import UsageError
from compress.models.families import ARCHITECTURES, MULTIMODAL, architecture_of, refuse_partly_seen
from compress.models.skeleton import Skeleton
from support.tiny_checkpoints import byte_tokenizer

# Types that transformers loads as a language model too, without the tower, and types it does not.
OTHERS = ["gemma3n", "gemma4", "mllama", "llava_next_video", "idefics2",
          "got_ocr2", "pixtral", "qwen2_audio", "voxtral"]  # fmt: skip
TEXT = ["gpt2", "gemma3_text", "llama4_text", "phi3", "mixtral", "qwen3_moe", "olmo2"]


@pytest.fixture
def film(tmp_path):
    """A tiny LLaVA-NeXT-Video with its tower."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = size | {"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 2,
                   "vocab_size": 260}  # fmt: skip
    vision = size | {"model_type": "clip_vision_model", "num_hidden_layers": 2, "image_size": 16,
                     "patch_size": 4}  # fmt: skip
    config = transformers.LlavaNextVideoConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = transformers.LlavaNextVideoForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "film")
    byte_tokenizer().save_pretrained(tmp_path / "film")
    return tmp_path / "film"


def line_of(call, *arguments):
    with pytest.raises(UsageError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_loading_says_what_the_plan_says(film):
    planned = line_of(Skeleton, film)
    assert "'llava_next_video' is not supported" in planned
    assert line_of(compress.load, film) == planned


COMMANDS = [
    ("plan", ["plan", "{recipe}"]),
    ("run", ["run", "{recipe}", "--output", "{folder}/out"]),
    ("generate", ["generate", "{model}", "--prompt", "a"]),
    ("eval", ["eval", "{model}", "--tasks", "demo_code", "--limit", "1"]),
    ("bench", ["bench", "model", "{model}"]),
]


@pytest.mark.parametrize("arguments", [a for _, a in COMMANDS], ids=[n for n, _ in COMMANDS])
def test_every_command_says_it(film, tmp_path, empty_folder, capsys, arguments):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {json.dumps(str(film))}\nquantize: {{method: rtn}}\n")
    places = {"recipe": recipe, "model": film, "folder": tmp_path}
    assert main([part.format(**places) for part in arguments]) == 2
    assert "'llava_next_video' is not supported" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", OTHERS)
def test_families_that_see_or_hear_are_refused(model_type):
    if model_type not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {model_type}")
    try:
        config = transformers.AutoConfig.for_model(model_type)
    except ImportError as error:  # of a part that wants another package
        pytest.skip(str(error))
    if model_type == "pixtral":  # a tower alone, no model that reads text
        refuse_partly_seen(config)
        return
    assert line_of(refuse_partly_seen, config) == line_of(architecture_of, config)


@pytest.mark.parametrize("model_type", [*TEXT, *ARCHITECTURES, *MULTIMODAL])
def test_text_models_and_our_own_families_load(model_type):
    refuse_partly_seen(transformers.AutoConfig.for_model(model_type))


@pytest.mark.parametrize("model_type", ["gemma4", "gemma3n", "mllama", "exaone_moe"])
def test_a_type_that_transformers_knows_is_no_typo(model_type):
    message = line_of(architecture_of, transformers.AutoConfig.for_model(model_type))
    assert "did you mean" not in message
    assert all(name in message for name in [*ARCHITECTURES, *MULTIMODAL])
