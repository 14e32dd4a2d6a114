"""Corpora: what each kind of dataset gives, and one-line errors for what cannot be read."""

import json
import sys
from types import SimpleNamespace

import pytest

from compress.data.stdlib import is_held_out, stdlib_files
from compress.data.text import load_documents
from compress.errors import CompressError, UsageError


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


def error_of(call, kind=UsageError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
        ('{"text": ', ["not valid JSON"]),
        ("[1]", ["expected an object", "list"]),
        ('{"texts": "a"}', ["'text'", "did you mean 'texts'", "text_field"]),
        ('{"text": 3}', ["'text'"]),
    ],
)
def test_bad_json_lines_name_file_and_line(tmp_path, second, words):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + second + "\n")
    message = error_of(lambda: load_documents(str(path), "train"))
    assert message.startswith(f"{path}:2: ")
    for word in words:
        assert word in message


def test_files_that_are_missing_empty_or_not_text(tmp_path):
    assert "nothing.txt" in error_of(lambda: load_documents("nothing.txt", "train"))
    for name, content in (("a.txt", b" \n"), ("a.jsonl", b"\n")):
        (tmp_path / name).write_bytes(content)
        assert "no documents" in error_of(lambda n=name: load_documents(str(tmp_path / n), "train"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in error_of(lambda: load_documents(str(tmp_path / "b.txt"), "train"))


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
    assert "no held-out part" in error_of(lambda: load_documents("pajama", "held_out"))


def test_any_hub_id_by_its_splits_and_column(hub):
    hub.answer = {"train": Table(body=["a"]), "validation": Table(body=["b"])}
    assert load_documents("owner/name", "train", "body").texts == ["a"]
    assert load_documents("owner/name", "held_out", "body").texts == ["b"]
    assert "found body" in error_of(lambda: load_documents("owner/name", "train"))
    hub.answer = {"dev": Table(body=["a"])}
    assert "found dev" in error_of(lambda: load_documents("owner/name", "train"))


def test_an_unreachable_hub_and_a_missing_package_name_the_remedy(hub, monkeypatch):
    hub.answer = ConnectionError("no route\nto host")
    message = error_of(lambda: load_documents("wikitext2", "train"), CompressError)
    assert "Salesforce/wikitext" in message and "no route to host" in message
    message = error_of(lambda: load_documents("python-stlib", "train"), CompressError)
    assert "did you mean 'python-stdlib'" in message
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "modelpress[eval]" in error_of(lambda: load_documents("c4", "train"))
