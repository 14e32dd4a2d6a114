"""Engines that will not load a checkpoint are named, and told apart by what they go by."""

from compress.checkpoint.compressed_tensors import quantization_config
from compress.checkpoint.engines import (
    gptq_notes,
    loading_table,
    must_dequantize_on_load,
    plan_notes,
    split_fusions,
)
from compress.errors import CheckpointError
from compress.scheme import Scheme
from support.refusals import check_line, refused
from support.tiny_quantised import MIXED

A, B, C = Scheme(4, 128), Scheme(2, 64), Scheme(8, None)
INNER = [f"self_attn.{part}_proj" for part in "qkvo"]
INNER += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
UNIFORM = {f"model.layers.{i}.{name}": A for i in range(2) for name in INNER}
TORN = UNIFORM | {"model.layers.1.self_attn.k_proj": C}
QKV = tuple(f"model.layers.1.self_attn.{part}_proj" for part in "qkv")


def test_fusions_whose_parts_differ():
    assert split_fusions(UNIFORM) == {}
    assert split_fusions(TORN) == {"model.layers.1.self_attn.qkv_proj": QKV}
    left = UNIFORM | {"model.layers.0.mlp.up_proj": None}
    assert [*split_fusions(left)] == ["model.layers.0.mlp.gate_up_proj"]


def test_readers_that_will_not_load_it_are_named():
    assert gptq_notes(UNIFORM) == []
    mixed = UNIFORM | {"model.layers.1.mlp.down_proj": C}
    assert [note.split()[0] for note in gptq_notes(mixed)] == ["transformers"]
    narrow = dict.fromkeys(UNIFORM, B)
    assert [note.split()[0] for note in gptq_notes(narrow)] == ["vLLM"]
    assert "model.layers.1.self_attn.qkv_proj" in gptq_notes(TORN)[0]
    assert "lm_head" in gptq_notes(UNIFORM | {"lm_head": A})[0]


def test_what_a_plan_says_of_engines():
    assert plan_notes(UNIFORM | {"lm_head": None}) == []
    (fused,) = plan_notes(TORN)
    assert all(part in fused for part in QKV)
    (narrow,) = plan_notes(dict.fromkeys(UNIFORM, B))
    check_line(narrow, "2-bit", "vLLM")
    asymmetric = dict.fromkeys(UNIFORM, Scheme(4, 32, symmetric=False))
    assert "several widths" not in " ".join(plan_notes(asymmetric))
    mixed = asymmetric | {"model.layers.1.mlp.down_proj": A}
    assert "several widths" in " ".join(plan_notes(mixed))


def test_group_sizes_that_engines_do_not_run():
    assert plan_notes({"a": A, "b": Scheme(4, 64), "c": C}) == []
    (both,) = plan_notes(dict.fromkeys(UNIFORM, Scheme(4, 512)))
    check_line(both, 512, "vLLM", "SGLang")
    (_, here) = plan_notes({"a": Scheme(4, 36)})
    check_line(here, "packed=False", 8)
    assert gptq_notes(dict.fromkeys(UNIFORM, Scheme(4, 512))) == []
    (note,) = gptq_notes(dict.fromkeys(UNIFORM, Scheme(4, 192)))
    check_line(note, "GPTQModel", 192)


def test_the_table_of_a_card():
    loads = dict(loading_table({4, 8}, symmetric=True, schemes=2, sizes={64, 128, None}))
    assert all(how.startswith("yes") for how in loads.values())
    loads = dict(loading_table({4}, symmetric=True, schemes=1, sizes={16}))
    assert "float16" in loads["vLLM"]
    assert loads["SGLang"].startswith("no")
    loads = dict(loading_table({4}, symmetric=False, schemes=1, sizes={16}))
    assert loads["vLLM"].startswith("no")
    loads = dict(loading_table({3, 4}, symmetric=False, schemes=2, sizes={128}))
    assert "humming" in loads["vLLM"]
    assert sum(how.startswith("no") for how in loads.values()) == 2


def test_what_transformers_cannot_load_is_said():
    symmetric = quantization_config(dict(zip("abcde", MIXED, strict=True)), [])
    assert not must_dequantize_on_load(symmetric)
    mixture = {"a": Scheme(3, 32, False), "b": Scheme(4, 32, False)}
    with refused(CheckpointError, "vLLM"):
        must_dequantize_on_load(quantization_config(mixture, []))
