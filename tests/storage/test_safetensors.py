"""The reader against damaged folders and the safetensors library; the writers byte for byte."""

import gc
import json
import os

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress.errors import CheckpointError, UsageError
from compress.storage.safetensors import (
    DTYPES,
    CheckpointReader,
    merge_shards,
    save_tensors,
)
from support.refusals import refused


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(11, 8),
        "model.layers.1.a.weight": torch.randn(5, 3).bfloat16(),  # an odd number of bytes follows
        "model.layers.1.b.weight_shape": torch.tensor([5, 3]),
        "model.layers.10.a.weight": torch.randint(-9, 9, (7,), dtype=torch.int8),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "empty": torch.zeros(0, 4),
        "mask": torch.tensor([True, False, True]),
    }


@pytest.fixture
def sharded(tmp_path):
    """A folder with two shards and an index."""
    tensors = some_tensors()
    names = sorted(tensors)
    for i, part in enumerate((names[:4], names[4:])):
        save_file(
            {n: tensors[n] for n in part}, tmp_path / f"model-0000{i + 1}-of-00002.safetensors"
        )
    index = {"metadata": {}, "weight_map": {}}
    for i, part in enumerate((names[:4], names[4:])):
        index["weight_map"] |= dict.fromkeys(part, f"model-0000{i + 1}-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


# ---- reading ------------------------------------------------------------------------------------


def test_reads_what_the_library_wrote(sharded):
    reader, tensors = CheckpointReader(sharded), some_tensors()
    assert reader.names == sorted(tensors)
    for name, tensor in tensors.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        assert reader.nbytes(name) == tensor.numel() * tensor.element_size()
        assert torch.equal(reader.tensor(name), tensor)
    assert reader.nbytes() == sum(t.numel() * t.element_size() for t in tensors.values())


def test_a_prefix_ends_at_a_dot(sharded):
    reader = CheckpointReader(sharded)
    layer = ["model.layers.1.a.weight", "model.layers.1.b.weight_shape"]
    assert list(reader.tensors("model.layers.1")) == layer
    assert list(reader.tensors("model.layers.1.")) == layer
    assert set(reader.tensors()) == set(some_tensors())


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d != torch.bool], ids=str)
def test_every_dtype_survives(tmp_path, dtype):
    source = {"x": torch.arange(1, 7).to(dtype)}
    save_tensors(tmp_path / "model.safetensors", source)
    found = CheckpointReader(tmp_path).tensor("x")
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), source["x"].view(torch.uint8))


def test_reading_layers_does_not_grow_memory(tmp_path):
    size, layers = 2**20, 24  # 4 MiB a layer
    save_tensors(
        tmp_path / "model.safetensors",
        {f"layers.{i}.weight": torch.full((size,), float(i)) for i in range(layers)},
    )
    reader, process = CheckpointReader(tmp_path), psutil.Process()
    reader.tensors("layers.0")
    gc.collect()
    before = process.memory_info().rss
    for i in range(layers):
        assert reader.tensors(f"layers.{i}")[f"layers.{i}.weight"][0] == i
    assert process.memory_info().rss - before < layers * 4 * size / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_names_tensor_and_file(tmp_path, dtype, value):
    weight = torch.randn(6, 6).to(dtype)
    weight[3, 2] = value
    save_tensors(tmp_path / "model.safetensors", {"layers.0.up.weight": weight})
    reader = CheckpointReader(tmp_path)
    with refused(CheckpointError, "layers.0.up.weight", tmp_path / "model.safetensors", 1, 36):
        reader.tensor("layers.0.up.weight")


def test_missing_folder_and_empty_folder(tmp_path):
    with refused(UsageError, tmp_path / "absent"):
        CheckpointReader(tmp_path / "absent")
    with refused(UsageError, tmp_path, "model.safetensors.index.json"):
        CheckpointReader(tmp_path)


def test_a_folder_of_pickles_says_safetensors_only(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with refused(UsageError, tmp_path, "pytorch_model.bin"):
        CheckpointReader(tmp_path)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with refused(CheckpointError, "model-00002-of-00002.safetensors"):
        CheckpointReader(sharded)


def test_a_tensor_absent_from_its_shard_is_named(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.7.weight"] = "model-00001-of-00002.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(CheckpointError, "model-00001-of-00002.safetensors", "'model.layers.7.weight'"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": "../b.safetensors"}}'])
def test_an_index_that_makes_no_sense_is_named(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with refused(CheckpointError, sharded / "model.safetensors.index.json"):
        CheckpointReader(sharded)


def test_a_truncated_file_is_noticed_before_any_data_is_read(sharded):
    path = sharded / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with refused(CheckpointError, path, "truncated"):
        CheckpointReader(sharded)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        b"\xff" * 64,
        b"<html>not found, sorry</html>" * 9,
        (9).to_bytes(8, "little") + b"not json!",
        (8).to_bytes(8, "little") + b'{"a": 1}',
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_a_garbage_header_is_noticed(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with refused(CheckpointError, tmp_path / "model.safetensors"):
        CheckpointReader(tmp_path)


def test_a_byte_range_that_contradicts_the_shape_is_noticed(tmp_path):
    text = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"0" * 8)
    with refused(CheckpointError, tmp_path / "model.safetensors", "'a'"):
        CheckpointReader(tmp_path)


def test_an_unknown_tensor_is_named(sharded):
    with refused(CheckpointError, sharded, "'nothing'"):
        CheckpointReader(sharded).tensor("nothing")


@pytest.mark.parametrize("place", [0, 1, 500, 999], ids="element {}".format)
def test_fingerprint_follows_every_weight(tmp_path, place):
    def fingerprint():
        return CheckpointReader(tmp_path).fingerprint()

    weight = torch.zeros(1000)
    save_tensors(tmp_path / "model.safetensors", {"w": weight})
    first = fingerprint()
    assert fingerprint() == first
    weight[place] = 1
    save_tensors(tmp_path / "model.safetensors", {"w": weight})
    second = fingerprint()
    (tmp_path / "config.json").write_text("{}")
    assert len({first, second, fingerprint()}) == 3


@pytest.mark.parametrize("asked", ["tensor", "fingerprint"])
@pytest.mark.parametrize("how", ["in place", "replaced", "touched"])
def test_a_file_that_is_changed_while_it_is_read_is_named(tmp_path, asked, how):
    file = tmp_path / "model.safetensors"
    save_tensors(file, {"w": torch.zeros(1000)})
    os.utime(file, ns=(0, 0))
    reader = CheckpointReader(tmp_path)
    if how == "in place":
        with file.open("r+b") as opened:
            opened.seek(-1, 2)
            opened.write(b"1")
    elif how == "replaced":
        save_tensors(file, {"w": torch.ones(1000)})
    else:
        os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed"):
        reader.tensor("w") if asked == "tensor" else reader.fingerprint()


# ---- writing ------------------------------------------------------------------------------------


def test_saving_is_deterministic_and_the_library_reads_it(tmp_path):
    tensors = some_tensors()
    save_tensors(tmp_path / "a.safetensors", tensors)
    save_tensors(tmp_path / "b.safetensors", dict(reversed(tensors.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_views_are_saved_as_what_they_show(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    save_tensors(tmp_path / "model.safetensors", {"t": base.T, "column": base[:, 1]})
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.tensor("t"), base.T)
    assert torch.equal(reader.tensor("column"), base[:, 1])


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"w": torch.zeros(4)})
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with refused(CheckpointError, path, "No space left"):
        save_tensors(path, {"w": torch.ones(4)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def write_parts(folder, count=5, width=100):
    folder.mkdir()
    parts = []
    for i in range(count):
        parts.append(folder / f"layer-{i:05d}.safetensors")
        tensors = {
            f"layers.{i}.packed": torch.full((width,), i, dtype=torch.int32),
            f"layers.{i}.scale": torch.full((3,), i + 0.5, dtype=torch.bfloat16),
        }
        save_tensors(parts[-1], tensors)
    return parts


@pytest.mark.parametrize("limit", [1, 406, 900, 10**6])
def test_merging_keeps_every_tensor(tmp_path, limit):
    parts = write_parts(tmp_path / "parts")
    (tmp_path / "out").mkdir()
    paths = merge_shards(parts, tmp_path / "out", limit)
    reader = CheckpointReader(tmp_path / "out")
    expected = {n: t for part in parts for n, t in load_file(part).items()}
    assert reader.names == sorted(expected)
    assert all(torch.equal(reader.tensor(n), t) for n, t in expected.items())
    for path in paths:
        tensors = load_file(path)  # the library maps the file, so it checks the alignment too
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert size <= limit or len(tensors) == 1
    assert (tmp_path / "out/model.safetensors.index.json").exists() == (len(paths) > 1)
    if limit == 10**6:
        assert [path.name for path in paths] == ["model.safetensors"]
    if limit == 900:  # two layers of 406 bytes fit
        assert [path.name for path in paths] == [
            f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)
        ]
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 5 * 406


def test_merging_twice_gives_the_same_bytes_and_no_leftovers(tmp_path):
    parts = write_parts(tmp_path / "parts")
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
        merge_shards(parts, tmp_path / name, 900)
    (tmp_path / "twice/keep.txt").write_text("mine")
    merge_shards(parts, tmp_path / "twice", 10**6)
    left = sorted(path.name for path in (tmp_path / "twice").iterdir())
    assert left == ["keep.txt", "model.safetensors"]
    merge_shards(parts, tmp_path / "twice", 900)
    once = {path.name: path.read_bytes() for path in (tmp_path / "once").iterdir()}
    twice = {path.name: path.read_bytes() for path in (tmp_path / "twice").iterdir()}
    assert once == {name: data for name, data in twice.items() if name != "keep.txt"}


def test_the_same_name_in_two_parts_is_refused(tmp_path):
    parts = write_parts(tmp_path / "parts")
    with refused(CheckpointError, "'layers.0.packed'", parts[0]):
        merge_shards([*parts, parts[0]], tmp_path / "out", 10**6)
