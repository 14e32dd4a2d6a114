"""The command line when things go wrong: one line on stderr, and the right exit code."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CompressError
from support.calling import call, last_line, modelpress, only_line, pretend, refuses, write_recipe
from support.refusals import check_line

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(scope="session")
def recipe(checkpoint, text, tmp_path_factory) -> Path:
    """A recipe for the tiny Llama."""
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", checkpoint(), text)


# ---- the command or the recipe is wrong: 2 ------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["rnu"], "run"),
        (["run"], "recipe"),
        (["run", "demo-lm", "--divice", "cpu"], "--divice"),
        (["eval", "x", "--perplexity", "y", "--limit", "0"], "--limit"),
        (["eval", "x"], "--perplexity"),
        (["compare", "demo-lm"], "two"),
        (["compare", "demo-lm", "demo-rtn", "--seeds", "0,a"], "0,a"),
        (["recipes", "demo-lmm"], "'demo-lm'"),
        (["run", "demo-lmm"], "'demo-lm'"),
        (["plan", "./not/here.yaml"], "./not/here.yaml"),
        (["plan", "gptq-w4"], "--model"),
        (["plan", "demo-lm", "--set", "quantize.bitts=3"], "'bits'"),
        (["plan", "demo-lm", "--model", "./not/here"], "./not/here"),
        (["generate", "./not/here", "--prompt", "x"], "./not/here"),
        (["generate", "x", "--prompt", "x", "--device", "abacus"], "abacus"),
        (["inspect", "not/here"], "not/here"),
        (["push", "not/here", "me/model"], "not/here"),
    ],
)
def test_wrong_commands_are_one_line_and_2(argv, said, capsys):
    refuses(capsys, argv, said)


DEEP = [40, 900, 100_000]  # beyond what we take, what Python recurses, what its parser does
READERS = [
    ["plan", "rsq-w4", "--model"],
    ["inspect"],
    ["generate", "--prompt", "x"],
    ["export", "--format", "gptq", "--output", "out"],
]


@pytest.mark.parametrize("levels", DEEP)
@pytest.mark.parametrize("command", READERS, ids=lambda command: command[0])
def test_a_config_in_absurdly_many_levels_is_one_line_and_2(command, levels, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "llama", "x": ' + "[" * levels + "]" * levels + "}")
    refuses(capsys, [*command, str(tmp_path)], str(file), 32, "levels")


def test_unknown_key_names_file_line_and_the_nearest_key(tmp_path):
    file = tmp_path / "typo.yaml"
    file.write_text("model: somewhere\nquantize:\n  bits: 4\n  grop_size: 64\n")
    done = modelpress("run", file)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    check_line(line, f"{file}:4: quantize.grop_size: ", "'group_size'")
    assert list(tmp_path.iterdir()) == [file]


def test_a_result_is_not_replaced_unasked(recipe, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    output = ["--output", tmp_path / "out"]
    refuses(capsys, ["run", recipe, *output], tmp_path / "out", "--overwrite", read=last_line)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_unreachable_hub_id_is_one_line(recipe):
    done = modelpress(
        "run", recipe, "--model", "nobody/nothing", env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 2
    assert "'nobody/nothing'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


# ---- the run fails: 1 ---------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def put_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lose_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    shards = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    shards["lm_head.weight"] = "model-00002-of-00002.safetensors"
    kept = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(kept, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "model.safetensors"),
        (put_nan, "model.layers.1.mlp.up_proj.weight"),
        (lose_shard, "model-00002-of-00002.safetensors"),
    ],
)
def test_damaged_checkpoint_is_one_line_and_leaves_no_result(
    damage, said, checkpoint, recipe, tmp_path, capsys
):
    shutil.copytree(checkpoint(), tmp_path / "model")
    damage(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--output", tmp_path / "out"]
    refuses(capsys, ["run", recipe, *options], said, code=1, read=last_line)
    left = list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else []
    assert [path.name for path in left] in ([], [".modelpress"])


def test_missing_tokenizer_is_one_line(checkpoint, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(), folder, ignore=shutil.ignore_patterns("tokenizer*"))
    refuses(capsys, ["generate", folder, "--prompt", "x"], folder, "tokenizer", code=1)


@pytest.mark.parametrize(
    ("raised", "named"),
    [
        (CompressError("a check\nfailed"), ("a check failed",)),
        (OSError(errno.ENOSPC, "No space left on device", "big.bin"), ("disk", "big.bin")),
        (ZeroDivisionError("by nought"), ("ZeroDivisionError", "by nought", "--debug")),
    ],
)
def test_failures_are_one_line_and_1(monkeypatch, raised, named, recipe, capsys):
    pretend(monkeypatch, "compress.pipeline.run", "run", raised)
    refuses(capsys, ["run", recipe], *named, code=1, read=last_line)


@pytest.mark.parametrize("place", [0, 2])
def test_debug_shows_the_traceback_and_keeps_the_code(place, monkeypatch, recipe, capsys):
    pretend(monkeypatch, "compress.pipeline.run", "run", ZeroDivisionError("by nought"))
    argv = ["run", recipe]
    argv.insert(place, "--debug")
    assert call(*argv) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    check_line(err.splitlines()[-1], "error: ", "ZeroDivisionError", "by nought")


def test_debug_of_a_wrong_recipe_still_leaves_with_2(capsys):
    assert call("plan", "no-such-recipe", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_json_prints_nothing_on_stdout_when_it_fails(monkeypatch, recipe, capsys):
    pretend(monkeypatch, "compress.pipeline.run", "run", CompressError("stop"))
    assert call("run", recipe, "--json") == 1
    assert capsys.readouterr().out == ""


def test_json_keeps_what_libraries_print_off_stdout(monkeypatch, capsys):
    def talkative(*args, **kwargs):
        print("here I am")
        return {"perplexity": {"value": float("inf")}}

    monkeypatch.setattr("compress.pipeline.evaluation.evaluate", talkative)
    assert call("eval", "x", "--perplexity", "y", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"perplexity": {"value": None}}
    assert "here I am" in captured.err


# ---- interrupted, and a reader that has gone ----------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [([], "again"), (["--no-resume"], "--no-resume")],
)
def test_interrupted_run_says_how_to_continue(options, said, monkeypatch, recipe, capsys):
    pretend(monkeypatch, "compress.pipeline.run", "run", KeyboardInterrupt())
    assert call("run", recipe, *options) == 130
    assert said in last_line(capsys)


def test_other_commands_are_interrupted_too(monkeypatch, capsys):
    pretend(monkeypatch, "compress.recipe.recipe", "shipped_recipes", KeyboardInterrupt())
    assert call("recipes") == 130
    assert only_line(capsys) == "interrupted"


SIGNALS = [name for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)]


def send(name, times=1):
    for _ in range(times):
        os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", SIGNALS)
def test_every_signal_that_ends_a_command_ends_it_as_ctrl_c_does(
    name, monkeypatch, recipe, tmp_path, capsys
):
    """In the middle of a layer; the same command then goes on."""
    sent = []

    def module(self, *_):
        if not sent:
            sent.append(name)
            send(name)

    monkeypatch.setattr("compress.cli.progress.RunProgress.module", module)
    before = signal.getsignal(getattr(signal, name))
    output = tmp_path / "out"
    assert call("run", recipe, "--output", output) == 130
    assert "interrupted: to continue" in last_line(capsys)
    assert [path.name for path in output.iterdir()] == [".modelpress"]
    assert not (output / ".modelpress" / "lock").exists()
    assert signal.getsignal(getattr(signal, name)) == before
    monkeypatch.setattr("compress.pipeline.run.reload_and_compare", lambda *_: {})
    assert call("run", recipe, "--output", output) == 0


@pytest.mark.parametrize("name", SIGNALS[:-1])
@pytest.mark.parametrize("command", ["recipes", "eval", "compare", "export", "search-pruning"])
def test_signals_end_every_command(name, command, monkeypatch, capsys):
    monkeypatch.setattr("compress.cli.main.app", lambda *_, **__: send(name))
    assert call(command) == 130
    assert only_line(capsys) == "interrupted"


def test_a_second_signal_does_not_disturb_the_end(monkeypatch, capsys):
    def tidying(*_, **__):
        try:
            send("SIGTERM")
        finally:
            send("SIGTERM", 2)
            if hasattr(signal, "SIGHUP"):
                send("SIGHUP")
            print("tidied", file=sys.stderr)

    monkeypatch.setattr("compress.cli.main.app", tidying)
    assert call("recipes") == 130
    assert capsys.readouterr().err.splitlines() == ["tidied", "interrupted"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
def test_a_run_under_nohup_goes_on(monkeypatch):
    """There SIGHUP is ignored from the start."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr("compress.cli.main.app", lambda *_, **__: send("SIGHUP"))
        assert call("recipes") == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("argv", [["recipes"], ["recipes", "demo-lm"], ["--help"]])
def test_closed_pipe_is_quiet(argv):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "compress", *argv]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.stderr == b""


def test_text_that_is_no_characters_is_shown_escaped(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint(), tmp_path / "model")
    (folder / "recipe.yaml").write_text("name: x")
    (folder / "modelpress.json").write_text(json.dumps({"versions": {"\ud800": "1"}}))
    done = modelpress("inspect", folder)
    assert done.returncode == 0 and "\\ud800" in done.stdout and done.stderr == ""
