"""Calling the command line from tests, in this process or in one of its own."""

import inspect
import subprocess
import sys
from pathlib import Path

import yaml

from compress.cli.main import main
from support.refusals import check_line


def write_recipe(path: Path, model: Path, dataset: Path, **changes) -> Path:
    recipe = {
        "model": str(model),
        "calibration": {"dataset": str(dataset), "samples": 4, "length": 16},
        "quantize": {"bits": 4, "group_size": 32},
    }
    path.write_text(yaml.safe_dump(recipe | changes, sort_keys=False))
    return path


def modelpress(*argv, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "compress", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def call(*argv) -> int:
    return main([str(argument) for argument in argv])


def only_line(capsys) -> str:
    """The one line on stderr of a command that printed nothing else."""
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def last_line(capsys) -> str:
    """The last line on stderr, below the progress of a run; no traceback anywhere."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err.splitlines()[-1]


def refuses(capsys, argv, *named, code: int = 2, read=only_line) -> str:
    """The command leaves with `code`; its line on stderr is an error and names each part."""
    assert call(*argv) == code
    line = read(capsys)
    assert line.startswith("error: ")
    check_line(line, *named)
    return line


def pretend(monkeypatch, module: str, name: str, result) -> list[inspect.BoundArguments]:
    """Puts a function that returns `result` in place of one that is slow; returns its calls.

    The calls are bound to the real function's signature: what it would not take fails here too.
    """
    real = getattr(__import__(module, fromlist=[name]), name)
    calls = []

    def fake(*args, **kwargs):
        bound = inspect.signature(real).bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(bound.arguments)
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(f"{module}.{name}", fake)
    return calls


class Counts:
    """How often something was called, and with what first."""

    def __init__(self, monkeypatch, module, name):
        real, self.first = getattr(module, name), []

        def counted(*arguments, **options):
            self.first.append(arguments[0])
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, counted)
