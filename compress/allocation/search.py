"""One option out of each of several lists: the searches behind the allocators, on plain integers.

    minimise  sum_i values[i][k_i]   so that   sum_i weights[i][k_i] <= limit

the multiple-choice knapsack. `fill` follows the best gain per weight, `optimum` is exact, `evolve`
minimises any function of the choice, within the same limit. All are deterministic.

`optimum` goes through the lists and keeps the Pareto front of (weight, value) over what has been
chosen so far. A state is dropped if no completion can beat the choice of `fill`, by the Lagrangian
bound: for any price p >= 0 the lists still open add at least sum_i min_k (value + p weight) less
p times the weight that is left. Integers make sums exact, so ties do not depend on rounding.

    choice = optimum(values, weights, limit)            # one index per list
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import TypedDict

import numpy as np

from compress.errors import CompressError, UsageError

Table = Sequence[Sequence[int]]
Choice = tuple[int, ...]


class EvolutionState(TypedDict):
    """Where `evolve` stands after a generation; JSON."""

    search: str  # tells one search from another
    parent: list[int]
    history: list[float]  # the parent's fitness, before the first generation and after each


# States that `optimum` may keep over all lists, at 5 bytes each.
MAX_STATES = 5_000_000
# What the floating-point bound may be off by, as a share of the largest possible value.
SLACK = 1e-9


def total(table: Table, choice: Sequence[int]) -> int:
    """The sum of the chosen entries."""
    return sum(row[k] for row, k in zip(table, choice, strict=True))


def fill(values: Table, weights: Table, limit: int) -> tuple[Choice, float]:
    """Starts at the least weight and takes the step with the best gain per weight while one fits.

    Returns:
        the choice, and the price: the gain per weight of the first step that no longer fitted, 0
        if all did. The least weights must fit.
    """
    choice = [_lightest(v, w) for v, w in zip(values, weights, strict=True)]
    left, price = limit - total(weights, choice), 0.0
    assert left >= 0, "the least weights exceed the limit"

    def step(i: int, room: float) -> tuple[float, int, int] | None:
        """The best move of list i that needs no more than `room`: (-gain per weight, i, k)."""
        v, w, now = values[i], weights[i], choice[i]
        moves = [
            (-(v[now] - v[k]) / (w[k] - w[now]), i, k)
            for k in range(len(v))
            if v[k] < v[now] and 0 < w[k] - w[now] <= room
        ]
        return min(moves, default=None)

    moves = [move for i in range(len(values)) if (move := step(i, math.inf))]
    heapify(moves)
    while moves:
        gain, i, k = heappop(moves)
        cost = weights[i][k] - weights[i][choice[i]]
        if cost <= left:
            choice[i], left = k, left - cost
            further = step(i, math.inf)
        else:
            price = price or -gain
            further = step(i, left)
        if further:
            heappush(moves, further)
    return tuple(choice), price


def _lightest(values: Sequence[int], weights: Sequence[int]) -> int:
    return min(range(len(values)), key=lambda k: (weights[k], values[k], k))


def optimum(values: Table, weights: Table, limit: int) -> Choice:
    """The choice of least value within the limit; of the least weight among those.

    Among choices equal in both, earlier lists take later options. The least weights must fit.

    Raises:
        UsageError: more than MAX_STATES states would have to be kept.
    """
    greedy, price = fill(values, weights, limit)
    lightest = [min(row) for row in weights]
    room = min(limit, sum(map(max, weights))) - sum(lightest)
    largest = sum(max(abs(v) for v in row) for row in values)
    ceiling = total(values, greedy) + SLACK * largest + price * room
    rest = _open_lists(values, weights, lightest, price)

    weight, value = np.zeros(1, np.int64), np.zeros(1, np.int64)
    trail: list[tuple[np.ndarray, np.ndarray]] = []  # option and parent of each state
    states = 0
    for i, (v, w) in enumerate(zip(values, weights, strict=True)):
        options = np.repeat(np.arange(len(v), dtype=np.uint8), len(weight))
        parents = np.tile(np.arange(len(weight), dtype=np.int32), len(v))
        candidate_weight = np.concatenate([weight + (x - lightest[i]) for x in w])
        candidate_value = np.concatenate([value + x for x in v])
        bound = candidate_value + price * candidate_weight + rest[i + 1]
        kept = np.flatnonzero((candidate_weight <= room) & (bound <= ceiling))
        kept = kept[_front(candidate_weight[kept], candidate_value[kept])]
        weight, value = candidate_weight[kept], candidate_value[kept]
        trail.append((options[kept], parents[kept]))
        states += len(kept)
        if states > MAX_STATES:
            raise UsageError(
                f"knapsack: more than {MAX_STATES:,} trade-offs to keep after {i + 1} of "
                f"{len(values)} units: use greedy, fewer widths, or whole layers as units"
            )
    return _walk_back(trail)


def _open_lists(values: Table, weights: Table, lightest: list[int], price: float) -> list[float]:
    """sum_{i >= n} min_k (value + price * weight) for each n, weights counted from the lightest."""
    rest = [0.0]
    for v, w, least in zip(reversed(values), reversed(weights), reversed(lightest), strict=True):
        cheapest = min(x + price * (y - least) for x, y in zip(v, w, strict=True))
        rest.append(rest[-1] + cheapest)
    return rest[::-1]


def _front(weight: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Indices of the Pareto-optimal states by rising weight; of equal ones the first."""
    order = np.lexsort((value, weight))
    lowest = np.minimum.accumulate(value[order])
    better = np.ones(len(order), dtype=bool)
    better[1:] = value[order][1:] < lowest[:-1]
    return order[better]


def _walk_back(trail: list[tuple[np.ndarray, np.ndarray]]) -> Choice:
    """The options that led to the last state, the one of least value."""
    state, choice = len(trail[-1][0]) - 1, []
    for options, parents in reversed(trail):
        choice.append(int(options[state]))
        state = int(parents[state])
    return tuple(reversed(choice))


def evolve(
    weights: Table,
    limit: int,
    start: Choice | None,
    fitness: Callable[[Choice], float],
    *,
    generations: int,
    offspring: int,
    seed: int,
    identity: str = "",
    state: EvolutionState | None = None,
    save: Callable[[EvolutionState], None] | None = None,
) -> tuple[Choice, float]:
    """(1 + offspring) evolution: the parent is replaced by a mutant of lower fitness.

    A mutant's draws depend on the seed, its generation and its place in it alone, so a search that
    goes on from a saved state ends where an uninterrupted one does.

    Args:
        weights: options of each list from the least to the best; a mutation moves by one.
        start: the first parent, within the limit; not read if there is a `state`.
        fitness: lower is better; it must give the same number for the same choice.
        identity: what else tells one search from another (model, data, fitness).
        state: what `save` was given. `generations` counts those in it.
        save: called with the state after each generation, and before the first.

    Returns:
        the best choice and its fitness.

    Raises:
        UsageError: the state is that of another search.
        CompressError: the fitness is NaN.
    """
    known: dict[Choice, float] = {}

    def measured(choice: Choice) -> float:
        if choice not in known:
            known[choice] = float(fitness(choice))
            if math.isnan(known[choice]):
                raise CompressError(f"evolve: the fitness of choice {choice} is NaN")
        return known[choice]

    settings = json.dumps((weights, limit, offspring, seed, identity))
    search = hashlib.sha256(settings.encode()).hexdigest()
    if state is None:
        assert start is not None and total(weights, start) <= limit, "no start within the limit"
        history = [measured(start)]
        state = {"search": search, "parent": list(start), "history": history}
        if save:
            save(state)
    elif state.get("search") != search:
        raise UsageError(
            "evolve: the saved state is of another search (other units, widths, budget, seed, "
            "offspring or model): remove it or restore the settings"
        )
    parent, history = tuple(state["parent"]), list(state["history"])
    known[parent] = history[-1]
    for generation in range(len(history), generations + 1):
        mutants = [
            _mutant(weights, limit, parent, random.Random(f"{seed} {generation} {i}"))  # noqa: S311
            for i in range(offspring)
        ]
        parent = min([parent, *mutants], key=measured)  # the first of equals
        history = [*history, measured(parent)]
        if save:
            save({"search": search, "parent": list(parent), "history": history})
    return parent, history[-1]


def _mutant(weights: Table, limit: int, parent: Choice, draw: random.Random) -> Choice:
    """One to three lists moved up, few more often than many, and others down to pay for it.

    What is then left of the limit goes to lists drawn at random.
    """
    choice, left = list(parent), limit - total(weights, parent)

    def price(i: int, move: int) -> int:
        return weights[i][choice[i] + move] - weights[i][choice[i]]

    def drawn(lists: list[int]) -> int | None:
        return draw.choice(lists) if lists else None

    def may_rise() -> list[int]:
        return [i for i, row in enumerate(weights) if choice[i] + 1 < len(row)]

    raised: set[int] = set()
    for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
        before, room = list(choice), left
        up = drawn(may_rise())
        if up is None:
            break
        raised.add(up)
        left -= price(up, 1)
        choice[up] += 1
        while left < 0:
            down = drawn([i for i in range(len(choice)) if choice[i] and i not in raised])
            if down is None:
                choice, left = before, room
                break
            left -= price(down, -1)
            choice[down] -= 1
    for i in draw.sample(range(len(choice)), len(choice)):
        if choice[i] + 1 < len(weights[i]) and price(i, 1) <= left:
            left -= price(i, 1)
            choice[i] += 1
    return tuple(choice)
