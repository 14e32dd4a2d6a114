r"""Regular expressions of other people, which may take no longer than a name is long.

Python's `re` goes back and tries again: `(a+)+$` takes 2^n steps on n letters. An expression's
steps are bounded from its parse, and one that may take too many is refused where it is read, before
it is matched. Parts in a row multiply, alternatives add up, a repeat without an end counts as a
name's length, and one inside another has no bound.

    check_expression(r"model\.layers\.\d+\.mlp\..*")
    check_patterns(["lm_head", "re:.*down_proj$"])
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from math import inf, prod
from re import _parser  # type: ignore[attr-defined]  # the only parse that is sure to be re's own
from typing import cast

Parts = Iterable[tuple[object, object]]  # kind and value of each, in a row

LENGTH = 4_000  # characters: some dozens of alternatives
NAME = 64  # letters of a module's name
STEPS = NAME**4  # a tenth of a second for one name
ALL_STEPS = 16 * STEPS  # of one list, whose every expression may be matched with each name
MOST = 10_000  # expressions of one list
LONGEST_NAME = 1_000  # characters of a module's name
REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def check_patterns(patterns: Iterable[str]) -> None:
    """ValueError for names and expressions `re:...` that are too many, or could match for too long.

    Names are only looked up, so there may be any number of them.
    """
    found = [(pattern, check_pattern(pattern)) for pattern in patterns]
    costs = [(pattern, steps) for pattern, steps in found if steps]
    if len(costs) > MOST:
        raise ValueError(f"expected at most {MOST:,} regular expressions, found {len(costs):,}")
    total: float = 0
    for pattern, steps in costs:
        total += steps
        if total > ALL_STEPS:
            raise ValueError(
                f"{shown(pattern)} and the expressions before it could match for very long: "
                f"expected fewer of them, or fewer repeats such as .* in each"
            )


def check_pattern(pattern: str) -> float:
    """ValueError for a name that is too long, or an expression `re:...` as below; the steps."""
    if pattern.startswith("re:"):
        return check_expression(pattern[3:], pattern)
    if len(pattern) > LONGEST_NAME:
        raise ValueError(f"{shown(pattern)} is longer than the {LONGEST_NAME:,} letters of a name")
    return 0


def shown(text: str) -> str:
    """Text in quotation marks, its first letters if it is long."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


@lru_cache(maxsize=2 * MOST)  # that of `re` holds 512
def compiled(expression: str) -> re.Pattern[str]:
    """The expression, parsed once."""
    return re.compile(expression)


def check_expression(expression: str, said: str = "") -> float:
    """The most steps that matching a name takes.

    ValueError for text that is no regular expression, or one that could match for too long.

    `said`: how whoever wrote it spelt it, with a prefix.
    """
    what = shown(said or expression)
    if len(expression) > LENGTH:
        raise ValueError(f"{what} is longer than {LENGTH:,} characters: name fewer modules in it")
    try:
        steps = _steps(_parser.parse(expression))
        re.compile(expression)
    except (re.error, OverflowError) as error:
        raise ValueError(f"{what} is not a regular expression: {error}") from None
    except RecursionError:
        raise ValueError(f"{what} is not a regular expression: it is too deep") from None
    if steps > STEPS:
        raise ValueError(
            f"{what} could match for very long: expected at most four repeats such as .* in "
            f"a row, and none inside another"
        )
    return max(steps, 1)


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
