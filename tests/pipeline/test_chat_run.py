"""Calibration on conversations: what is read, what counts, and what the files say of it."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

import compress
from compress.data.prompts import calibration_data
from compress.data.windows import CalibrationWindows
from compress.errors import UsageError
from compress.pipeline.inputs import RunInputs
from compress.pipeline.run import run
from support.refusals import check_line, refused
from support.tiny_checkpoints import recipe_for, weight_files, write_checkpoint
from support.tiny_folders import tiny_folder, write_samples

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
ROWS = [
    {"messages": [{"role": "user", "content": "ab" * i}, {"role": "assistant", "content": "c" * i}]}
    for i in range(1, 9)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("chat") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return file


def recipe_of(model, rows, **calibration):
    return recipe_for(model, rows, calibration={"loss_mask": "assistant", **calibration})


def test_the_assistants_tokens_alone_decide_the_rounding(model, rows, tmp_path):
    """As the same windows do with the same mask, whatever the prompts' own weights would be."""
    recipe = recipe_of(model, rows, samples=8, length=64)
    made = run(recipe, tmp_path / "chat", self_check=False, check_source=False)
    inputs = RunInputs.open(recipe)
    data = calibration_data(inputs.source, inputs.skeleton)
    assert isinstance(data, CalibrationWindows)
    own = run(
        recipe_for(model, calibration={"dataset": "python-stdlib"}), tmp_path / "own",
        windows=CalibrationWindows(data.input_ids, data.mask), self_check=False,
        check_source=False,
    )  # fmt: skip
    assert weight_files(made.path) == weight_files(own.path)
    whole = run(
        recipe_of(model, rows, samples=8, length=64, loss_mask="all"), tmp_path / "whole",
        self_check=False, check_source=False,
    )  # fmt: skip
    assert weight_files(made.path) != weight_files(whole.path)
    facts = json.loads((made.path / "modelpress.json").read_text())["calibration"]
    # First token, c, c, ..., </s> of each.
    assert facts["counted_tokens"] == sum(1 + i + 1 for i in range(1, 9))
    assert facts["tokens"] == sum(len("u:</s>a:</s>") - 6 + 3 * i for i in range(1, 9))
    assert facts["windows"] == list(data.input_ids.shape)


def test_plan_says_how_many_tokens_count(model, rows, tmp_path):
    planned = compress.plan(recipe_of(model, rows, samples=8, length=64))
    assert planned.calibration is not None
    assert planned.calibration["counted_tokens"] == sum(2 + i for i in range(1, 9))
    assert planned.as_dict()["calibration"] == planned.calibration
    whole = compress.plan(recipe_of(model, rows, samples=8, length=64, loss_mask="all"))
    assert whole.calibration["counted_tokens"] == whole.calibration["tokens"]
    text = recipe_for(model, calibration={"dataset": "python-stdlib"})
    assert compress.plan(text).calibration == {
        "windows": [6, 24], "tokens": 144, "counted_tokens": 144,
    }  # fmt: skip
    assert (
        compress.plan(
            recipe_for(model, quantize={"method": "rtn", "clip_search": "magnitude"})
        ).calibration
        is None
    )
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(model / "config.json", alone)
    assert compress.plan(recipe_of(alone, rows, samples=99, length=64)).calibration == {
        "windows": [8, 64], "tokens": 512, "counted_tokens": None,
    }  # fmt: skip
    hub = recipe_of(model, "me/chats")  # nothing of it is read for a plan
    assert compress.plan(hub).calibration["counted_tokens"] is None


def test_what_would_stop_the_run_stands_in_the_plan(model, rows, tmp_path):
    def problems(recipe):
        return "; ".join(compress.plan(recipe).problems)

    check_line(problems(recipe_of(model, "python-stdlib")), "calibration.loss_mask")
    check_line(problems(recipe_of(model, rows, expansion=2)), "calibration.expansion")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"messages": [{"role": "usr", "content": "x"}]}), encoding="utf-8")
    check_line(problems(recipe_of(model, bad)), f"{bad}:1", "messages[0].role", "'usr'")
    bad.write_text(json.dumps({"mesages": []}), encoding="utf-8")
    check_line(problems(recipe_of(model, bad)), f"{bad}:1", "'text'", "mesages", "'messages'")
    with refused(UsageError, "'absent.jsonl'", "no such file"):
        problems(recipe_of(model, "absent.jsonl"))
    bare = write_checkpoint(tmp_path / "bare")
    check_line(problems(recipe_of(bare, rows)), "chat template", rows)
    vlm = tiny_folder(tmp_path / "vlm")
    samples = write_samples(tmp_path / "images")
    check_line(problems(recipe_of(vlm, samples)), "calibration.loss_mask", "images")
