"""Weights with one scale, and perhaps one zero point, for the whole matrix.

Written by compressed-tensors; the oracle is the dense twin, and transformers where it reads them.
"""

import pytest
import torch

import compress
from compress.storage.safetensors import CheckpointReader, save_tensors
from support.by_library import LINEARS, check_linears, write_by_library
from support.calling import call
from support.tiny_checkpoints import load_whole, random_ids, relative_error

# transformers says so of every argument beside a quantised checkpoint's own config.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

CASES = {
    "W4": ("pack-quantized", {"num_bits": 4}, None),
    "W3, asymmetric": ("pack-quantized", {"num_bits": 3, "symmetric": False}, None),
    "W4A8": ("pack-quantized", {"num_bits": 4}, 8),
    "W8A8": ("int-quantized", {"num_bits": 8}, 8),
    "W8, asymmetric": ("int-quantized", {"num_bits": 8, "symmetric": False}, None),
}


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory):
    """(folder, twin, bits of activations)."""
    format, weights, bits = CASES[request.param]
    folder = tmp_path_factory.mktemp("tensor")
    return folder, write_by_library(folder, format, weights | {"strategy": "tensor"}, bits), bits


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_every_linear_has_the_weight_that_the_file_says(written, tmp_path, shape):
    folder, twin, bits = written
    tensors = CheckpointReader(folder).tensors()
    for name, tensor in tensors.items():
        if name.endswith(("weight_scale", "weight_zero_point")):
            assert tensor.shape == (1,)
            tensors[name] = tensor.view(shape)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_tensors(tmp_path / "model.safetensors", tensors)
    model, _ = compress.load(tmp_path, packed=True)
    check_linears(model, twin, bits)
    model.save_pretrained(tmp_path / "again")
    after = CheckpointReader(tmp_path / "again").tensors()
    assert tensors.keys() == after.keys()
    assert all(torch.equal(tensors[name], after[name]) for name in tensors)


@torch.no_grad()
@pytest.mark.parametrize(
    "written", [name for name, case in CASES.items() if case[2] is None], indirect=True
)
def test_transformers_reads_the_same(written):
    folder, _, _ = written
    ids = random_ids(2, 12) % 61
    model, _ = compress.load(folder, packed=True)
    assert relative_error(model(ids).logits, load_whole(folder)(ids).logits) < 1e-5


def test_inspect_says_so(written, capsys):
    folder, _, _ = written
    modules = compress.inspect(folder)["modules"]
    said = [module["name"] for module in modules if module.get("per_tensor")]
    assert len(said) == LINEARS
    assert call("inspect", folder) == 0
    assert " tensor " in capsys.readouterr().out
