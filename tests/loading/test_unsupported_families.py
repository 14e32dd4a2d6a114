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
OTHERS = ["gemma3", "gemma3n", "llama4", "mllama", "qwen3_vl", "mistral3", "internvl", "idefics3",
          "paligemma", "pixtral", "smolvlm", "qwen2_audio", "voxtral", "qwen3_5"]  # fmt: skip
TEXT = ["gpt2", "gemma3_text", "llama4_text", "phi3", "mixtral", "qwen3_moe", "olmo2"]


@pytest.fixture
def gemma(tmp_path):
    """A tiny Gemma 3 with its vision tower."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = size | {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8,
                   "vocab_size": 260}  # fmt: skip
    vision = size | {"num_hidden_layers": 1, "image_size": 16, "patch_size": 4}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5
    )
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "gemma")
    byte_tokenizer().save_pretrained(tmp_path / "gemma")
    return tmp_path / "gemma"


def line_of(call, *arguments):
    with pytest.raises(UsageError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_loading_says_what_the_plan_says(gemma):
    planned = line_of(Skeleton, gemma)
    assert "'gemma3' is not supported" in planned
    assert line_of(compress.load, gemma) == planned


COMMANDS = [
    ("plan", ["plan", "{recipe}"]),
    ("run", ["run", "{recipe}", "--output", "{folder}/out"]),
    ("generate", ["generate", "{model}", "--prompt", "a"]),
    ("eval", ["eval", "{model}", "--tasks", "demo_code", "--limit", "1"]),
    ("bench", ["bench", "model", "{model}"]),
]


@pytest.mark.parametrize("arguments", [a for _, a in COMMANDS], ids=[n for n, _ in COMMANDS])
def test_every_command_says_it(gemma, tmp_path, empty_folder, capsys, arguments):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {json.dumps(str(gemma))}\nquantize: {{method: rtn}}\n")
    places = {"recipe": recipe, "model": gemma, "folder": tmp_path}
    assert main([part.format(**places) for part in arguments]) == 2
    assert "'gemma3' is not supported" in capsys.readouterr().err


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


@pytest.mark.parametrize("model_type", ["llama4", "gemma3", "mllama", "qwen3_vl", "phimoe"])
def test_a_type_that_transformers_knows_is_no_typo(model_type):
    message = line_of(architecture_of, transformers.AutoConfig.for_model(model_type))
    assert "did you mean" not in message
    assert all(name in message for name in [*ARCHITECTURES, *MULTIMODAL])
