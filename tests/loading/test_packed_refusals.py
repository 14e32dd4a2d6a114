"""What cannot be run packed is refused in one line that names the module and what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import compress
from compress.checkpoint.export import export
from compress.checkpoint.packed import PackedLinears, UnpackableError
from compress.checkpoint.quantization_config import is_packed
from compress.errors import CheckpointError, UsageError
from compress.scheme import Scheme
from compress.storage.safetensors import CheckpointReader, save_tensors
from support.calling import call, refuses
from support.demo_quantised import quantise_folder
from support.refusals import refused
from support.tiny_checkpoints import byte_tokenizer
from support.tiny_checkpoints import write_checkpoint as write_plain
from support.tiny_quantised import write_quantised

# transformers says so of every argument beside a quantised checkpoint's own config.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Symmetric 4 bits in groups of 32, as compressed-tensors and as GPTQ."""
    folder = tmp_path_factory.mktemp("whole") / "compressed-tensors"
    write_quantised(folder, [Scheme(4, 32)])
    byte_tokenizer().save_pretrained(folder)
    export(folder, "gptq", folder.parent / "gptq", round_scales=True)
    return folder.parent


@pytest.fixture
def damaged(whole, tmp_path):
    """`damaged("gptq", tensors={...}, section={...})`: a copy, changed; None takes a key away."""

    def copy(format: str, tensors: dict | None = None, section: dict | None = None, **config):
        folder = shutil.copytree(whole / format, tmp_path / "model")
        held = CheckpointReader(folder).tensors() | (tensors or {})
        kept = {name: tensor for name, tensor in held.items() if tensor is not None}
        save_tensors(folder / "model.safetensors", kept)
        old = json.loads((folder / "config.json").read_text())
        changed = old["quantization_config"] | (section or {})
        new = old | config | {"quantization_config": changed}
        (folder / "config.json").write_text(json.dumps(new))
        return folder

    return copy


def check_refused(folder: Path, *named, **options) -> None:
    with refused(UnpackableError, folder, *named):
        compress.load(folder, **options)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("format", "key", "tensor", "expected"),
    [
        ("compressed-tensors", "weight_packed", ints(96, 7), [96, 8]),
        ("compressed-tensors", "weight_packed", ints(95, 8), [96, 8]),
        ("compressed-tensors", "weight_scale", torch.ones(96, 3), [96, 2]),
        ("compressed-tensors", "weight_shape", torch.tensor([96]), [2]),
        ("gptq", "qweight", ints(7, 96), [8, 96]),
        ("gptq", "qzeros", ints(2, 11), [2, 12]),
        ("gptq", "scales", torch.ones(3, 96).half(), [2, 96]),
        ("gptq", "g_idx", ints(60), [64]),
    ],
)
def test_wrong_shapes(damaged, format, key, tensor, expected):
    folder = damaged(format, {f"{UP}.{key}": tensor})
    check_refused(folder, f"{UP}.{key}", list(tensor.shape), expected)


def test_a_wrong_shape_of_zero_points(tmp_path):
    write_quantised(tmp_path, [Scheme(3, 32, symmetric=False)])
    byte_tokenizer().save_pretrained(tmp_path)
    tensors = CheckpointReader(tmp_path).tensors()
    save_tensors(tmp_path / "model.safetensors", tensors | {f"{UP}.weight_zero_point": ints(8, 2)})
    check_refused(tmp_path, f"{UP}.weight_zero_point", [8, 2], [9, 2])
    del tensors[f"{UP}.weight_zero_point"]
    save_tensors(tmp_path / "model.safetensors", tensors)
    check_refused(tmp_path, UP, "weight_zero_point")


@pytest.mark.parametrize(
    ("format", "key"),
    [
        ("compressed-tensors", "weight_packed"),
        ("compressed-tensors", "weight_scale"),
        ("compressed-tensors", "weight_shape"),
        ("gptq", "qweight"),
        ("gptq", "qzeros"),
        ("gptq", "scales"),
    ],
)
def test_a_missing_tensor(damaged, format, key):
    check_refused(damaged(format, {f"{UP}.{key}": None}), UP, key)


def test_a_shape_that_is_not_the_models(damaged):
    folder = damaged("compressed-tensors", {f"{UP}.weight_shape": torch.tensor([96, 60])})
    check_refused(folder, f"{UP}.weight_shape", [96, 60], [96, 64])


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_a_scale_that_is_no_number(damaged, format):
    key = f"{UP}.{'scales' if format == 'gptq' else 'weight_scale'}"
    tensor = torch.ones(2, 96).half() if format == "gptq" else torch.ones(96, 2)
    tensor[1, 0] = torch.nan
    folder = damaged(format, {key: tensor})
    with refused(CheckpointError, key, "NaN"):
        compress.load(folder)


# ---- schemes ------------------------------------------------------------------------------------


BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


def groups_of(weights: dict, **group) -> dict:
    """A section with one group of Linear."""
    full = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "format": "pack-quantized", "weights": full | weights} | group
    return {"config_groups": {"group_0": group}}


def check_down_proj(folder: Path) -> None:
    linears = PackedLinears(folder)
    linears.check_runs()
    linears.check(DOWN, (64, 96))


@pytest.mark.parametrize(
    ("section", "named"),
    [
        (groups_of({"num_bits": 9}), (DOWN, "9 bits")),
        (groups_of({"group_size": 12}), (DOWN, 12, 8)),
        (groups_of({"num_bits": 3}), (f"{DOWN}.weight_packed", "3 bits", [64, 12], [64, 9])),
        (groups_of({"group_size": 64}), (f"{DOWN}.weight_scale", [64, 3], [64, 2])),
        (groups_of({"type": "float"}), ("weights", "integers")),
        (groups_of({"strategy": "block", "group_size": None}), ("weights", "integers")),
        (
            groups_of({"strategy": "tensor", "group_size": None}),
            (f"{DOWN}.weight_scale", [64, 3], [1]),
        ),
        (groups_of({"actorder": "group"}), (DOWN, "weight_g_idx", "config.json")),
        (groups_of({}, format="int-quantized"), (DOWN, "weight_scale", "weight")),
        (
            {
                "config_groups": {
                    **groups_of({})["config_groups"],
                    "group_1": {"targets": ["lm_head"], "format": "float-quantized"},
                }
            },
            ("float-quantized, pack-quantized",),
        ),
        (groups_of({}, format="naive-quantized"), ("naive-quantized",)),
        (groups_of({}, input_activations={"num_bits": 8}), ("activations", "token")),
        *(
            (groups_of({}, input_activations=BY_TOKEN | change), ("activations", "token"))
            for change in (
                {"num_bits": 9},
                {"type": "float"},
                {"symmetric": False},
                {"dynamic": False},
                {"strategy": "tensor"},
            )
        ),
        (groups_of({}, output_activations=BY_TOKEN), ("activations", "token")),
        (
            groups_of({"symmetric": False, "num_bits": 5}, input_activations=BY_TOKEN),
            (DOWN, "5 bits", "activations", "4 bits"),
        ),
        (
            groups_of({"group_size": 16}, input_activations=BY_TOKEN),
            (DOWN, 16, "activations", 32),
        ),
        (groups_of({}, targets=["re:.*gate_proj"]), (DOWN, "config.json")),
        ({"kv_cache_scheme": {"num_bits": 8}}, ("KV cache",)),
        ({"sparsity_config": {"format": "sparse-24"}}, ("sparse",)),
        (
            {"transform_config": {"config_groups": {"R4": {"apply": [{"location": "input"}]}}}},
            ("rotations",),
        ),
        ({"quant_method": "awq"}, ("'awq'", "packed=False", "--dense")),
    ],
)
def test_compressed_tensors_sections(damaged, section, named):
    folder = damaged("compressed-tensors", section=section)
    with refused(UnpackableError, folder, *named):
        check_down_proj(folder)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"bits": 5}, (DOWN, "5 bits", "2, 3, 4, 8")),
        ({"group_size": 20}, (DOWN, 20, 8)),
        ({"bits": 8}, (f"{DOWN}.qweight", "8 bits", [12, 64], [24, 64])),
        ({"checkpoint_format": "marlin"}, ("'marlin'",)),
        ({"pack_dtype": "int16"}, ("'gptq'", "int16")),
        ({"dynamic": {"-:.*down_proj": {}}}, (DOWN, "`dynamic`")),
        ({"dynamic": {".*down_proj": {"bits": 2}}}, (f"{DOWN}.qweight", "2 bits", [6, 64])),
    ],
)
def test_gptq_sections(damaged, section, named):
    folder = damaged("gptq", section=section)
    with refused(UnpackableError, folder, *named):
        check_down_proj(folder)


def test_other_tensors_of_a_packed_linear(damaged):
    folder = damaged("compressed-tensors", {f"{UP}.input_scale": torch.ones(1)})
    check_refused(folder, f"{UP}.input_scale")
    shutil.rmtree(folder)
    folder = damaged("compressed-tensors", {f"{UP}.weight_zero_point": ints(12, 2)})
    check_refused(folder, UP, "weight_zero_point", "config.json")


@pytest.mark.parametrize(
    ("format", "key"), [("compressed-tensors", "weight_g_idx"), ("gptq", "g_idx")]
)
@pytest.mark.parametrize(
    ("changed", "expected", "found"),
    [({0: 1}, 32, [31, 33]), ({0: -1}, "0 to 1", -1), ({63: 2}, "0 to 1", 2)],
)
def test_an_order_of_columns_that_is_no_act_order(damaged, format, key, changed, expected, found):
    g_idx = (torch.arange(64) // 32).int()
    for column, group in changed.items():
        g_idx[column] = group
    check_refused(damaged(format, {f"{UP}.{key}": g_idx}), f"{UP}.{key}: ", expected, found)


def test_an_act_order_without_its_order(damaged):
    """Inputs would be multiplied by the scales of other groups."""
    folder = damaged("gptq", {f"{UP}.g_idx": None}, section={"desc_act": True})
    check_refused(folder, UP, "g_idx", "config.json")
    shutil.rmtree(folder)
    compress.load(damaged("gptq", {f"{UP}.g_idx": None}))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bias_that_is_no_number(tmp_path, value):
    source = write_plain(tmp_path / "model", "llama-biased", dtype=torch.bfloat16)
    folder = quantise_folder(source, tmp_path / "out", [Scheme(4, 32)])
    tensors = CheckpointReader(folder).tensors()
    tensors[f"{UP}.bias"][5] = value
    save_tensors(folder / "model.safetensors", tensors)
    with refused(CheckpointError, f"{UP}.bias", folder / "model.safetensors"):
        compress.load(folder)


# ---- models -------------------------------------------------------------------------------------


def test_a_module_that_the_model_does_not_have(damaged, whole):
    tensors = CheckpointReader(whole / "gptq").tensors("model.layers.1.mlp.up_proj")
    moved = {name.replace("up_proj", "side_proj"): tensor for name, tensor in tensors.items()}
    check_refused(damaged("gptq", moved), "model.layers.1.mlp.side_proj")


def test_a_packed_head_that_config_ties(whole, damaged):
    tensors = CheckpointReader(whole / "gptq").tensors("model.layers.1.mlp.up_proj")
    head = {f"lm_head.{name.rpartition('.')[2]}": t for name, t in tensors.items()}
    tied = {"vocab_size": 96, "tie_word_embeddings": True}
    folder = damaged("gptq", head | {"lm_head.weight": None}, **tied)
    check_refused(folder, "lm_head", "config.json", "tie_word_embeddings")


def test_a_bias_that_the_model_has_no_place_for(damaged):
    folder = damaged("gptq", {f"{UP}.bias": torch.ones(96)})
    check_refused(folder, UP, "bias")
    shutil.rmtree(folder)
    compress.load(damaged("gptq", {f"{UP}.bias": torch.zeros(96)}))  # as old writers leave them


def test_weights_on_more_than_one_device(whole, tmp_path):
    from transformers import AutoModelForCausalLM

    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0", "lm_head"]
    device_map = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    with refused(UnpackableError, "cpu", "meta", "device_map"):
        AutoModelForCausalLM.from_pretrained(
            whole / "gptq", device_map=device_map, offload_folder=tmp_path,
            quantization_config=compress.ModelpressConfig(),
        )  # fmt: skip


def test_an_unquantised_model_has_nothing_to_keep_packed(checkpoint):
    from transformers import AutoModelForCausalLM

    with refused(UnpackableError, "None"):
        AutoModelForCausalLM.from_pretrained(
            checkpoint(), quantization_config=compress.ModelpressConfig()
        )
    compress.load(checkpoint())
    with refused(UsageError, checkpoint(), "fuse=True"):
        compress.load(checkpoint(), fuse=True)


def test_the_command_line_leaves_with_2(damaged, capsys):
    folder = damaged("compressed-tensors", {f"{UP}.weight_scale": None})
    assert issubclass(UnpackableError, CheckpointError)
    refuses(capsys, ["generate", folder, "--prompt", "a", "--packed"], UP, "weight_scale")


def test_the_way_out_that_a_refusal_names(tmp_path, capsys):
    write_quantised(tmp_path, [Scheme(4, 4)])
    byte_tokenizer().save_pretrained(tmp_path)
    command = ["generate", tmp_path, "--prompt", "0", "--max-tokens", 2]
    refuses(capsys, [*command, "--packed"], "packed=False", "--dense")
    assert call(*command, "--dense") == 0
    assert call(*command) == 0  # who does not choose gets what runs


@pytest.mark.parametrize("packed", [None, False])
def test_no_way_out_is_named_where_there_is_none(tmp_path, packed):
    """Asymmetric weights are dense by the same reader only, which refuses the rest of it."""
    write_quantised(tmp_path, [Scheme(4, 32, symmetric=False)])
    byte_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(UnpackableError, tmp_path, "KV cache", "vLLM") as error:
        compress.load(tmp_path, packed=packed)
    assert "--dense" not in str(error.value)


def test_formats_of_others_are_left_to_transformers_unless_packed_is_asked_for(damaged):
    folder = damaged("compressed-tensors", section={"quant_method": "awq"})
    check_refused(folder, "'awq'", packed=True)
    with pytest.raises(CheckpointError) as error:  # transformers', which wants one more package
        compress.load(folder)
    assert not isinstance(error.value, UnpackableError)
    assert is_packed(whole_section("pack-quantized"))
    assert not is_packed(whole_section("float-quantized"))
    assert not is_packed(whole_section("int-quantized"))  # nothing to gain over dense weights
    assert is_packed(whole_section("int-quantized", input_activations=BY_TOKEN))
    assert not is_packed(whole_section("int-quantized", input_activations={"num_bits": 8}))


def whole_section(format: str, **group) -> dict:
    groups = {"g": {"format": format} | group}
    return {"quant_method": "compressed-tensors", "config_groups": groups}
