"""Checkpoints whose activations are rounded token by token: W8A8, W4A8 and W4A4.

The files are written by compressed-tensors itself; the oracle is the dense weight in fp32 and
the formula by which inputs are rounded.
"""

import json

import pytest
import torch

import compress
from compress.checkpoint.packed import UnpackableError
from compress.checkpoint.packed_formats import FORMATS
from compress.cli.main import main
from compress.errors import CheckpointError
from compress.kernels.codes import Codes
from compress.kernels.linear import QuantLinear
from compress.kernels.reference import dequantize
from compress.scheme import Scheme
from compress.storage.safetensors import CheckpointReader, save_tensors
from support.by_library import LINEARS, rounded, write_by_library
from support.refusals import refused
from support.tiny_checkpoints import byte_tokenizer, load_whole, random_ids, relative_error

# transformers says so of every argument beside a quantised checkpoint's own config.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

SCHEMES = {
    "W8A8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, 8),
    "W8A8 in groups": ("int-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}, 8),
    "W4A8": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, 8),
    "W4A4": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, 4),
    "W4A8 with zero points": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        8,
    ),
    "W3A8 with zero points": (
        "int-quantized",
        {"num_bits": 3, "strategy": "channel", "symmetric": False},
        8,
    ),
}


@pytest.fixture(scope="module", params=SCHEMES)
def written(request, tmp_path_factory):
    """(folder, dense twin of the quantised weights, bits of activations)."""
    format, weights, bits = SCHEMES[request.param]
    folder = tmp_path_factory.mktemp("activations") / "model"
    return folder, write_by_library(folder, format, weights, bits), bits


@torch.no_grad()
def test_every_linear_multiplies_rounded_inputs(written):
    """Linear by linear: an input that moves by its last bit may move an integer by one."""
    folder, twin, bits = written
    model, _ = compress.load(folder)
    layers = {name: m for name, m in model.named_modules() if type(m) is QuantLinear}
    assert len(layers) == LINEARS
    errors = []

    def compare(name, x, y):
        dense = twin.get_submodule(name)
        errors.append(relative_error(y, dense(rounded(x, bits))))
        assert relative_error(y, dense(x)) > 1e-3  # rounding does something

    for name, layer in layers.items():
        assert layer.activation_bits == bits
        layer.register_forward_hook(lambda _, x, y, name=name: compare(name, x[0], y))
    model(random_ids(2, 12) % 61)
    assert len(errors) == LINEARS
    assert max(errors) < 1e-5


def test_inspect_says_so(written, capsys):
    folder, _, bits = written
    modules = compress.inspect(folder)["modules"]
    found = {module["name"]: module.get("activation_bits") for module in modules}
    assert found.pop("lm_head") is None
    assert found.pop("model.embed_tokens") is None
    assert set(found.values()) == {bits}
    assert main(["inspect", str(folder)]) == 0
    assert f"activations {bits} bits" in capsys.readouterr().out


def test_saving_writes_what_was_read(written, tmp_path):
    folder, _, _ = written
    model, _ = compress.load(folder)
    model.save_pretrained(tmp_path)
    before, after = CheckpointReader(folder).tensors(), CheckpointReader(tmp_path).tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    sections = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path)]
    assert sections[0]["quantization_config"] == sections[1]["quantization_config"]


def test_projections_of_one_input_share_a_product(written):
    folder, _, _ = written
    ids = random_ids(1, 8) % 61
    fused, _ = compress.load(folder, fuse=True)
    apart, _ = compress.load(folder)
    with torch.no_grad():
        assert relative_error(fused(ids).logits, apart(ids).logits) < 1e-6


def test_dense_weights_alone_are_refused_later_too(written):
    folder, _, _ = written
    model, _ = compress.load(folder)
    with refused(UnpackableError, "down_proj", "packed=False"):
        model.dequantize()
    assert sum(type(module) is QuantLinear for module in model.modules()) == LINEARS


def test_codes_that_transformers_would_take_for_weights(written, tmp_path):
    folder, _, _ = written
    config = json.loads((folder / "config.json").read_text())
    if config["quantization_config"]["format"] != "int-quantized":
        pytest.skip("of codes in words it makes no weights")
    config["quantization_config"].pop("quantization_status", None)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    compress.load(tmp_path)
    with refused(CheckpointError, "down_proj.weight", "quantization_status", "None"):
        compress.load(tmp_path, packed=False)
    tensors = CheckpointReader(tmp_path).tensors()
    small = {n: t.view(torch.float8_e4m3fn) for n, t in tensors.items() if t.dtype == torch.int8}
    save_tensors(tmp_path / "model.safetensors", tensors | small)  # floats, but codes as well
    with refused(CheckpointError, "down_proj.weight", "quantization_status", "None"):
        compress.load(tmp_path, packed=False)


@pytest.mark.parametrize(
    "written", [name for name in SCHEMES if name != "W4A8 with zero points"], indirect=True
)
def test_weights_that_transformers_has_saved_dense(written, tmp_path):
    """After a forward it writes weights, and says `decompressed`; believed only if that is so."""
    folder, _, _ = written
    ids = random_ids(1, 8) % 61
    with torch.no_grad():
        model = load_whole(folder)
        expected = model(ids).logits
        model.save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        loaded, _ = compress.load(tmp_path)
        assert relative_error(loaded(ids).logits, expected) < 1e-5
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quantization_status"] == "decompressed"
    config["quantization_config"]["quantization_status"] = "compressed"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(CheckpointError, "down_proj.weight", "'compressed'", "'decompressed'"):
        compress.load(tmp_path, packed=False)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int_quantized_tensors_both_ways(bits, symmetric):
    format, scheme = FORMATS["int-quantized"], Scheme(bits, 32, symmetric)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (20, 64), generator=generator, dtype=torch.uint8)
    zero = torch.randint(2**bits, (20, 2), generator=generator, dtype=torch.uint8)
    scale = torch.rand(20, 2, generator=generator)
    weight = Codes(codes, scale, None if symmetric else zero, bits, 32)
    tensors = format.write(weight, scheme)
    shapes = format.shapes(scheme, (20, 64))
    assert all(tuple(t.shape) == shapes[key] for key, t in tensors.items())
    assert shapes.keys() - tensors.keys() == {format.g_idx}
    # what compressed-tensors makes of them: (q - z) s
    shift = 0 if symmetric else tensors["weight_zero_point"].double().repeat_interleave(32, 1)
    dense = (tensors["weight"].double() - shift) * scale.double().repeat_interleave(32, 1)
    read = format.read(tensors, scheme, "up_proj")
    assert torch.equal(dequantize(read), dense)
    assert torch.equal(read.codes, codes)
    low = tensors | {"weight": torch.full((20, 64), -(2 ** (bits - 1)), dtype=torch.int8) - 1}
    if bits < 8:
        with refused(ValueError, "up_proj.weight", "3 bits"):
            format.read(low, scheme, "up_proj")


def test_dense_weights_alone_would_be_another_model(written):
    from transformers import AutoModelForCausalLM

    folder, _, _ = written
    with refused(UnpackableError, "down_proj", "packed=False"):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=compress.ModelpressConfig(packed=False)
        )


def test_integers_that_the_width_does_not_hold(written, tmp_path):
    folder, _, _ = written
    reader = CheckpointReader(folder)
    name = "model.layers.1.mlp.up_proj"
    if f"{name}.weight" not in reader:
        pytest.skip("codes in words hold no others")
    config = json.loads((folder / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights["num_bits"] -= 1
    save_tensors(tmp_path / "model.safetensors", reader.tensors())
    (tmp_path / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(tmp_path)
    with refused(UnpackableError, "down_proj.weight", f"{weights['num_bits']} bits"):
        compress.load(tmp_path)
