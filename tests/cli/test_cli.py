"""The commands: what each is given, what it prints and where."""

import inspect
import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from compress.bench.quantize import quantize_bench_table
from compress.bench.report import Report
from compress.bench.settings import QuantizeBench
from compress.cli import bench as bench_commands
from compress.cli import checkpoints as checkpoint_commands
from compress.cli.common import expanded
from compress.cli.measure import MEASURED, evaluate
from compress.cli.run import run
from compress.errors import CompressError, UsageError
from compress.eval.report import Row
from compress.eval.settings import EvaluationSettings
from compress.loading.load import load
from compress.recipe.recipe import Recipe
from support.calling import call, last_line, modelpress, pretend, refuses, write_recipe
from support.refusals import check_line

SCORES = {
    "results": {"demo_code": {"acc": 0.525, "acc_stderr": 0.025}},
    "perplexity": {"value": 12.5, "value_stderr": 0.5, "line": "perplexity 12.5, 32 tokens"},
    "baseline": {"results": {"demo_code": {"acc": 0.75, "acc_stderr": 0.02}}},
    "difference": {
        "results": {"demo_code": {"acc": {"value": -0.225, "stderr": 0.011, "count": 400}}},
        "mean_nll": {"value": 0.125, "stderr": 0.012, "count": 9},
    },
    "conditions": {"limit": 400, "seed": 7},
}


pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(scope="session")
def recipe(checkpoint, text, tmp_path_factory) -> Path:
    """A recipe for the tiny Llama."""
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", checkpoint(), text)


@pytest.fixture(scope="session")
def finished(recipe, tmp_path_factory) -> SimpleNamespace:
    """One real run with --json, in a process of its own as a person would start it."""
    output = tmp_path_factory.mktemp("run") / "out"
    done = modelpress("run", recipe, "--output", output, "--set", "quantize.bits=3", "--json")
    return SimpleNamespace(output=output, **vars(done))


# ---- each command does what it says -------------------------------------------------------------


def test_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out.split()[0] == "modelpress"


@pytest.mark.parametrize("command", [["--help"], *([c, "--help"] for c in (
    "run", "plan", "eval", "compare", "inspect", "generate", "recipes", "push", "bench",
))])  # fmt: skip
def test_help_of_every_command(command, capsys):
    assert call(*command) == 0
    assert "Usage: modelpress" in capsys.readouterr().out


def test_run_prints_one_object_and_writes_the_folder(finished):
    assert finished.returncode == 0
    result = json.loads(finished.stdout)
    assert {"path", "plan", "metrics", "seconds", "peak_memory"} <= set(result)
    assert result["path"] == str(finished.output)
    assert result["plan"]["average_bits"] == 3  # --set
    assert (finished.output / "config.json").is_file()


def test_run_in_a_log_shows_one_line_a_layer(finished):
    lines = [line for line in finished.stderr.splitlines() if line.startswith("layer ")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    assert "\x1b" not in finished.stderr


def test_run_ends_with_a_table(monkeypatch, recipe, tmp_path, capsys):
    from compress.pipeline.plan import Plan
    from compress.pipeline.result import RunResult

    (tmp_path / "there").mkdir()
    provenance = {"bytes": {"original": 500_000}}
    (tmp_path / "there" / "modelpress.json").write_text(json.dumps(provenance))

    plan = Plan([], 4.0, {"quantized": 100, "other": 100, "total": 200_000}, {"host": 1})
    result = RunResult(
        path=tmp_path / "there", plan=plan, metrics=SCORES, layers=[], seconds={"layers": 1.5},
        peak_memory={"host": 2_000_000, "device": 0}, warnings=["mind"],
        evaluation_memory={"host": 3_000_000, "device": 0},
        self_check={"relative_error": 1e-6, "tolerance": 1e-4, "tokens": 16},
    )  # fmt: skip
    (runs,) = [pretend(monkeypatch, "compress.pipeline.run", "run", result)]
    assert call("run", recipe, "--no-resume", "--overwrite", "--no-self-check") == 0
    captured = capsys.readouterr()
    for text in (
        "500.00 kB before, 200.00 kB after (2.50 x)",
        "4.00",
        "2.00 MB host; with the evaluation 3.00",
        "1e-06",
        "0.525 ± 0.025",
        "there",
    ):
        assert text in captured.out
    assert runs[0]["output"] == Path("outputs/tiny")
    assert "outputs/tiny" in captured.err
    assert (runs[0]["resume"], runs[0]["overwrite"]) == (False, True)
    assert (runs[0]["self_check"], runs[0]["check_source"]) == (False, True)


def test_a_recipes_name_cannot_lead_out_of_outputs(monkeypatch, recipe):
    runs = pretend(monkeypatch, "compress.pipeline.run", "run", CompressError("stop"))
    for name in ("../../there", "a/b", "..", ""):
        call("run", recipe, "--set", f"name={json.dumps(name)}")
        assert runs[-1]["output"].parent == Path("outputs")
        assert runs[-1]["output"].name not in ("", ".", "..")


def test_plan_prints_what_the_architecture_says(recipe, capsys):
    assert call("plan", recipe, "--json") == 0
    captured = capsys.readouterr()
    planned = json.loads(captured.out)
    assert {"modules", "average_bits", "bytes", "peak_memory", "problems"} <= set(planned)
    assert set(planned["modules"][0]) == {"name", "shape", "bits", "group_size", "score"}
    assert set(planned["bytes"]) >= {"quantized", "other", "total"}
    assert set(planned["peak_memory"]) == {"host", "device"}
    assert planned["problems"] == []
    assert call("plan", recipe) == 0
    out = capsys.readouterr().out
    assert "model.layers.*.mlp.down_proj" in out
    assert "model.layers.0" not in out


def test_plan_with_problems_prints_each_and_leaves_with_2(recipe, capsys):
    wrong = ["--set", "quantize.group_size=256", "--set", "calibration.length=65"]
    assert call("plan", recipe, *wrong, "--json") == 2
    captured = capsys.readouterr()
    problems = json.loads(captured.out)["problems"]
    assert len(problems) > 1
    assert captured.err.splitlines() == [f"error: {problem}" for problem in problems]


def test_inspect_tells_what_run_has_written(finished, checkpoint, capsys):
    assert call("inspect", finished.output, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"format", "average_bits", "modules", "bytes", "recipe", "provenance"}
    assert found["average_bits"] == 3
    planned = json.loads(finished.stdout)["plan"]
    assert found["bytes"]["total"] == planned["bytes"]["total"]
    bits = {module["name"]: module["bits"] for module in found["modules"]}
    assert {m["name"]: bits[m["name"]] for m in planned["modules"]} == {
        m["name"]: 3 for m in planned["modules"]
    }
    assert call("inspect", finished.output) == 0
    shown = capsys.readouterr().out
    assert "compressed-tensors" in shown
    assert "3.00 over the quantised weights" in shown
    assert call("inspect", checkpoint()) == 0
    shown = capsys.readouterr().out
    assert "unquantised" in shown
    assert "average bits" not in shown


def test_generate_is_greedy_and_the_seed_decides_the_rest(checkpoint, capsys):
    def text(*options):
        assert call("generate", checkpoint(), "--prompt", "ab", "--max-tokens", 8, *options) == 0
        return capsys.readouterr().out

    assert text() == text("--seed", 1)
    hot = ["--temperature", 5, "--seed"]
    assert text(*hot, 1) == text(*hot, 1) != text(*hot, 2)


def test_libraries_are_quiet(finished):
    done = modelpress("generate", finished.output, "--prompt", "ab", "--max-tokens", 2)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    check_line(line, "linears")


def test_recipes_are_listed_and_printed(capsys):
    from compress.recipe.recipe import shipped_recipes

    assert call("recipes") == 0
    listed = capsys.readouterr().out
    for name, line, path in shipped_recipes():
        assert name in listed
        assert line in listed
        assert call("recipes", name) == 0
        assert capsys.readouterr().out == path.read_text()


def test_push_dry_run_lists_every_file(checkpoint, capsys):
    files = {path.name: path.stat().st_size for path in checkpoint().iterdir()}
    assert call("push", checkpoint(), "me/model", "--dry-run") == 2  # nothing is quantised
    assert "--any" in capsys.readouterr().err
    given = ("me/model", "--any", "--private", "--dry-run", "--json")
    assert call("push", checkpoint(), *given) == 0
    report = json.loads(capsys.readouterr().out)
    assert {file["path"]: file["bytes"] for file in report["files"]} == files
    assert report["private"]
    assert call("push", checkpoint(), "me/model", "--any", "--dry-run") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in files)


def test_no_command_takes_a_token():
    for command in (checkpoint_commands.push, run, evaluate):
        assert not [name for name in inspect.signature(command).parameters if name == "token"]


@pytest.mark.parametrize(
    ("command", "options", "settings"),
    [
        (bench_commands.bench_quantize, bench_commands.SHARED, QuantizeBench),
        (evaluate, MEASURED, EvaluationSettings),
    ],
)
def test_a_command_takes_every_field_with_its_default(command, options, settings):
    taken = inspect.signature(expanded(command, options)).parameters
    for field in fields(settings):
        default = "" if field.default == () else str(field.default)  # as one would write it
        assert str(taken[field.name].default) == default, field.name


def test_bench_prints_a_column_a_run(monkeypatch, tmp_path, capsys):
    result = {
        "conditions": {"threads": 2, "torch": "9.9", "device": "cpu", "matmul_rate": 5e9},
        "floor": {"seconds": 0.5, "parts": {"forward": 0.38, "solves": 0.12}, "layer_bytes": 4000},
        "seconds": 1.5, "layers_seconds": 1.25, "ratio": 3.0, "mean_error": 0.0125,
        "rounding": {"size": 64, "group_size": 32, "kernel": 0.25, "eager": 0.75},
        "peak_memory": {"host": 7_000_000, "device": 0},
    }  # fmt: skip
    report = Report({"runs": [result, result]}, quantize_bench_table)
    benches = pretend(monkeypatch, "compress.bench.quantize", "bench_quantize", report)
    file = tmp_path / "made" / "bench.json"
    assert call("bench", "quantize", "--hidden", 64, "--group-size", "channel", "--repeats", 2,
                "--output", file) == 0  # fmt: skip
    out = capsys.readouterr().out
    for text in (
        "run 2",
        "0.38",
        "3.00",
        "7.00 MB",
        "0.0125",
        "5.0 GFLOP/s",
        "2 threads",
        "9.9",
        "0.2500",
        "0.7500",
    ):
        assert text in out
    bench = QuantizeBench(hidden=64, group_size="channel")
    assert benches == [{"bench": bench, "repeats": 2}]
    assert json.loads(file.read_text()) == {"runs": [result, result]}


def test_eval_prints_figures_differences_and_conditions(monkeypatch, tmp_path, capsys):
    calls = pretend(monkeypatch, "compress.pipeline.evaluation", "evaluate", SCORES)
    file = tmp_path / "scores.json"
    argv = ["eval", "quantised", "--tasks", "demo_code, demo_vqa", "--perplexity", "wikitext2",
            "--length", 32, "--stride", 16, "--bos", "--limit", 400, "--num-fewshot", 2,
            "--include-path", tmp_path, "--batch-size", 3, "--seed", 7, "--text-field", "body",
            "--tokens", 99, "--per-document", "--by-position",
            "--baseline", "full", "--output", file]  # fmt: skip
    assert call(*argv) == 0
    out = capsys.readouterr().out
    for text in ("full", "0.750 ± 0.020", "0.525 ± 0.025", "-0.225 ± 0.011", "0.125 ± 0.012",
                 "perplexity 12.5, 32 tokens", "limit 400", "seed 7"):  # fmt: skip
        assert text in out
    assert json.loads(file.read_text()) == SCORES
    assert calls[0]["model"] == "quantised"
    assert calls[0] | {
        "tasks": ["demo_code", "demo_vqa"], "include_path": tmp_path, "perplexity": "wikitext2",
        "length": 32, "stride": 16, "bos": True, "text_field": "body", "baseline": "full",
        "tokens": 99, "per_document": True, "by_position": True,
        "limit": 400, "batch_size": 3, "num_fewshot": 2, "seed": 7, "device": "auto",
    } == calls[0]  # fmt: skip
    assert call(*argv, "--json") == 0
    assert json.loads(capsys.readouterr().out) == SCORES


def test_eval_of_the_tiny_model_against_itself(checkpoint, text, capsys):
    model = checkpoint()
    argv = ["--perplexity", text, "--length", 32, "--baseline", model, "--json"]
    assert call("eval", model, *argv) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["perplexity"]["value"] == scores["baseline"]["perplexity"]["value"]
    assert scores["difference"]["mean_nll"]["value"] == 0
    assert call("eval", model, *argv[:-1], "--by-position") == 0
    shown = capsys.readouterr().out
    assert "tokens in front" in shown
    assert "1 – 31" in shown


def test_compare_hands_over_recipes_and_seeds(monkeypatch, recipe, checkpoint, capsys):
    compared = SimpleNamespace(
        rows=[Row("16 bits", {"perplexity": 10.5}), Row("tiny", {"perplexity": 11.25})],
        conditions="two runs, 16 tokens",
        plot=Path("here/plot.png"),
        others=[([Row("tiny", {"1 – 63": 0.25})], "kl by position")],
        as_dict=lambda: {"rows": 2},
    )
    calls = pretend(monkeypatch, "compress.comparison.compare", "compare", compared)
    argv = ["compare", recipe, "demo-rtn", "--seeds", "0,3", "--model", checkpoint(),
            "--set", "quantize.bits=2", "--output", "made"]  # fmt: skip
    assert call(*argv) == 0
    out = capsys.readouterr().out
    for text in (
        "16 bits",
        "11.25",
        "two runs, 16 tokens",
        "here/plot.png",
        "kl by position",
        "1 – 63",
    ):
        assert text in out
    assert [r.name for r in calls[0]["recipes"]] == ["tiny", Recipe.load("demo-rtn").name]
    assert {r.quantize.bits for r in calls[0]["recipes"]} == {2}
    assert {r.model.path for r in calls[0]["recipes"]} == {str(checkpoint())}
    assert list(calls[0]["seeds"]) == [0, 3]
    assert calls[0]["output"] == Path("made")
    assert call(*argv, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"rows": 2}


@pytest.mark.parametrize(
    "command",
    [
        ["run", "demo-rtn"],
        ["plan", "demo-gptq", "--time"],
        ["generate", "MODEL", "hello"],
        ["eval", "MODEL", "--perplexity", "python-stdlib"],
        ["compare", "demo-rtn", "demo-gptq"],
        ["bench", "kernels", "--shapes", "64x64"],
        ["bench", "quantize"],
        ["bench", "model", "MODEL"],
    ],
    ids=" ".join,
)
def test_a_processor_that_is_none_is_refused_by_every_command(
    checkpoint, monkeypatch, capsys, command
):
    monkeypatch.setenv("MODELPRESS_CPU", "avx1024")
    argv = [checkpoint() if word == "MODEL" else word for word in command]
    refuses(capsys, argv, "MODELPRESS_CPU", "native, avx2, generic", "'avx1024'", read=last_line)


def test_help_is_there_for_any_processor(monkeypatch, capsys):
    monkeypatch.setenv("MODELPRESS_CPU", "avx1024")
    for command in (["eval", "--help"], ["--version"], []):
        call(*command)
        shown = capsys.readouterr()
        assert "MODELPRESS_CPU" not in shown.err and shown.out


def test_load_refuses_a_processor_that_is_none(checkpoint, monkeypatch):
    monkeypatch.setenv("MODELPRESS_CPU", "avx1024")
    with pytest.raises(UsageError, match="MODELPRESS_CPU: expected native, avx2, generic"):
        load(checkpoint())
