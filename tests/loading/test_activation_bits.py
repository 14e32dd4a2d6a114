"""Activations that are rounded because the user asks for it, not because the checkpoint does."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compress
from compress.checkpoint.packed import UnpackableError
from compress.errors import UsageError
from compress.kernels import linear as linears
from compress.kernels.fused import SharedLinear
from compress.kernels.linear import QuantLinear
from compress.scheme import Scheme
from support.by_library import rounded, write_by_library
from support.calling import call, refuses
from support.refusals import refused
from support.tiny_checkpoints import byte_tokenizer, random_ids, relative_error
from support.tiny_quantised import write_quantised

# transformers says so of every argument beside a quantised checkpoint's own config.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

SCHEMES = {
    "symmetric": [
        Scheme(2, 32),
        Scheme(4, 32),
        Scheme(5, 32),
        Scheme(8, None),
    ],
    "asymmetric": [Scheme(4, 32, symmetric=False), Scheme(3, None, symmetric=False)],
}


def write(folder, schemes):
    """A folder that `load` takes, and its twin."""
    quantised = write_quantised(folder, schemes)
    byte_tokenizer().save_pretrained(folder)
    return quantised


@pytest.fixture(scope="module", params=SCHEMES)
def written(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("rounded") / "model", SCHEMES[request.param])


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
def test_every_linear_multiplies_rounded_inputs(written, bits):
    model, _ = compress.load(written.folder, activation_bits=bits)
    errors = []

    def compare(name, x, y):
        dense = written.twin.get_submodule(name)
        errors.append(relative_error(y, dense(rounded(x, bits))))
        assert relative_error(y, dense(x)) > 1e-3  # rounding does something

    for name, layer in model.named_modules():
        if type(layer) is QuantLinear:
            layer.register_forward_hook(lambda _, x, y, name=name: compare(name, x[0], y))
    model(random_ids(2, 12) % 61)
    assert len(errors) == len(written.modules)
    assert max(errors) < 1e-5


@torch.no_grad()
def test_shared_launches_round_alike(tmp_path):
    schemes = [Scheme(4, 32), Scheme(4, 32, symmetric=False)]
    folder = write(tmp_path / "model", schemes).folder
    ids = random_ids(2, 12) % 61
    model, _ = compress.load(folder, activation_bits=8)
    fused, _ = compress.load(folder, activation_bits=8, fuse=True)
    shared = [m.linear for m in fused.modules() if type(m) is SharedLinear]
    assert {linear.activation_bits for linear in shared} == {8}
    assert relative_error(fused(ids).logits, model(ids).logits) < 1e-6


def test_from_pretrained_takes_them_and_saving_forgets_them(written, tmp_path):
    config = compress.ModelpressConfig(activation_bits=8)
    if not all(scheme.symmetric for scheme in written.modules.values()):
        pytest.skip("asymmetric modules of several widths are for compress.load")
    model = AutoModelForCausalLM.from_pretrained(written.folder, quantization_config=config)
    found = {m.activation_bits for m in model.modules() if type(m) is QuantLinear}
    assert found == {8}
    model.save_pretrained(tmp_path)
    before = load_file(written.folder / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    sections = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (written.folder, tmp_path)
    ]
    assert sections[0] == sections[1]


@pytest.mark.parametrize("bits", [1, 9, True, 8.0, "8"])
def test_other_widths(written, bits):
    with refused(UsageError, "activation_bits", repr(bits)):
        compress.load(written.folder, activation_bits=bits)


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (Scheme(8, 32, symmetric=False), "8 bits"),
        (Scheme(4, 16), 16),
    ],
)
def test_weights_that_do_not_go_with_them(tmp_path, scheme, said):
    folder = write(tmp_path / "model", [scheme]).folder
    compress.load(folder)
    with refused(UnpackableError, folder, said, "activation_bits"):
        compress.load(folder, activation_bits=8)


def test_a_checkpoint_that_rounds_otherwise(tmp_path):
    weights = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
    write_by_library(tmp_path, "int-quantized", weights, 8)
    compress.load(tmp_path, activation_bits=8)
    with refused(UnpackableError, tmp_path, "8 bits", "activation_bits"):
        compress.load(tmp_path, activation_bits=4)


def test_dense_linears_round_nothing(written, checkpoint):
    model, _ = compress.load(written.folder, activation_bits=8)
    with refused(UnpackableError, "mlp.down_proj", "activation_bits"):
        model.dequantize()
    with refused(UsageError, "activation_bits", "packed=False"):
        compress.load(written.folder, packed=False, activation_bits=8)
    with refused(UsageError, checkpoint(), "activation_bits"):
        compress.load(checkpoint(), activation_bits=8)


def test_the_command_line(finished, tmp_path, capsys, monkeypatch):
    generate = ["generate", finished, "--prompt", "a", "--max-tokens", 1, "--activation-bits"]
    used, quantize = set(), linears.quantize_tokens
    with monkeypatch.context() as patch:
        patch.setattr(
            linears,
            "quantize_tokens",
            lambda x, bits, **k: used.add(bits) or quantize(x, bits, **k),
        )
        assert call(*generate, 8) == 0
    assert used == {8}
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 40)
    capsys.readouterr()
    found = {}
    for bits in (None, 8, 2):
        options = [] if bits is None else ["--activation-bits", bits]
        command = ["eval", finished, "--perplexity", text, "--length", 32, "--json"]
        assert call(*command, *options) == 0
        scores = json.loads(capsys.readouterr().out)
        assert scores["conditions"].get("activation_bits") == bits
        found[bits] = scores["perplexity"]["value"]
    assert 0 < abs(found[8] - found[None]) < abs(found[2] - found[None])
    refuses(capsys, [*generate, 9], "--activation-bits", 8)
