"""A question in the model's chat template, or a text continued as it is."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedConfig

from compress.cli.main import main
from compress.errors import UsageError
from compress.models.pretrained import processor_reader
from compress.pipeline.asking import Question, question_inputs, room_for
from support.local_tasks import TEMPLATE
from support.refusals import refused
from support.tiny_lm import byte_tokenizer, tiny_llama


def tokenizer_with(template=TEMPLATE):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def asked(tokenizer, *arguments, **options):
    """The text that a model reads, and whether it is in the template."""
    inputs, templated = question_inputs(tokenizer, Question.of(*arguments, **options), "the model")
    return tokenizer.decode(inputs["input_ids"][0]), templated


def test_a_prompt_in_the_template_where_there_is_one():
    whole = "<end>[user]Hi?\n[assistant]"
    assert asked(tokenizer_with(), "Hi?") == (whole, True)
    assert asked(tokenizer_with(), "Hi?", chat=True) == (whole, True)
    assert asked(tokenizer_with(), "Hi?", chat=False) == ("Hi?", False)
    assert asked(byte_tokenizer(), "Hi?") == ("Hi?", False)


def test_bos_stands_once_whoever_writes_it():
    from tokenizers import processors

    tokenizer = tokenizer_with()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", 256)]
    )
    assert asked(tokenizer, "Hi?")[0].count("<end>") == 1
    assert asked(tokenizer, "Hi?", chat=False)[0] == "<end>Hi?"


def test_a_system_prompt_and_turns_of_a_file(tmp_path):
    file = tmp_path / "turns.json"
    turns = [{"role": "user", "content": "I am Ada."}, {"role": "assistant", "content": "Hi."}]
    file.write_text(json.dumps(turns), encoding="utf-8")
    before = "<end>[system]Be brief.\n[user]I am Ada.\n[assistant]Hi.\n"
    found = asked(tokenizer_with(), "Who am I?", system="Be brief.", messages=file)
    assert found == (before + "[user]Who am I?\n[assistant]", True)
    with refused(UsageError, file, "assistant"):
        Question.of(None, messages=file)
    file.write_text(json.dumps([{"role": "system", "content": "x"}, turns[0]]), encoding="utf-8")
    assert asked(tokenizer_with(), None, messages=file)[1]
    with refused(UsageError, "--system", file):
        Question.of("x", system="y", messages=file)


def test_what_only_a_template_has_a_place_for():
    with refused(UsageError, "--raw", "--system"):
        Question.of("x", system="y", chat=False)
    with refused(UsageError, "the model", "chat template"):
        asked(byte_tokenizer(), "x", system="y")
    with refused(UsageError, "the model", "chat template"):
        asked(byte_tokenizer(), "x", chat=True)
    with refused(UsageError, "the model", "no system"):
        asked(tokenizer_with("{{ raise_exception('no system') }}"), "x")
    with refused(UsageError, "--image"):
        asked(tokenizer_with(), "x", images=[Image.new("RGB", (4, 4))])
    with refused(UsageError, "--prompt"):
        asked(byte_tokenizer(), "")


def test_images_stand_before_the_last_users_text():
    from transformers import AutoConfig

    from compress.data.samples import prompt_inputs

    folder = "recipes/demo/vlm"
    read = processor_reader(AutoConfig.from_pretrained(folder))
    processor = read(folder, trust_remote_code=False)
    picture = [Image.new("RGB", (32, 32))]
    inputs, templated = question_inputs(processor, Question.of("how many?", images=picture), "m")
    assert templated
    for name, value in prompt_inputs(processor, "how many?", picture).items():
        assert torch.equal(inputs[name], value)
    raw, _ = question_inputs(processor, Question.of("how many?", images=picture, chat=False), "m")
    assert (raw["input_ids"] == processor.image_token_id).any()
    alone, templated = question_inputs(processor, Question.of("how many?"), "m")
    assert templated and not (alone["input_ids"] == processor.image_token_id).any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tokenizer_with().save_pretrained(folder)
    return folder


def test_generate_asks_as_the_model_is_meant_to_be_asked(folder, capsys):
    def answer(*options):
        assert main(["generate", str(folder), *options, "--max-tokens", "6"]) == 0
        return capsys.readouterr()

    chat, raw = answer("Hi?"), answer("Hi?", "--raw")
    assert chat.out != raw.out
    assert "chat template" in chat.err and "--raw" in chat.err
    assert "chat template" not in raw.err
    assert answer("--prompt", "Hi?", "--chat").out == chat.out
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    made = tiny_llama().generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=256)
    text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    assert chat.out.rstrip("\n") == text.rstrip("\n")


def test_what_the_context_has_no_room_for(folder, capsys):
    model, context = tiny_llama(), tiny_llama().config.max_position_embeddings
    inputs = {"input_ids": torch.zeros(1, context - 4, dtype=torch.int64)}
    assert room_for(model.config, inputs, 3) == 3
    assert room_for(model.config, inputs, 9) == 4
    with refused(UsageError, f"{context:,}", "context"):
        room_for(model.config, {"input_ids": torch.zeros(1, context, dtype=torch.int64)}, 1)
    assert room_for(PreTrainedConfig(), inputs, 9) == 9  # says nothing of a context
    assert main(["generate", str(folder), "x" * context, "--raw"]) == 2
    assert "context" in capsys.readouterr().err
    assert main(["generate", str(folder), "x" * (context - 2), "--raw"]) == 0
    assert "at most 2 new tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [([], "prompt"), (["a", "--prompt", "b"], "'a'"), (["a", "--messages", "no.json"], "no.json")],
)
def test_generate_refuses_before_a_model_is_read(options, named, capsys):
    assert main(["generate", "recipes/demo/lm", *options]) == 2
    assert named in capsys.readouterr().err
