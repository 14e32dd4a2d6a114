"""Inspecting counts every matrix and every byte, from headers alone."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from compress.checkpoint.inspect import inspect
from compress.checkpoint.packed import PackedLinears
from compress.errors import CheckpointError, UsageError
from compress.storage.safetensors import CheckpointReader, save_tensors
from support.refusals import refused
from support.tiny_checkpoints import change_config
from support.tiny_quantised import tiny_llama


def test_inspect_lists_every_matrix_and_every_byte(mixed):
    found = inspect(mixed.folder)
    assert found["format"] == "compressed-tensors"
    modules = {module["name"]: module for module in found["modules"]}
    assert set(modules) == {*mixed.modules, "lm_head", "model.embed_tokens"}
    for name, scheme in mixed.modules.items():
        assert modules[name] == {
            "name": name,
            "shape": list(mixed.twin.get_submodule(name).weight.shape),
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "symmetric": True,
        }
    assert modules["lm_head"]["bits"] == 32
    assert modules["lm_head"]["symmetric"] is None
    size = found["bytes"]
    assert (
        size["quantized"] + size["other"]
        == size["total"]
        == CheckpointReader(mixed.folder).nbytes()
    )
    packed = sum(
        module["shape"][0] * -(-module["shape"][1] * module["bits"] // 32) * 4
        for name, module in modules.items()
        if name in mixed.modules
    )
    assert packed < size["quantized"] < 1.5 * packed
    weights = {name: math.prod(modules[name]["shape"]) for name in mixed.modules}
    assert found["average_bits"] == pytest.approx(
        sum(weights[name] * scheme.bits for name, scheme in mixed.modules.items())
        / sum(weights.values())
    )
    assert found["recipe"] is None
    assert found["provenance"] is None


def test_what_dynamic_says_of_a_module_is_its_scheme(tmp_path):
    """As packed loading has it: both read the same rules."""
    foreign = Path(__file__).parents[1] / "interop" / "foreign" / "gptqmodel-mixed"
    folder = shutil.copytree(foreign, tmp_path / "mixed")
    config = json.loads((folder / "config.json").read_text())
    rules = config["quantization_config"]["dynamic"]
    for rule, override in rules.items():
        if rule.startswith("+:"):
            override["sym"] = False
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").unlink(missing_ok=True)
    found = {m["name"]: m for m in inspect(folder)["modules"] if m["symmetric"] is not None}
    assert {m["symmetric"] for m in found.values()} == {True, False}
    for name, scheme in PackedLinears(folder).schemes.items():
        facts = scheme.bits, scheme.group_size, scheme.symmetric
        assert (found[name]["bits"], found[name]["group_size"], found[name]["symmetric"]) == facts


def test_inspect_reads_recipe_and_provenance(mixed, tmp_path):
    folder = shutil.copytree(mixed.folder, tmp_path / "model")
    (folder / "recipe.yaml").write_text("quantize: {bits: 3}\n")
    (folder / "modelpress.json").write_text('{"seed": 7}')
    found = inspect(folder)
    assert found["recipe"] == {"quantize": {"bits": 3}}
    assert found["provenance"] == {"seed": 7}
    (folder / "recipe.yaml").write_text("a: [")
    with refused(CheckpointError, folder / "recipe.yaml", "YAML"):
        inspect(folder)


def test_inspect_a_plain_folder(tmp_path):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found["format"] == "unquantised"
    assert {module["bits"] for module in found["modules"]} == {16}
    assert found["bytes"]["quantized"] == 0
    assert found["average_bits"] is None
    names = [module["name"] for module in found["modules"]]
    assert len(names) == 2 * 7 + 2


def test_layers_are_listed_in_the_order_of_their_numbers(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = {f"layers.{i}.weight": torch.zeros(2, 2) for i in range(12)}
    save_tensors(tmp_path / "model.safetensors", weights)
    names = [module["name"] for module in inspect(tmp_path)["modules"]]
    assert names == [f"layers.{i}" for i in range(12)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 3])
def test_inspect_a_gptq_folder(tmp_path, bits, groups):
    N, K = 32, 96
    save_tensors(
        tmp_path / "model.safetensors",
        {
            "m.qweight": torch.zeros(K * bits // 32, N, dtype=torch.int32),
            "m.qzeros": torch.zeros(groups, N * bits // 32, dtype=torch.int32),
            "m.scales": torch.ones(groups, N, dtype=torch.float16),
            "m.g_idx": torch.zeros(K, dtype=torch.int32),
        },
    )
    change = {"quant_method": "gptq", "bits": 4, "sym": False}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": change}))
    assert inspect(tmp_path)["modules"] == [
        {
            "name": "m",
            "shape": [N, K],
            "bits": bits,
            "group_size": 32 if groups == 3 else None,
            "symmetric": False,
        }
    ]


@pytest.mark.parametrize("key", ["qweight", "scales", "g_idx"])
@pytest.mark.parametrize("shape", [(), (6,), (0, 4), (2, 3, 4)])
def test_tensors_that_are_no_matrices_are_named(tmp_path, key, shape):
    tensors = {
        "qweight": torch.zeros(8, 64),
        "scales": torch.zeros(2, 64),
        "g_idx": torch.zeros(64),
    }
    tensors[key] = torch.zeros(shape)
    if key == "g_idx" and shape == (6,):
        tensors[key] = torch.zeros(1, 6)
    save_tensors(tmp_path / "model.safetensors", {f"a.{k}": t for k, t in tensors.items()})
    section = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    with refused(CheckpointError, tmp_path, f"a.{key}"):
        inspect(tmp_path)


def test_inspect_small_floats(tmp_path):
    """Two codes of 4 bits to a byte, with no tensor for the shape."""
    save_tensors(
        tmp_path / "model.safetensors",
        {
            "m.weight_packed": torch.zeros(48, 32, dtype=torch.uint8),
            "m.weight_scale": torch.ones(48, 4).to(torch.float8_e4m3fn),
            "m.weight_global_scale": torch.ones(1),
        },
    )
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    section = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    (module,) = inspect(tmp_path)["modules"]
    assert module["shape"] == [48, 64]
    assert (module["bits"], module["group_size"]) == (4, 16)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", "64"), ("num_hidden_layers", -1)])
def test_a_wrong_value_of_the_config_is_named(mixed, tmp_path, key, value):
    folder = shutil.copytree(mixed.folder, tmp_path / "folder")
    change_config(folder, **{key: value})
    with refused(UsageError, folder / "config.json", key, json.dumps(value)):
        inspect(folder)
    change_config(folder, model_type="another_family")  # whose keys nobody here knows
    assert inspect(folder)["modules"]


def test_a_method_that_is_not_known_has_no_schemes(mixed, tmp_path):
    folder = shutil.copytree(mixed.folder, tmp_path / "folder")
    group = {"weights": {"num_bits": "x"}, "input_activations": True, "targets": 3}
    section = {"quant_method": "sparse-tensors", "config_groups": {"group_0": group}}
    change_config(folder, quantization_config=section)
    found = inspect(folder)
    assert found["format"] == "sparse-tensors" and found["bytes"]["quantized"] == 0


def test_inspect_no_such_folder(tmp_path):
    with refused(UsageError, tmp_path / "absent"):
        inspect(tmp_path / "absent")
