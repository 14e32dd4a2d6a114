"""An export holds the weights of the checkpoint it was made from, or it is refused."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from compress.checkpoint.export import CHECKPOINT_FORMATS, export
from compress.checkpoint.inspect import inspect
from compress.errors import CheckpointError, UsageError
from compress.scheme import Scheme
from compress.storage.safetensors import save_tensors
from support.failing_runs import refused_export
from support.gptq_reader import read_naively
from support.refusals import refused
from support.tiny_checkpoints import dequantised, every_file, read_tensors, recipe_for
from support.tiny_quantised import MIXED, write_quantised

ASYMMETRIC = [Scheme(4, 32, False), Scheme(3, None), Scheme(8, 32, False)]


def write_checkpoint(folder: Path, schemes=MIXED, **model) -> Path:
    """A quantised folder whose scales are fp16 numbers, without zero points of either sign."""
    write_quantised(folder, schemes, **model)
    generator = torch.Generator().manual_seed(0)
    asymmetric = read_tensors(folder).keys()

    def change(name, tensor):
        if not name.endswith("weight_scale"):
            return tensor
        if name.replace("scale", "zero_point") in asymmetric:
            return tensor.half().float()
        return tensor.half().float() * (1 - 2 * torch.randint(2, tensor.shape, generator=generator))

    rewrite(folder, change)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "recipe.yaml").write_text("name: tiny\n")
    history = {"seeds": {"rotate": 7}, "bytes": {"original": 10, "total": 5}}
    (folder / "modelpress.json").write_text(json.dumps(history))
    return folder


def rewrite(folder: Path, change) -> None:
    tensors = {name: change(name, tensor) for name, tensor in read_tensors(folder).items()}
    save_tensors(folder / "model.safetensors", tensors)


def change_section(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def bits_of(folder: Path) -> dict[str, int]:
    modules = inspect(folder)["modules"]
    return {module["name"]: module["bits"] for module in modules if module["symmetric"] is not None}


def gptq_weights(folder: Path) -> dict[str, torch.Tensor]:
    """A GPTQ folder as plain fp32 weights, by the documented layout alone."""
    tensors, bits = read_tensors(folder), bits_of(folder)
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    version = {"gptq": 1, "gptq_v2": 2}[section["checkpoint_format"]]
    parts = ("qweight", "qzeros", "scales", "g_idx")
    plain = {n: t.float() for n, t in tensors.items() if n.rpartition(".")[2] not in parts}
    for name, width in bits.items():
        module = {part: tensors[f"{name}.{part}"] for part in parts}
        plain[f"{name}.weight"] = read_naively(module, width, version)
    return plain


def assert_same_weights(exported: Path, source: Path) -> None:
    found = gptq_weights(exported)
    expected = dequantised(read_tensors(source), bits_of(source))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Widths 2, 3, 4 and 8, in groups and per channel. Tests must not change it."""
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """One that a test may change."""
    return shutil.copytree(folder, tmp_path / "model")


# ---- what is written ----------------------------------------------------------------------------


def test_mixed_widths_keep_every_bit(folder, tmp_path):
    result = export(folder, "gptq", tmp_path / "out")
    assert_same_weights(tmp_path / "out", folder)
    assert result.rounding.changed == 0
    assert result.bytes["total"] == sum(t.nbytes for t in read_tensors(tmp_path / "out").values())
    assert inspect(tmp_path / "out")["bytes"] == result.bytes
    assert json.dumps(result.as_dict())


def test_asymmetric_checkpoints_keep_every_bit(tmp_path):
    source = write_checkpoint(tmp_path / "model", ASYMMETRIC)
    export(source, "gptq", tmp_path / "out")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["checkpoint_format"] == "gptq_v2"
    assert_same_weights(tmp_path / "out", source)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_width_keeps_every_bit(tmp_path, bits):
    source = write_checkpoint(tmp_path / "model", [Scheme(bits, 32)])
    export(source, "gptq", tmp_path / "out")
    assert_same_weights(tmp_path / "out", source)


def test_what_a_run_makes_can_be_exported(checkpoint, press, tmp_path):
    model = checkpoint("qwen2", dtype=torch.bfloat16)
    overrides = [{"match": "re:.*down_proj", "bits": 3}, {"match": "re:.*o_proj", "ignore": True}]
    source = press(recipe_for(model, quantize={"method": "rtn", "overrides": overrides}))
    export(source, "gptq", tmp_path / "out")
    assert_same_weights(tmp_path / "out", source)
    assert any(name.endswith("q_proj.bias") for name in read_tensors(tmp_path / "out"))
    copied = {"tokenizer.json", "tokenizer_config.json", "recipe.yaml", "generation_config.json"}
    ours, theirs = every_file(source), every_file(tmp_path / "out")
    assert all(ours[name] == theirs[name] for name in copied & ours.keys())
    assert {"tokenizer.json", "recipe.yaml"} <= theirs.keys()


def test_shards_hold_the_same_tensors(folder, tmp_path):
    export(folder, "gptq", tmp_path / "one")
    export(folder, "gptq", tmp_path / "many", shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_both_configs_say_the_same_and_the_rest_stays(folder, tmp_path):
    export(folder, "gptq", tmp_path / "out")
    before = json.loads((folder / "config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    section = config.pop("quantization_config")
    assert section["quant_method"] == "gptq"
    assert section == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    before.pop("quantization_config")
    assert config == before


def test_history_is_kept_and_the_origin_named(folder, tmp_path):
    result = export(folder, "gptq", tmp_path / "out")
    history = json.loads((tmp_path / "out" / "modelpress.json").read_text())
    assert history["seeds"] == {"rotate": 7}
    assert history["bytes"] == {"original": 10} | result.bytes
    assert history["exported_from"]["format"] == "compressed-tensors"
    assert history["export"]["notes"] == result.notes
    other = write_checkpoint(tmp_path / "other", [Scheme(4, 32)])
    export(other, "gptq", tmp_path / "out2")
    second = json.loads((tmp_path / "out2" / "modelpress.json").read_text())
    assert second["exported_from"]["fingerprint"] != history["exported_from"]["fingerprint"]


def test_the_same_export_gives_the_same_bytes(folder, tmp_path):
    export(folder, "gptq", tmp_path / "a")
    export(folder, "gptq", tmp_path / "b")
    assert every_file(tmp_path / "a") == every_file(tmp_path / "b")


# ---- scales -------------------------------------------------------------------------------------


def test_scales_are_rounded_only_if_allowed(copy, tmp_path):
    step = 2.0**-12  # below half of what fp16 tells apart
    rewrite(copy, lambda name, t: t * (1 + step) if name.endswith("weight_scale") else t)
    refused_export("gptq", copy, tmp_path / "out", "down_proj", "--round-scales")
    result = export(copy, "gptq", tmp_path / "out", round_scales=True)
    assert 0 < result.rounding.changed <= result.rounding.scales
    assert result.rounding.largest == pytest.approx(step, rel=1e-2)
    assert "rounded" in result.notes[-1]
    found, exact = gptq_weights(tmp_path / "out"), dequantised(read_tensors(copy), bits_of(copy))
    for name in exact:
        assert ((found[name] - exact[name]).abs() <= 1.01 * step * exact[name].abs()).all()


def test_the_scale_of_zeros_is_no_rounding(tmp_path):
    """A row of zero weights has a scale too small for fp16, and it does not matter."""
    source = write_checkpoint(tmp_path / "model", [Scheme(4, 32), Scheme(4, 32, False)])
    tensors = read_tensors(source)
    symmetric, asymmetric = (f"model.layers.0.self_attn.{part}_proj" for part in "qk")
    for module, zero in ((symmetric, 8), (asymmetric, 5)):  # unsigned
        tensors[f"{module}.weight_scale"][0] = torch.finfo(torch.float32).tiny
        tensors[f"{module}.weight_packed"][0] = torch.tensor(0x11111111 * zero).int()
    packed = tensors[f"{asymmetric}.weight_zero_point"]
    packed[0] = packed[0] & ~0xF | 5  # row 0 is in the lowest four bits
    save_tensors(source / "model.safetensors", tensors)
    plain = dequantised(tensors, bits_of(source))
    assert not any(plain[f"{module}.weight"][0].any() for module in (symmetric, asymmetric))
    assert export(source, "gptq", tmp_path / "out").rounding.changed == 0
    assert_same_weights(tmp_path / "out", source)


def test_scales_beyond_fp16_are_refused_even_then(copy, tmp_path):
    rewrite(copy, lambda name, t: t * 1e7 if name.endswith("weight_scale") else t)
    refused_export("gptq", copy, tmp_path / "out", "down_proj", "fp16", round_scales=True)


# ---- what is refused ----------------------------------------------------------------------------


def test_widths_and_shapes_that_gptq_does_not_have(tmp_path):
    odd = write_checkpoint(tmp_path / "odd", [Scheme(5, 32)])
    refused_export("gptq", odd, tmp_path / "out", "model.layers.0.mlp.down_proj", 5)
    narrow = write_checkpoint(tmp_path / "narrow", [Scheme(4, None)], head_dim=12)
    refused_export("gptq", narrow, tmp_path / "out", "self_attn.k_proj", [24, 64])


def test_modules_outside_the_layers(copy, tmp_path):
    tensors = read_tensors(copy)
    prefix = "model.layers.0.self_attn.q_proj."
    inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    tensors |= {f"model.embed_out.{key}": tensor.clone() for key, tensor in inside.items()}
    save_tensors(copy / "model.safetensors", tensors)
    groups = json.loads((copy / "config.json").read_text())["quantization_config"]["config_groups"]
    next(g for g in groups.values() if prefix[:-1] in g["targets"])["targets"] += [
        "model.embed_out"
    ]
    change_section(copy, config_groups=groups)
    refused_export("gptq", copy, tmp_path / "out", "model.embed_out")


def test_models_that_see_images(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vision_config": {}}))
    refused_export("gptq", copy, tmp_path / "out", "images")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"transform_config": {"config_groups": {"R4": {}}}}, "rotations"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "KV cache"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
    ],
)
def test_checkpoints_that_are_more_than_packed_weights(copy, tmp_path, changes, said):
    change_section(copy, **changes)
    refused_export("gptq", copy, tmp_path / "out", copy, said)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("input_activations", {"num_bits": 8}, "activations"),
        ("input_activations", {"dynamic": True, "strategy": "token"}, "activations,"),
        ("weights", {"type": "float", "num_bits": 4, "strategy": "channel"}, "integers"),
        ("weights", {"num_bits": 4, "strategy": "tensor"}, "whole weight"),
        (
            "weights",
            {"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": "group"},
            "act-order",
        ),
    ],
)
def test_groups_that_are_more_than_packed_weights(copy, tmp_path, key, value, said):
    groups = json.loads((copy / "config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_1"][key] = value
    change_section(copy, config_groups=groups)
    refused_export("gptq", copy, tmp_path / "out", copy, said)


def test_small_groups_and_groups_that_are_not_whole(tmp_path):
    """No kernel runs groups of 4, and what is exported need not run here."""
    small = write_checkpoint(tmp_path / "small", [Scheme(4, 4)])
    export(small, "gptq", tmp_path / "out")
    assert_same_weights(tmp_path / "out", small)
    uneven = write_checkpoint(tmp_path / "uneven", [Scheme(4, None)])
    groups = json.loads((uneven / "config.json").read_text())["quantization_config"][
        "config_groups"
    ]
    groups["group_0"]["weights"] |= {"strategy": "group", "group_size": 128}
    change_section(uneven, config_groups=groups)
    said = ("model.layers.0.mlp.down_proj", 96, 128)
    refused_export("gptq", uneven, tmp_path / "no", uneven, *said, kind=CheckpointError)


def test_codes_in_int8(copy, tmp_path):
    section = json.loads((copy / "config.json").read_text())["quantization_config"]
    for group in section["config_groups"].values():
        group["format"] = "int-quantized"
    change_section(copy, **section)
    refused_export("gptq", copy, tmp_path / "out", copy, "pack-quantized", kind=CheckpointError)


def test_codes_that_are_missing(copy, tmp_path):
    tensors = {n: t for n, t in read_tensors(copy).items() if not n.endswith("weight_packed")}
    save_tensors(copy / "model.safetensors", tensors)
    refused_export("gptq", copy, tmp_path / "out", "weight_packed", kind=CheckpointError)


def test_tensors_that_other_formats_have_no_place_for(copy, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight_g_idx"
    tensors = read_tensors(copy) | {name: torch.arange(64)}
    save_tensors(copy / "model.safetensors", tensors)
    refused_export("gptq", copy, tmp_path / "out", name)


def test_tensors_that_are_not_what_the_config_says(copy, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    rewrite(copy, lambda n, t: t[:, :1].contiguous() if n == name else t)
    damaged = partial(refused_export, "gptq", copy, tmp_path / "out", kind=CheckpointError)
    damaged(name, [64, 1], [64, 2])
    group = {"targets": ["lm_head"], "weights": {"num_bits": 4, "strategy": "channel"}}
    change_section(copy, config_groups={"group_0": group})
    damaged("model.layers.0.mlp.down_proj", "config.json")
    change_section(copy, config_groups=[])
    damaged(f"{copy}/config.json: quantization_config: config_groups: ")
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    refused_export("gptq", copy, tmp_path / "out", copy, "quantised")
    (copy / "config.json").write_text("[")
    damaged(copy / "config.json", "JSON")


def test_a_damaged_weight_leaves_nothing_behind(copy, tmp_path):
    """Found only while writing: the export stops, and a checkpoint that is replaced stays whole."""
    rewrite(copy, lambda name, t: t * torch.nan if name == "lm_head.weight" else t)
    refused_export("gptq", copy, tmp_path / "out", "lm_head.weight", kind=CheckpointError)
    assert not (tmp_path / "out").exists()
    kept = write_checkpoint(tmp_path / "kept", [Scheme(4, 32)])
    refused_export("gptq", copy, kept, kind=CheckpointError, overwrite=True)


def test_a_full_disk_is_one_line(folder, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("compress.checkpoint.gptq.merge_shards", full)
    said = ("model.safetensors", "No space left")
    refused_export("gptq", folder, tmp_path / "out", *said, kind=CheckpointError)


def test_outputs_that_are_taken(folder, copy, tmp_path):
    refused_export("gptq", copy, copy, copy, "itself", overwrite=True)
    taken = write_checkpoint(tmp_path / "taken", [Scheme(4, 32)])
    refused_export("gptq", folder, taken, taken, "--overwrite")
    export(folder, "gptq", taken, overwrite=True)
    assert_same_weights(taken, folder)
    work = tmp_path / "unfinished" / ".modelpress"
    work.mkdir(parents=True)
    (work / "journal.jsonl").write_text("{}\n")
    refused_export("gptq", folder, work.parent, work.parent, "unfinished")
    refused_export("gptq", tmp_path / "absent", tmp_path / "out", tmp_path / "absent")


def test_an_unknown_format_lists_those_there_are(folder, tmp_path):
    with refused(UsageError, "'gtpq'", "'gptq'", "gguf"):
        export(folder, "gtpq", tmp_path / "out")
    assert "gptq" in CHECKPOINT_FORMATS
