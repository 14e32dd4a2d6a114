"""Files of text and of prompts that are not what they should be: one line with place and value."""

import json

import pytest

from compress.data.samples import _rows
from compress.data.text import load_documents
from compress.errors import UsageError
from support.refusals import refused

LINES = {
    '{"text": null}': "null",
    '{"text": 3}': "3",
    '{"text": ["a"]}': '["a"]',
    '[{"text": "a"}]': '[{"text": "a"}]',
    "null": "null",
    '"a"': '"a"',
    '{"text": "a\\ud800b"}': "\\ud800",
    '{"text": "\\udc00"}': "\\udc00",
    "[" * 100_000: "",
    '{"text": ' + "[" * 100_000: "",
    '{"text": ' + "9" * 5000 + "}": "",
}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:20])
def test_a_line_that_holds_no_text(tmp_path, line):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with refused(UsageError, f"{path}:3:", *filter(None, [LINES[line]])):
        load_documents(str(path), "train")


@pytest.mark.parametrize("name", ["t.json", "t.csv", "t.parquet", "t.arrow", "t", "t.jsonl.gz"])
def test_other_formats_are_named(tmp_path, name):
    path = tmp_path / name
    path.write_text('[{"text": "a"}]')
    with refused(UsageError, path, ".jsonl"):
        load_documents(str(path), "train")


@pytest.mark.parametrize(("name", "text"), [("t.txt", "words"), ("t.jsonl", '{"text": "words"}')])
def test_a_byte_order_mark_is_no_text(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert load_documents(str(tmp_path / name), "train").texts == ["words"]


def test_a_pair_of_surrogates_is_one_character(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert load_documents(str(tmp_path / "t.jsonl"), "train").texts == ["\U0001f600"]


PROMPTS = {
    '{"image": "a.png", "prompt": null}': "null",
    '[{"image": "a.png", "prompt": "x"}]': '[{"image": "a.png", "prompt": "x"}]',
    '{"image": "a.png", "prompt": "\\ud800"}': "\\ud800",
    '{"image": "a.png", "prompt": "x", "answer": "\\udfff"}': "\\udfff",
    "[" * 100_000: "",
}


@pytest.mark.parametrize("line", PROMPTS, ids=lambda line: line[:30])
def test_a_line_that_holds_no_prompt(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"image": "a.png", "prompt": "fine"}) + "\n" + line)
    with refused(UsageError, f"{path}:2:", *filter(None, [PROMPTS[line]])):
        _rows(path)


def test_prompts_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(json.dumps({"image": "a.png", "prompt": "x"}).encode("utf-8-sig"))
    assert [row["prompt"] for _, row in _rows(path)] == ["x"]
