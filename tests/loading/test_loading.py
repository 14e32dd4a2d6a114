"""Loading gives the model that was written, or one line that says why not."""

import shutil
from pathlib import Path

import pytest
import torch

import compress
from compress.checkpoint.packed import UnpackableError
from compress.errors import CheckpointError, CompressError, UsageError
from compress.loading.load import fastest_packing, load
from compress.models.skeleton import Skeleton
from compress.scheme import Scheme
from compress.storage.safetensors import CheckpointReader, save_tensors
from support.refusals import refused
from support.tiny_checkpoints import change_config
from support.tiny_quantised import write_quantised


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


@pytest.fixture
def packed_folder(packed, tmp_path):
    return shutil.copytree(packed("llama-biased").folder, tmp_path / "biased")


def check_refused(kind: type[CompressError], path, *named, **options) -> None:
    with refused(kind, path, *named):
        load(path, **options)


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


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("fast", "asked", "found"),
    [
        (True, None, torch.bfloat16),
        (False, None, torch.float32),
        (False, torch.bfloat16, torch.bfloat16),
        (False, "auto", torch.bfloat16),
    ],
)
def test_fp32_where_products_in_16_bits_are_slow(
    tmp_path, checkpoint, monkeypatch, fast, asked, found, packed
):
    """Where a processor has none in bf16, it is what runs, unless a dtype is asked for."""
    monkeypatch.setattr("compress.loading.load.multiplies_16_bits", lambda device: fast)
    source = checkpoint(dtype=torch.bfloat16)
    compress.run(
        {"model": str(source), "quantize": {"method": "rtn", "bits": 4, "group_size": 32}},
        output=tmp_path / "out",
    )
    model, _ = load(tmp_path / "out", dtype=asked, packed=packed)
    assert model.lm_head.weight.dtype == found
    assert model(torch.tensor([[1, 2]])).logits.dtype == found


def test_auto_is_the_device_that_is_here(folder):
    model, _ = load(folder, device="auto")
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with refused(UsageError, "device", "nowhere"):
        load(folder, device="nowhere")


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
    check_refused(UsageError, tmp_path / "absent")
    check_refused(UsageError, "./absent")


def test_a_hub_id_that_cannot_be_reached_names_the_remedy(monkeypatch):
    def unreachable(*args, **options):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nCheck your connection.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    check_refused(UsageError, "nobody/nothing", "hf auth login")


@pytest.mark.parametrize("opened", [load, Skeleton.open, fastest_packing])
def test_a_hub_model_with_wrong_values_is_told_before_its_weights_are_fetched(
    folder, monkeypatch, opened
):
    def snapshot_download(name, allow_patterns=None, **options):
        assert allow_patterns == ["config.json"]
        return str(folder)

    change_config(folder, hidden_size=-1)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with refused(UsageError, "somebody/something", "config.json", "hidden_size", -1):
        opened("somebody/something")


def test_a_hub_model_is_checked_as_a_folder_is(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(folder))
    model, _ = load("somebody/something")
    assert model.name_or_path == "somebody/something"
    (folder / "tokenizer.json").write_text("[]")
    with refused(CheckpointError, folder / "tokenizer.json"):
        load("somebody/something")


def test_damaged_folders(folder):
    tokenizer_files = [p for p in folder.iterdir() if p.name.startswith("tokenizer")]
    aside = [(path, path.read_bytes()) for path in tokenizer_files]
    for path in tokenizer_files:
        path.unlink()
    check_refused(CheckpointError, folder, "tokenizer")
    for path, data in aside:
        path.write_bytes(data)

    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-9])
    check_refused(CheckpointError, folder, "model.safetensors", "truncated")
    (folder / "model.safetensors").write_bytes(weights)

    (folder / "config.json").write_text("{")
    check_refused(CheckpointError, folder, "config.json", "JSON")
    (folder / "config.json").unlink()
    check_refused(CheckpointError, folder, "no config.json")


@pytest.mark.parametrize("stays", [True, False])
def test_biases_that_are_no_numbers_are_refused(packed_folder, stays):
    name = "model.layers.0.self_attn.q_proj.bias"
    tensors = CheckpointReader(packed_folder).tensors()
    save_tensors(packed_folder / "model.safetensors", tensors | {name: tensors[name] > 0})
    check_refused(CheckpointError, packed_folder, name, "bool", packed=stays)


def test_a_missing_tensor_is_an_error_not_a_random_weight(folder):
    tensors = CheckpointReader(folder).tensors()
    del tensors["model.layers.1.input_layernorm.weight"]
    save_tensors(folder / "model.safetensors", tensors)
    check_refused(CheckpointError, folder, "model.layers.1.input_layernorm.weight")


def test_an_unknown_quantisation_method_is_an_error(folder):
    change_config(folder, quantization_config={"quant_method": "no-such-method"})
    check_refused(UnpackableError, folder, "'no-such-method'", packed=True)
    for packed in (None, False):
        check_refused(CheckpointError, folder, "model.layers.0.mlp.down_proj.weight", packed=packed)


def test_code_in_a_checkpoint_is_not_run(folder):
    canary = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    change_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    check_refused(CheckpointError, folder)
    assert not canary.exists()
