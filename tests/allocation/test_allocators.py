"""Allocators: closed forms, brute force, textbook dynamic programming, budgets to the byte."""

import math
import random
from fractions import Fraction
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest

from compress.allocation import search
from compress.allocation.allocators import (
    ALLOCATORS,
    Assignment,
    Budget,
    Unit,
    assignment,
    keep_top,
    predict_errors,
)
from compress.errors import CompressError, UsageError
from support.refusals import refused
from support.unit_tables import byte_budgets, layers, uneven

top_n, knapsack, greedy = (ALLOCATORS[name] for name in ("top_n", "knapsack", "greedy"))
searches = pytest.mark.parametrize("allocate", [knapsack, greedy], ids=["knapsack", "greedy"])


def every_sum(units: list[Unit], number) -> np.ndarray:
    """`number(unit, width)` summed for every assignment: [widths ** units]."""
    rows = [np.array([number(unit, b) for b in unit.widths]) for unit in units]
    return reduce(np.add.outer, rows).ravel()


def bytes_of(unit, b):
    return unit.bytes[b]


def bits_of(unit, b):
    return unit.weights * b


def error_of(unit, b):
    return unit.errors[b]


# The paper's allocator


@pytest.mark.parametrize(("average", "high"), [(3.5, 30), (2.85, 17), (2, 0), (4, 40), (9, 40)])
def test_top_n_of_forty_layers_at_four_and_two_bits(average, high):
    units = layers(40)
    result = top_n(units, Budget(average_bits=average))
    best = sorted(units, key=lambda unit: unit.score)[40 - high :]
    assert {name for name, bits in result.widths.items() if bits == 4} == {u.name for u in best}
    assert result.average_bits == min(average, 4)


@pytest.mark.parametrize("widths", [(2, 4), (3, 8), (0, 4)])
@pytest.mark.parametrize(("count", "weights"), [(7, 1), (20, 5), (32, 1000)])
def test_top_n_is_the_closed_form_for_every_decimal_average(count, weights, widths):
    low, high = widths
    units = layers(count, widths, weights=weights)
    for hundredths in range(100 * low, 100 * high + 1):
        result = top_n(units, Budget(average_bits=hundredths / 100))
        share = (Fraction(hundredths, 100) - low) / (high - low)
        assert list(result.widths.values()).count(high) == math.floor(share * count)


def test_top_n_is_the_closed_form_for_bytes():
    units, fixed = layers(24, (4, 8)), 12_345
    at = {b: fixed + sum(u.bytes[b] for u in units) for b in (4, 8)}
    for available in range(at[4], at[8] + 400, 397):
        result = top_n(units, Budget(bytes=available, fixed_bytes=fixed))
        share = Fraction(available - at[4], at[8] - at[4])
        assert list(result.widths.values()).count(8) == min(24, math.floor(share * 24))
        assert result.bytes <= available


def test_top_n_of_unlike_sizes_takes_the_most_units_in_order_of_score_that_fit():
    units = uneven(12, (2, 4))
    for budget in byte_budgets(units, (0.1, 0.3, 0.5, 0.77, 1)):
        result = top_n(units, budget)
        high = list(result.widths.values()).count(4)
        assert result == keep_top(units, high)
        assert result.bytes <= budget.bytes
        assert all(keep_top(units, n).bytes > budget.bytes for n in range(high + 1, 13))


def test_top_n_says_what_it_can_reach_where_a_wider_width_is_the_smaller_file():
    units = [Unit("a", 8, {2: 50, 4: 40}, score=1), Unit("b", 8, {2: 20, 4: 40}, score=2)]
    with refused(UsageError, "budget", "69 bytes", "70 bytes"):
        top_n(units, Budget(bytes=69))
    assert top_n(units, Budget(bytes=70)).widths == {"a": 2, "b": 2}
    assert top_n(units, Budget(bytes=80)).widths == {"a": 4, "b": 4}


def test_top_n_within_an_error_takes_the_fewest_units():
    units = layers(16)
    for count in range(17):
        bound = keep_top(units, count).error
        assert top_n(units, Budget(error=bound)) == keep_top(units, count)
    with refused(UsageError, "maximum_kl"):
        top_n(units, Budget(error=keep_top(units, 16).error * 0.99))


def test_equal_scores_go_to_the_earlier_units():
    units = [Unit(f"u{i}", 10, {2: 20, 4: 40}) for i in range(5)]
    assert list(keep_top(units, 2).widths.values()) == [4, 4, 2, 2, 2]


def test_top_n_refuses_three_widths_and_leaves_fixed_units_alone():
    with refused(UsageError, "top_n", [2, 3, 4]):
        top_n(layers(4, (2, 3, 4)), Budget(average_bits=3))
    head = Unit("head", 1000, {8: 1000}, score=99)
    result = top_n([*layers(4), head], Budget(average_bits=4))
    assert result.widths == keep_top(layers(4), 2).widths | {"head": 8}
    assert result.average_bits == 4


def test_a_unit_may_be_left_out_as_width_zero():
    units = [Unit(f"u{i}", 100, {0: 0, 4: 58}, score=i) for i in range(4)]
    result = top_n(units, Budget(average_bits=3))
    assert result.widths == {"u0": 0, "u1": 4, "u2": 4, "u3": 4}
    assert result.bytes == 3 * 58


# The exact allocator


@pytest.mark.parametrize("seed", range(12))
def test_knapsack_equals_brute_force(seed):
    widths = [(2, 3, 4, 8), (2, 4), (3, 4, 8)][seed % 3]
    units = uneven(8 - seed % 4, widths, seed)
    errors, sizes = every_sum(units, error_of), every_sum(units, bytes_of)
    for budget in byte_budgets(units, fixed=777):
        within = errors[sizes <= budget.bytes - 777]
        assert knapsack(units, budget).error == pytest.approx(within.min(), rel=1e-12)
    bits, weights = every_sum(units, bits_of), sum(u.weights for u in units)
    for average in (widths[0], 3.1, 3.5, 3.99, 7.25):
        if bits.min() <= average * weights:
            within = errors[bits <= Fraction(str(average)) * weights]
            found = knapsack(units, Budget(average_bits=average))
            assert found.error == pytest.approx(within.min(), rel=1e-12)
    for bound in np.quantile(errors, [0, 0.001, 0.2, 0.9, 1]):
        found = knapsack(units, Budget(error=float(bound)))
        assert found.bytes == sizes[errors <= bound * (1 + 1e-12)].min()
        assert found.error <= bound * (1 + 1e-12)


def test_knapsack_equals_textbook_dynamic_programming_on_many_units():
    draw, count = random.Random(5), 60  # noqa: S311
    units = [
        Unit(
            f"u{i}",
            weights := draw.randint(1, 6),
            {b: weights * b for b in (2, 3, 4, 8)},
            errors={b: draw.random() * weights / 3.0**b for b in (2, 3, 4, 8)},
        )
        for i in range(count)
    ]
    most = sum(8 * u.weights for u in units)
    table = np.zeros(most + 1)  # least error within each number of bits
    for unit in units:
        shifted = [
            np.concatenate(
                [np.full(unit.weights * b, np.inf), table[: most + 1 - unit.weights * b]]
            )
            + unit.errors[b]
            for b in unit.widths
        ]
        table = np.min(shifted, axis=0)
    least = sum(2 * u.weights for u in units)
    for limit in range(least, most + 1, 37):
        assert knapsack(units, Budget(bytes=limit)).error == pytest.approx(table[limit], rel=1e-12)


@pytest.mark.parametrize("average", [2, 2.4, 3.3, 3.9])
def test_knapsack_on_predicted_errors_is_top_n_for_two_widths_and_one_size(average):
    for seed in range(5):
        units = layers(30, seed=seed)
        budget = Budget(average_bits=average)
        assert knapsack(units, budget) == top_n(units, budget)
        other = predict_errors(units, minimum=0.3)
        assert knapsack(other, budget).widths == top_n(units, budget).widths


def test_more_budget_never_gives_more_error_and_more_error_never_more_bytes():
    units = uneven(14, seed=3)
    shares = [i / 60 for i in range(61)]
    errors = [knapsack(units, b).error for b in byte_budgets(units, shares)]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(errors))
    assert len(set(errors)) > 30
    sizes = [knapsack(units, Budget(error=e)).bytes for e in errors]
    assert sizes == sorted(sizes)


def test_among_equal_errors_the_cheapest_then_the_earlier_unit():
    flat = [Unit(f"u{i}", 8, {2: 2, 3: 3, 4: 4}, errors={2: 1, 3: 0.5, 4: 0.5}) for i in range(4)]
    assert set(knapsack(flat, Budget(average_bits=4)).widths.values()) == {3}
    same = [Unit(f"u{i}", 8, {2: 2, 4: 4}, errors={2: 0.3, 4: 0.1}) for i in range(7)]
    for allocate in (knapsack, greedy):
        result = allocate(same, Budget(average_bits=3))
        assert list(result.widths.values()) == [4, 4, 4, 2, 2, 2, 2]
    assert list(knapsack(same, Budget(error=1.5)).widths.values()) == [4, 4, 4, 2, 2, 2, 2]


def test_the_order_of_the_units_does_not_change_what_is_reached():
    units = uneven(10, seed=8)
    shuffled = random.Random(1).sample(units, 10)  # noqa: S311
    for budget in byte_budgets(units):
        one, other = knapsack(units, budget), knapsack(shuffled, budget)
        assert (one.widths, one.bytes, one.error) == (other.widths, other.bytes, other.error)


def test_too_many_states_are_an_error_with_a_way_out(monkeypatch):
    units = uneven(14, seed=3)
    budget = byte_budgets(units)[3]
    knapsack(units, budget)
    monkeypatch.setattr(search, "MAX_STATES", 30)
    with refused(UsageError, "knapsack", 30, "greedy"):
        knapsack(units, budget)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300, 0])
def test_the_unit_of_errors_does_not_matter(scale):
    draw = [0.5, 0.25, 0.75, 0.375]
    units = [
        Unit(f"u{i}", 8, {2: 2, 4: 4}, errors={2: s * scale, 4: s * scale / 16})
        for i, s in enumerate(draw)
    ]
    result = knapsack(units, Budget(average_bits=3))
    assert list(result.widths.values()) == ([4, 2, 4, 2] if scale else [2, 2, 2, 2])
    assert knapsack(units, Budget(error=result.error)).widths == result.widths


# The greedy allocator


@pytest.mark.parametrize("seed", range(6))
def test_greedy_stays_within_the_budget_and_never_beats_the_optimum(seed):
    units = uneven(10, seed=seed)
    for budget in byte_budgets(units, fixed=50):
        best, quick = knapsack(units, budget), greedy(units, budget)
        assert quick.bytes <= budget.bytes
        assert quick.error >= best.error * (1 - 1e-12)
        least = Budget(error=best.error)
        quick = greedy(units, least)
        assert quick.error <= least.error * (1 + 1e-12)
        assert quick.bytes >= knapsack(units, least).bytes


def test_greedy_is_optimal_for_one_size_and_convex_errors():
    units = layers(25, (2, 3, 4), seed=4)
    for step in range(0, 26):
        budget = Budget(average_bits=2 + 2 * step / 25)
        assert greedy(units, budget).error == pytest.approx(knapsack(units, budget).error)


def test_greedy_goes_on_with_what_still_fits():
    big = Unit("big", 100, {2: 100, 4: 200}, errors={2: 1000, 4: 0})
    small = Unit("small", 10, {2: 10, 4: 20}, errors={2: 1, 4: 0})
    assert greedy([big, small], Budget(bytes=214)).widths == {"big": 4, "small": 2}
    assert greedy([big, small], Budget(bytes=199)).widths == {"big": 2, "small": 4}
    steps = Unit("steps", 100, {2: 100, 3: 150, 8: 400}, errors={2: 1000, 3: 900, 8: 0})
    assert greedy([steps], Budget(bytes=399)).widths == {"steps": 3}


@searches
def test_of_widths_that_take_the_same_bytes_the_more_exact_is_taken(allocate):
    padded = Unit("padded", 8, {2: 32, 3: 32, 4: 40}, errors={2: 1.0, 3: 0.5, 4: 0.1})
    assert allocate([padded], Budget(bytes=39)).widths == {"padded": 3}


# Budgets


@searches
def test_a_budget_is_met_to_the_byte_and_not_by_one_less(allocate):
    units = layers(10)
    wanted = keep_top(units, 6, fixed_bytes=123)
    result = allocate(units, Budget(bytes=wanted.bytes, fixed_bytes=123))
    assert result == wanted
    assert allocate(units, Budget(bytes=wanted.bytes - 1, fixed_bytes=123)) == keep_top(
        units, 5, fixed_bytes=123
    )


@searches
def test_an_error_that_was_reported_can_be_asked_for(allocate):
    """Rounded to a double it may be less than the sum that it stands for."""
    draw = random.Random(0)  # noqa: S311
    for _ in range(40):
        units = [
            Unit(f"{i}", 1, {2: 1, 4: 2}, errors={b: 1 + draw.random() for b in (2, 4)})
            for i in range(5)
        ]
        least = math.fsum(min(unit.errors.values()) for unit in units)
        assert allocate(units, Budget(error=least)).error == pytest.approx(least, rel=1e-15)


@searches
def test_an_endless_budget_gives_every_unit_its_best(allocate):
    units = layers(6, (2, 3, 8))
    for budget in (Budget(average_bits=16), Budget(bytes=10**15)):
        assert set(allocate(units, budget).widths.values()) == {8}
    assert set(allocate(units, Budget(error=1e300)).widths.values()) == {2}


def test_average_bits_are_weighted_by_the_number_of_weights():
    units = [
        Unit("large", 900, {2: 1, 4: 1}, errors={2: 5, 4: 0}),
        Unit("little", 100, {2: 1, 4: 1}, errors={2: 5, 4: 0}),
    ]
    result = knapsack(units, Budget(average_bits=3))
    assert result.widths == {"large": 2, "little": 4}
    assert result.average_bits == pytest.approx(2.2)


def impossible(units):
    """Each kind of budget just out of reach, and what the message quotes as reachable."""
    least = sum(min(u.bytes.values()) for u in units)
    error = math.fsum(min(u.errors.values()) for u in units)
    return [
        (Budget(average_bits=2.03), "average_bits", lambda v: Budget(average_bits=float(v))),
        (
            Budget(bytes=least + 999, fixed_bytes=1000),
            "bytes",
            lambda v: Budget(bytes=int(v.replace(",", "")), fixed_bytes=1000),
        ),
        (Budget(error=error * 0.999), "maximum_kl", lambda v: Budget(error=float(v))),
    ]


@pytest.mark.parametrize("kind", range(3), ids=["average", "bytes", "error"])
@pytest.mark.parametrize("allocate", [top_n, knapsack, greedy], ids=["top_n", "knapsack", "greedy"])
def test_an_impossible_budget_names_the_closest_that_is_possible(allocate, kind):
    fixed = Unit("fixed", 77, {8: 77}, errors={8: 0.0123})
    units = [*layers(11), fixed]
    budget, word, as_budget = impossible(units)[kind]
    with refused(UsageError, word) as caught:
        allocate(units, budget)
    words = str(caught.value).split()
    quoted = [part.strip(",.") for part in words if part[0].isdigit()][1]
    assert allocate(units, as_budget(quoted)).widths  # what is quoted can be asked for


def test_the_closest_byte_budget_is_the_smallest_checkpoint():
    units = layers(3)
    with refused(UsageError, "budget", "100 bytes", "1,870 bytes", "1,000"):
        knapsack(units, Budget(bytes=100, fixed_bytes=1000))
    assert knapsack(units, Budget(bytes=1870, fixed_bytes=1000)).bytes == 1870


@pytest.mark.parametrize("bounds", [{}, {"average_bits": 3, "bytes": 5}, {"error": math.nan}])
def test_a_budget_is_one_finite_bound(bounds):
    with refused(UsageError, "average_bits", "budget", "maximum_kl"):
        Budget(**bounds)


def test_what_cannot_be_allocated_says_so():
    with refused(UsageError, "allocate", "width"):
        knapsack([], Budget(average_bits=3))
    blank = Unit("model.layers.0", 8, {2: 2, 4: 4})
    with refused(UsageError, "model.layers.0", "predicted error"):
        knapsack([blank], Budget(average_bits=3))
    broken = Unit("model.layers.0", 8, {2: 2, 4: 4}, errors={2: math.inf, 4: 1})
    with refused(CompressError, "model.layers.0", "inf"):
        greedy([broken], Budget(average_bits=3))


def test_predicted_errors_follow_scores_sizes_and_bits():
    units = predict_errors(
        [Unit("a", 10, {2: 1, 4: 2}, score=-3), Unit("b", 40, {2: 1, 4: 2}, score=7)], minimum=0.1
    )
    assert units[0].errors == pytest.approx({2: 0.1 * 10 / 16, 4: 0.1 * 10 / 256})
    assert units[1].errors == pytest.approx({2: 40 / 16, 4: 40 / 256})
    alike = predict_errors([Unit("a", 10, {2: 1}), Unit("b", 10, {2: 1})])
    assert alike[0].errors == alike[1].errors == {2: 10 / 16}


def test_an_assignment_adds_up_and_is_the_same_each_time():
    units = uneven(9, seed=2)
    budget = byte_budgets(units, fixed=11)[3]
    for allocate in (knapsack, greedy):
        result = allocate(units, budget)
        assert result == allocate(uneven(9, seed=2), budget)
        assert result.bytes == 11 + sum(u.bytes[result.widths[u.name]] for u in units)
        assert result == assignment(units, result.widths, 11)
    blank = Unit("u", 8, {2: 2, 4: 4})
    assert keep_top([blank], 1) == Assignment({"u": 4}, 4.0, 4, None)
