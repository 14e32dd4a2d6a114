"""The reload check passes what is right and stops what is not. Each test starts one process."""

import shutil

import pytest

from compress.errors import CheckpointError
from compress.pipeline.verify import reload_and_compare, write_probe
from compress.scheme import Scheme
from compress.storage.safetensors import CheckpointReader, save_tensors
from support.refusals import refused
from support.tiny_checkpoints import change_config
from support.tiny_quantised import write_quantised


@pytest.fixture
def probe(mixed, tmp_path):
    write_probe(tmp_path / "probe.safetensors", {"input_ids": mixed.input_ids}, mixed.logits)
    return tmp_path / "probe.safetensors"


@pytest.fixture
def copy(mixed, tmp_path):
    """A copy of the mixed checkpoint that a test may damage."""
    return shutil.copytree(mixed.folder, tmp_path / "copy")


def rewrite(folder, change):
    tensors = CheckpointReader(folder).tensors()
    change(tensors)
    save_tensors(folder / "model.safetensors", tensors)


def test_a_faithful_checkpoint_passes(mixed, probe, capfd):
    report = reload_and_compare(mixed.folder, probe)
    assert report["relative_error"] <= 1e-5
    assert report["tokens"] == mixed.input_ids.numel()
    assert capfd.readouterr() == ("", "")  # the child's noise stays in the child


def test_one_asymmetric_scheme_passes(tmp_path):
    made = write_quantised(tmp_path / "model", [Scheme(3, 32, symmetric=False)])
    write_probe(tmp_path / "probe.safetensors", {"input_ids": made.input_ids}, made.logits)
    assert reload_and_compare(made.folder, tmp_path / "probe.safetensors")["relative_error"] <= 1e-5


def test_asymmetric_faults_are_found(tmp_path):
    made = write_quantised(tmp_path / "model", [Scheme(3, 32, symmetric=False)])
    write_probe(tmp_path / "probe.safetensors", {"input_ids": made.input_ids}, made.logits)
    zeros = "model.layers.1.mlp.up_proj.weight_zero_point"
    rewrite(made.folder, lambda tensors: tensors[zeros].bitwise_xor_(1))
    with refused(CheckpointError, "relative error"):
        reload_and_compare(made.folder, tmp_path / "probe.safetensors")
    rewrite(made.folder, lambda tensors: tensors.pop("model.norm.weight"))
    with refused(CheckpointError, "model.norm.weight"):
        reload_and_compare(made.folder, tmp_path / "probe.safetensors")


def test_other_logits_are_an_error_with_the_figure(copy, probe):
    name = "model.layers.1.mlp.up_proj.weight_scale"
    rewrite(copy, lambda tensors: tensors[name].mul_(1.1))
    with refused(CheckpointError, "relative error", 0.0001):
        reload_and_compare(copy, probe)


def test_a_missing_and_a_left_over_tensor_are_named(copy, probe):
    def swap(tensors):
        tensors["model.extra.weight"] = tensors.pop("model.norm.weight")

    rewrite(copy, swap)
    with refused(CheckpointError, "model.norm.weight", "model.extra.weight"):
        reload_and_compare(copy, probe)


def test_a_folder_that_does_not_load_is_one_line(copy, probe):
    change_config(copy, model_type="no-such-model")
    with refused(CheckpointError, copy, "no-such-model"):
        reload_and_compare(copy, probe)
    (copy / "config.json").unlink()
    with refused(CheckpointError, copy, "config.json"):
        reload_and_compare(copy, probe)
