"""Act-order of compressed-tensors: `weight_g_idx` says which group each input belongs to.

The oracle is the formula, w[n, k] = (q[n, k] - z[n, g[k]]) s[n, g[k]], in a dense model. What
llm-compressor itself writes is read in test_foreign.py.
"""

import json

import pytest
import torch

import compress
from compress.checkpoint.packed import PackedLinears, UnpackableError
from compress.kernels.linear import QuantLinear
from compress.storage.safetensors import CheckpointReader, save_tensors
from support.by_library import LINEARS, check_linears, write_by_library
from support.calling import call
from support.refusals import refused
from support.tiny_checkpoints import random_ids, relative_error
from support.tiny_quantised import tiny_llama

# transformers says so of every argument beside a quantised checkpoint's own config.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

GROUPED = {"strategy": "group", "group_size": 32}
CASES = {
    "4 bits": ("pack-quantized", GROUPED | {"num_bits": 4}, None),
    "3 bits, asymmetric": ("pack-quantized", GROUPED | {"num_bits": 3, "symmetric": False}, None),
    "5 bits": ("pack-quantized", GROUPED | {"num_bits": 5}, None),
    "W4A8": ("pack-quantized", GROUPED | {"num_bits": 4}, 8),
    "int8": ("int-quantized", GROUPED | {"num_bits": 8}, None),
    "W8A8": ("int-quantized", GROUPED | {"num_bits": 8}, 8),
}
UNSET, FOLLOWING = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module", params=CASES)
def ordered(request, tmp_path_factory):
    """(folder, twin, bits of activations): all linears permuted, but for UNSET and FOLLOWING."""
    format, weights, activation_bits = CASES[request.param]
    folder = tmp_path_factory.mktemp("ordered")
    write_by_library(folder, format, weights, activation_bits)
    tensors, twin = CheckpointReader(folder).tensors(), tiny_llama()
    for number, name in enumerate(PackedLinears(folder).schemes):
        linear = twin.get_submodule(name)
        K = linear.in_features
        generator = torch.Generator().manual_seed(number)
        g_idx = (torch.arange(K) // 32)[torch.randperm(K, generator=generator)]
        if name in (UNSET, FOLLOWING):
            g_idx = torch.arange(K) // 32
        # the codes of the file as they are, each with the scale of its input's group
        codes = PackedLinears(folder).codes(name)
        zero = 2 ** (codes.bits - 1) if codes.zero is None else codes.zero.float()[:, g_idx]
        linear.weight.data = (codes.codes.float() - zero) * codes.scale[:, g_idx]
        stored = -torch.ones_like(g_idx) if name == UNSET else g_idx
        tensors[f"{name}.weight_g_idx"] = stored.to([torch.int32, torch.int64][number % 2])
    save_tensors(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (folder / "config.json").write_text(json.dumps(config))
    return folder, twin, activation_bits


def test_every_linear_has_the_weight_that_the_file_says(ordered):
    folder, twin, bits = ordered
    model, _ = compress.load(folder, packed=True)
    check_linears(model, twin, bits)
    for name, layer in model.named_modules():
        if type(layer) is QuantLinear:
            assert (layer.codes().order is None) == (name in (UNSET, FOLLOWING))


@torch.no_grad()
def test_logits_packed_fused_and_dense(ordered):
    """Projections of one input are fused only where they have one order, and these have none."""
    folder, twin, bits = ordered
    ids = random_ids(2, 12) % 61
    if bits is None:
        models = [compress.load(folder, packed=packed)[0] for packed in (True, False)]
        assert all(relative_error(m(ids).logits, twin(ids).logits) < 1e-5 for m in models)
    else:
        with refused(UnpackableError, "mlp.down_proj", "packed=False"):
            compress.load(folder, packed=False)
    fused, _ = compress.load(folder, packed=True, fuse=True)
    apart, _ = compress.load(folder, packed=True)
    assert relative_error(fused(ids).logits, apart(ids).logits) < 1e-6


def test_saving_writes_what_was_read(ordered, tmp_path):
    """Groups that follow each other too, in either way of saying so."""
    folder, _, _ = ordered
    model, _ = compress.load(folder, packed=True)
    model.save_pretrained(tmp_path)
    before, after = CheckpointReader(folder).tensors(), CheckpointReader(tmp_path).tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(before[name].dtype == after[name].dtype for name in before)


def test_inspect_says_so(ordered, capsys):
    folder, _, bits = ordered
    modules = [m for m in compress.inspect(folder)["modules"] if m["symmetric"] is not None]
    assert [m.get("act_order") for m in modules] == [True] * LINEARS
    assert [m.get("activation_bits") for m in modules] == [bits] * LINEARS
    assert call("inspect", folder) == 0
    said = capsys.readouterr().out
    assert "act-order" in said
    assert bits is None or f"act-order activations {bits} bits" in said
