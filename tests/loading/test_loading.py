"""Loading gives the model that was written, or one line that says why not; inspecting counts."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from compress.checkpoint.packed import UnpackableError
from compress.errors import CheckpointError, CompressError, UsageError
from compress.loading.load import inspect, load
from compress.scheme import Scheme
from compress.storage.safetensors import CheckpointReader, save_tensors
from support.tiny_quantised import tiny_llama, write_quantised


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(60)} | {"<unk>": 60}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)  # noqa: S106


@pytest.fixture
def folder(mixed, tmp_path):
    """A copy of the mixed checkpoint, with a tokenizer, that a test may damage."""
    copy = shutil.copytree(mixed.folder, tmp_path / "model")
    write_tokenizer(copy)
    return copy


def message_of(path, kind: type[CompressError], **options) -> str:
    with pytest.raises(kind) as error:
        load(path, **options)
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    return str(error.value)


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


# ---- load ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_a_quantised_checkpoint_runs(mixed, folder, packed):
    model, tokenizer = load(folder, packed=packed)
    assert not model.training
    assert tokenizer("w3 w5")["input_ids"][:2] == [3, 5]
    with torch.no_grad():
        torch.testing.assert_close(model(mixed.input_ids).logits, mixed.logits, rtol=0, atol=1e-4)


def test_dtype_can_be_chosen(folder):
    model, _ = load(folder, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16


def test_one_asymmetric_scheme_runs(tmp_path, recwarn):
    made = write_quantised(tmp_path, [Scheme(4, 32, symmetric=False)])
    write_tokenizer(made.folder)
    model, _ = load(made.folder)
    with torch.no_grad():
        torch.testing.assert_close(model(made.input_ids).logits, made.logits, rtol=0, atol=1e-4)
    assert not [w for w in recwarn if "quantization_config" in str(w.message)]


def test_asymmetric_schemes_of_two_widths_run(tmp_path):
    """transformers alone does not load these; packed and dense, they are read without it."""
    schemes = [Scheme(4, 32, symmetric=False), Scheme(3, 32, symmetric=False)]
    made = write_quantised(tmp_path, schemes)
    write_tokenizer(made.folder)
    for packed in (True, False):
        model, _ = load(made.folder, packed=packed)
        with torch.no_grad():
            torch.testing.assert_close(model(made.input_ids).logits, made.logits, rtol=0, atol=1e-4)


def test_no_such_folder(tmp_path):
    assert "no such model folder" in message_of(tmp_path / "absent", UsageError)
    assert "no such model folder" in message_of("./absent", UsageError)


def test_a_hub_id_that_cannot_be_reached_names_the_remedy(monkeypatch):
    def unreachable(*args, **options):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nCheck your connection.")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreachable)
    message = message_of("nobody/nothing", UsageError)
    assert "'nobody/nothing'" in message
    assert "hf auth login" in message


def test_damaged_folders(folder):
    tokenizer_files = [p for p in folder.iterdir() if p.name.startswith("tokenizer")]
    aside = [(path, path.read_bytes()) for path in tokenizer_files]
    for path in tokenizer_files:
        path.unlink()
    assert "no tokenizer" in message_of(folder, CheckpointError)
    for path, data in aside:
        path.write_bytes(data)

    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-9])
    assert "truncated" in message_of(folder, CheckpointError)
    (folder / "model.safetensors").write_bytes(weights)

    (folder / "config.json").write_text("{")
    assert "not valid JSON" in message_of(folder, CheckpointError)
    (folder / "config.json").unlink()
    assert "no config.json" in message_of(folder, CheckpointError)


def test_a_missing_tensor_is_an_error_not_a_random_weight(folder):
    tensors = CheckpointReader(folder).tensors()
    del tensors["model.layers.1.input_layernorm.weight"]
    save_tensors(folder / "model.safetensors", tensors)
    assert "model.layers.1.input_layernorm.weight" in message_of(folder, CheckpointError)


def test_an_unknown_quantisation_method_is_an_error(folder):
    change_config(folder, quantization_config={"quant_method": "no-such-method"})
    assert "found 'no-such-method'" in message_of(folder, UnpackableError, packed=True)
    for packed in (None, False):
        assert "does not know" in message_of(folder, CheckpointError, packed=packed)


def test_code_in_a_checkpoint_is_not_run(folder):
    canary = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    change_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    message_of(folder, CheckpointError)
    assert not canary.exists()


# ---- inspect ------------------------------------------------------------------------------------


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
    assert found["recipe"] is None
    assert found["provenance"] is None


def test_inspect_reads_recipe_and_provenance(folder):
    (folder / "recipe.yaml").write_text("quantize: {bits: 3}\n")
    (folder / "modelpress.json").write_text('{"seed": 7}')
    found = inspect(folder)
    assert found["recipe"] == {"quantize": {"bits": 3}}
    assert found["provenance"] == {"seed": 7}
    (folder / "recipe.yaml").write_text("a: [")
    with pytest.raises(CheckpointError, match=r"recipe\.yaml is not valid YAML") as error:
        inspect(folder)
    assert "\n" not in str(error.value)


def test_inspect_a_plain_folder(tmp_path):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found["format"] == "unquantised"
    assert {module["bits"] for module in found["modules"]} == {16}
    assert found["bytes"]["quantized"] == 0
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


def test_inspect_no_such_folder(tmp_path):
    with pytest.raises(UsageError, match="no such model folder"):
        inspect(tmp_path / "absent")
