"""Tables of units for allocators: of one size and of many, and budgets between their extremes.

units = uneven(8, seed=1)
for budget in byte_budgets(units): ...
"""

import random

from compress.allocation.allocators import Budget, Unit, predict_errors


def layers(count: int, widths=(2, 4), seed=0, weights=1000) -> list[Unit]:
    """Units of one size with scores drawn at random, and errors predicted from them."""
    draw = random.Random(seed)  # noqa: S311
    table = {b: weights * b // 8 + 40 for b in widths}
    made = [Unit(f"layer{i}", weights, table, score=draw.gauss(0, 1)) for i in range(count)]
    return predict_errors(made)


def uneven(count: int, widths=(2, 3, 4, 8), seed=0) -> list[Unit]:
    """Units of unlike sizes, with odd overheads and errors that need not even fall with bits."""
    draw = random.Random(seed)  # noqa: S311
    made = []
    for i in range(count):
        weights = draw.randint(1, 500)
        made.append(
            Unit(
                f"unit{i}",
                weights,
                {b: weights * b // 8 + draw.randint(0, 90) for b in widths},
                score=draw.random(),
                errors={b: draw.lognormvariate(0, 2) * weights * 4.0**-b for b in widths},
            )
        )
    return made


def byte_budgets(units, shares=(0, 0.05, 0.3, 0.5, 0.77, 1), fixed=0) -> list[Budget]:
    least = sum(min(u.bytes.values()) for u in units)
    most = sum(max(u.bytes.values()) for u in units)
    steps = [least + int(share * (most - least)) + fixed for share in shares]
    return [Budget(bytes=step, fixed_bytes=fixed) for step in steps]
