"""A recipe that is too much, or whose values are no values, is refused in a line, at once."""

import pytest

from compress.errors import RecipeError
from compress.recipe.recipe import Recipe
from compress.recipe.source import YAML_BYTES, YAML_NODES, parse_yaml
from support.refusals import refused


def bomb(levels: int) -> str:
    """Nine aliases a level, of a list of nine."""
    lines, last = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"], "a0"
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [" + ",".join([f"*{last}"] * 9) + "]")
        last = f"a{level}"
    return "\n".join([*lines, f"quantize: {{bits: *{last}}}"])


def merges(levels: int) -> str:
    """The same by merge keys: each mapping merges the one before nine times."""
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} {{<<: [" + ",".join([f"*a{level - 1}"] * 9) + "]}")
    return "\n".join(lines)


TOO_MUCH = {
    "aliases": (bomb(9), 5),
    "aliases of mappings": (merges(9), None),
    "values": ("x: [" + "1," * (YAML_NODES + 1) + "]", 1),
    "lines": ("name: x\n" + "- 1\n" * 10, 2),
    "depth": ("x: " + "[" * 5000 + "]" * 5000, 1),
    "depth of blocks": ("\n".join(" " * i + "a:" for i in range(200)), None),
    "depth of mappings": ("x: " + "{a: " * 5000 + "}" * 5000, 1),
    "itself": ("name: x\na: &a [*a]", 2),
    "itself, deeper": ("a: &a {b: [1, {c: *a}]}", 1),
}


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_too_much_is_told_with_its_line(tmp_path, kind):
    text, line = TOO_MUCH[kind]
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with refused(RecipeError, f"{path}:" if line is None else f"{path}:{line}:"):
        Recipe.load(path)


def test_a_large_file_is_not_parsed(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: x\n" + "# nothing\n" * (YAML_BYTES // 5))
    with refused(RecipeError, path, f"{YAML_BYTES:,}"):
        Recipe.load(path)


def test_a_bomb_on_the_command_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: x\n")
    nested = "[&a [1,1,1,1,1,1,1,1,1], &b [" + ",".join(["*a"] * 9) + "]"
    for old, new in ("bc", "cd", "de", "ef"):
        nested += f", &{new} [" + ",".join([f"*{old}"] * 9) + "]"
    with refused(RecipeError, "--set quantize.bits", f"{YAML_NODES:,}"):
        Recipe.load(path, [f"quantize.bits={nested}]"])


@pytest.mark.parametrize(
    "value",
    ["2001-99-99", "!!int x", "!!int ''", "!!float x", "!!bool maybe", "!!timestamp x",
     "!!binary é", "9" * 5000, "!!python/object/apply:os.system [x]", "0b", "0x_"],
)  # fmt: skip
def test_a_value_that_is_not_what_its_tag_says(tmp_path, value):
    path = tmp_path / "r.yaml"
    path.write_text(f"name: x\nquantize:\n  bits: {value}\n", encoding="utf-8")
    with refused(RecipeError, f"{path}:3:"):
        Recipe.load(path)


def test_anchors_within_reason_are_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("quantize: {ignore: &i [lm_head, 're:x'], overrides: [{match: a, bits: 8}]}\n")
    assert Recipe.load(path).quantize.ignore == ["lm_head", "re:x"]
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: *a}")[1]["b"] == {"x": 1, "y": {"x": 1}}


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes("name: marked\n".encode("utf-8-sig"))
    assert Recipe.load(path).name == "marked"
