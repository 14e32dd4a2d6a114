"""Drawing: progress, tables, and strict JSON."""

import io
import json
from pathlib import Path

from rich.console import Console

from compress.cli.console import console, module_table, to_json
from compress.cli.progress import RunProgress
from compress.observer import Observer

# ---- drawing ------------------------------------------------------------------------------------


def drawn(terminal: bool, first_layer: int = 0) -> str:
    """What a run of three layers leaves on a console."""
    file = io.StringIO()
    target = Console(file=file, force_terminal=terminal, width=120)
    with RunProgress(target) as progress:
        progress.stage("plan")
        progress.stage("layers")
        for i in range(first_layer, 3):
            progress.layers(i, 3)
            for name, error in (("up", 0.25), ("down", 0.75), ("unknown", None)):
                facts = {"bits": 3, "error": error, "seconds": 1.5}
                progress.module(f"model.layers.{i}.{name}_proj", facts)
                progress.live.refresh()
        progress.layers(3, 3)
        progress.warning("damping was raised [in red]")
    return file.getvalue()


def test_progress_in_a_log_is_lines():
    lines = drawn(terminal=False).splitlines()
    layers = [line for line in lines if line.startswith("layer ")]
    assert [line.split()[1] for line in layers] == ["1/3", "2/3", "3/3"]
    assert all("mean relative error 0.5" in line for line in layers)
    assert "warning: damping was raised [in red]" in lines


def test_progress_tells_how_long_the_other_layers_will_take(monkeypatch):
    times = iter([0.0, 90.0, 240.0, 250.0])
    monkeypatch.setattr("compress.cli.progress.time.perf_counter", lambda: next(times))
    file = io.StringIO()
    with RunProgress(Console(file=file, width=120)) as progress:
        progress.stage("layers")
        for done in range(4):
            progress.layers(done, 60 if done < 3 else 3)
    assert file.getvalue().splitlines() == [
        "layers",
        "layer 1/60  90.0 s  88 min left",
        "layer 2/60  150.0 s  1 h 56 min left",
        "layer 3/3  10.0 s",
    ]


def test_progress_of_a_comparison_shows_each_figure():
    file = io.StringIO()
    with RunProgress(Console(file=file, width=120)) as progress:
        progress.module("rtn, seed 0", {"perplexity": 12.5, "demo_code acc": 0.5})
    assert file.getvalue() == "rtn, seed 0: perplexity 12.5, demo_code acc 0.5\n"


def test_progress_of_a_continued_run_says_where_it_goes_on():
    text = drawn(terminal=False, first_layer=2)
    assert "continuing after layer 2/3" in text
    assert "layer 3/3" in text
    assert "layer 1/3" not in text


def test_progress_in_a_terminal_shows_the_current_module():
    text = drawn(terminal=True)
    assert "model.layers.1.down_proj  3 bits  relative error 0.75  1.5 s" in text
    assert "2/3" in text


def test_progress_draws_all_that_a_run_tells():
    told = {name for name in vars(Observer) if not name.startswith("_")}
    assert told <= set(vars(RunProgress))


def test_json_is_strict():
    value = {"a": float("nan"), "b": [float("-inf"), 1.5], "c": Path("x"), 3: (None,)}
    assert json.loads(to_json(value)) == {"a": None, "b": [None, 1.5], "c": "x", "3": [None]}


def test_text_is_printed_as_it_is(capsys):
    console().print(module_table([{"name": "a[bold]", "shape": [1, 2], "bits": 4, "group_size": 32,
                                   "symmetric": False}]))  # fmt: skip
    out = capsys.readouterr().out
    assert "a[bold]" in out
    assert "asymmetric" in out


def test_collapsed_rows_stand_for_every_module():
    names = ["lm_head", *(f"model.layers.{i}.mlp.up_proj" for i in range(12))]
    modules = [
        {"name": n, "shape": [8, 4], "bits": 3 + (".3." in n), "group_size": None,
         "symmetric": True} for n in names
    ]  # fmt: skip
    table = module_table(modules)
    cells = [list(column.cells) for column in table.columns]
    assert list(zip(cells[0], cells[1], cells[3], strict=True)) == [
        ("lm_head", "1", "3"),
        ("model.layers.*.mlp.up_proj", "11", "3"),
        ("model.layers.*.mlp.up_proj", "1", "4"),
    ]
