"""How many bits each part of the model gets: the best widths within a budget never exceeded.

    units = [Unit("model.layers.0", weights=196_608, bytes={2: 61_440, 4: 110_592}, score=-0.4)]
    result = ALLOCATORS["top_n"](units, Budget(average_bits=3.25))
    result.widths["model.layers.0"], result.bytes, result.average_bits

    top_n      the n units of highest score at the wider of two widths, the rest at the narrower.
               Units of one size: n = floor((b - b_low) / (b_high - b_low) N), so 30 of 40 for 3.5
               bits and 17 for 2.85 at widths 4 and 2 ("Variable Layerwise Quantization",
               arXiv 2406.17415); else the largest n that fits
    knapsack   the least summed predicted error: exact, any widths
    greedy     the best fall of predicted error per byte (or bit) first
    evolve     mutation search with a measured fitness, in the manner of EvoPress

Predicted errors must add up over units: the solver's output errors, the KL of each unit alone, or
`predict_errors` of any score. An entry is a function of units and a budget; it is deterministic,
settles ties by the order of the units, and raises UsageError with the closest reachable value if
the budget cannot be met. Nothing here reads a model: the cost table comes from the writer of the
file. Width 0 stands for a unit that is left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from compress.allocation.search import Choice, EvolutionState, evolve, fill, optimum, total
from compress.errors import CompressError, UsageError
from compress.registry import Registry

ALLOCATORS: Registry[Callable[..., "Assignment"]] = Registry("allocator")

# Predicted errors become integers with this many bits for their sum, so that sums are exact.
ERROR_BITS = 60

NO_UNIT = "allocate: no width to choose: every linear is ignored or an override says its width"


@dataclass(frozen=True)
class Unit:
    """What is given one width as a whole: a decoder layer, or linears that engines fuse.

    Attributes:
        weights: how many of them are quantised.
        bytes: width -> bytes of the unit in the checkpoint: codes, scales, zero points, padding.
            Its keys are the widths to choose from; a unit with one key is fixed.
        score: importance, higher = keep more bits. Read by `top_n` and `predict_errors`.
        errors: width -> predicted error; None if it is not known.
        factor: what the errors are multiplied by when they are weighed against other units'.
        modules: the full names of its linears; for the caller.
        layer: index of the decoder layer that it is, or is a part of; for the caller.
    """

    name: str
    weights: int
    bytes: Mapping[int, int]
    score: float = 0.0
    errors: Mapping[int, float] | None = None
    factor: float = 1.0
    modules: tuple[str, ...] = ()
    layer: int = 0

    @property
    def widths(self) -> list[int]:
        """The widths to choose from, the narrowest first."""
        return sorted(self.bytes)


@dataclass(frozen=True)
class Budget:
    """One upper bound: `average_bits`, `bytes`, or `error`.

    Attributes:
        average_bits: sum(bits * weights) / sum(weights) over the units, scales not counted. Taken
            as the decimal number that is written: 2.85 is 57/20.
        bytes: of the whole checkpoint, `fixed_bytes` included.
        error: on the summed predicted errors of the units; the size is what is minimised then.
        fixed_bytes: what is written whatever the widths: embeddings, norms, an unquantised head.
    """

    average_bits: float | None = None
    bytes: int | None = None
    error: float | None = None
    fixed_bytes: int = 0

    def __post_init__(self) -> None:
        bounds = (self.average_bits, self.bytes, self.error)
        given = [bound for bound in bounds if bound is not None]
        if len(given) != 1 or not math.isfinite(given[0]):
            raise UsageError(
                "allocate: expected one of average_bits, budget or maximum_kl as a finite number, "
                f"found average_bits {self.average_bits}, budget {self.bytes} and "
                f"maximum_kl {self.error}"
            )


@dataclass(frozen=True)
class Assignment:
    """The chosen width of each unit, and what it comes to.

    Attributes:
        widths: unit name -> bits.
        average_bits: over the units' weights.
        bytes: of the checkpoint, with the budget's `fixed_bytes`.
        error: the summed predicted error; None if a unit has none.
        fitness: as measured by `evolve`.
    """

    widths: dict[str, int]
    average_bits: float
    bytes: int
    error: float | None
    fitness: float | None = None


class _Problem:
    """Units and a budget as tables of integers: a row for each unit, options by rising width.

    `costs` are bytes, or bits * weights for a budget of average bits; `limit` bounds their sum and
    is None for a budget of error.
    """

    def __init__(self, units: Sequence[Unit], budget: Budget):
        _check(units)
        self.units, self.budget = units, budget
        self.widths = [unit.widths for unit in units]
        self.limit: int | None = None
        if budget.average_bits is not None:
            self.costs = [[w * unit.weights for w in unit.widths] for unit in units]
            weights = sum(unit.weights for unit in units)
            self.limit = math.floor(Fraction(str(budget.average_bits)) * weights)
        else:
            self.costs = [[unit.bytes[w] for w in unit.widths] for unit in units]
            if budget.bytes is not None:
                self.limit = budget.bytes - budget.fixed_bytes
        least = sum(map(min, self.costs))
        if self.limit is not None and least > self.limit:
            raise self.out_of_reach(least)

    def out_of_reach(self, least: int) -> UsageError:
        budget = self.budget
        if budget.average_bits is not None:
            reached = _rounded_up(Fraction(least, sum(unit.weights for unit in self.units)))
            return UsageError(
                f"average_bits: {budget.average_bits} cannot be met: the least that the widths "
                f"allow is {reached}"
            )
        return UsageError(
            f"budget: {budget.bytes:,} bytes cannot be met: the narrowest widths take "
            f"{least + budget.fixed_bytes:,} bytes, {budget.fixed_bytes:,} of them for what has "
            "no width to choose"
        )

    def errors(self) -> tuple[list[list[int]], float]:
        """The predicted errors as integers, and the number that stands for 1."""
        table = []
        for unit in self.units:
            if unit.errors is None:
                raise UsageError(
                    f"{unit.name}: no predicted error for each width, which this allocator needs: "
                    "use top_n, or an importance that measures or predicts errors"
                )
            table.append([unit.errors[w] for w in unit.widths])
        largest = sum(max(map(abs, row)) for row in table)
        exponent = min(ERROR_BITS - math.frexp(largest)[1], 1000)
        # A power of two: nothing is rounded but what is too small to count.
        return [[round(math.ldexp(e, exponent)) for e in row] for row in table], 2.0**exponent

    def error_limit(self, errors: list[list[int]], one: float) -> int:
        """The bound on the integer errors. Raises UsageError if it cannot be met."""
        # A bound that is a reachable sum, as it was reported, is met: that was rounded to a double,
        # and each term here is by half a unit.
        assert self.budget.error is not None
        bound = Fraction(math.nextafter(self.budget.error, math.inf))
        limit = math.floor(bound * Fraction(one)) + len(errors)
        least = sum(map(min, errors))
        if least > limit:
            raise self.error_out_of_reach(least / one)
        return limit

    def error_out_of_reach(self, least: float) -> UsageError:
        return UsageError(
            f"maximum_kl: a predicted error of {self.budget.error} cannot be met: the least that "
            f"the widths allow is {_rounded_up(least)}"
        )

    def result(self, choice: Choice, fitness: float | None = None) -> Assignment:
        return assignment(self.units, self.named(choice), self.budget.fixed_bytes, fitness)

    def choice(self, widths: Mapping[str, int]) -> Choice:
        rows = zip(self.units, self.widths, strict=True)
        return tuple(options.index(widths[unit.name]) for unit, options in rows)

    def named(self, choice: Choice) -> dict[str, int]:
        rows = zip(self.units, self.widths, choice, strict=True)
        return {unit.name: widths[k] for unit, widths, k in rows}


def _check(units: Sequence[Unit]) -> None:
    if not units:
        raise UsageError(NO_UNIT)
    assert len({unit.name for unit in units}) == len(units), "two units of one name"
    for unit in units:
        assert unit.bytes and unit.weights > 0, f"{unit.name}: no width or no weight"
        assert unit.errors is None or unit.bytes.keys() <= unit.errors.keys(), unit.name
        numbers = [unit.score, *(unit.errors or {}).values()]
        if not all(map(math.isfinite, numbers)):
            raise CompressError(
                f"{unit.name}: expected a finite score and errors, found {unit.score} and "
                f"{dict(unit.errors or {})}"
            )


def _rounded_up(number: Fraction | float) -> str:
    """Four significant digits, not below the number, so that it can be asked for."""
    if not number:
        return "0"
    step = Fraction(10) ** (math.floor(math.log10(abs(float(number)))) - 3)
    return f"{float(math.ceil(Fraction(number) / step) * step):g}"


def assignment(
    units: Sequence[Unit],
    widths: Mapping[str, int],
    fixed_bytes: int = 0,
    fitness: float | None = None,
) -> Assignment:
    """What an assignment of widths comes to: its average bits, bytes and predicted error."""
    weights = sum(unit.weights for unit in units)
    errors = [unit.errors[widths[unit.name]] for unit in units if unit.errors is not None]
    return Assignment(
        widths={unit.name: widths[unit.name] for unit in units},
        average_bits=sum(widths[unit.name] * unit.weights for unit in units) / weights,
        bytes=fixed_bytes + sum(unit.bytes[widths[unit.name]] for unit in units),
        error=math.fsum(errors) if len(errors) == len(units) else None,
        fitness=fitness,
    )


def check_budget(units: Sequence[Unit], budget: Budget) -> str | None:
    """Why no assignment meets the budget, one line, or None. Reads neither scores nor errors."""
    try:
        _Problem(units, budget)
    except UsageError as error:
        return str(error)
    return None


def predict_errors(units: Sequence[Unit], minimum: float = 0.01) -> list[Unit]:
    """The units with errors predicted from their scores, for scores that have none of their own.

        error(b) = r * weights * 4^-b,   r = the scores mapped onto [minimum, 1]

    The noise of an evenly spaced grid falls by 4 with each bit; `minimum` is what the least
    important unit still counts for. With two widths and units of one size, the least summed error
    is that of `top_n`, whatever the minimum.
    """
    _check(units)
    shares = mapped([unit.score for unit in units], minimum)
    return [
        replace(unit, errors={b: share * unit.weights * 4.0**-b for b in unit.bytes})
        for unit, share in zip(units, shares, strict=True)
    ]


def mapped(scores: Sequence[float], minimum: float) -> list[float]:
    """The scores on [minimum, 1], lowest to highest; 1 each where all are equal."""
    low, high = min(scores), max(scores)
    if high == low:
        return [1.0] * len(scores)
    return [minimum + (1 - minimum) * (score - low) / (high - low) for score in scores]


def weighed(units: Sequence[Unit]) -> list[Unit]:
    """The units with scores and errors multiplied by their factors, as allocators take them."""
    return [
        replace(
            unit,
            score=unit.factor * unit.score,
            errors=unit.errors and {b: unit.factor * e for b, e in unit.errors.items()},
            factor=1.0,
        )
        for unit in units
    ]


def keep_top(units: Sequence[Unit], count: int, fixed_bytes: int = 0) -> Assignment:
    """The `count` units of highest score at the wider of two widths, the others at the narrower.

    Units with one width keep it and are not counted. Raises UsageError for other than two widths.
    """
    free = _free_by_score(units)
    wide = {unit.name for unit in free[:count]}
    widths = {u.name: max(u.widths) if u.name in wide else min(u.widths) for u in units}
    return assignment(units, widths, fixed_bytes)


def _free_by_score(units: Sequence[Unit]) -> list[Unit]:
    _check(units)
    free = [unit for unit in units if len(unit.bytes) > 1]
    found = sorted({width for unit in free for width in unit.bytes})
    if free and (len(found) != 2 or any(len(unit.bytes) != 2 for unit in free)):
        raise UsageError(f"top_n: expected two widths, the same for every unit, found {found}")
    return sorted(free, key=lambda unit: -unit.score)


@ALLOCATORS.register("top_n")
def top_n(units: Sequence[Unit], budget: Budget) -> Assignment:
    """The most units by score at the wider width that the budget allows (error: the fewest)."""
    problem, count = _Problem(units, budget), len(_free_by_score(units))
    results = [keep_top(units, n, budget.fixed_bytes) for n in range(count + 1)]
    if problem.limit is None:
        assert budget.error is not None
        problem.errors()  # there is one for every unit
        errors = [result.error for result in results if result.error is not None]
        for result, error in zip(results, errors, strict=True):
            if error <= budget.error:
                return result
        raise problem.error_out_of_reach(min(errors))
    costs = [total(problem.costs, problem.choice(result.widths)) for result in results]
    fitting = [result for result, cost in zip(results, costs, strict=True) if cost <= problem.limit]
    if not fitting:
        raise problem.out_of_reach(min(costs))
    return fitting[-1]


@ALLOCATORS.register("knapsack")
def knapsack(units: Sequence[Unit], budget: Budget) -> Assignment:
    """The least summed predicted error within the budget, or the least bytes within the error.

    Exact, to 1e-15 of the largest possible sum of errors. Of equal assignments it is the cheapest,
    then the one with more bits in earlier units. Raises UsageError if more than
    `search.MAX_STATES` partial assignments would have to be compared.
    """
    return _solve(units, budget, optimum)


@ALLOCATORS.register("greedy")
def greedy(units: Sequence[Unit], budget: Budget) -> Assignment:
    """From the narrowest widths up, the step with the greatest fall of error per byte first.

    For a budget of error: from the least errors down, the most bytes saved per error first.
    """
    return _solve(units, budget, lambda values, weights, limit: fill(values, weights, limit)[0])


def _solve(
    units: Sequence[Unit],
    budget: Budget,
    search: Callable[[list[list[int]], list[list[int]], int], Choice],
) -> Assignment:
    problem = _Problem(units, budget)
    errors, one = problem.errors()
    if problem.limit is None:
        choice = search(problem.costs, errors, problem.error_limit(errors, one))
    else:
        choice = search(errors, problem.costs, problem.limit)
    return problem.result(choice)


@ALLOCATORS.register("evolve")
def evolve_widths(
    units: Sequence[Unit],
    budget: Budget,
    *,
    fitness: Callable[[dict[str, int]], float],
    generations: int = 50,
    offspring: int = 8,
    seed: int = 0,
    start: Mapping[str, int] | None = None,
    identity: str = "",
    state: EvolutionState | None = None,
    save: Callable[[EvolutionState], None] | None = None,
) -> Assignment:
    """Mutates an assignment within the budget and keeps what measures better.

    Args:
        fitness: unit name -> bits to a number, lower is better (a KL on calibration text). It must
            give the same number for the same widths.
        start: the first assignment; None for that of `knapsack`, which needs predicted errors.
        identity: what tells this search from others beside its units and budget, for `state`.
        state, save: see `search.evolve`.

    Raises:
        UsageError: a budget of error, which has no measured counterpart; a start that exceeds the
            budget; a state of another search.
    """
    problem = _Problem(units, budget)
    if problem.limit is None:
        raise UsageError(
            "evolve: expected a budget of average_bits or bytes, found maximum_kl: "
            "use knapsack or greedy, which bound the predicted error"
        )
    first = None
    if state is None:
        chosen = knapsack(units, budget).widths if start is None else start
        first = problem.choice(chosen)
        if total(problem.costs, first) > problem.limit:
            raise UsageError("evolve: the assignment to start from exceeds the budget")
    names = "\n".join([identity, *(f"{unit.name} {unit.widths}" for unit in units)])
    choice, measured = evolve(
        problem.costs,
        problem.limit,
        first,
        lambda choice: fitness(problem.named(choice)),
        generations=generations,
        offspring=offspring,
        seed=seed,
        identity=names,
        state=state,
        save=save,
    )
    return problem.result(choice, measured)
