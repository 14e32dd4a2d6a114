r"""Regular expressions of other people, which may take no longer than a name is long.

Python's `re` goes back and tries again: `(a+)+$` takes 2^n steps on n letters. An expression's
steps are bounded from its parse, and one that may take too many is refused where it is read, before
it is matched. Parts in a row multiply, alternatives add up, a repeat without an end counts as a
name's length, and one inside another has no bound.

    check_expression(r"model\.layers\.\d+\.mlp\..*")
"""

import re
from collections.abc import Iterable
from math import inf, prod
from re import _parser  # type: ignore[attr-defined]  # the only parse that is sure to be re's own
from typing import cast

Parts = Iterable[tuple[object, object]]  # kind and value of each, in a row

LENGTH = 4_000  # characters: some dozens of alternatives
NAME = 64  # letters of a module's name
STEPS = NAME**4  # a tenth of a second for one name
REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def check_expression(expression: str, said: str = "") -> None:
    """ValueError for text that is no regular expression, or one that could match for too long.

    `said`: how whoever wrote it spelt it, with a prefix.
    """
    said = said or expression
    shown = repr(said if len(said) <= 60 else f"{said[:57]}...")
    if len(expression) > LENGTH:
        raise ValueError(f"{shown} is longer than {LENGTH:,} characters: name fewer modules in it")
    try:
        steps = _steps(_parser.parse(expression))
        re.compile(expression)
    except (re.error, OverflowError) as error:
        raise ValueError(f"{shown} is not a regular expression: {error}") from None
    except RecursionError:
        raise ValueError(f"{shown} is not a regular expression: it is too deep") from None
    if steps > STEPS:
        raise ValueError(
            f"{shown} could match for very long: expected at most four repeats such as .* in "
            f"a row, and none inside another"
        )


def _steps(parts: Parts) -> float:
    """The most ways of going through a sequence of parts."""
    parts = list(parts)
    following = [*parts[1:], ("", None)]
    return prod(
        1 if _ends_at(str(kind), value, after) else _ways(str(kind), value)
        for (kind, value), after in zip(parts, following, strict=False)
    )


def _ends_at(kind: str, value: object, after: tuple[object, object]) -> bool:
    """Whether a repeat can end in one place alone, as of `[^.]*` before a dot."""
    if kind not in REPEATS or str(after[0]) != "LITERAL":
        return False
    inner = list(value[2])  # type: ignore[index]
    if len(inner) != 1 or str(inner[0][0]) != "IN":
        return False
    members = [(str(name), what) for name, what in inner[0][1]]
    letter = after[1]
    if members[0][0] == "NEGATE":
        return ("LITERAL", letter) in members[1:]
    digits = all(name == "CATEGORY" and str(what) == "CATEGORY_DIGIT" for name, what in members)
    return digits and not chr(letter).isdigit()  # type: ignore[arg-type]


def _ways(kind: str, value: object) -> float:
    """The most ways of going through one part, as `re` parses it."""
    if kind in REPEATS:
        least, most, inner = cast("tuple[int, int, Parts]", value)
        ways = _steps(inner)
        if most == _parser.MAXREPEAT:
            return inf if ways > 1 else NAME
        most = min(most, NAME)
        return (most - min(least, most) + 1) * ways**most if ways < STEPS else inf
    if kind == "BRANCH":
        _, branches = cast("tuple[None, list[Parts]]", value)
        return sum(_steps(branch) for branch in branches)
    if kind in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return _steps(cast("tuple[Parts, ...]", value)[-1])
    if kind == "ATOMIC_GROUP":
        return _steps(cast("Parts", value))
    if kind == "GROUPREF_EXISTS":
        _, yes, no = cast("tuple[int, Parts, Parts | None]", value)
        return _steps(yes) + _steps(no or [])
    return 1
