"""Evolution of widths: the optimum where it can be listed, budgets, resuming to the same end."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from compress.allocation.allocators import ALLOCATORS, Budget, Unit, assignment, keep_top
from compress.errors import CompressError, UsageError
from support.refusals import refused
from support.unit_tables import byte_budgets, layers, uneven

knapsack, evolve = ALLOCATORS["knapsack"], ALLOCATORS["evolve"]


def interacting(units):
    """A fitness that no sum over units expresses: narrow neighbours hurt each other."""
    weight = {unit.name: 1 + unit.score for unit in units}

    def fitness(widths):
        noise = [weight[name] * 4.0**-bits for name, bits in widths.items()]
        return sum(noise) + 30 * sum(a * b for a, b in pairwise(noise))

    return fitness


def evolved(units, budget, **options):
    settings = {"fitness": interacting(units), "generations": 30, "offspring": 6, "seed": 3}
    return evolve(units, budget, **settings | options)


def test_evolve_finds_the_best_of_all_where_it_can_be_listed():
    units = uneven(6, seed=1)
    budget = byte_budgets(units)[3]
    fitness = interacting(units)
    shapes = [len(unit.widths) for unit in units]
    best = math.inf
    for choice in np.ndindex(*shapes):
        widths = {u.name: u.widths[k] for u, k in zip(units, choice, strict=True)}
        if assignment(units, widths).bytes <= budget.bytes:
            best = min(best, fitness(widths))
    found = evolved(units, budget, generations=120)
    assert found.fitness == pytest.approx(best)
    assert found.fitness == fitness(found.widths)
    assert found.fitness < fitness(knapsack(units, budget).widths)


@pytest.mark.parametrize("share", [0, 0.01, 0.1, 1])
def test_mutants_of_tight_and_of_endless_budgets_are_within_them(share):
    units = uneven(5, seed=2)
    budget = byte_budgets(units, [share])[0]
    tried = []
    fitness = interacting(units)
    evolved(units, budget, fitness=lambda widths: tried.append(widths) or fitness(widths))
    assert all(assignment(units, widths).bytes <= budget.bytes for widths in tried)


@pytest.mark.parametrize("seed", range(4))
def test_every_mutant_is_within_the_budget_and_the_parent_never_gets_worse(seed):
    units = uneven(12, seed=seed)
    budget = byte_budgets(units, fixed=9)[3]
    tried, states = [], []
    fitness = interacting(units)

    def watched(widths):
        tried.append(widths)
        return fitness(widths)

    result = evolved(units, budget, fitness=watched, seed=seed, save=states.append)
    assert all(assignment(units, widths, 9).bytes <= budget.bytes for widths in tried)
    assert len({tuple(widths.values()) for widths in tried}) == len(tried) > 50
    history = states[-1]["history"]
    assert len(history) == 31
    assert history == sorted(history, reverse=True)
    assert history[-1] == result.fitness < history[0]


def test_a_resumed_search_ends_where_an_uninterrupted_one_does():
    units = uneven(12, seed=6)
    budget = Budget(average_bits=3.4)
    states = []
    whole = evolved(units, budget, save=lambda state: states.append(json.dumps(state)))
    assert len(states) == 31
    assert whole.fitness < json.loads(states[10])["history"][-1]  # there was something left to find
    for done in (0, 1, 10, 30):
        later = []
        resumed = evolved(units, budget, state=json.loads(states[done]), save=later.append)
        assert resumed == whole
        assert [json.dumps(state) for state in later] == states[done + 1 :]
    assert evolved(units, budget, generations=10) == evolved(
        units, budget, generations=10, state=json.loads(states[4])
    )
    others = []
    evolved(units, budget, seed=4, save=others.append)
    assert others[-1]["history"] != json.loads(states[-1])["history"]


def test_the_state_of_another_search_is_refused():
    units = uneven(6, seed=6)
    budget, states = Budget(average_bits=3.4), []
    evolved(units, budget, generations=1, save=states.append)
    others = [
        (units, Budget(average_bits=3.5), {}),
        (uneven(6, seed=7), budget, {}),
        (units, budget, {"seed": 9}),
        (units, budget, {"identity": "another model"}),
    ]
    for other, bound, options in others:
        with refused(UsageError, "evolve", "state"):
            evolved(other, bound, state=states[0], **options)


def test_evolve_starts_where_it_is_told_and_within_the_budget():
    units = layers(8)
    blank = [Unit(u.name, u.weights, u.bytes, u.score) for u in units]
    turned = [Unit(u.name, u.weights, u.bytes, -u.score) for u in units]
    start = keep_top(turned, 4).widths  # the worst
    budget = Budget(average_bits=3)
    still = evolved(blank, budget, start=start, fitness=lambda widths: 0.0)
    assert still.widths == start  # no mutant is better
    assert evolved(blank, budget, start=start).fitness < interacting(units)(start)
    with refused(UsageError, "evolve", "budget"):
        evolved(blank, budget, start=keep_top(units, 5).widths)
    with refused(UsageError, "layer0", "predicted error"):
        evolved(blank, budget)


def test_evolve_refuses_an_error_budget_and_a_fitness_that_is_not_a_number():
    units = layers(4)
    with refused(UsageError, "evolve", "average_bits", "maximum_kl"):
        evolved(units, Budget(error=100))
    with refused(CompressError, "fitness", "NaN"):
        evolved(units, Budget(average_bits=3), fitness=lambda widths: math.nan)


def test_nothing_to_mutate_is_no_trouble():
    fixed = [Unit("u", 8, {4: 4}, errors={4: 1.0})]
    assert evolve(fixed, Budget(average_bits=4), fitness=lambda w: 1.0).widths == {"u": 4}
