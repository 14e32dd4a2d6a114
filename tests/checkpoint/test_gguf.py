"""A GGUF file holds the model that it was made from, as llama.cpp reads it, or it is refused.

tests/interop/check_llamacpp.py asks llama.cpp itself.
"""

import shutil

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from compress.checkpoint.export import export
from compress.errors import CheckpointError
from compress.models.families import head_dim_of
from compress.storage.safetensors import save_tensors
from support.failing_runs import refused_export
from support.gguf_files import FILE, Read, as_checkpoint, assert_same
from support.tiny_checkpoints import (
    FAMILIES,
    LAYERS,
    change_config,
    every_file,
    read_tensors,
    relative_error,
)

# ---- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_every_bit(packed, tmp_path, family):
    source = packed(family)
    result = export(source.folder, "gguf", tmp_path / "out", keep_embeddings=True)
    config = AutoConfig.from_pretrained(source.folder)
    read = Read(tmp_path / "out" / FILE)
    assert_same(as_checkpoint(read, config), source.weights)
    assert read.fields["general.architecture"] == config.model_type.replace("mistral", "llama")
    quantised = {kind for name, kind in read.types.items() if name.endswith("_q.weight")}
    assert quantised == {"Q4_0"}
    assert read.types["token_embd.weight"] == "BF16"
    assert result.bytes["total"] == sum(
        int(tensor.n_bytes) for tensor in gguf.GGUFReader(tmp_path / "out" / FILE).tensors
    )


@pytest.mark.parametrize("family", ["llama-biased", "mistral", "qwen2", "qwen3"])
def test_rotary_embedding_of_llamacpp_gives_the_same_attention(packed, tmp_path, family):
    """Pairs of neighbours for Llama, half a head apart for Qwen: q . k stays what it was."""
    source = packed(family)
    export(source.folder, "gguf", tmp_path / "out", keep_embeddings=True)
    config, read = AutoConfig.from_pretrained(source.folder), Read(tmp_path / "out" / FILE)
    size = head_dim_of(config)
    angles = torch.arange(1.0, 1 + size // 2).double()  # of some distance, another for each pair
    turn, generator = torch.polar(torch.ones_like(angles), angles), torch.Generator().manual_seed(0)
    x = torch.randn(config.hidden_size, generator=generator).double()

    def head(tensors: dict[str, Tensor], name: str) -> Tensor:
        bias = tensors.get(f"{name}.bias", torch.zeros(()))
        return (tensors[f"{name}.weight"].double() @ x + bias.double()).view(-1, size)[-1]

    def product(tensors: dict[str, Tensor], names: list[str], neighbours: bool) -> float:
        q, k = (head(tensors, name) for name in names)
        pairs = [v.view(-1, 2).T if neighbours else v.view(2, -1) for v in (q, k)]
        (q, k) = (torch.complex(*pair) for pair in pairs)
        return float((q * turn * k.conj()).real.sum())

    ours = [f"model.layers.1.self_attn.{part}_proj" for part in "qk"]
    expected = product(source.weights, ours, neighbours=False)
    llama = read.fields["general.architecture"] == "llama"
    names = ["blk.1.attn_q", "blk.1.attn_k"]
    assert product(read.values, names, neighbours=llama) == pytest.approx(expected, rel=1e-9)
    assert product(read.values, names, neighbours=not llama) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_reads_the_same_model(packed, tmp_path, family):
    """Its reader of GGUF is another implementation; of families with fewer settings."""
    source = packed(family)
    export(source.folder, "gguf", tmp_path / "out", keep_embeddings=True)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=FILE, dtype=torch.float32
    )
    with torch.no_grad():
        ids = torch.arange(40).view(2, 20)
        dense = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(source.folder), dtype=torch.float32
        )
        dense.load_state_dict(source.weights)
        expected = dense.eval()(input_ids=ids).logits
        assert relative_error(read.eval()(input_ids=ids).logits, expected) < 1e-6


def test_mixed_widths_have_a_type_each(packed, tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    channel = {"group_size": "channel"}
    overrides = [
        {"match": "re:.*q_proj", "bits": 2, "group_size": 256},
        {"match": "re:.*k_proj", "bits": 3} | channel,
        {"match": "re:.*v_proj", "bits": 4, "symmetric": False} | channel,
        {"match": "re:.*o_proj", "bits": 5, "group_size": 64},
        {"match": "re:.*gate_proj", "bits": 6, "group_size": 256},
        {"match": "re:.*up_proj", "bits": 8} | channel,
        {"match": "re:.*down_proj", "bits": 2, "symmetric": False, "group_size": 256},
        {"match": "lm_head", "bits": 8, "group_size": 32},
    ]
    source = packed("llama", wide, overrides=overrides, ignore=[])
    result = export(source.folder, "gguf", tmp_path / "out", keep_embeddings=True)
    read = Read(tmp_path / "out" / FILE)
    types = {name.split(".")[-2]: kind for name, kind in read.types.items() if "norm" not in name}
    kinds = ["Q2_K", "Q3_K", "Q4_K", "Q5_0", "Q6_K", "Q8_0", "Q2_K", "Q8_0", "BF16"]
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    assert types == dict(zip([*names, "output", "token_embd"], kinds, strict=True))
    assert_same(as_checkpoint(read, AutoConfig.from_pretrained(source.folder)), source.weights)
    assert result.notes == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_quantised_keeps_its_values(packed, tmp_path, copy, dtype):
    """Matrices keep their dtype; vectors become fp32."""
    tensors = read_tensors(copy)
    plain = [name for name in tensors if tensors[name].dtype == torch.bfloat16]
    plain = [name for name in plain if not name.endswith("scale")]
    tensors |= {name: tensors[name].to(dtype) for name in plain}
    save_tensors(copy / "model.safetensors", tensors)
    export(copy, "gguf", tmp_path / "out", keep_embeddings=True)
    read = Read(tmp_path / "out" / FILE)
    expected = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert {read.types["token_embd.weight"], read.types["output.weight"]} == {expected}
    assert read.types["output_norm.weight"] == "F32"
    ours = as_checkpoint(read, AutoConfig.from_pretrained(copy))
    for name in plain:
        assert torch.equal(ours[name], tensors[name].float()), name


def test_a_tied_head_is_left_out(packed, tmp_path):
    source = packed("qwen2", {"tied": True})
    export(source.folder, "gguf", tmp_path / "out", keep_embeddings=True)
    read = Read(tmp_path / "out" / FILE)
    assert "output.weight" not in read.values
    assert_same(as_checkpoint(read, AutoConfig.from_pretrained(source.folder)), source.weights)


# ---- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_are_those_of_the_config(packed, tmp_path, family):
    source = packed(family)
    export(source.folder, "gguf", tmp_path / "out", keep_embeddings=True)
    config, read = AutoConfig.from_pretrained(source.folder), Read(tmp_path / "out" / FILE)
    head_dim = {"mistral": 16, "qwen3": 32}.get(family, 16)
    expected = {
        "context_length": 64,
        "embedding_length": 64,
        "block_count": LAYERS,
        "feed_forward_length": 128,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "vocab_size": 260,
    }
    assert {name: read.setting(name) for name in expected} == expected


def test_the_frequencies_of_llama_3_are_those_of_transformers(copy, tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 1e5, "original_max_position_embeddings": 512}
    rope |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    change_config(copy, rope_parameters=rope)
    export(copy, "gguf", tmp_path / "out", keep_embeddings=True)
    factors = Read(tmp_path / "out" / FILE).values["rope_freqs.weight"]
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(copy), "cpu")
    plain = 1e5 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / factors, expected, rtol=1e-6)
    assert (factors[0], factors[-1]) == (1, 8)  # short wavelengths stay, long ones are stretched
    assert ((factors > 1) & (factors < 8)).any()  # and between them is a ramp


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_rope_is_named(copy, tmp_path, kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 16} if kind == "yarn" else {}
    change_config(copy, rope_parameters=rope)
    export(copy, "gguf", tmp_path / "out", keep_embeddings=True)
    read = Read(tmp_path / "out" / FILE)
    assert (read.setting("rope.scaling.type"), read.setting("rope.scaling.factor")) == (kind, 4.0)
    if kind == "yarn":
        assert read.setting("rope.scaling.original_context_length") == 16


def test_a_sliding_window_is_said_to_be_lost(packed, tmp_path):
    notes = export(packed("mistral").folder, "gguf", tmp_path / "out", keep_embeddings=True).notes
    assert any("window of 8 tokens" in note for note in notes)
    assert export(packed().folder, "gguf", tmp_path / "out2", keep_embeddings=True).notes == []


# ---- the file -----------------------------------------------------------------------------------


def test_the_same_export_gives_the_same_bytes(packed, tmp_path):
    source = packed("qwen2").folder
    moved = shutil.copytree(source, tmp_path / "elsewhere")
    export(source, "gguf", tmp_path / "a", keep_embeddings=True)
    export(moved, "gguf", tmp_path / "b", keep_embeddings=True)
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    assert every_file(tmp_path / "a").keys() == {FILE, "modelpress.json", "recipe.yaml"}


def test_shards_hold_the_same_tensors(packed, tmp_path):
    source = packed().folder
    export(source, "gguf", tmp_path / "one", keep_embeddings=True)
    export(source, "gguf", tmp_path / "many", shard_size="40KB", keep_embeddings=True)
    shards = sorted((tmp_path / "many").glob("*.gguf"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.gguf"
    one, many = Read(tmp_path / "one" / FILE), Read(*shards)
    assert many.fields["split.count"] == len(shards)
    assert one.types == many.types
    assert_same(many.values, one.values)
    export(source, "gguf", tmp_path / "many", overwrite=True, keep_embeddings=True)
    assert [file.name for file in (tmp_path / "many").glob("*.gguf")] == [FILE]


def test_a_damaged_weight_leaves_nothing_behind(copy, packed, tmp_path):
    tensors = read_tensors(copy)
    tensors["lm_head.weight"] *= torch.nan
    save_tensors(copy / "model.safetensors", tensors)
    refused_export("gguf", copy, tmp_path / "out", "lm_head.weight", kind=CheckpointError)
    kept = tmp_path / "kept"
    export(packed().folder, "gguf", kept, keep_embeddings=True)
    refused_export("gguf", copy, kept, "lm_head.weight", kind=CheckpointError, overwrite=True)


def test_a_full_disk_is_one_line(packed, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", FILE)

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", full)
    said = (FILE, "No space left")
    refused_export("gguf", packed().folder, tmp_path / "out", *said, kind=CheckpointError)


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_rounded_as_llamacpp_does(packed, tmp_path, tied):
    source = packed("llama", {"tie_word_embeddings": tied})
    notes = export(source.folder, "gguf", tmp_path / "out").notes
    read = Read(tmp_path / "out" / FILE)
    tables = {"token_embd.weight": "model.embed_tokens.weight"}
    tables |= {} if tied else {"output.weight": "lm_head.weight"}
    assert len(notes) == 1 and "Q8_0" in notes[0] and "--keep-embeddings" in notes[0]
    for name, original in tables.items():
        assert read.types[name] == "Q8_0"
        weight = source.weights[original].float()
        blocks = weight.view(len(weight), -1, 32)
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
        moved = (read.values[name].view_as(blocks) - blocks).abs()
        assert bool((moved <= scale * 0.57).all())  # half of it, and d in fp16
