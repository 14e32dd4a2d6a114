"""What must be refused, told by kind, place and value: the words around these are free.

with refused(RecipeError, "quantize.bits", 7):
    Recipe.load(path)
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def check_line(line: str, *parts: object) -> None:
    """`line` is one line without a traceback, and names each part: a whole word, name or number.

    1 is not found in 10, 0.1 or 1,000, and `bits` not in `num_bits`.
    """
    assert "\n" not in line and "Traceback" not in line, line
    for part in map(str, parts):
        before = r"(?<![\w.])" if part[0].isdigit() else r"(?<!\w)" if part[0].isalpha() else ""
        after = r"(?!\w|[.,]\d)" if part[-1].isdigit() else r"(?!\w)" if part[-1].isalpha() else ""
        assert re.search(before + re.escape(part) + after, line), f"{part!r} is not in: {line}"


@contextmanager
def refused(kind: type[Exception], *parts: object) -> Iterator[pytest.ExceptionInfo]:
    """The block raises an error of exactly this kind, whose line names each part."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.type is kind
    check_line(str(caught.value), *parts)
