"""A named table of classes or functions: the one extension mechanism of the toolkit.

SOLVERS = Registry("solver")

@SOLVERS.register("gptq")
class Gptq: ...

SOLVERS["gptq"]       # an unknown name is a UsageError that lists the known ones
"""

from collections.abc import Callable
from typing import Any, TypeVar

from compress.errors import UsageError, did_you_mean

T = TypeVar("T")


class Registry(dict[str, Any]):
    """A dict whose missing key is an error a person can act on."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[T], T]:
        def add(entry: T) -> T:
            assert name not in self, f"{self.kind} {name!r} is registered twice"
            self[name] = entry
            return entry

        return add

    def __missing__(self, name: str) -> Any:
        known = ", ".join(sorted(self))
        raise UsageError(
            f"unknown {self.kind} {name!r}{did_you_mean(name, self)}: expected one of {known}"
        )
