"""Headers of safetensors files: refused where the library refuses them, in one line each."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from compress.errors import CheckpointError
from compress.storage.safetensors import read_tensors
from compress.storage.safetensors_header import read_header


def write(path, header, data: int = 24, pad: int = 0, raw: bytes | None = None):
    text = json.dumps(header).encode() if raw is None else raw
    text = text + b" " * pad if pad >= 0 else b" " * -pad + text
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(data)))
    return path


def tensor(start=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


A, B = tensor(), tensor(16, 24, (2,))

REFUSED = {
    "a gap": {"a": A, "b": tensor(20, 24, (1,))},
    "a gap before the first": {"a": tensor(8, 24)},
    "an overlap": {"a": A, "b": tensor(12, 24, (3,))},
    "the same bytes twice": {"a": tensor(0, 24, (6,)), "b": tensor(0, 24, (6,))},
    "bytes behind the last": {"a": A},
    "nothing but data": {},
    "an end before its start": {"a": A, "b": tensor(24, 16, (0,))},
    "a fractional shape": {"a": A, "b": B | {"shape": [2.5]}},
    "a float that is whole": {"a": A, "b": B | {"shape": [2.0]}},
    "a shape in text": {"a": A, "b": B | {"shape": ["2"]}},
    "a negative shape": {"a": A, "b": B | {"shape": [-2]}},
    "a shape of true": {"a": tensor(0, 4, (1,)) | {"shape": [True]}, "b": tensor(4, 24, (5,))},
    "no shape": {"a": A, "b": {"dtype": "F32", "data_offsets": [16, 24]}},
    "no dtype": {"a": A, "b": {"shape": [2], "data_offsets": [16, 24]}},
    "a dtype that is a number": {"a": A, "b": B | {"dtype": 32}},
    "no offsets": {"a": A, "b": {"dtype": "F32", "shape": [2]}},
    "one offset": {"a": A, "b": B | {"data_offsets": [16]}},
    "three offsets": {"a": A, "b": B | {"data_offsets": [16, 20, 24]}},
    "offsets in text": {"a": A, "b": B | {"data_offsets": ["16", "24"]}},
    "fractional offsets": {"a": A, "b": B | {"data_offsets": [16.0, 24.0]}},
    "negative offsets": {"a": A, "b": B | {"data_offsets": [-8, 0]}},
    "a shape that is too large": {"a": A, "b": B | {"shape": [3]}},
    "no object": {"a": A, "b": [2]},
    "a list": [A, B],
    "a number": 3,
    "metadata that is a number": {"__metadata__": {"format": 3}, "a": A, "b": B},
    "metadata that is a list": {"__metadata__": [], "a": A, "b": B},
    "metadata inside metadata": {"__metadata__": {"x": {}}, "a": A, "b": B},
}  # fmt: skip
RAW = {
    "a name twice": json.dumps({"a": A, "b": B}).replace('"b"', '"a"').encode(),
    "no JSON": b"{'a': 1}",
    "no text": b"{\xff\xfe",
    "deep nesting": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number beyond all bounds": json.dumps({"a": A, "b": B}).replace("[2]", "[1e400]").encode(),
}  # fmt: skip


@pytest.mark.parametrize("case", [*REFUSED, *RAW])
def test_what_the_library_refuses_is_refused(tmp_path, case):
    file = write(tmp_path / "x.safetensors", REFUSED.get(case), raw=RAW.get(case))
    with pytest.raises((SafetensorError, OverflowError, ValueError)):
        load_file(file)
    with pytest.raises(CheckpointError, match=r"x\.safetensors is not a whole") as caught:
        read_header(file)
    assert "\n" not in str(caught.value)


ACCEPTED = {
    "tensors that follow each other": ({"a": A, "b": B}, 24, 0),
    "in any order": ({"b": B, "a": A}, 24, 0),
    "padding behind the header": ({"a": A, "b": B}, 24, 5),
    "padding in front of it": ({"a": A, "b": B}, 24, -1),
    "metadata": ({"__metadata__": {"format": "pt"}, "a": A, "b": B}, 24, 0),
    "empty tensors": ({"a": A, "e": tensor(16, 16, (0, 3)), "b": B}, 24, 0),
    "a scalar": ({"a": tensor(0, 4, ()), "b": tensor(4, 24, (5,))}, 24, 0),
    "no tensors": ({}, 0, 0),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_the_library_reads_is_read_alike(tmp_path, case):
    header, data, pad = ACCEPTED[case]
    file = write(tmp_path / "x.safetensors", header, data, pad)
    expected, found = load_file(file), read_tensors(file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("change", [1, -1, 4096])
def test_a_file_of_another_length_is_noticed(tmp_path, change):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3000)}, file)
    data = file.read_bytes()
    file.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(CheckpointError, match=r"truncated|follow the last"):
        read_header(file)
