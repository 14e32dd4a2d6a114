"""What commands do alike: answer as a table or as JSON, stop on Ctrl-C, read recipes and lists.

def inspect(model: ...) -> Answer:
    return Answer(found, draw=lambda out: out.print(table))

add_command(app, inspect)      # modelpress inspect MODEL [--json] [--debug]
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from compress.cli.console import console, stdout_for, write_json
from compress.cli.options import DebugOption, JsonOption
from compress.errors import CompressError, UsageError

if TYPE_CHECKING:  # --help is quicker without
    from compress.recipe.recipe import Recipe


@dataclass(frozen=True)
class Answer:
    """What a command has found.

    Attributes:
        value: the object that --json prints.
        draw: shows it to a person.
        file: a JSON file for the value as well.
        afterwards: done once all that is told.
        problems: told as errors behind it; the command then leaves with 2.
    """

    value: Any
    draw: Callable[[Console], None]
    file: Path | None = None
    problems: Sequence[str] = ()
    afterwards: Callable[[], object] = lambda: None


def add_command(app: typer.Typer, function: Callable[..., Any], name: str | None = None) -> None:
    """Makes a function a command, with --debug, and with --json if it returns an Answer."""
    signature = inspect.signature(function)
    options = {"debug": DebugOption}
    if signature.return_annotation is Answer:
        options = {"json": JsonOption, "debug": DebugOption}

    @functools.wraps(function)
    def command(*, json: bool = False, debug: bool = False, **arguments: Any) -> None:
        # --debug has done its work: its callback tells `main`.
        with stdout_for(json) as emit:
            answer = function(**arguments)
            if answer is None:
                return
            if emit:
                emit(answer.value)
            else:
                answer.draw(console())
            write_json(answer.file, answer.value)
        answer.afterwards()
        for problem in answer.problems:
            print(f"error: {problem}", file=sys.stderr)
        if answer.problems:
            raise typer.Exit(2)

    added = [
        Parameter(option, Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for option, annotation in options.items()
    ]
    parameters = [*signature.parameters.values(), *added]
    # What typer reads.
    command.__dict__["__signature__"] = signature.replace(parameters=parameters)
    app.command(name)(command)


class InterruptError(CompressError):
    """Ctrl-C in a command that can be continued; the message says how."""

    exit_code = 130


@contextlib.contextmanager
def interruptible(advice: Callable[[], str]) -> Iterator[None]:
    """Lets Ctrl-C say what to do next."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptError(advice()) from None


def load_recipe(
    path: str, model: str | None, assignments: Sequence[str] | None, more: Sequence[str] = ()
) -> "Recipe":
    """A recipe with --model and --set; `more` assignments win over these."""
    from compress.recipe.recipe import Recipe

    return Recipe.load(path, overrides=[*(assignments or ()), *more], model=model)


def names(text: str) -> list[str]:
    """`a, b` as names; empty ones are left out."""
    return [name.strip() for name in text.split(",") if name.strip()]


def integers(option: str, text: str, expected: str = "whole numbers such as 0,1,2") -> list[int]:
    """`2,3,4` as numbers. Raises UsageError, which names the option and what was expected."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option}: expected {expected}, found {text!r}") from None
