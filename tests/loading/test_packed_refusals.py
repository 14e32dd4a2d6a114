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
from compress.cli.main import main
from compress.errors import CheckpointError, UsageError
from compress.scheme import Scheme
from compress.storage.safetensors import CheckpointReader, save_tensors
from support.demo_quantised import quantise_folder
from support.tiny_checkpoints import byte_tokenizer
from support.tiny_checkpoints import write_checkpoint as write_plain
from support.tiny_quantised import write_quantised

# transformers says so of every argument beside a quantised checkpoint's own config.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

UP = "model.layers.1.mlp.up_proj"


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


def message_of(folder: Path, **options) -> str:
    with pytest.raises(UnpackableError) as error:
        compress.load(folder, **options)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert isinstance(error.value, CheckpointError)
    assert isinstance(error.value, UsageError)
    assert error.value.exit_code == 2
    return str(error.value)


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
    message = message_of(damaged(format, {f"{UP}.{key}": tensor}))
    assert f"{UP}.{key} has shape {list(tensor.shape)}" in message
    assert f"take {expected}" in message


def test_a_wrong_shape_of_zero_points(tmp_path):
    write_quantised(tmp_path, [Scheme(3, 32, symmetric=False)])
    byte_tokenizer().save_pretrained(tmp_path)
    tensors = CheckpointReader(tmp_path).tensors()
    save_tensors(tmp_path / "model.safetensors", tensors | {f"{UP}.weight_zero_point": ints(8, 2)})
    assert f"{UP}.weight_zero_point has shape [8, 2]" in message_of(tmp_path)
    del tensors[f"{UP}.weight_zero_point"]
    save_tensors(tmp_path / "model.safetensors", tensors)
    assert f"{UP} has no weight_zero_point" in message_of(tmp_path)


@pytest.mark.parametrize(
    ("format", "key"),
    [
        ("compressed-tensors", "weight_scale"),
        ("compressed-tensors", "weight_shape"),
        ("gptq", "qzeros"),
        ("gptq", "scales"),
    ],
)
def test_a_missing_tensor(damaged, format, key):
    assert f"{UP} has no {key}" in message_of(damaged(format, {f"{UP}.{key}": None}))


@pytest.mark.parametrize(
    ("format", "key"), [("compressed-tensors", "weight_packed"), ("gptq", "qweight")]
)
def test_missing_codes(damaged, format, key):
    message = message_of(damaged(format, {f"{UP}.{key}": None}))
    assert UP in message
    assert f"no {key}" in message


def test_a_shape_that_is_not_the_models(damaged):
    folder = damaged("compressed-tensors", {f"{UP}.weight_shape": torch.tensor([96, 60])})
    assert f"{UP}.weight_shape says [96, 60]" in message_of(folder)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_a_scale_that_is_no_number(damaged, format):
    key = f"{UP}.{'scales' if format == 'gptq' else 'weight_scale'}"
    tensor = torch.ones(2, 96).half() if format == "gptq" else torch.ones(96, 2)
    tensor[1, 0] = torch.nan
    folder = damaged(format, {key: tensor})
    with pytest.raises(CheckpointError, match="NaN") as error:
        compress.load(folder)
    assert key in str(error.value)


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
    linears.check("model.layers.0.mlp.down_proj", (64, 96))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (groups_of({"num_bits": 9}), "down_proj has 9 bits"),
        (groups_of({"group_size": 24}), "has groups of 24, kernels take a multiple of 16"),
        (groups_of({"num_bits": 3}), "down_proj.weight_packed has shape .*, but 3 bits in groups"),
        (groups_of({"group_size": 64}), r"down_proj.weight_scale has shape \[64, 3\]"),
        (groups_of({"type": "float"}), "weights other than integers in groups cannot be run"),
        (
            groups_of({"strategy": "block", "group_size": None}),
            "weights other than integers in groups cannot be run",
        ),
        (
            groups_of({"strategy": "tensor", "group_size": None}),
            r"down_proj.weight_scale has shape \[64, 3\], but .* take \[1\]",
        ),
        (
            groups_of({"actorder": "group"}),
            "down_proj has no weight_g_idx, though config.json says act-order",
        ),
        (groups_of({}, format="int-quantized"), "down_proj has weight_scale but no weight"),
        (
            {
                "config_groups": {
                    **groups_of({})["config_groups"],
                    "group_1": {"targets": ["lm_head"], "format": "int-quantized", "weights": {}},
                }
            },
            "found int-quantized, pack-quantized",
        ),
        (groups_of({}, format="naive-quantized"), "int-quantized, found naive-quantized"),
        (groups_of({}, input_activations={"num_bits": 8}), "with a scale for each token cannot be"),
        *(
            (groups_of({}, input_activations=BY_TOKEN | change), "for each token cannot be run")
            for change in (
                {"num_bits": 9},
                {"type": "float"},
                {"symmetric": False},
                {"dynamic": False},
                {"strategy": "tensor"},
            )
        ),
        (groups_of({}, output_activations=BY_TOKEN), "with a scale for each token cannot be"),
        (
            groups_of({"symmetric": False, "num_bits": 5}, input_activations=BY_TOKEN),
            "down_proj has 5 bits with zero points and quantised activations, .* only up to 4 bits",
        ),
        (
            groups_of({"group_size": 16}, input_activations=BY_TOKEN),
            "down_proj has groups of 16 and quantised activations",
        ),
        (
            groups_of({}, targets=["re:.*gate_proj"]),
            "down_proj is packed, but config.json",
        ),
        ({"kv_cache_scheme": {"num_bits": 8}}, "a quantised KV cache cannot be run packed"),
        ({"sparsity_config": {"format": "sparse-24"}}, "sparse weights cannot be run packed"),
        (
            {"transform_config": {"config_groups": {"R4": {"apply": [{"location": "input"}]}}}},
            "online rotations cannot be run packed",
        ),
        ({"quant_method": "awq"}, r"found 'awq': load it with packed=False \(--dense\)"),
    ],
)
def test_compressed_tensors_sections(damaged, section, message):
    folder = damaged("compressed-tensors", section=section)
    with pytest.raises(UnpackableError, match=message):
        check_down_proj(folder)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"bits": 5}, "down_proj has 5 bits, packed gptq runs 2, 3, 4, 8"),
        ({"group_size": 40}, "has groups of 40, kernels take a multiple of 16"),
        ({"bits": 8}, "down_proj.qweight has shape .*, but 8 bits in groups of 32"),
        ({"checkpoint_format": "marlin"}, "gptq and gptq_v2 in 32-bit words, found 'marlin'"),
        ({"pack_dtype": "int16"}, "found 'gptq' in int16"),
        ({"dynamic": {"-:.*down_proj": {}}}, "down_proj is packed, but `dynamic` leaves it"),
        ({"dynamic": {".*down_proj": {"bits": 2}}}, "down_proj.qweight has shape .*, but 2 bits"),
    ],
)
def test_gptq_sections(damaged, section, message):
    folder = damaged("gptq", section=section)
    with pytest.raises(UnpackableError, match=message):
        check_down_proj(folder)


def test_other_tensors_of_a_packed_linear(damaged):
    folder = damaged("compressed-tensors", {f"{UP}.input_scale": torch.ones(1)})
    assert f"{UP}.input_scale is more than codes and scales" in message_of(folder)
    shutil.rmtree(folder)
    folder = damaged("compressed-tensors", {f"{UP}.weight_zero_point": ints(12, 2)})
    assert f"{UP} has a weight_zero_point, but config.json says symmetric" in message_of(folder)


@pytest.mark.parametrize(
    ("format", "key"), [("compressed-tensors", "weight_g_idx"), ("gptq", "g_idx")]
)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: 1}, "expected groups of 32 inputs each, found [31, 33]"),
        ({0: -1}, "expected groups 0 to 1, found -1"),
        ({63: 2}, "expected groups 0 to 1, found 2"),
    ],
)
def test_an_order_of_columns_that_is_no_act_order(damaged, format, key, changed, message):
    g_idx = (torch.arange(64) // 32).int()
    for column, group in changed.items():
        g_idx[column] = group
    assert f"{UP}.{key}: {message}" in message_of(damaged(format, {f"{UP}.{key}": g_idx}))


def test_an_act_order_without_its_order(damaged):
    """Inputs would be multiplied by the scales of other groups."""
    folder = damaged("gptq", {f"{UP}.g_idx": None}, section={"desc_act": True})
    assert f"{UP} has no g_idx, though config.json says act-order" in message_of(folder)
    shutil.rmtree(folder)
    compress.load(damaged("gptq", {f"{UP}.g_idx": None}))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bias_that_is_no_number(tmp_path, value):
    source = write_plain(tmp_path / "model", "llama-biased", dtype=torch.bfloat16)
    folder = quantise_folder(source, tmp_path / "out", [Scheme(4, 32)])
    tensors = CheckpointReader(folder).tensors()
    tensors[f"{UP}.bias"][5] = value
    save_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match="holds 1 NaN or infinite values") as error:
        compress.load(folder)
    assert f"{UP}.bias" in str(error.value)


# ---- models -------------------------------------------------------------------------------------


def test_a_module_that_the_model_does_not_have(damaged, whole):
    tensors = CheckpointReader(whole / "gptq").tensors("model.layers.1.mlp.up_proj")
    moved = {name.replace("up_proj", "side_proj"): tensor for name, tensor in tensors.items()}
    message = message_of(damaged("gptq", moved))
    assert "side_proj is packed, but the model has nothing of that name" in message


def test_a_packed_head_that_config_ties(whole, damaged):
    tensors = CheckpointReader(whole / "gptq").tensors("model.layers.1.mlp.up_proj")
    head = {f"lm_head.{name.rpartition('.')[2]}": t for name, t in tensors.items()}
    message = message_of(
        damaged("gptq", head | {"lm_head.weight": None}, vocab_size=96, tie_word_embeddings=True)
    )
    assert "lm_head is packed, but config.json ties its weight" in message


def test_a_bias_that_the_model_has_no_place_for(damaged):
    folder = damaged("gptq", {f"{UP}.bias": torch.ones(96)})
    assert f"{UP} has a bias" in message_of(folder)
    shutil.rmtree(folder)
    compress.load(damaged("gptq", {f"{UP}.bias": torch.zeros(96)}))  # as old writers leave them


def test_weights_on_more_than_one_device(whole, tmp_path):
    from transformers import AutoModelForCausalLM

    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0", "lm_head"]
    device_map = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    with pytest.raises(UnpackableError, match="packed linears run on one device, found cpu, meta"):
        AutoModelForCausalLM.from_pretrained(
            whole / "gptq", device_map=device_map, offload_folder=tmp_path,
            quantization_config=compress.ModelpressConfig(),
        )  # fmt: skip


def test_an_unquantised_model_has_nothing_to_keep_packed(checkpoint):
    from transformers import AutoModelForCausalLM

    with pytest.raises(UnpackableError, match="found None"):
        AutoModelForCausalLM.from_pretrained(
            checkpoint(), quantization_config=compress.ModelpressConfig()
        )
    compress.load(checkpoint())
    with pytest.raises(UsageError, match="no packed linears to fuse"):
        compress.load(checkpoint(), fuse=True)


def test_the_command_line_leaves_with_2(damaged, capsys):
    folder = damaged("compressed-tensors", {f"{UP}.weight_scale": None})
    assert main(["generate", str(folder), "--prompt", "a", "--packed"]) == 2
    assert f"{UP} has no weight_scale" in capsys.readouterr().err


def test_the_way_out_that_a_refusal_names(tmp_path, capsys):
    write_quantised(tmp_path, [Scheme(4, 8)])
    byte_tokenizer().save_pretrained(tmp_path)
    command = ["generate", str(tmp_path), "--prompt", "0", "--max-tokens", "2"]
    assert main([*command, "--packed"]) == 2
    assert "load it with packed=False (--dense)" in capsys.readouterr().err
    assert main([*command, "--dense"]) == 0


@pytest.mark.parametrize("packed", [None, False])
def test_no_way_out_is_named_where_there_is_none(tmp_path, packed):
    """Asymmetric weights are dense by the same reader only, which refuses the rest of it."""
    write_quantised(tmp_path, [Scheme(4, 32, symmetric=False)])
    byte_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = message_of(tmp_path, packed=packed)
    assert message.endswith(
        "a quantised KV cache cannot be run packed: it cannot be loaded dense "
        "either, serve it with vLLM"
    )


def test_formats_of_others_are_left_to_transformers_unless_packed_is_asked_for(damaged):
    folder = damaged("compressed-tensors", section={"quant_method": "awq"})
    assert "found 'awq'" in message_of(folder, packed=True)
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
