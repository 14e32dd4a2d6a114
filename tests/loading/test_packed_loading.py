"""A packed model gives the logits of the dense one, holds nothing dense, and saves what it read."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import compress
from compress.checkpoint.export import export
from compress.errors import UsageError
from compress.kernels.linear import QuantLinear
from compress.scheme import Scheme
from compress.storage.safetensors import CheckpointReader
from support.demo_quantised import DEMO, quantise_folder
from support.refusals import refused
from support.tiny_checkpoints import (
    byte_tokenizer,
    load_whole,
    logits_of,
    random_ids,
    relative_error,
)
from support.tiny_checkpoints import write_checkpoint as write_plain

# transformers says so of every argument beside a quantised checkpoint's own config.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

SCHEMES = {
    "2 bits": [Scheme(2, 64)],
    "3 bits": [Scheme(3, 64)],
    "4 bits": [Scheme(4, 64)],
    "8 bits": [Scheme(8, None)],
    "mixed": [
        Scheme(2, 32),
        Scheme(3, 64),
        Scheme(4, None),
        Scheme(8, 64),
        Scheme(5, 32),
        Scheme(6, None),
        Scheme(7, 64),
    ],
}
ASYMMETRIC = [Scheme(b, 32, symmetric=False) for b in (2, 3, 4, 8, 5)]
LINEARS = 6 * 7  # of the demo model


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """`demo("mixed")`: a folder that tests must not change."""
    made = {}

    def folder_of(name):
        if name not in made:
            schemes = SCHEMES.get(name, ASYMMETRIC)
            made[name] = quantise_folder(DEMO, tmp_path_factory.mktemp("demo") / "out", schemes)
        return made[name]

    return folder_of


def packed_modules(model) -> list[QuantLinear]:
    return [module for module in model.modules() if type(module) is QuantLinear]


@torch.no_grad()
def logits(model, rows: int = 2):
    """Of `rows` sequences, and of one token: kernels for many rows, and for one."""
    ids = random_ids(rows, 24)
    return torch.cat([model(ids).logits.flatten(), model(ids[:1, :1]).logits.flatten()]).float()


# ---- the same model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_logits_are_those_that_transformers_gets_from_dense_weights(demo, name):
    model, _ = compress.load(demo(name), dtype=torch.float32)
    assert len(packed_modules(model)) == LINEARS
    assert relative_error(logits(model), logits(load_whole(demo(name)))) < 1e-5


def test_asymmetric_widths_packed_and_dense(demo):
    """transformers reads no such mixture; both ways of ours must read the same one."""
    packed, _ = compress.load(demo("asymmetric"), dtype=torch.float32)
    dense, _ = compress.load(demo("asymmetric"), dtype=torch.float32, packed=False)
    assert len(packed_modules(packed)) == LINEARS
    assert not packed_modules(dense)
    assert not dense.config.to_dict().get("quantization_config")
    assert relative_error(logits(packed), logits(dense)) < 1e-5
    plain = load_whole(DEMO)
    assert 1e-3 < relative_error(logits(packed), logits(plain)) < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["4 bits", "mixed"])
def test_16_bit_activations(demo, name, dtype):
    """Products as exact as the dense ones: the error is that of 16-bit activations, not more."""
    exact = logits(load_whole(demo(name)))
    model, _ = compress.load(demo(name), dtype=dtype)
    dense, _ = compress.load(demo(name), dtype=dtype, packed=False)
    assert model.dtype == dtype
    assert all(module.dtype == dtype for module in packed_modules(model))
    limit = relative_error(logits(dense), exact) + torch.finfo(dtype).eps
    assert relative_error(logits(model), exact) < 1.5 * limit


@pytest.mark.parametrize("name", ["2 bits", "3 bits", "4 bits", "8 bits", "half"])
def test_gptq_exports_run_packed(demo, tmp_path, name):
    schemes = {"half": [Scheme(4, 32), Scheme(8, None, symmetric=False)]}
    if name in schemes:
        source = quantise_folder(DEMO, tmp_path / "source", schemes[name])
    else:
        source = demo(name)
    export(source, "gptq", tmp_path / "gptq", round_scales=True)
    expected, _ = compress.load(source, dtype=torch.float32)
    found, _ = compress.load(tmp_path / "gptq", dtype=torch.float32)
    dense, _ = compress.load(tmp_path / "gptq", dtype=torch.float32, packed=False)
    assert len(packed_modules(found)) == LINEARS
    assert not packed_modules(dense)
    for one, other in zip(packed_modules(found), packed_modules(expected), strict=True):
        assert torch.equal(one.codes().codes, other.codes().codes)
    assert relative_error(logits(found), logits(dense)) < 1e-5
    assert relative_error(logits(found), logits(expected)) < 2e-3  # scales rounded to fp16


def test_generation(demo):
    model, tokenizer = compress.load(demo("4 bits"), dtype=torch.float32)
    dense, _ = compress.load(demo("4 bits"), dtype=torch.float32, packed=False)
    inputs = tokenizer("def ", return_tensors="pt", return_token_type_ids=False)
    options = {"max_new_tokens": 12, "do_sample": False}
    found, expected = (m.generate(**inputs, **options) for m in (model, dense))
    assert found.shape[1] > inputs["input_ids"].shape[1]
    assert torch.equal(found, expected)


def test_biases_of_packed_linears(tmp_path):
    source = write_plain(tmp_path / "model", "llama-biased", dtype=torch.bfloat16)
    folder = quantise_folder(source, tmp_path / "out", [Scheme(4, 32)])
    model, _ = compress.load(folder, dtype=torch.float32)
    assert all(module.bias is not None for module in packed_modules(model))
    assert relative_error(logits_of(model), logits_of(load_whole(folder))) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["2 bits", "3 bits", "4 bits", "8 bits", "mixed", "asymmetric"])
@pytest.mark.parametrize("fuse", [False, True])
def test_on_a_gpu(demo, name, fuse):
    """fp16 products there against dense fp32 ones on the CPU."""
    exact, _ = compress.load(demo(name), dtype=torch.float32, packed=False)
    model, _ = compress.load(demo(name), "cuda", torch.float16, fuse=fuse)
    dense, _ = compress.load(demo(name), "cuda", torch.float16, packed=False)
    assert all(module.packed_weight().scale.is_cuda for module in packed_modules(model))
    ids = random_ids(2, 24)
    with torch.no_grad():
        expected = exact(ids).logits
        found, plain = (m(ids.cuda()).logits.float().cpu() for m in (model, dense))
    assert relative_error(found, expected) < max(1e-3, 1.5 * relative_error(plain, expected))


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_memory_is_that_of_the_packed_weights(tmp_path, format):
    source = write_plain(
        tmp_path / "model", dtype=torch.bfloat16, hidden_size=256, intermediate_size=1024
    )
    folder = quantise_folder(source, tmp_path / "out", [Scheme(4, 128)])
    if format == "gptq":
        export(folder, "gptq", tmp_path / "gptq", round_scales=True)
        folder = tmp_path / "gptq"
    model, _ = compress.load(folder)
    model(random_ids(1, 20))
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    dense = CheckpointReader(source).nbytes()
    assert held < 0.4 * dense
    assert sum(module.packed_bytes() for module in packed_modules(model)) > 0.5 * held


def test_no_dense_weight_is_made_while_loading(tmp_path):
    """Of no packed linear, at no time: every result of every operator is seen."""
    source = write_plain(tmp_path / "model", dtype=torch.bfloat16, vocab_size=61)
    folder = quantise_folder(source, tmp_path / "out", [Scheme(4, 32)])
    sizes = {64 * 64, 64 * 32, 64 * 128}
    with FloatsMade() as made:
        compress.load(folder, packed=False)[0](torch.tensor([[1]]))
    assert sizes <= made.sizes  # it sees them where they are made
    with FloatsMade() as made:
        compress.load(folder)
    assert 61 * 64 in made.sizes  # the embedding
    assert not sizes & made.sizes


class FloatsMade(TorchDispatchMode):
    """The numbers of elements of all floating-point tensors that operators gave, meta ones not."""

    def __enter__(self):
        self.sizes: set[int] = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.is_floating_point()
                and tensor.device.type != "meta"
            ):
                self.sizes.add(tensor.numel())
        return result


# ---- from_pretrained and save_pretrained --------------------------------------------------------


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("fuse", [False, True])
def test_from_pretrained_takes_the_config(demo, tmp_path, format, fuse):
    folder = demo("4 bits")
    if format == "gptq":
        export(folder, "gptq", tmp_path / "gptq", round_scales=True)
        folder = tmp_path / "gptq"
    config = compress.ModelpressConfig(packed=True, fuse=fuse)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, output_loading_info=True
    )
    assert not any(report.values())
    expected, _ = compress.load(folder, dtype=torch.float32)
    assert len(packed_modules(model)) == (6 * 4 if fuse else LINEARS)
    assert relative_error(logits(model), logits(expected)) < 1e-6


@pytest.mark.parametrize("name", ["mixed", "asymmetric", "gptq"])
@pytest.mark.parametrize("fuse", [False, True])
def test_saving_writes_the_same_tensors(demo, tmp_path, name, fuse):
    if name == "gptq":
        schemes = [Scheme(4, 64), Scheme(3, 32, symmetric=False)]
        source = quantise_folder(DEMO, tmp_path / "source", schemes)
        folder = tmp_path / "gptq"
        export(source, "gptq", folder, round_scales=True)
    else:
        folder = demo(name)
    model, tokenizer = compress.load(folder, dtype="auto", fuse=fuse)
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key]), key
    sections = [
        json.loads((f / "config.json").read_text())["quantization_config"]
        for f in (folder, tmp_path / "again")
    ]
    assert sections[0] == sections[1]
    assert compress.inspect(tmp_path / "again")["modules"] == compress.inspect(folder)["modules"]


def test_a_packed_model_can_be_made_dense(demo):
    model, _ = compress.load(demo("mixed"), dtype=torch.float32, fuse=True)
    expected = logits(model)
    model.dequantize()
    assert not packed_modules(model)
    assert not any("fused" in name for name, _ in model.named_modules())
    assert relative_error(logits(model), expected) < 1e-5


def test_config_says_what_it_takes():
    with refused(UsageError, "activation_bits", "bits"):
        compress.ModelpressConfig(bits=4)
    with refused(UsageError, "packed", 1):
        compress.ModelpressConfig(packed=1)
    with refused(UsageError, "fuse=True", "packed=False"):
        compress.ModelpressConfig(packed=False, fuse=True)
    config = compress.ModelpressConfig(fuse=True)
    assert compress.ModelpressConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


# ---- fused launches -----------------------------------------------------------------------------


def test_linears_of_one_input_share_a_launch(demo):
    model, _ = compress.load(demo("4 bits"), dtype=torch.float32)
    fused, _ = compress.load(demo("4 bits"), dtype=torch.float32, fuse=True)
    assert relative_error(logits(fused), logits(model)) < 1e-6
    assert len(packed_modules(fused)) == 6 * (1 + 1 + 1 + 1)  # qkv, o, gate and up, down
    ids = random_ids(1, 8)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(fused.generate(ids, **options), model.generate(ids, **options))


def test_what_differs_stays_apart(demo):
    model, _ = compress.load(demo("mixed"), dtype=torch.float32, fuse=True)
    assert len(packed_modules(model)) == LINEARS  # seven schemes in turn: no two of a layer agree


# ---- a multimodal one ---------------------------------------------------------------------------


def test_a_multimodal_checkpoint(tmp_path):
    from transformers import AutoModelForImageTextToText, LlavaConfig

    text = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 260,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=259)
    source = AutoModelForImageTextToText.from_config(config)
    source.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    folder = quantise_language(tmp_path / "model", tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, quantization_config=compress.ModelpressConfig()
    )
    dense, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    assert len(packed_modules(model)) == 2 * 7
    ids = random_ids(1, 12) % 256
    with torch.no_grad():
        found, expected = (m(input_ids=ids).logits for m in (model, dense))
    # An older transformers reads the parts' own type from config.json, whatever it is told.
    assert relative_error(found, expected) < (1e-5 if found.dtype == torch.float32 else 1e-2)
    # the files' names are older than the model's: what is saved has the files' names again
    model.save_pretrained(tmp_path / "again")
    again = CheckpointReader(tmp_path / "again").names
    assert again == CheckpointReader(folder).names


def quantise_language(source, folder):
    """Only the linears of the language model; the vision tower's stay as they are."""
    from compress.storage.safetensors import save_tensors

    reader = CheckpointReader(source)
    language = {n: reader.tensor(n) for n in reader.names if "language_model" in n}
    rest = {n: reader.tensor(n) for n in reader.names if "language_model" not in n}
    inner = shutil.copytree(source, folder.parent / "language")
    save_tensors(inner / "model.safetensors", language)
    quantise_folder(inner, folder, [Scheme(4, 32)])
    save_tensors(folder / "model.safetensors", CheckpointReader(folder).tensors() | rest)
    return folder
