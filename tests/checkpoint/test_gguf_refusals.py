"""What GGUF or llama.cpp cannot hold is refused in one line, or stored otherwise on request."""

import json
import shutil
import sys

import pytest
import torch
from transformers import AutoConfig

from compress.checkpoint.export import export
from compress.errors import CompressError, UsageError
from compress.scheme import Scheme
from compress.storage.safetensors import save_tensors
from support.failing_runs import refused_export
from support.gguf_files import FILE, Read, as_checkpoint, assert_same
from support.refusals import check_line, refused
from support.tiny_checkpoints import (
    byte_tokenizer,
    change_config,
    dequantised,
    read_tensors,
)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("num_attention_heads", 2, "q_proj"),
        ("num_key_value_heads", 1, "k_proj"),
        ("hidden_size", 128, "embed_tokens"),
        ("intermediate_size", 64, "gate_proj"),
        ("vocab_size", 128, "embed_tokens"),
        ("num_hidden_layers", 3, "layers.2"),
        ("num_hidden_layers", 10**9, "num_hidden_layers"),
        ("hidden_size", "64", "hidden_size"),
        ("rms_norm_eps", None, "rms_norm_eps"),
    ],
)
def test_a_config_of_another_model_is_refused(copy, tmp_path, key, value, named):
    change_config(copy, **{key: value})
    with pytest.raises(CompressError) as caught:
        export(copy, "gguf", tmp_path / "out")
    check_line(str(caught.value).replace("_", ""), named.replace("_", ""))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_whose_values_are_of_another_kind_is_refused(copy, tmp_path):
    (copy / "tokenizer_config.json").write_text('{"model_max_length": ""}')
    refused_export("gguf", copy, tmp_path / "out", "model_max_length", '""')
    assert not (tmp_path / "out").exists()


def test_groups_that_no_type_has_are_stored_wider_only_if_allowed(packed, tmp_path):
    source = packed(bits=3)
    module = ("model.layers.0.mlp.down_proj", "3 bits", 32)
    refused_export("gguf", source.folder, tmp_path / "out", *module, "Q4_0", "--requantise")
    result = export(source.folder, "gguf", tmp_path / "out", requantise=True, keep_embeddings=True)
    read = Read(tmp_path / "out" / FILE)
    assert_same(as_checkpoint(read, AutoConfig.from_pretrained(source.folder)), source.weights)
    check_line(result.notes[0], "14 of 14")
    check_line(result.notes[1], "4.5 bits a weight", "3.5")  # groups of 32
    assert "modelpress.requantised" not in read.fields


@pytest.mark.parametrize(
    ("quantize", "kind", "most"),
    [
        ({"bits": 8, "symmetric": False}, "Q8_0", 1e-2),
        # 112 columns are no blocks of 32
        ({"overrides": [{"match": "re:.*down_proj", "bits": 8, "group_size": "channel"}]},
         "F16", 1e-3),
    ],
)  # fmt: skip
def test_what_no_type_holds_is_rounded_anew_only_if_allowed(packed, tmp_path, quantize, kind, most):
    source = packed("llama", {"intermediate_size": 112} if kind == "F16" else None, **quantize)
    refused_export("gguf", source.folder, tmp_path / "out", kind, "--requantise")
    result = export(source.folder, "gguf", tmp_path / "out", requantise=True, keep_embeddings=True)
    read = Read(tmp_path / "out" / FILE)
    found = as_checkpoint(read, AutoConfig.from_pretrained(source.folder))
    changed = read.fields["modelpress.requantised"]
    check_line(result.notes[0], f"{len(changed)} of 14")
    check_line(result.notes[1], "bits a weight")
    errors = []
    for name, weight in source.weights.items():
        error = float((found[name] - weight).norm() / weight.norm())
        if name.removesuffix(".weight") in changed:
            errors.append(error)
            assert 0 < error < most
        else:
            assert error == 0, name
    assert result.notes[0].endswith(f" {max(errors):.1e}")
    history = json.loads((tmp_path / "out" / "modelpress.json").read_text())
    assert history["export"]["notes"] == result.notes


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "K", "named"),
    [
        (3, 64, True, 512, ["groups", 256]),
        (3, None, True, 192, ["4 or 8 bits", "symmetrically"]),
        (4, 32, False, 512, ["groups", 256]),
        (4, 32, False, 192, ["symmetrically", "groups", 32]),
        (8, 32, False, 192, ["symmetrically", "groups", 32]),
        (7, 32, True, 512, ["4 or 8 bits", "symmetrically"]),
        (4, None, True, 112, ["not at all"]),
    ],
)
def test_the_remedy_is_one(bits, group_size, symmetric, K, named):
    """What is advised is possible with as many columns, and gives a type of its own."""
    from compress.checkpoint.gguf.format import _remedy

    check_line(_remedy(Scheme(bits, group_size, symmetric), K), *named)


def test_a_dtype_that_gguf_does_not_have(copy, tmp_path):
    tensors = read_tensors(copy)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    save_tensors(copy / "model.safetensors", tensors)
    refused_export("gguf", copy, tmp_path / "out", "model.norm.weight", "torch.float64")


def test_scales_are_rounded_only_if_allowed(copy, tmp_path):
    tensors = read_tensors(copy)
    step = 2.0**-12
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name] = tensors[name].float() * (1 + step)
    save_tensors(copy / "model.safetensors", tensors)
    refused_export("gguf", copy, tmp_path / "out", "--round-scales")
    result = export(copy, "gguf", tmp_path / "out", round_scales=True, keep_embeddings=True)
    assert result.rounding.largest == pytest.approx(step, rel=1e-2)
    module = "model.layers.0.mlp.up_proj"
    exact = dequantised({n: t for n, t in tensors.items() if n.startswith(module)}, {module: 4})
    found = Read(tmp_path / "out" / FILE).values["blk.0.ffn_up.weight"]
    difference = (found - exact[f"{module}.weight"]).abs()
    assert difference.any()
    assert (difference <= 1.01 * step * exact[f"{module}.weight"].abs()).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "gemma2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}}, "dynamic"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
                                 "attention_factor": 1.5}},
            "attention_factor",
        ),
    ],
)  # fmt: skip
def test_models_that_llamacpp_would_compute_differently(copy, tmp_path, changes, said):
    change_config(copy, **changes)
    refused_export("gguf", copy, tmp_path / "out", said)


def test_tensors_that_llamacpp_has_no_place_for(packed, tmp_path):
    copy = shutil.copytree(packed("qwen2").folder, tmp_path / "copy")
    bias = {"model.layers.1.mlp.up_proj.bias": torch.zeros(128)}
    save_tensors(copy / "model.safetensors", read_tensors(copy) | bias)
    refused_export("gguf", copy, tmp_path / "out", *bias)


def test_tokenizers_that_are_missing_or_too_large(copy, tmp_path):
    byte_tokenizer(first=10).save_pretrained(copy)
    refused_export("gguf", copy, tmp_path / "out", 267, 260)
    for file in copy.glob("tokenizer*"):
        file.unlink()
    refused_export("gguf", copy, tmp_path / "out", "tokenizer")


def test_a_missing_library_names_the_extra(packed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused_export("gguf", packed().folder, tmp_path / "out", "pip install 'gguf'")


def test_formats_without_other_types_refuse_to_requantise(packed, tmp_path):
    with refused(UsageError, "--requantise"):
        export(packed().folder, "gptq", tmp_path / "out", requantise=True)
    assert not (tmp_path / "out").exists()
