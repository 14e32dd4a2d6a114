"""What a folder to start from may hold: packed weights and adapters are refused, buffers dropped.

The oracle for what is accepted is transformers on the same folder.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import UsageError
from compress.models.skeleton import Skeleton
from compress.pipeline.inputs import RunInputs
from compress.pipeline.plan import make_plan
from compress.pipeline.run import run
from support.tiny_checkpoints import load_whole, logits_of, recipe_for, relative_error
from support.tiny_recipes import recipe_of

QUERY = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A 16-bit checkpoint of one's own, to change."""
    return shutil.copytree(checkpoint(dtype=torch.bfloat16), tmp_path / "copy")


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refused(folder):
    """The line that says why."""
    with pytest.raises(UsageError) as caught:
        Skeleton.open(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def plan_of(folder):
    return make_plan(RunInputs.of(recipe_for(folder), Skeleton(folder)))


# ---- packed weights -----------------------------------------------------------------------------

DTYPES = [
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [QUERY, "model.embed_tokens.weight", "model.norm.weight"])
def test_weights_that_are_no_floats_of_16_bits_are_refused(copy, dtype, name):
    change_tensors(copy, lambda tensors: tensors.update({name: tensors[name].float().to(dtype)}))
    message = refused(copy)
    assert name in message
    assert "model.safetensors" in message


def test_reinterpreted_weights_are_refused_with_their_dtype(copy):
    change_tensors(copy, lambda tensors: tensors.update({QUERY: tensors[QUERY].view(torch.int16)}))
    assert "I16" in refused(copy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_16_bits_and_more_are_read(copy, dtype):
    change_tensors(copy, lambda tensors: tensors.update({QUERY: tensors[QUERY].to(dtype)}))
    assert Skeleton(copy).read_layer(1)["self_attn.q_proj.weight"].dtype is dtype


BESIDE = [
    "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "input_scale",
    "weight_zero_point", "weight_packed", "weight_g_idx", "qweight", "qzeros", "scales", "g_idx",
    "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4", "SCB",
    "weight_format", "q_weight", "q_scale", "q_perm", "codes", "codebooks", "biases", "W_q",
    "weight_quantizer._amax", "trellis", "suh",
]  # fmt: skip


@pytest.mark.parametrize("suffix", BESIDE)
@pytest.mark.parametrize("instead", [False, True], ids=["beside", "instead"])
def test_what_lies_beside_packed_weights_is_refused(copy, suffix, instead):
    def change(tensors):
        tensors[f"{UP}.{suffix}"] = torch.ones(3)
        if instead:
            del tensors[f"{UP}.weight"]

    change_tensors(copy, change)
    message = refused(copy)
    assert f"{UP}.{suffix}" in message
    assert "model.safetensors" in message


SAID = {
    "hf_quant_config.json": {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "FP8"},
    },
    "quantize_config.json": {"bits": 4, "group_size": 128, "desc_act": False},
    "quant_config.json": {"w_bit": 4, "q_group_size": 128, "zero_point": True},
    "quanto_qmap.json": {"model.layers.0.mlp.up_proj": {"weights": "qint8"}},
}


@pytest.mark.parametrize("file", SAID)
def test_files_that_say_quantised_are_refused(copy, file):
    (copy / file).write_text(json.dumps(SAID[file]))
    assert file in refused(copy)


KEYS = {
    "quantization_config": {"quant_method": "fp8"},
    "compression_config": {"format": "pack-quantized"},
    "quantization": {"group_size": 64, "bits": 4},
}


@pytest.mark.parametrize("key", KEYS)
def test_keys_of_the_config_that_say_quantised_are_refused(copy, key):
    change_config(copy, **{key: KEYS[key]})
    message = refused(copy)
    assert key in message
    assert "config.json" in message


def test_a_text_part_may_say_it(folder_of, tmp_path):
    folder = shutil.copytree(folder_of(), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    part = config["text_config"] | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    change_config(folder, text_config=part)
    message = refused(folder)
    assert "text_config.quantization_config" in message
    assert "awq" in message


# ---- adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_model", [False, True], ids=["alone", "beside a model"])
def test_an_adapter_is_refused_with_its_base(copy, tmp_path, with_model):
    folder = copy if with_model else tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)},
              folder / "adapter_model.safetensors")  # fmt: skip
    message = refused(folder)
    assert "meta-llama/Llama-3.2-1B" in message
    assert "merge" in message


@pytest.mark.parametrize("suffix", ["lora_A.weight", "lora_B.default.weight", "base_layer.weight"])
def test_weights_of_an_adapter_in_a_model_are_refused(copy, suffix):
    change_tensors(copy, lambda tensors: tensors.update({f"{UP}.{suffix}": torch.ones(2, 2)}))
    message = refused(copy)
    assert "adapter" in message
    assert f"{UP}.{suffix}" in message


# ---- tensors that the model does not take -------------------------------------------------------

KNOWN = [
    "model.layers.{}.self_attn.rotary_emb.inv_freq",
    "model.layers.{}.self_attn.rotary_emb.cos_cached",
    "model.layers.{}.self_attn.rotary_emb.sin_cached",
    "model.rotary_emb.inv_freq",
    "model.embeddings.position_ids",
]


@pytest.mark.parametrize("rotate", ["none", "hadamard"])
@pytest.mark.parametrize("name", KNOWN)
def test_buffers_of_old_are_left_out(copy, press, name, rotate):
    names = {name.format(index) for index in range(2)}
    change_tensors(copy, lambda tensors: tensors.update({n: torch.ones(8) for n in names}))
    plan = plan_of(copy)
    assert plan.problems == []
    assert any(sorted(names)[0] in note for note in plan.notes)
    result = press(recipe_for(copy, rotate=rotate, quantize={"method": "none"}))
    load_whole(result)  # nothing missing, nothing left over
    if rotate == "none":
        expected = logits_of(load_without_extras(copy))
        assert relative_error(logits_of(result), expected) < 1e-5


def load_without_extras(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


UNKNOWN = [
    "model.layers.0.self_attn.sinks",
    "model.layers.1.mlp.gate.weight",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.2.input_layernorm.weight",
    "model.layers.0.extra",
    "score.weight",
    "model.extra.weight",
    "mtp.layers.0.weight",
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_tensors_that_nobody_knows_are_a_problem_of_the_plan(copy, tmp_path, name):
    change_tensors(copy, lambda tensors: tensors.update({name: torch.ones(4, 4)}))
    (problem,) = plan_of(copy).problems
    assert name in problem
    assert "model.safetensors" in problem
    assert "\n" not in problem
    with pytest.raises(UsageError) as caught:
        run(recipe_for(copy), tmp_path / "out")
    assert str(caught.value) == problem
    assert not (tmp_path / "out").exists()


def test_many_unknown_tensors_are_counted(copy):
    names = [f"model.layers.{i}.mlp.experts.{j}.weight" for i in range(2) for j in range(4)]
    change_tensors(copy, lambda tensors: tensors.update({n: torch.ones(2) for n in names}))
    (problem,) = plan_of(copy).problems
    assert names[0] in problem
    assert "7 more" in problem


def test_unknown_tensors_of_a_tower_are_a_problem(folder_of, tmp_path):
    folder = shutil.copytree(folder_of(), tmp_path / "copy")
    change_tensors(folder, lambda t: t.update({"vision_tower.vision_model.extra": torch.ones(2)}))
    plan = make_plan(RunInputs.of(recipe_of(folder), Skeleton(folder)))
    assert len(plan.problems) == 1
    assert "vision_tower.vision_model.extra" in plan.problems[0]


# ---- other names and other files ----------------------------------------------------------------


@pytest.mark.parametrize("rotate", ["none", "hadamard"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_base_model_without_its_prefix_is_read(checkpoint, tmp_path, press, family, rotate):
    whole = load_whole(checkpoint(family, tied=True))
    base = tmp_path / "base"
    shutil.copytree(checkpoint(family, tied=True), base)
    (base / "model.safetensors").unlink()
    whole.model.save_pretrained(base)
    assert "embed_tokens.weight" in load_file(base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    assert config["architectures"][0].endswith("Model")
    result = press(recipe_for(base, rotate=rotate, quantize={"method": "none"}), self_check=False)
    assert relative_error(logits_of(result), logits_of(whole)) < 1e-5
    written = json.loads((result / "config.json").read_text())
    assert written["architectures"] == [type(whole).__name__]


def test_a_base_model_whose_head_nothing_ties_lacks_it(checkpoint, tmp_path):
    from compress.errors import CheckpointError

    base = shutil.copytree(checkpoint(), tmp_path / "base")
    load_whole(checkpoint()).model.save_pretrained(base)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        Skeleton(base)


@pytest.mark.parametrize("rotate", ["none", "hadamard"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_multimodal_base_model_is_read(folder_of, tmp_path, family, rotate):
    from transformers import AutoModelForImageTextToText

    base = shutil.copytree(folder_of(family), tmp_path / "base")
    change_config(base, tie_word_embeddings=True)
    change_tensors(base, lambda t: [t.pop(n) for n in list(t) if "lm_head" in n])
    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    (base / "model.safetensors").unlink()
    whole.model.save_pretrained(base)
    run(recipe_of(base, rotate=rotate), tmp_path / "out", self_check=False)
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert relative_error(found(input_ids=ids).logits, whole(input_ids=ids).logits) < 2e-5


@pytest.mark.parametrize("count", [1, 3])
def test_shards_without_an_index_are_read_if_all_are_there(checkpoint, tmp_path, press, count):
    import compress

    folder = shutil.copytree(checkpoint(), tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for shard in range(count):
        part = dict(sorted(tensors.items())[shard::count])
        name = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
    result = press(recipe_for(folder, rotate="hadamard", quantize={"method": "none"}))
    assert relative_error(logits_of(result), logits_of(checkpoint())) < 1e-5
    model, _ = compress.load(folder)
    assert relative_error(logits_of(model), logits_of(checkpoint())) < 1e-6


def test_shards_without_an_index_are_refused_if_one_is_missing(checkpoint, tmp_path):
    from compress.errors import CheckpointError

    folder = shutil.copytree(checkpoint(), tmp_path / "copy")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        Skeleton(folder)
