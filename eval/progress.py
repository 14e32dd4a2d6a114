"""How far a measurement is, told to whoever asked, while it goes on.

    with telling(lambda what, done, total: print(what, done, total)):
        evaluate_model(...)      # windows of a text, requests of lm-eval

Nobody is told where nobody asks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

Told = Callable[[str, int, int], None]  # what is counted, how many are done, of how many

REQUESTS = "Running "  # begins the names of lm-eval's bars over requests
_told: ContextVar[Told | None] = ContextVar("told", default=None)


@contextmanager
def telling(told: Told) -> Iterator[None]:
    """Within it, `told` hears of each step of a measurement."""
    token = _told.set(told)
    try:
        yield
    finally:
        _told.reset(token)


def tell(what: str, done: int, total: int) -> None:
    """A step is done."""
    if (told := _told.get()) is not None:
        told(what, done, total)


@contextmanager
def requests_told() -> Iterator[None]:
    """Within it, lm-eval's bars over requests tell how far they are, shown or not."""
    begin, step = tqdm.__init__, tqdm.update

    def beginning(self: Any, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        what, total = options.get("desc") or "", options.get("total")
        self.told = [what.removeprefix(REQUESTS), 0, total]
        if not (total and what.startswith(REQUESTS)):
            self.told = None

    def stepping(self: Any, n: float | None = 1) -> bool | None:
        if getattr(self, "told", None) is not None:
            self.told[1] += int(n or 0)
            tell(*self.told)
        return step(self, n)

    tqdm.__init__, tqdm.update = beginning, stepping
    try:
        yield
    finally:
        tqdm.__init__, tqdm.update = begin, step
