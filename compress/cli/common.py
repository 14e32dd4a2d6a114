"""What several commands do alike: stop on Ctrl-C with advice, read numbers with commas."""

import contextlib
from collections.abc import Callable, Iterator

from compress.errors import CompressError, UsageError


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


def integers(option: str, text: str, such_as: str = "0,1,2") -> list[int]:
    """`2,3,4` as numbers. Raises UsageError, which names the option."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"{option}: expected whole numbers such as {such_as}, found {text!r}"
        ) from None
