"""The one family of errors that a person is meant to read.

Each is raised where the fact is known, as one line: what was expected, what was found, where, and
what to do. The command line prints the line and leaves with `exit_code`; anything else that
escapes is a bug and shows a stack trace.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType


class CompressError(Exception):
    """A run that cannot go on: a damaged file, a failed check, a matrix that no damping saves."""

    exit_code = 1


class UsageError(CompressError):
    """The command or the recipe asks for something that does not exist or cannot be done."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that does not say what the schema allows; the message names file, line and field."""


class CheckpointError(CompressError):
    """A checkpoint that is missing a file or a tensor, is truncated, or holds a NaN."""


class DepthError(CheckpointError):
    """A JSON file with more levels of objects and lists in each other than any of use."""

    exit_code = 2


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The line for a name that is not known: what is, and the nearest."""
    names = list(known)
    near = did_you_mean(str(name), names)
    return f"unknown {kind} {name!r}{near}: expected one of {', '.join(names) or 'none'}"


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Puts the place in front of the line of an error that is raised inside."""
    try:
        yield
    except CompressError as error:
        raise CompressError(f"{place}: {error}") from error


PACKAGES = {"lm_eval": "lm-eval[hf]", "PIL": "pillow"}  # where the name to install is another


def import_package(module: str, what: str) -> ModuleType:
    """A package that may not be installed; without it a UsageError: `what` needs it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UsageError(
            f"{what} needs the package {package} ({error}): "
            f"pip install '{PACKAGES.get(package, package)}'"
        ) from error
