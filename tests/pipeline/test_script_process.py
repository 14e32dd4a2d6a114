"""What a script's own process gives back, and what is said of one that gives nothing."""

import json
import os
import signal
import sys

import pytest

from compress.pipeline import script_process
from compress.pipeline.script_process import reported
from support.forked_scripts import ForkedScripts

KILL = f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
# What the tests of the checks take for a process must do as one does.
KINDS = {
    "process": script_process.completed,
    "fork": ForkedScripts(script_process.OFFLINE).completed,
}


@pytest.fixture(params=KINDS)
def told(request, tmp_path, monkeypatch):
    """`told(code, *arguments)`: what is reported of a script."""
    monkeypatch.setattr(script_process, "completed", KINDS[request.param])
    script = tmp_path / "apart" / "script.py"
    script.parent.mkdir()

    def told(code, *arguments):
        script.write_text(f"import json, os, sys\n{code}\n")
        return reported(script, arguments)

    return told


def test_the_object_that_it_prints(told, capfd):
    code = "print('noise', file=sys.stderr)\nprint(json.dumps({'given': sys.argv[1:]}))"
    assert told(code, "a", "b c") == {"given": ["a", "b c"]}
    assert capfd.readouterr() == ("", "")


def test_it_reads_nothing_and_its_folder_is_no_import_path(told, tmp_path):
    (tmp_path / "apart" / "graphlib.py").write_text("raise ImportError('not this one')")
    assert told("import graphlib\nprint(json.dumps([sys.stdin.read()]))") == [""]


def test_it_is_offline_and_has_our_environment(told, monkeypatch, tmp_path):
    monkeypatch.setenv("OURS", "kept")
    monkeypatch.chdir(tmp_path)
    names = ("OURS", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES")
    code = f"print(json.dumps([os.getcwd(), *map(os.environ.get, {names})]))"
    assert told(code) == [str(tmp_path), "kept", "1", ""]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (KILL, "the process left with code -9: no message"),
        ("sys.exit(3)", "the process left with code 3: no message"),
        ("raise ValueError('wrong\\nhere')", "the process left with code 1: here"),
        ("sys.exit('no such thing')", "the process left with code 1: no such thing"),
        (r"os.write(1, b'\xff\n')", "the process left with code 0: no message"),
        ("print('{')", "the process left with code 0: no message"),
    ],
)
def test_a_process_that_prints_no_object(told, code, reason):
    assert told(code) == {"failure": reason}


def test_a_fork_has_nothing_of_the_project(told):
    assert told("print(json.dumps([n for n in sys.modules if n.startswith('compress.')]))") == []


def test_its_environment_is_gone_with_it(told):
    told("os.environ['LEFT'] = 'behind'\nprint(json.dumps({}))")
    assert told("print(json.dumps([os.environ.get('LEFT')]))") == [None]
    assert "LEFT" not in os.environ


def test_an_answer_that_nobody_has_read_is_not_the_next_ones(tmp_path):
    """An interrupted test, and one that was forked off and killed, leave the next one its own."""
    scripts = ForkedScripts(script_process.OFFLINE)
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(f"print({name!r})")

    def printed(name):
        command = [sys.executable, "-P", str(tmp_path / f"{name}.py")]
        return scripts.completed(command, os.environ)[1]

    assert printed("one") == "one\n"
    outputs = [str(tmp_path / name) for name in ("stdout", "stderr")]
    left = [scripts.asked, [str(tmp_path / "one.py")], dict(os.environ), str(tmp_path), outputs]
    print(json.dumps(left), file=scripts.server.stdin, flush=True)
    assert printed("two") == "two\n"
    server = scripts.server
    scripts.owner = 1  # as if this were a fork of another process
    assert printed("two") == "two\n"
    assert scripts.server is not server
    server.communicate()
    scripts.close()
