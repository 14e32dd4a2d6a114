"""Files are whole or not there, what the system refuses is one line, and sizes are bytes."""

import errno
import json

import pytest

from compress.errors import CheckpointError, UsageError
from compress.storage.files import (
    LARGE_JSON,
    folder_name,
    parse_size,
    read_json,
    write_json,
    writing,
)
from support.refusals import refused


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "facts.json"
    write_json(path, {"bits": 4})
    assert read_json(path) == json.loads(path.read_text()) == {"bits": 4}
    with pytest.raises(TypeError):
        write_json(path, {"bits": object()})
    assert read_json(path) == {"bits": 4}
    assert [file.name for file in path.parent.iterdir()] == ["facts.json"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_json_that_is_too_large_is_not_parsed(tmp_path, monkeypatch, name):
    limits = dict.fromkeys(LARGE_JSON, 300)
    monkeypatch.setattr("compress.storage.files.JSON_BYTES", 100)
    monkeypatch.setattr("compress.storage.files.LARGE_JSON", limits)
    most = 100 if name == "config.json" else 300
    text = json.dumps({"a": ""})
    (tmp_path / name).write_text(text + " " * (most - len(text)))
    assert read_json(tmp_path / name) == {"a": ""}
    (tmp_path / name).write_text("[" * (most + 1))
    with refused(CheckpointError, tmp_path / name, most):
        read_json(tmp_path / name)


def test_what_the_system_refuses_names_the_file(tmp_path):
    inside = tmp_path / "model.safetensors"
    for place, named in ((tmp_path, inside), (tmp_path / "a.json", tmp_path / "a.json")):
        with refused(CheckpointError, f"{named}: No space left"), writing(place):
            raise OSError(errno.ENOSPC, "No space left on device", str(inside))


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("7", 7), (12, 12), ("1kb", 1000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "five GB", "5 XB", "-1GB", "0"])
def test_sizes_that_are_not(text):
    with refused(UsageError, repr(text)):
        parse_size(text)


def test_a_name_as_a_folder():
    assert folder_name("RSQ bits=3-0") == "RSQ-bits-3-0"
    assert folder_name("../..") == "recipe"
    long = ["é" * 300 + end for end in "ab"]
    found = [folder_name(name) for name in long]
    assert len(set(found)) == 2
    assert all(len(f"{name}-0.json".encode()) < 160 and name[:50] == "é" * 50 for name in found)
