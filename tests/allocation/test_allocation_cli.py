"""Budgets, exports and varied keys on the command line: what is printed, written and refused."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from compress.checkpoint.export import CHECKPOINT_FORMATS
from compress.cli.console import BAR
from compress.errors import CompressError
from compress.storage.safetensors import CheckpointReader
from support.calling import call, last_line, pretend, refuses, write_recipe
from support.mixed_widths import DEPTH, widths_in_file
from support.tiny_checkpoints import dequantised, every_file, read_tensors, weight_files

pytestmark = pytest.mark.usefixtures("empty_folder")

LIM = {"average_bits": 3, "importance": "layer_embedding_change"}


@pytest.fixture(scope="session")
def recipe(checkpoint, text, tmp_path_factory) -> Path:
    """A quick recipe for four layers, at 4 bits."""
    folder = tmp_path_factory.mktemp("recipe")
    quantize = {"bits": 4, "group_size": 32, "method": "rtn", "clip_search": "none"}
    return write_recipe(
        folder / "tiny.yaml", checkpoint(layers=DEPTH), text, rotate="none", quantize=quantize
    )


@pytest.fixture
def allocating(recipe, tmp_path) -> Path:
    """The same with an `allocate` section."""
    path = tmp_path / "mixed.yaml"
    path.write_text(recipe.read_text() + f"allocate: {json.dumps(LIM)}\n")
    return path


def planned(capsys, *argv) -> dict:
    assert call("plan", *argv, "--json") == 0
    return json.loads(capsys.readouterr().out)


# ---- plan and run -------------------------------------------------------------------------------


def test_plan_shows_score_width_and_a_bar_of_every_layer(recipe, capsys):
    argv = [recipe, "--average-bits", 3.5, "--widths", "2,3,8"]
    found = planned(capsys, *argv)
    allocation = found["allocation"]
    assert call("plan", *argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for unit, bits in allocation["widths"].items():
        (line,) = (line for line in lines if line.split()[:1] == [unit])
        _, score, width, bar = line.split()
        assert float(score) == pytest.approx(allocation["scores"][unit], rel=1e-3)
        assert int(width) == bits
        assert bar == BAR * bits
    assert allocation["average_bits"] == found["average_bits"] <= 3.5
    assert {m["name"]: m["bits"] for m in found["modules"]} == {
        name: allocation["widths"][unit]
        for unit, names in allocation["modules"].items()
        for name in names
    }


def test_plan_says_what_the_widths_cost(recipe, capsys):
    measured = ["--set", "allocate.importance=output_error", "--average-bits", 3]
    evolved = [*measured, "--set", "allocate.method=evolve", "--set", "allocate.generations=1"]
    found = planned(capsys, recipe, *evolved)["allocation"]
    assert call("plan", recipe, *evolved) == 0
    out, log = capsys.readouterr()
    assert f"generation 1/1  KL {found['fitness']:.4g} nats per token" in log
    assert "error –" not in log  # nothing of a layer that is scored
    assert f"{found['error']:.4g}, summed over units" in out
    assert f"{found['fitness']:.4g} nats per token" in out
    assert call("plan", recipe, "--average-bits", 3, "--set", "allocate.importance=position") == 0
    out = capsys.readouterr().out
    assert "summed over units" not in out  # that score measures no error
    assert "nats" not in out


def test_plan_without_a_section_has_no_allocation(recipe, capsys):
    assert planned(capsys, recipe)["allocation"] is None
    assert call("plan", recipe) == 0
    assert BAR not in capsys.readouterr().out


def test_a_budget_on_the_command_line_replaces_the_recipes(allocating, capsys):
    assert planned(capsys, allocating)["average_bits"] == 3
    assert planned(capsys, allocating, "--average-bits", 2.5)["average_bits"] == 2.5
    least = planned(capsys, allocating, "--average-bits", 2)["file_bytes"]
    most = planned(capsys, allocating, "--average-bits", 4)["file_bytes"]
    budget = f"{(least + most) / 2000:.1f}KB"
    found = planned(capsys, allocating, "--budget", budget)
    assert least < found["file_bytes"] <= (least + most) / 2 < most
    wide = planned(capsys, allocating, "--average-bits", 5.5, "--widths", "8,3")
    assert set(wide["allocation"]["widths"].values()) == {3, 8}


def test_run_takes_the_same_options_and_prints_the_same_table(allocating, monkeypatch, capsys):
    pretend(monkeypatch, "compress.pipeline.run", "reload_and_compare", {})
    argv = [allocating, "--average-bits", 3.5]
    assert call("run", *argv, "--output", "table") == 0
    lines = capsys.readouterr().out.splitlines()
    assert call("run", *argv, "--output", "json", "--json") == 0
    allocation = json.loads(capsys.readouterr().out)["plan"]["allocation"]
    assert allocation == planned(capsys, *argv)["allocation"]
    for unit, bits in allocation["widths"].items():
        (line,) = (line for line in lines if line.split()[:1] == [unit])
        assert line.split()[-1] == BAR * bits
    assert widths_in_file(Path("table")) == {
        name: allocation["widths"][unit]
        for unit, names in allocation["modules"].items()
        for name in names
    }
    assert weight_files(Path("table")) == weight_files(Path("json"))


def test_a_layer_that_is_left_out_is_said_to_be(recipe, capsys):
    section = {"method": "remove", "narrow": 1, "importance": "position"}
    argv = [recipe, "--set", f"allocate={json.dumps(section)}"]
    (gone,) = [u for u, bits in planned(capsys, *argv)["allocation"]["widths"].items() if not bits]
    assert call("plan", *argv) == 0
    removed = [
        line.split()[0] for line in capsys.readouterr().out.splitlines() if "removed" in line
    ]
    assert removed == [gone]


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--average-bits", 1.5], ("average_bits", 1.5)),
        (["--budget", "9KB"], ("budget", "9,000 bytes")),
        (["--set", "allocate.narrow=5"], ("allocate.narrow", "5 of 4")),
        (["--set", "allocate={narrow: 4, method: remove}"], ("allocate.narrow", 4)),
    ],
)
def test_a_budget_that_cannot_be_met_is_one_line_and_2(recipe, monkeypatch, capsys, argv, named):
    def read(*args):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(CheckpointReader, "tensor", read)
    monkeypatch.setattr(CheckpointReader, "tensors", read)
    line = refuses(capsys, ["run", recipe, *argv, "--output", "out"], *named, read=last_line)
    assert not Path("out").exists()
    assert call("plan", recipe, *argv) == 2
    assert [e for e in capsys.readouterr().err.splitlines() if "error" in e] == [line]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--budget", "5"], "allocate.budget"),
        (["--average-bits", "few"], "--average-bits"),
        (["--average-bits", "0"], "allocate.average_bits"),
        (["--widths", "2,x", "--average-bits", 3], "2,x"),
        (["--widths", "2,7", "--average-bits", 3], "allocate.widths[1]"),
        (["--widths", "2,4"], "average_bits, budget"),  # widths alone decide nothing
        (["--budget", "5GB", "--average-bits", 3], "average_bits and budget"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_wrong_options_are_one_line_and_2(recipe, capsys, command, argv, said):
    refuses(capsys, [command, recipe, *argv], said)


# ---- export -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(checkpoint, text, tmp_path_factory) -> Path:
    """A finished result with 4 and 8 bits, which every format holds."""
    from compress.pipeline.run import run
    from compress.recipe.recipe import Recipe

    folder = tmp_path_factory.mktemp("mixed")
    recipe = write_recipe(
        folder / "mixed.yaml", checkpoint(layers=DEPTH), text, rotate="none",
        quantize={"group_size": 32, "method": "rtn", "clip_search": "none"},
        allocate={"widths": [4, 8], "narrow": 2, "importance": "position"},
    )  # fmt: skip
    run(Recipe.load(recipe, ["model.dtype=float16"]), folder / "out", self_check=False)
    assert set(widths_in_file(folder / "out").values()) == {4, 8}
    return folder / "out"


@pytest.mark.parametrize("name", CHECKPOINT_FORMATS)
def test_export_writes_the_format(mixed, name, capsys):
    if name == "gguf":
        pytest.importorskip("gguf")
    before = every_file(mixed)
    assert call("export", mixed, "--format", name, "--output", "made", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["path"], made["format"]) == ("made", name)
    suffix = ".gguf" if name == "gguf" else ".safetensors"
    size = sum(file.stat().st_size for file in Path("made").glob(f"*{suffix}"))
    assert 0 < made["bytes"]["quantized"] < made["bytes"]["total"] < size
    assert every_file(mixed) == before
    refuses(capsys, ["export", mixed, "--format", name, "--output", "made"], "--overwrite")
    assert call("export", mixed, "--format", name, "--output", "made", "--overwrite") == 0
    out = capsys.readouterr().out
    for said in ("made", name, "total"):
        assert said in out


def test_an_exported_gptq_names_the_width_of_each_layer(mixed, capsys):
    """What is not the base width is in `dynamic`, by a pattern that names those modules alone."""
    import re

    assert call("export", mixed, "--format", "gptq", "--output", "made") == 0
    config = json.loads(Path("made/config.json").read_text())["quantization_config"]
    for module, bits in widths_in_file(mixed).items():
        rules = [r for p, r in config["dynamic"].items() if re.match(p.removeprefix("+:"), module)]
        assert (rules[0] if rules else config)["bits"] == bits


def test_an_exported_gguf_holds_the_weights(mixed, capsys):
    gguf = pytest.importorskip("gguf")
    assert call("export", mixed, "--format", "gguf", "--output", "made") == 0
    (file,) = Path("made").glob("*.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    weights = dequantised(read_tensors(mixed), widths_in_file(mixed))
    kinds = {4: "Q4_0", 8: "Q8_0"}
    for index in range(DEPTH):
        module, found = (
            f"model.layers.{index}.mlp.down_proj",
            tensors[f"blk.{index}.ffn_down.weight"],
        )
        assert found.tensor_type.name == kinds[widths_in_file(mixed)[module]]
        values = gguf.quants.dequantize(found.data, found.tensor_type)
        assert (values == weights[f"{module}.weight"].numpy()).all()


@pytest.mark.parametrize(
    "options, said",
    [
        (["--format", "gptqq", "--output", "made"], "'gptq'"),
        (["--format", "gptq", "--output", "made", "--shard-size", "big"], "big"),
        (["--format", "gptq", "--output", "made", "--requantise"], "--requantise"),
        (["--format", "gptq"], "--output"),
        (["--output", "made"], "--format"),
    ],
)
def test_wrong_exports_are_one_line_and_2(mixed, capsys, options, said):
    refuses(capsys, ["export", mixed, *options], said)
    assert not Path("made").exists()


def test_what_is_not_quantised_is_not_exported(checkpoint, capsys):
    model, options = checkpoint(), ["--format", "gptq", "--output", "made"]
    capsys.readouterr()  # of writing it
    refuses(capsys, ["export", model, *options], model, "quantised")
    refuses(capsys, ["export", "not/here", *options], "not/here")
    assert not Path("made").exists()


# ---- compare --vary -----------------------------------------------------------------------------


@pytest.fixture
def compared(monkeypatch) -> list:
    result = SimpleNamespace(rows=[], conditions="", plot=None, others=[], as_dict=dict)
    return pretend(monkeypatch, "compress.comparison.compare", "compare", result)


def test_varied_keys_give_every_combination(recipe, allocating, compared):
    argv = ["compare", recipe, allocating, "--vary", "quantize.bits=2,4,8",
            "--vary", "allocate.widths=[4, 2],[8, 3]", "--set", "allocate.average_bits=3.5",
            "--seeds", "0,1"]  # fmt: skip
    assert call(*argv) == 0
    ((made,),) = [[call["recipes"] for call in compared]]
    assert len({r.name for r in made}) == len(made) == 2 * 3 * 2
    settings = {
        (r.name.split()[0], r.quantize.bits, tuple(r.allocate.widths)): r.name for r in made
    }
    assert set(settings) == {
        (name, bits, widths)
        for name in ("tiny", "mixed")
        for bits in (2, 4, 8)
        for widths in ((4, 2), (8, 3))
    }
    for (_, bits, _), name in settings.items():
        assert f"bits={bits}" in name
    assert {r.allocate.average_bits for r in made} == {3.5}
    assert list(compared[0]["seeds"]) == [0, 1]


def test_keys_that_end_alike_are_told_apart_by_what_they_are_of(recipe, compared):
    argv = ["compare", recipe, "--vary", "quantize.bits=3,4", "--vary", "calibration.seed=5"]
    assert call(*argv, "--vary", "quantize.embedding.bits=6") == 0
    assert [r.name for r in compared[0]["recipes"]] == [
        f"tiny quantize.bits={bits} seed=5 embedding.bits=6" for bits in (3, 4)
    ]


def test_results_of_varied_keys_go_to_folders_of_their_own(recipe, compared):
    from compress.storage.files import folder_name

    values = "position,random,outlier_weight_count,{name: random, seed: 1},{name: random, seed: 2}"
    argv = ["compare", recipe, "--set", "allocate.narrow=2"]
    assert call(*argv, "--vary", f"allocate.importance={values}") == 0
    made = compared[0]["recipes"]
    assert [(r.allocate.importance.name, r.allocate.importance.seed) for r in made] == [
        ("position", 0), ("random", 0), ("outlier_weight_count", 0), ("random", 1), ("random", 2),
    ]  # fmt: skip
    folders = {folder_name(f"{r.name}-0") for r in made}
    assert len(folders) == len(made)
    assert not any("/" in folder for folder in folders)


def test_values_with_brackets_of_their_own_and_commas_in_quotes_are_whole(recipe, compared):
    values = [
        "{importance: {name: output_error, weighted_by: position}, widths: [2, 4], narrow: 1}",
        "null",
        "{narrow: 1, importance: {name: random, seed: 2}}",
    ]
    names = "'one, two',three"
    argv = ["compare", recipe, "--vary", f"allocate={','.join(values)}"]
    assert call(*argv, "--vary", f"calibration.text_field={names}") == 0
    made = compared[0]["recipes"]
    assert [recipe.calibration.text_field for recipe in made] == ["one, two", "three"] * 3
    assert made[0].allocate.importance.weighted_by == "position"
    assert made[2].allocate is None
    assert made[4].allocate.importance.seed == 2
    assert made[0].name == f"tiny allocate={values[0]} text_field='one, two'"


@pytest.mark.parametrize("wrong", ["3,", ",3", "3,,4", "[3,4", "{a: 3,4"])
def test_values_that_are_no_list_are_refused(recipe, compared, capsys, wrong):
    refuses(capsys, ["compare", recipe, "--vary", f"quantize.bits={wrong}"], "--vary", wrong)
    assert compared == []


def test_one_recipe_varied_is_enough_but_one_run_is_not(recipe, compared, capsys):
    assert call("compare", recipe, "--vary", "quantize.bits=2,4") == 0
    capsys.readouterr()
    refuses(capsys, ["compare", recipe, "--vary", "quantize.bits=2"], "two")


@pytest.mark.parametrize(
    "vary, said",
    [
        ("quantize.bits", "KEY=A,B,C"),
        ("quantize.bits=", "KEY=A,B,C"),
        ("quantize.bits=,", "KEY=A,B,C"),
        ("quantize.bits=2,,4", "KEY=A,B,C"),
        ("quantize.bits=2,4,", "KEY=A,B,C"),
        ("allocate.widths=[4,2],[8,3", "KEY=A,B,C"),
        ("=2,4", "section.key=value"),
        ("quantize.bitts=2,4", "'bits'"),
        ("quantize.bits=4,7", "quantize.bits=7"),
        ("quantize.bits=[4,2", "KEY=A,B,C"),
        ("quantize.bits=4,4", "'tiny bits=4'"),
    ],
)
def test_a_bad_vary_is_one_line_and_2(recipe, monkeypatch, capsys, vary, said):
    runs = pretend(monkeypatch, "compress.pipeline.run", "run", CompressError("it has run"))
    argv = ["compare", recipe, "--vary", vary, "--set", "evaluate.tasks=[demo_code]"]
    refuses(capsys, argv, said)
    assert runs == []


def test_a_comparison_is_written_as_lines_and_as_a_table(recipe, text, monkeypatch, capsys):
    """Really run: two budgets, two seeds. Each figure of the table is the line's."""
    pretend(monkeypatch, "compress.pipeline.run", "reload_and_compare", {})
    perplexity = {"dataset": str(text), "length": 32, "tokens": 200}
    argv = ["compare", recipe, "--vary", "allocate.average_bits=2,4", "--seeds", "0,1", "--set",
            "allocate.importance=position", "--output", "made", "--json", "--set",
            f"evaluate.perplexity={json.dumps(perplexity)}"]  # fmt: skip
    assert call(*argv) == 0
    printed = json.loads(capsys.readouterr().out)
    lines = Path("made/comparison.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    assert runs == printed["runs"]
    assert [(run["bits"], run["seed"]) for run in runs] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    with Path("made/comparison.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(runs)
    for row, run in zip(table, runs, strict=True):
        assert (row["name"], int(row["seed"])) == (run["name"], run["seed"])
        scores = run["evaluation"]
        assert float(row["perplexity"]) == pytest.approx(scores["perplexity"]["value"])
        difference = scores["difference"]["mean_nll"]
        assert float(row["nll difference"]) == pytest.approx(difference["value"])
        assert float(row["nll difference_stderr"]) == pytest.approx(difference["stderr"])
        assert int(row["bytes"]) == run["bytes"]
