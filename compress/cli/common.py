"""What commands do alike: answer as a table or as JSON, stop on Ctrl-C, read recipes and lists.

def inspect(model: ...) -> Answer:
    return Answer(found, draw=lambda out: out.print(table))

add_command(app, inspect)      # modelpress inspect MODEL [--json] [--debug]
"""

import contextlib
import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer
import yaml
from rich.console import Console

from compress.cli.console import console, stdout_for, write_json
from compress.cli.options import DebugOption, JsonOption, ThreadsOption
from compress.errors import CompressError, UsageError
from compress.ranks import launched

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
        problems: told as errors before it; the command then leaves with 2.
    """

    value: Any
    draw: Callable[[Console], None]
    file: Path | None = None
    problems: Sequence[str] = ()
    afterwards: Callable[[], object] = lambda: None


def add_command(app: typer.Typer, function: Callable[..., Any], name: str | None = None) -> None:
    """Makes a function a command, with --debug; with --json if it returns an Answer, and with
    --threads if it computes on a device."""
    signature = inspect.signature(function)
    options: dict[str, Any] = {"debug": DebugOption}
    if signature.return_annotation is Answer:
        options = {"json": JsonOption} | options
    if "device" in signature.parameters:
        options = {"threads": ThreadsOption} | options

    @functools.wraps(function)
    def command(
        *, json: bool = False, debug: bool = False, threads: int | None = None, **arguments: Any
    ) -> None:
        # --debug and --threads have done their work: their callbacks tell.
        with stdout_for(json) as emit:
            answer = function(**arguments)
            if answer is None or launched()[0] > 0:  # the first of several ranks tells
                return
            for problem in answer.problems:  # before a table that is longer than the screen
                print(f"error: {problem}", file=sys.stderr)
            if emit:
                emit(answer.value)
            else:
                answer.draw(console())
            write_json(answer.file, answer.value)
        answer.afterwards()
        if answer.problems:
            raise typer.Exit(2)

    added = [
        Parameter(
            option,
            Parameter.KEYWORD_ONLY,
            default=None if annotation is ThreadsOption else False,
            annotation=annotation,
        )
        for option, annotation in options.items()
    ]
    parameters = [*signature.parameters.values(), *added]
    # What typer reads.
    command.__dict__["__signature__"] = signature.replace(parameters=parameters)
    app.command(name)(command)


def expanded(command: Callable[..., Answer], options: Mapping[str, Any]) -> Callable[..., Answer]:
    """The command with the fields of each parameter whose type is a dataclass in its place.

    A field's annotation is its option, and behind that what makes its value of the command line's
    text; `options` has them of fields that are annotated with none. A field of neither is none.
    """
    hints = {n: k for n, k in get_type_hints(command).items() if n != "return"}
    kinds = {n: k for n, k in hints.items() if isinstance(k, type) and is_dataclass(k)}
    parameters: list[Parameter] = []
    parsers: dict[str, Callable[[str], object]] = {}
    for given in inspect.signature(command).parameters.values():
        if given.name not in kinds:
            parameters.append(given)
            continue
        for name, hint in get_type_hints(kinds[given.name], include_extras=True).items():
            own = hint if get_origin(hint) is Annotated else options.get(name)
            if own is None:
                continue
            kind, option, *parse = get_args(own)
            default = getattr(kinds[given.name], name, Parameter.empty)
            if parse:
                named = isinstance(option.default, str)  # typer keeps the first name there
                called = option.default if named else "--" + name.replace("_", "-")
                parsers[name] = functools.partial(parse[0], option=called)
                kind, default = (str | None, None) if default is None else (str, _text(default))
            annotation = Annotated[kind, option]  # type: ignore[valid-type]  # made at run time
            parameters.append(given.replace(name=name, annotation=annotation, default=default))

    @functools.wraps(command)
    def run(**values: object) -> Answer:
        for name, parse in parsers.items():
            if isinstance(text := values[name], str):
                values[name] = parse(text)
        for name, kind in kinds.items():
            own = [field.name for field in fields(kind) if field.name in values]
            values[name] = kind(**{field: values.pop(field) for field in own})
        return command(**values)

    # What typer reads.
    run.__dict__["__signature__"] = inspect.Signature(parameters, return_annotation=Answer)
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _text(value: object) -> str:
    """What one would write on the command line for a value."""
    return ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


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
    from compress.recipe.recipe import Recipe  # --help is quicker without

    return Recipe.load(path, overrides=[*(assignments or ()), *more], model=model)


def names(text: str) -> list[str]:
    """`a, b` as names; empty ones are left out."""
    return [name.strip() for name in text.split(",") if name.strip()]


def key_values(text: str, option: str) -> dict[str, Any]:
    """`a=1,b=[x, y]`, or a JSON object, as a mapping; values as YAML reads them.

    Raises UsageError, which names the option and what was expected.
    """
    try:
        if text.lstrip().startswith("{"):
            return dict(json.loads(text))
        parts = re.findall(r"""(?:[^,\["'{]|\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*')+""", text)
        found = dict(part.split("=", 1) for part in parts)
        if ",".join(parts) != text or not all(key.strip() for key in found):
            raise ValueError(text)
        return {key.strip(): yaml.safe_load(value) for key, value in found.items()}
    except (ValueError, yaml.YAMLError):
        raise UsageError(
            f"{option}: expected KEY=VALUE,KEY=VALUE or a JSON object, found {text!r}"
        ) from None


def integers(option: str, text: str, expected: str = "whole numbers such as 0,1,2") -> list[int]:
    """`2,3,4` as numbers. Raises UsageError, which names the option and what was expected."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option}: expected {expected}, found {text!r}") from None
