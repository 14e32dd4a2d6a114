"""`inspect` of GGUF files: every matrix and every byte, by llama.cpp's names and types."""

import sys

import gguf
import numpy as np
import pytest

from compress.checkpoint.export import export
from compress.checkpoint.inspect import inspect
from compress.cli.main import main
from compress.errors import CheckpointError, UsageError
from support.gguf_files import FILE
from support.refusals import refused


@pytest.fixture
def exported(packed, tmp_path):
    export(packed().folder, "gguf", tmp_path / "out", keep_embeddings=True)
    return tmp_path / "out"


def test_an_export_is_listed_as_its_source(packed, exported):
    source = {m["name"]: m for m in inspect(packed().folder)["modules"]}
    found = inspect(exported)
    assert found["format"] == "gguf"
    listed = {m["name"]: m for m in found["modules"]}
    assert len(listed) == len(source)
    ours, theirs = source["model.layers.1.mlp.down_proj"], listed["blk.1.ffn_down"]
    assert theirs == ours | {"name": "blk.1.ffn_down", "type": "Q4_0"}
    assert listed["token_embd"]["symmetric"] is None
    tensors = gguf.GGUFReader(exported / FILE).tensors
    assert found["bytes"]["total"] == sum(int(tensor.n_bytes) for tensor in tensors)
    # 4 bits and an fp16 scale for each 32 weights
    weights = sum(np.prod(m["shape"]) for m in found["modules"] if m["symmetric"] is not None)
    assert found["bytes"]["quantized"] == weights * (4 + 16 / 32) / 8
    assert inspect(exported / FILE) == found


def test_types_of_others(tmp_path):
    kinds = {
        "Q2_K": (2, 256, False),
        "MXFP4": (4, 32, True),
        "Q4_1": (4, 32, False),
        "Q5_K": (5, 256, False),
        "Q6_K": (6, 256, True),
    }
    kinds |= {"IQ4_NL": (4, 32, True), "BF16": (16, None, None), "F32": (32, None, None)}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for kind in kinds:
        number = gguf.GGMLQuantizationType[kind]
        block, nbytes = gguf.GGML_QUANT_SIZES[number]
        data = np.zeros((3, 512 // block * nbytes), np.uint8)
        writer.add_tensor(f"blk.0.{kind}.weight", data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    listed = {module["name"]: module for module in inspect(tmp_path)["modules"]}
    for kind, (bits, group_size, symmetric) in kinds.items():
        assert listed[f"blk.0.{kind}"] == {
            "name": f"blk.0.{kind}",
            "shape": [3, 512],
            "type": kind,
            "bits": bits,
            "group_size": group_size,
            "symmetric": symmetric,
        }


def test_one_model_at_a_time(exported):
    whole = inspect(exported)
    data = (exported / FILE).read_bytes()
    (exported / "model-Q8_0.gguf").write_bytes(data)
    with refused(UsageError, FILE, "model-Q8_0.gguf"):
        inspect(exported)
    assert inspect(exported / FILE) == whole
    (exported / FILE).rename(exported / "m-00001-of-00002.gguf")
    (exported / "model-Q8_0.gguf").rename(exported / "m-00002-of-00002.gguf")
    both = inspect(exported)
    assert len(both["modules"]) == 2 * len(whole["modules"])
    assert both["bytes"]["total"] == 2 * whole["bytes"]["total"]


def test_the_command_line(exported, capsys):
    assert main(["inspect", str(exported)]) == 0
    shown = capsys.readouterr().out
    assert "blk.*.ffn_down" in shown
    assert "gguf" in shown


def test_damaged_files_and_a_missing_library(tmp_path, exported, monkeypatch):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and no more")
    with refused(CheckpointError, "broken.gguf"):
        inspect(tmp_path / "broken.gguf")
    with refused(UsageError, "absent.gguf"):
        inspect(tmp_path / "absent.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with refused(UsageError, "gguf"):
        inspect(exported)
