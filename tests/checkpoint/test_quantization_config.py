"""quantization_config in any shape: a model that loads, or one line that names file and key.

Every key of the sections that others write is taken away, and replaced by values of every type.
"""

import copy
import json
from pathlib import Path

import pytest
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

import compress
from compress.checkpoint.export import export
from compress.checkpoint.packed import PackedLinears
from compress.checkpoint.quantization_config import (
    checked_section,
    has_act_order,
    read_config,
    strategy_of,
)
from compress.errors import CheckpointError, UsageError
from compress.scheme import Scheme
from support.calling import refuses
from support.refusals import check_line
from support.tiny_checkpoints import byte_tokenizer
from support.tiny_quantised import write_quantised

# transformers says so of every argument beside a quantised checkpoint's own config.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

FOREIGN = Path(__file__).parents[1] / "interop" / "foreign"
REMOVED = object()
VALUES = [
    None, "text", "32", "", "re:(", "-:(", 32, -5, 0, 1.5, True, False, [], ["Linear"], [["x"]],
    ["re:("], [None], {}, {"x": 1}, {"(": {"bits": 4}}, {"-:x": None}, {"x": {"bits": "4"}},
    REMOVED,
]  # fmt: skip
LOCATION = {"apply": [{"location": "weight_input", "targets": ["Linear"]}], "type": "hadamard"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model as compressed-tensors and as GPTQ, with every key that readers know of."""
    root = tmp_path_factory.mktemp("sections")
    write_quantised(root / "compressed-tensors", [Scheme(4, 32)])
    byte_tokenizer().save_pretrained(root / "compressed-tensors")
    export(root / "compressed-tensors", "gptq", root / "gptq", round_scales=True)
    change(root / "compressed-tensors", ("transform_config",), {"config_groups": {"R1": LOCATION}})
    change(root / "compressed-tensors", ("sparsity_config",), {"format": "dense"})
    change(root / "compressed-tensors", ("config_groups", "group_0", "weights", "actorder"), None)
    change(root / "gptq", ("dynamic",), {r"+:.*up_proj": {"bits": 4, "group_size": 32}})
    change(root / "gptq", ("pack_dtype",), "int32")
    change(root / "gptq", ("format",), "gptq")
    for name in ("compressed-tensors", "gptq"):
        compress.load(root / name)
    return root


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def changed(config: dict, path: tuple, value) -> dict:
    """A copy of config.json with another value (REMOVED: none) at `path` in its section."""
    config = copy.deepcopy(config)
    *way, last = ("quantization_config", *path)
    node = config
    for step in way:
        node = node[step]
    if value is REMOVED:
        del node[last]
    else:
        node[last] = value
    return config


def change(folder: Path, path: tuple, value) -> None:
    (folder / "config.json").write_text(json.dumps(changed(config_of(folder), path, value)))


def paths_in(node, path=()) -> list[tuple]:
    """The ways to every key and list item of a section, and to the section itself."""
    inner = (
        node.items() if isinstance(node, dict) else enumerate(node if type(node) is list else ())
    )
    return [path, *(way for key, value in inner for way in paths_in(value, (*path, key)))]


def outcome(read, folder: Path) -> str | None:
    """None for what worked, or the line of an error, which names the folder."""
    try:
        read(folder)
    except (CheckpointError, UsageError) as error:
        assert "\n" not in str(error)
        assert str(folder) in str(error)
        return str(error)
    return None


def section_of(folder: Path) -> dict:
    return checked_section(read_config(folder), folder / "config.json")


@pytest.fixture(params=["compressed-tensors", "gptq"])
def folder(request, folders):
    """One of them; its config.json is put back."""
    path = folders / request.param / "config.json"
    before = path.read_text()
    yield path.parent
    path.write_text(before)


def cases(folder: Path, values=VALUES):
    """(path, value) of every change; config.json has it when they are given."""
    config = config_of(folder)
    for path in paths_in(config["quantization_config"]):
        for value in values:
            (folder / "config.json").write_text(json.dumps(changed(config, path, value)))
            yield path, value


def test_any_value_anywhere(folder):
    """All that reads config.json and headers; a value of the wrong kind is told by its key."""
    refused = 0
    for path, _ in cases(folder):
        at_the_door = outcome(section_of, folder)
        lines = [outcome(read, folder) for read in (PackedLinears, compress.inspect)]
        if at_the_door is not None:
            refused += 1
            names = [step for step in path if isinstance(step, str)] or ["quantization_config"]
            assert any(name in at_the_door for name in names)
            assert lines == [at_the_door] * 2
    assert refused > 100


CT, GROUP = "compressed-tensors", ("config_groups", "group_0")
WEIGHTS = (*GROUP, "weights")
FEW = [None, "text", "re:(", 1.5, True, [None], {"x": 1}, REMOVED]


def test_loading(folder):
    """What comes through the door meets transformers as well."""
    for _ in cases(folder, FEW):
        outcome(compress.load, folder)


@pytest.mark.parametrize(
    ("format", "path", "value", "place", "named"),
    [
        (CT, (), 3, "", 3),
        (CT, ("quant_method",), ["x"], "quant_method", "gptq"),
        (CT, ("config_groups",), [], "config_groups", []),
        (CT, ("config_groups",), None, "config_groups", "pack-quantized"),
        (CT, ("ignore",), ["re:("], "ignore[0]", "'re:('"),
        (CT, (*GROUP, "targets"), "Linear", "config_groups.group_0.targets", '"Linear"'),
        (CT, WEIGHTS, None, "config_groups.group_0.weights", "pack-quantized"),
        (CT, (*WEIGHTS, "num_bits"), True, "config_groups.group_0.weights.num_bits", "true"),
        (CT, (*WEIGHTS, "group_size"), "32", "config_groups.group_0.weights.group_size", '"32"'),
        (CT, (*WEIGHTS, "group_size"), None, "config_groups.group_0.weights.group_size", "group"),
        (
            CT,
            (*WEIGHTS, "strategy"),
            "channel",
            "config_groups.group_0.weights.group_size",
            "channel",
        ),
        ("gptq", ("bits",), None, "bits", "null"),
        ("gptq", ("bits",), REMOVED, "bits", "missing"),
        ("gptq", ("dynamic",), {"-:(": {}}, "dynamic.-:(", "'-:('"),
    ],
)
def test_the_command_line_says_it_in_one_line(
    folders, tmp_path, capsys, format, path, value, place, named
):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (folders / format).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder, path, value)
    for command in (["inspect", str(folder)], ["generate", str(folder), "--prompt", "a"]):
        line = refuses(capsys, command, named, code=1)
        where = f"quantization_config: {place}: " if place else "quantization_config: "
        assert line.startswith(f"error: {folder}/config.json: {where}")


@pytest.mark.parametrize("text", ["[]", "3", "{", ""])
def test_a_file_that_is_no_object(folder, text):
    (folder / "config.json").write_text(text)
    for read in (PackedLinears, compress.inspect, compress.load):
        check_line(outcome(read, folder), folder / "config.json")


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "config.json").mkdir()
    for read in (PackedLinears, compress.inspect, compress.load):
        check_line(outcome(read, tmp_path), tmp_path / "config.json", "Is a directory")


def test_what_others_write_is_right():
    for folder in FOREIGN.iterdir():
        config = config_of(folder)
        assert checked_section(config, folder) == config["quantization_config"]
    assert checked_section({}, "here") == {}
    assert checked_section({"quantization_config": None}, "here") == {}
    flags = {"load_in_4bit": True}  # bitsandbytes of old, which is transformers' to read
    assert checked_section({"quantization_config": flags}, "here") == flags
    for scheme in PRESET_SCHEMES.values():
        parts = {key: part.model_dump(mode="json") for key, part in scheme.items()}
        group = json.loads(json.dumps({"targets": ["Linear"]} | parts))
        section = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
        assert checked_section({"quantization_config": section}, "here") == section
    within = {"text_config": {"quantization_config": {"quant_method": "gptq", "bits": 4}}}
    assert checked_section(within, "here")["bits"] == 4


def test_null_is_as_good_as_nothing(folder):
    for key in ("ignore", "sparsity_config", "transform_config", "dynamic", "pack_dtype", "format"):
        if key in config_of(folder)["quantization_config"]:
            change(folder, (key,), None)
    compress.load(folder)


@pytest.mark.parametrize("size", [None, -1, 32])
def test_a_strategy_that_is_not_said(size):
    assert strategy_of({"group_size": size}) == QuantizationArgs(group_size=size).strategy


@pytest.mark.parametrize("value", [None, False, True, "group", "dynamic", "weight", "static"])
def test_act_order_is_what_compressed_tensors_gave_up(value):
    try:
        QuantizationArgs(group_size=32, actorder=value)
    except ValueError as error:
        assert "has been removed" in str(error)
        assert has_act_order({"actorder": value})
    else:
        assert not has_act_order({"actorder": value})
