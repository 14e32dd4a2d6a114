"""Corpora: what each kind of dataset gives, and one-line errors for what cannot be read."""

import json
import sys
from types import SimpleNamespace

import pytest

from compress.data.stdlib import is_held_out, stdlib_files
from compress.data.text import load_documents
from compress.errors import CompressError, UsageError
from support.refusals import refused


class Table:
    """The part of a `datasets` table that is read: column names, and columns by name."""

    def __init__(self, **columns):
        self.columns = columns
        self.column_names = list(columns)

    def __getitem__(self, name):
        return self.columns[name]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`: `hub.answer` is what it returns or raises."""
    state = SimpleNamespace(answer=None, calls=[])

    def load_dataset(*arguments, **options):
        state.calls.append((arguments, options))
        if isinstance(state.answer, Exception):
            raise state.answer
        return state.answer

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return state


def test_stdlib_splits_share_no_file_and_miss_none():
    train, held_out = stdlib_files("train"), stdlib_files("held_out")
    assert not set(train) & set(held_out)
    assert 0.01 < len(held_out) / len(train) < 0.1
    assert any(path.name == "argparse.py" for path in train + held_out)
    assert is_held_out("argparse.py") == any(path.name == "argparse.py" for path in held_out)


def test_stdlib_is_one_stream_of_modules():
    corpus = load_documents("python-stdlib", "held_out")
    assert corpus.one_stream and len(corpus.texts) > 10


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    corpus = load_documents(str(path), "train")
    assert corpus.one_stream and corpus.texts == ["one\n\ntwo\n"]


def test_json_lines_give_the_field_that_is_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"body": "a\u2028b", "text": "x"}, {"body": "c"}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    corpus = load_documents(str(path), "train", text_field="body")
    assert corpus.one_stream and corpus.texts == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ('{"text": ', ["JSON"]),
        ("[1]", ["[1]"]),
        ('{"texts": "a"}', ["'text'", "'texts'", "text_field"]),
        ('{"text": 3}', ["text:"]),
    ],
)
def test_bad_json_lines_name_file_and_line(tmp_path, second, words):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + second + "\n")
    with refused(UsageError, f"{path}:2: ", *words):
        load_documents(str(path), "train")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("nothing.txt", None, "No such file"),
        ("a.txt", b" \n", "documents"),
        ("a.jsonl", b"\n", "documents"),
        ("b.txt", b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_files_that_are_missing_empty_or_not_text(tmp_path, name, content, word):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused(UsageError, tmp_path / name, word):
        load_documents(str(tmp_path / name), "train")


def test_wikitext_is_one_text_joined_with_blank_lines(hub):
    hub.answer = Table(text=["", " = A = \n", "b"])
    corpus = load_documents("wikitext2", "train")
    assert corpus.one_stream and corpus.texts == ["\n\n = A = \n\n\nb"]


@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4"])
def test_splits_of_hub_datasets_differ(hub, name):
    hub.answer = Table(text=["a"], sentence=["a"])
    load_documents(name, "train")
    load_documents(name, "held_out")
    first, second = (options["split"] for _, options in hub.calls)
    assert first == "train" and second in ("test", "validation")


def test_web_pages_stay_separate_documents(hub):
    hub.answer = Table(text=["a", "b"])
    for name in ("c4", "pajama"):
        corpus = load_documents(name, "train")
        assert not corpus.one_stream and list(corpus.texts) == ["a", "b"]
    with refused(UsageError, "pajama", "held-out"):
        load_documents("pajama", "held_out")


def test_any_hub_id_by_its_splits_and_column(hub):
    hub.answer = {"train": Table(body=["a"]), "validation": Table(body=["b"])}
    assert load_documents("owner/name", "train", "body").texts == ["a"]
    assert load_documents("owner/name", "held_out", "body").texts == ["b"]
    for split, found in (("train", "body"), ("dev", "dev")):
        hub.answer = {split: Table(body=["a"])}
        with refused(UsageError, "owner/name", found):
            load_documents("owner/name", "train")


def test_an_unreachable_hub_and_a_missing_package_name_the_remedy(hub, monkeypatch):
    hub.answer = ConnectionError("no route\nto host")
    with refused(CompressError, "Salesforce/wikitext", "no route to host"):  # as it was raised
        load_documents("wikitext2", "train")
    with refused(CompressError, "python-stlib", "'python-stdlib'"):
        load_documents("python-stlib", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused(UsageError, "pip install 'datasets'"):
        load_documents("c4", "train")
