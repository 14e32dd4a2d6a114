"""The plan of the house: a room imports only rooms below its own, and no file imports in a circle.

Every import is read from the source, those inside functions and under TYPE_CHECKING as well.
"""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the top down; rooms of one line do not import each other.
FLOORS = (
    ("compress.__main__",),
    ("compress.cli",),
    ("compress",),
    ("compress.bench", "compress.comparison"),
    ("compress.pipeline",),
    ("compress.allocation",),
    ("compress.loading", "compress.quantization"),
    ("compress.checkpoint", "compress.pruning", "compress.rotation", "compress.data"),
    ("compress.importance",),
    ("compress.models",),
    ("compress.recipe", "compress.storage"),
    (
        "compress.errors",
        "compress.observer",
        "compress.scheme",
        "compress.registry",
        "compress.memory",
        "compress.ranks",
        "compress.kernels",
        "compress.eval",
        "compress.recipes",
    ),
)
RANK = {room: rank for rank, rooms in enumerate(reversed(FLOORS)) for room in rooms}
# What rooms on the ground may import beside themselves.
GROUND = {
    "compress.errors": set(),
    "compress.observer": set(),
    "compress.scheme": set(),
    "compress.registry": {"compress.errors"},
    "compress.memory": {"compress.errors", "compress.ranks"},
    "compress.ranks": {"compress.errors"},
    "compress.kernels": set(),
    "compress.eval": {"compress.errors", "compress.recipes"},  # of recipes: the demo's scenes
    "compress.recipes": {"compress.errors"},
}
LOOSE = {"__init__", "__main__", "errors", "registry", "memory", "observer", "ranks", "scheme"}
# Scripts that made the demo models: tools, not part of the package's order.
TOOLS = {
    "expert_policies",
    "train_lm",
    "train_vlm",
    "vlm_model",
    "vlm_quality",
    "make_demo_code",
    "make_demo_text",
    "make_chats",
}
MOST_FLOORS = 12


def module_of(file: Path) -> str:
    """The dotted name under which a source file is imported."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "compress":
        parts = ("compress", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, Path]:
    folders = ("compress", "kernels", "eval", "recipes")
    files = (file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return {module_of(file): file for file in files if file.stem not in TOOLS}


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports_of(module: str) -> set[str]:
    """The modules of this project that a file names in an import, wherever in it that stands."""
    known = sources()
    found = set()
    for node in ast.walk(ast.parse(known[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module or "")
    return (found & known.keys()) - {module}


@cache
def arrows() -> dict[str, set[str]]:
    return {module: imports_of(module) for module in sources()}


def test_nobody_goes_round_the_plan():
    """No import by a name that is made up, and no folder by the name that it has on disk."""
    for module, file in sources().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            tops = {name.split(".")[0] for name in names}
            assert not tops & {"kernels", "eval", "recipes"}, module
            if module.startswith("compress.kernels"):
                assert not tops & {"transformers", "safetensors", "accelerate"}, module
            called = getattr(node, "func", None)
            if getattr(called, "id", getattr(called, "attr", "")) == "import_module":
                assert module in {"compress", "compress.errors"}, module


def test_every_file_stands_in_a_room_of_the_plan():
    loose = {file.stem for file in (ROOT / "compress").glob("*.py")}
    assert loose == LOOSE
    assert {room_of(module) for module in sources()} <= RANK.keys()


@pytest.mark.parametrize("room", sorted(RANK))
def test_a_room_imports_only_rooms_below(room):
    allowed = GROUND.get(room, {other for other in RANK if RANK[other] < RANK[room]}) | {room}
    up = [
        f"{module} -> {target}"
        for module, targets in arrows().items()
        if room_of(module) == room
        for target in sorted(targets)
        if room_of(target) not in allowed
    ]
    assert not up


def test_no_file_imports_in_a_circle():
    try:
        list(TopologicalSorter(arrows()).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_house_has_few_floors():
    """Floors of rooms: a room stands above all that it imports."""
    above = {
        room: {room_of(t) for m in sources() if room_of(m) == room for t in arrows()[m]} - {room}
        for room in RANK
    }
    floor: dict[str, int] = {}
    for room in TopologicalSorter(above).static_order():
        floor[room] = 1 + max((floor[below] for below in above[room]), default=0)
    assert max(floor.values()) <= MOST_FLOORS


def test_the_map_says_of_every_file_what_it_says_itself():
    """docs/map.md; of the files that only say what their folder is, the package's face alone."""
    lines = (ROOT / "docs" / "map.md").read_text(encoding="utf-8").splitlines()
    told = [line.strip("| ").split(" | ", 1) for line in lines if line.startswith("| `")]
    files = {
        file
        for folder in ("compress", "kernels", "eval", "recipes")
        for file in (ROOT / folder).rglob("*.py")
        if file.name != "__init__.py"
    }
    expected = {}
    for file in files | {ROOT / "compress" / "__init__.py"}:
        head = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        expected[f"`{file.relative_to(ROOT)}`"] = head.partition("\n")[0]
    assert sorted(name for name, _ in told) == sorted(expected)  # each once
    assert dict(told) == expected
