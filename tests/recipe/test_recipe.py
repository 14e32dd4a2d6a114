"""The recipe: defaults, short forms, resolution, round trips, and errors one can act on."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from compress.data.text import locate
from compress.errors import RecipeError
from compress.importance.tokens import TOKEN_IMPORTANCE
from compress.recipe.quantize import Quantize
from compress.recipe.recipe import Recipe, shipped_recipes
from compress.recipe.sections import matches
from compress.scheme import Scheme
from compress.storage.files import parse_size
from support.refusals import refused

EVERY_SECTION = """\
# a comment
name: full
model: {path: some/model, revision: abc, dtype: float16}
calibration:
  dataset: c4
  samples: 7
  length: 64
  bos: true
  expansion: 4
  offload: disk
  seed: 3
rotate: random
quantize:
  bits: 3
  group_size: channel
  damping: 1e-2
  token_importance: token_similarity
  ignore: [lm_head, "re:.*gate$"]
  overrides:
    - match: "re:.*down_proj$"
      bits: 4
    - match: model.layers.0.mlp.down_proj
      bits: 8
    - {match: "re:.*o_proj", ignore: true}
    - {match: "re:.*q_proj", bits: 16}
    - {match: "re:.*k_proj", group_size: 32, symmetric: false}
save: {shard_size: 500MB}
evaluate:
  tasks: [demo_code]
  perplexity: python-stdlib
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


# Reading and writing


def test_the_shortest_recipe_is_complete(write):
    recipe = Recipe.load(write("model: some/model\nquantize: {bits: 4}\n"))
    assert recipe.model.path == "some/model"
    assert recipe.evaluate is None
    assert recipe.rotate.kind == "hadamard"
    assert recipe.quantize.token_importance.name == "attention_concentration"
    assert recipe == Recipe(name="recipe", model="some/model", quantize={"bits": 4})


@pytest.mark.parametrize("text", [EVERY_SECTION, "model: m\n", "quantize: {method: rtn}\n"])
def test_dump_loads_back_to_an_equal_recipe_with_no_more_to_resolve(write, text):
    recipe = Recipe.load(write(text))
    again = Recipe.load(write(recipe.dump(), "again.yaml"))
    assert again == recipe
    assert again.dump() == recipe.dump()


def test_dump_holds_every_key_of_every_section(write):
    def keys(section, values):
        assert list(values) == list(type(section).model_fields)
        for key, value in values.items():
            if isinstance(value, dict):
                keys(getattr(section, key), value)

    recipe = Recipe.load(write(EVERY_SECTION))
    keys(recipe, yaml.safe_load(recipe.dump()))


def test_a_recipe_cannot_be_changed_behind_its_resolved_values():
    with pytest.raises(ValidationError):
        Recipe().quantize = Quantize(bits=3)


def test_reading_a_recipe_needs_no_torch():
    code = (
        "import sys, compress.recipe.recipe as r; r.Recipe.load('demo-lm'); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Resolution


def test_rsq_is_another_name_for_rotation_token_weights_and_gptq():
    rsq = Recipe(quantize={"method": "rsq"})
    spelled = Recipe(
        rotate="hadamard",
        quantize={"method": "gptq", "token_importance": "attention_concentration"},
    )
    assert rsq == spelled
    assert "rsq" not in rsq.dump()


@pytest.mark.parametrize(
    ("extra", "word"),
    [("rotate: none", "rotate.kind"), ("  token_importance: uniform", "token_importance")],
)
def test_rsq_contradicted_by_the_same_file_is_an_error(write, extra, word):
    path = write(f"quantize:\n  method: rsq\n{extra}\n")
    with refused(RecipeError, f"{path}:2: quantize.method: ", word):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("rotate", "name", "minimum"),
    [
        ("hadamard", "attention_concentration", 0.01),
        ("random", "activation_norm", 0.01),
        ("none", "attention_concentration", 0.1),
        ("hadamard", "first_n", 0.0),
    ],
)
def test_automatic_minimum_is_the_papers(rotate, name, minimum):
    recipe = Recipe(rotate=rotate, quantize={"token_importance": name})
    assert recipe.quantize.token_importance.minimum == minimum
    given = Recipe(quantize={"token_importance": {"name": name, "minimum": 0.5}})
    assert given.quantize.token_importance.minimum == 0.5


def test_a_shared_section_is_not_changed_by_the_recipe_that_uses_it():
    shared = Quantize()
    Recipe(rotate="none", quantize=shared)
    assert shared.token_importance.minimum is None
    assert Recipe(quantize=shared).quantize.token_importance.minimum == 0.01


def test_clip_search_of_rtn_needs_no_data(write):
    assert Recipe(quantize={"method": "rtn"}).quantize.clip_search == "magnitude"
    path = write("quantize:\n  method: rtn\n  clip_search: hessian\n")
    with refused(RecipeError, f"{path}:3: quantize.clip_search: ", "rtn"):
        Recipe.load(path)


@pytest.mark.parametrize("method", ["rtn", "none"])
def test_the_16_bit_output_is_no_target_of_a_method_without_data(write, method):
    path = write(f"quantize:\n  method: {method}\n  target: full_precision\n")
    with refused(RecipeError, f"{path}:3: quantize.target: ", "full_precision", method):
        Recipe.load(path)
    with refused(RecipeError, "quantize.target", "full_precision", method):
        write(f"quantize:\n  method: {method}\n")
        Recipe.load(path, overrides=["quantize.target=full_precision"])


def test_a_target_is_a_name_with_a_strength(write):
    assert Recipe().quantize.target.name == "quantized"
    target = Recipe(quantize={"target": "full_precision"}).quantize.target
    assert target == Recipe(quantize={"target": {"name": "full_precision"}}).quantize.target
    path = write("quantize:\n  target: {name: full_precision}\n")
    weak = Recipe.load(path, overrides=["quantize.target.strength=0.25"])
    assert (weak.quantize.target.name, weak.quantize.target.strength) == ("full_precision", 0.25)
    path = write("quantize:\n  target: {strength: 1}\n")
    with refused(RecipeError, f"{path}:2: quantize.target.strength: ", "full_precision"):
        Recipe.load(path)


def test_strategies_named_in_the_schema_are_those_registered():
    assert set(TOKEN_IMPORTANCE.shipped) == set(TOKEN_IMPORTANCE)


def test_a_strategy_registered_elsewhere_can_be_named(monkeypatch):
    monkeypatch.setitem(TOKEN_IMPORTANCE, "mine", object)
    recipe = Recipe(quantize={"token_importance": "mine"})
    assert recipe.quantize.token_importance.name == "mine"


# Schemes


def test_first_override_that_matches_wins_and_ignore_comes_first(write):
    quantize = Recipe.load(write(EVERY_SECTION)).quantize
    layer = "model.layers.0."
    assert quantize.scheme_for("lm_head", 576) is None
    assert quantize.scheme_for(layer + "mlp.gate", 576) is None
    assert quantize.scheme_for(layer + "mlp.down_proj", 576) == Scheme(4, None, True)
    assert quantize.scheme_for(layer + "self_attn.o_proj", 576) is None
    assert quantize.scheme_for(layer + "self_attn.q_proj", 576) is None
    assert quantize.scheme_for(layer + "self_attn.k_proj", 576) == Scheme(3, 32, False)
    assert quantize.scheme_for(layer + "self_attn.v_proj", 576) == Scheme(3, None, True)


def test_overrides_in_the_other_order_give_the_other_scheme():
    specific, general = {"match": "a.b", "bits": 8}, {"match": "re:.*b$", "bits": 4}
    for order, bits in (([specific, general], 8), ([general, specific], 4)):
        assert Recipe(quantize={"overrides": order}).quantize.scheme_for("a.b", 576).bits == bits


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (16, {576: 16, 1536: 16}),
        (512, {1536: 512}),
        (36, {576: 36}),
        (-1, {576: None, 172: None}),
        ("channel", {576: None}),
        ("auto", {4096: 128, 1536: 128, 576: 64, 96: 32, 2736: None, 172: None}),
    ],
)
def test_group_sizes(asked, found):
    for settings in ({"group_size": asked}, {"overrides": [{"match": "a", "group_size": asked}]}):
        quantize = Recipe(quantize=settings).quantize
        assert {inputs: quantize.scheme_for("a", inputs).group_size for inputs in found} == found
    dumped = Recipe.from_dict(yaml.safe_load(Recipe(quantize=settings).dump()))
    assert dumped.quantize == quantize


def test_recipes_for_any_model_leave_the_group_size_to_its_widths():
    assert Recipe().quantize.group_size == "auto"
    for name in ("gptq-w4", "rsq-w3", "rsq-w4"):
        assert Recipe.load(name).quantize.group_size == "auto"


def test_method_none_quantises_nothing():
    assert Recipe(quantize={"method": "none"}).quantize.scheme_for("a", 576) is None


def test_patterns_match_whole_names_or_from_the_start():
    assert matches("a.b", "a.b")
    assert not matches("a.b", "x.a.b")
    assert not matches("a.b", "a.b.c")
    assert matches("re:a.", "a.b")
    assert not matches("re:b", "a.b")


def test_patterns_that_name_no_module_are_found():
    quantize = Recipe(quantize={"overrides": [{"match": "re:.*dwn", "bits": 4}]}).quantize
    assert quantize.unmatched(["lm_head", "model.down"]) == ["re:.*dwn"]


def test_shard_size_in_bytes():
    assert parse_size(Recipe(save={"shard_size": "500MB"}).save.shard_size) == 500_000_000


# Errors


@pytest.mark.parametrize(
    ("text", "line", "field", "words"),
    [
        ("quantize:\n  bits: 4\n  groupsize: 64\n", 3, "quantize.groupsize", ["'group_size'"]),
        ("model: m\nquantise: {bits: 4}\n", 2, "quantise", ["'quantize'"]),
        ("quantize:\n\n  bits: 7\n", 3, "quantize.bits", ["2, 3, 4, 5, 6 or 8", 7]),
        ("quantize: {bits: '4'}\n", 1, "quantize.bits", ['"4"']),
        ("quantize: {group_size: 0}\n", 1, "quantize.group_size", ["'channel'", "'auto'", 0]),
        ("quantize: {group_size: -2}\n", 1, "quantize.group_size", ["'auto'", -2]),
        ("quantize: {group_size: true}\n", 1, "quantize.group_size", ["'auto'", "true"]),
        ("quantize: {group_size: 64.0}\n", 1, "quantize.group_size", ["'auto'", "64.0"]),
        ("quantize: {group_size: '64'}\n", 1, "quantize.group_size", ["'auto'", '"64"']),
        ("quantize: {group_size: null}\n", 1, "quantize.group_size", ["'auto'", "null"]),
        (
            "quantize:\n  overrides:\n  - {match: a, group_size: 0}\n",
            3,
            "quantize.overrides[0].group_size",
            ["'auto'", 0],
        ),
        ("calibration:\n  samples: many\n", 2, "calibration.samples", ["integer", '"many"']),
        ("calibration:\n  samples: 0\n", 2, "calibration.samples", [0]),
        ("calibration:\n  bos: 1\n", 2, "calibration.bos", [1]),
        ("calibration: {length: 8, expansion: 9}\n", 1, "calibration.expansion", [8, 9]),
        ("calibration: 3\n", 1, "calibration", [3]),
        ("save: {format: gguf}\n", 1, "save.format", ["'compressed-tensors'", '"gguf"']),
        ("save: {shard_size: 5 GB}\n", 1, "save.shard_size", ['"5 GB"']),
        (
            "quantize:\n  token_importance: {name: atention_concentration}\n",
            2,
            "quantize.token_importance.name",
            ["'attention_concentration'"],
        ),
        (
            "quantize:\n  token_importance:\n    minimum: 2\n",
            3,
            "quantize.token_importance.minimum",
            ["maximum"],
        ),
        (
            "quantize:\n  overrides:\n    - {match: a, bits: 4}\n    - match: b\n      bit: 3\n",
            5,
            "quantize.overrides[1].bit",
            ["'bits'"],
        ),
        (
            "quantize:\n  overrides:\n    - bits: 4\n",
            3,
            "quantize.overrides[0].match",
            ["required"],
        ),
        ("quantize:\n  overrides:\n    - match: b\n", 3, "quantize.overrides[0].match", ["bits"]),
        ("quantize:\n  ignore: ['re:(']\n", 2, "quantize.ignore[0]", ["'re:('"]),
        ("evaluate:\n  perplexity:\n    stride: 4096\n", 3, "evaluate.perplexity.stride", ["4096"]),
        (
            "evaluate:\n  perplexity:\n    per_document: true\n    stride: 8\n",
            4,
            "evaluate.perplexity.stride",
            ["documents"],
        ),
        ("evaluate:\n  task: [a]\n", 2, "evaluate.task", ["'tasks'"]),
        ("model: a\nrotate: none\nmodel: b\n", 3, "model", ["twice"]),
        ("quantize: {target: exact}\n", 1, "quantize.target.name", ["full_precision", '"exact"']),
        (
            "quantize:\n  target: {name: full_precision, strength: 1.5}\n",
            2,
            "quantize.target.strength",
            ["1.5"],
        ),
        ("quantize:\n  bits: 4\n  online: []\n", 3, "quantize.online", ["overrides"]),
    ],
)
def test_errors_name_file_line_field_and_what_was_expected(write, text, line, field, words):
    path = write(text)
    with refused(RecipeError, f"{path}:{line}: {field}: ", *words):
        Recipe.load(path)


def test_more_errors_are_counted(write):
    path = write("quantize: {bits: 7}\nsave: {format: x}\nrotate: {seed: -1}\n")
    with refused(RecipeError, f"{path}:3: rotate.seed: ", "2 more"):
        Recipe.load(path)


@pytest.mark.parametrize("text", ["a: [1\nb: 2\n", "a: b: c\n", "a:\n\t- b\n", "{[a]: b}\n"])
def test_yaml_syntax_errors_name_the_line(write, text):
    path = write(text)
    with refused(RecipeError, f"{path}:", "YAML"):
        Recipe.load(path)


@pytest.mark.parametrize("text", ["", "just text\n", "[1, 2]\n", "model: &a {path: *a}\n", "1: 2"])
def test_yaml_that_is_no_recipe(write, text):
    path = write(text)
    with refused(RecipeError, path):
        Recipe.load(path)


def test_objects_are_never_built_from_yaml(write):
    path = write("model: !!python/object/apply:os.getcwd []\n")
    with refused(RecipeError, path, "YAML"):
        Recipe.load(path)


def test_from_dict_names_the_source():
    with refused(RecipeError, "my experiment: quantize.bits: ", 7):
        Recipe.from_dict({"quantize": {"bits": 7}}, "my experiment")
    assert Recipe.from_dict({"model": "m"}) == Recipe(model="m")


def test_files_that_are_missing_or_no_files(tmp_path):
    for path, word in (("demo-ml", "'demo-lm'"), (tmp_path, "folder")):
        with refused(RecipeError, path, word):
            Recipe.load(path)


# --set and --model


def test_set_wins_over_model_which_wins_over_the_file(write):
    path = write("model: {path: a, revision: r}\nquantize: {bits: 3}\n")
    recipe = Recipe.load(path, ["quantize.bits=4", "evaluate.tasks=[x, y]"], model="b")
    assert (recipe.model.path, recipe.model.revision, recipe.quantize.bits) == ("b", None, 4)
    assert recipe.evaluate.tasks == ["x", "y"]
    assert Recipe.load(path, ["model.path=c"], model="b").model.path == "c"
    assert Recipe.load(path, model="a").model.revision == "r"


def test_set_reaches_through_short_forms_null_sections_and_lists(write):
    path = write(
        "model: a\nevaluate: null\nquantize:\n  token_importance: activation_norm\n"
        "  overrides: [{match: x, bits: 4}]\n"
    )
    overrides = [
        "model.dtype=float32",
        "evaluate.limit=5",
        "quantize.token_importance.power=2",
        "quantize.overrides.0.bits=8",
    ]
    recipe = Recipe.load(path, overrides)
    assert (recipe.model.path, recipe.model.dtype) == ("a", "float32")
    assert recipe.evaluate.limit == 5
    assert recipe.quantize.token_importance.name == "activation_norm"
    assert recipe.quantize.token_importance.power == 2
    assert recipe.quantize.scheme_for("x", 576).bits == 8


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("quantize.bit=4", ["quantize.bit: ", "'bits'"]),
        ("quantise.bits=4", ["quantise: ", "'quantize'"]),
        ("quantize.bits=7", ["quantize.bits: ", "found 7"]),
        ("quantize.bits.deep=7", ["quantize.bits"]),
        ("quantize.ignore.9=a", ["index"]),
        ("quantize.bits=[1", ["YAML"]),
        ("quantize", ["section.key=value"]),
        ("=3", ["section.key=value"]),
    ],
)
def test_errors_of_set_name_the_override(write, assignment, words):
    path = write("quantize:\n  bits: 4\n  ignore: [lm_head]\n")
    with refused(RecipeError, "--set", assignment, *words):
        Recipe.load(path, [assignment])


def test_a_replaced_section_forgets_the_lines_of_the_file(write):
    path = write("quantize:\n  bits: 4\n")
    with refused(RecipeError, "--set quantize={bits: 7}: quantize.bits: "):
        Recipe.load(path, ["quantize={bits: 7}"])


# Shipped recipes and paths


def test_shipped_recipes_load_by_bare_name_and_say_what_they_do():
    shipped = shipped_recipes()
    assert {"demo-lm", "demo-rtn", "demo-gptq", "demo-quarot", "rsq-w4"} <= {
        n for n, _, _ in shipped
    }
    for name, description, path in shipped:
        recipe = Recipe.load(name)
        assert recipe == Recipe.load(path)
        assert recipe.name == yaml.safe_load(path.read_text()).get("name", name)
        assert path.read_text().startswith(f"# {description}\n")
        assert Recipe.from_dict(yaml.safe_load(recipe.dump())) == recipe


def test_demo_recipes_differ_in_the_method_alone():
    recipes = [Recipe.load(f"demo-{name}") for name in ("lm", "quarot", "gptq", "rtn")]
    for recipe in recipes[1:]:
        assert recipe.calibration == recipes[0].calibration
        assert recipe.evaluate == recipes[0].evaluate
        assert recipe.quantize.scheme_for("x", 576) == recipes[0].quantize.scheme_for("x", 576)


def test_relative_paths_are_looked_up_from_here_the_recipe_and_its_parent(tmp_path, monkeypatch):
    folder = tmp_path / "project" / "recipes"
    for place in (folder / "near", tmp_path / "project" / "above", tmp_path / "here" / "local"):
        place.mkdir(parents=True)
    (folder / "r.yaml").write_text("name: r\n")
    monkeypatch.chdir(tmp_path / "here")
    recipe = Recipe.load(folder / "r.yaml")
    assert recipe.resolve_path("local") == "local"
    assert recipe.resolve_path("near") == str(folder / "near")
    assert recipe.resolve_path("above") == str(folder.parent / "above")
    assert recipe.resolve_path("owner/name-1.5") == "owner/name-1.5"
    for missing in ("a/b/c", "./near-me", "/nowhere/at/all", "../up"):
        with refused(RecipeError, missing):
            recipe.resolve_path(missing)


def test_a_dataset_name_is_never_taken_for_a_folder(tmp_path):
    (tmp_path / "c4").mkdir()
    (tmp_path / "r.yaml").write_text("name: r\n")
    assert locate("c4", Recipe.load(tmp_path / "r.yaml").resolve_path) == "c4"


def test_shipped_paths_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = {name: path for name, _, path in shipped_recipes()}
    assert Path(Recipe().resolve_path("recipes/demo-lm.yaml")).samefile(shipped["demo-lm"])


def test_a_recipe_without_a_model_says_so_when_it_is_needed():
    with refused(RecipeError, "--model"):
        Recipe.load("rsq-w4").model_location()
    assert Recipe(model="owner/name").model_location() == "owner/name"


# ---- task files can run code --------------------------------------------------------------------


@pytest.mark.parametrize("task", ["mine.yaml", "mine.yml", "tasks/mine", "/a/mine.yaml", "..\\x"])
@pytest.mark.parametrize("lines", ["  tasks: [demo_code, {}]", "  tasks:\n  - demo_code\n  - {}"])
def test_a_recipe_file_names_no_task_file(tmp_path, task, lines):
    path = tmp_path / "r.yaml"
    path.write_text("evaluate:\n" + lines.format(task) + "\n")
    with refused(RecipeError, f"{path}:", "evaluate.tasks[1]", f"{task!r}"):
        Recipe.load(path)


def test_a_task_file_behind_an_anchor_is_found(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: &t mine.yaml\nevaluate: {tasks: [*t]}\n")
    with refused(RecipeError, "evaluate.tasks[0]", "'mine.yaml'"):
        Recipe.load(path)


@pytest.mark.parametrize(
    "assignment",
    ["evaluate.tasks=[m.yaml]", "evaluate={tasks: [m.yaml]}", "evaluate.tasks.0=m.yaml"],
)
def test_the_command_line_names_a_task_file(tmp_path, assignment):
    path = tmp_path / "r.yaml"
    path.write_text("evaluate: {tasks: [demo_code]}\n")
    assert Recipe.load(path, [assignment]).evaluate.tasks == ["m.yaml"]
