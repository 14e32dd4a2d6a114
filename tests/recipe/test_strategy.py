"""The strategy: the budget's arithmetic, the published settings, JSON, and what is refused."""

import json
import math
import random
from itertools import accumulate, pairwise
from operator import mul

import pytest

from compress.errors import RecipeError, UsageError
from compress.recipe.strategy import METHODS, PruneStrategy, average_kept
from support.refusals import refused

# LLaVA-OneVision-7B, 28 layers: (kept, R1, R2, R3) as published with arXiv 2508.05211.
PUBLISHED = [
    (0.5008, 0.72332, 0.74875, 0.487),
    (0.2507, 0.26510, 0.98334, 0.87733),
    (0.1000, 0.11662, 1.0, 0.6011),
]


@pytest.mark.parametrize(("kept", "r1", "r2", "r3"), PUBLISHED)
def test_published_settings_have_the_published_average(kept, r1, r2, r3):
    strategy = PruneStrategy(stages=(0, 9, 18), ratios=(r1, r2, r3))
    assert strategy.average_kept(28) == pytest.approx(kept, abs=5e-5)


@pytest.mark.parametrize("keep", [1.0, 0.95, 0.7, 0.5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layers", [8, 28, 32])
def test_budgets_are_met_on_average(method, keep, layers):
    strategy = PruneStrategy.for_budget(method, keep, layers)
    kept_per_layer, share = [], 1.0
    for layer in range(layers):
        if layer in strategy.stages:
            share *= strategy.ratios[strategy.stages.index(layer)]
        kept_per_layer.append(share)
    assert sum(kept_per_layer) / layers == pytest.approx(keep)


@pytest.mark.parametrize(("layers", "stages"), [(28, (0, 9, 18)), (32, (0, 10, 20)), (2, (0,))])
def test_vflowopt_stages_are_the_papers(layers, stages):
    assert PruneStrategy.for_budget("vflowopt", 0.25, layers).stages == stages


def test_budgets_out_of_reach_say_what_is_possible():
    with refused(UsageError, [2], 0.25, 0.1):
        PruneStrategy.for_budget("fastv", 0.1, 8)
    with refused(UsageError, "layer 4", "4 layers"):
        average_kept((0, 4), (0.5, 0.5), 4)


@pytest.mark.parametrize("tokens", [7, 144, 1001])
@pytest.mark.parametrize("stages", [(0, 4, 8), (0, 3, 7), (2, 10), (5,)])
def test_counts_are_whole_shares_closest_to_the_budget_over_layers(tokens, stages):
    layers, draw = 12, random.Random(tokens)  # noqa: S311
    spans = [b - a for a, b in pairwise((*stages, layers))]
    for _ in range(50):
        ratios = [draw.uniform(0.5, 1) for _ in stages]
        counts = PruneStrategy(stages=stages, ratios=ratios).counts(tokens, layers)
        exact = [tokens * share for share in accumulate(ratios, mul)]
        assert all(abs(count - n) < 1 for count, n in zip(counts, exact, strict=True))
        assert all(a >= b for a, b in pairwise((tokens, *counts)))
        miss = abs(sum(s * (c - n) for s, c, n in zip(spans, counts, exact, strict=True)))
        assert miss <= max(spans) / 2 + 1e-6
        near = [math.floor(n + 0.5) for n in exact]
        assert (
            miss <= abs(sum(s * (c - n) for s, c, n in zip(spans, near, exact, strict=True))) + 1e-6
        )


def test_whole_shares_are_met_and_at_least_one_token_stays():
    strategy = PruneStrategy(stages=(0, 4, 8), ratios=(91.54 / 144, 12.82 / 91.54, 3.64 / 12.82))
    assert sum(strategy.counts(144, 12)) == 108  # a quarter; each to nearest would be 109
    strategy = PruneStrategy(stages=(0, 1), ratios=(0.25, 0.5))
    assert strategy.counts(200, 2) == (50, 25)
    with refused(UsageError, "stage 1", 0.125, 3):
        strategy.check_tokens(3)
    assert strategy.counts(3, 2) == (1, 1)  # the least possible
    assert (strategy.stage_without(3), strategy.stage_without(1)) == (1, 0)
    assert strategy.stage_without(4) is None


@pytest.mark.parametrize("method", METHODS)
def test_json_round_trip(tmp_path, method):
    strategy = PruneStrategy.for_budget(method, 0.6, 12)
    strategy.save(tmp_path / "s.json")
    assert PruneStrategy.load(tmp_path / "s.json") == strategy
    assert set(json.loads((tmp_path / "s.json").read_text())) == set(PruneStrategy.model_fields)


@pytest.mark.parametrize(
    ("settings", "field", "named"),
    [
        ({"ratio": [0.5]}, "ratio", "'ratios'"),
        ({"ratios": [0.5, 0.5]}, "ratios", 2),
        ({"ratios": [0.0]}, "ratios[0]", 0.0),
        ({"stages": [3, 3], "ratios": [0.5, 0.5]}, "stages", [3, 3]),
        ({"method": "fastv"}, "stages", "fastv"),
        ({"method": "divprune", "stages": [2]}, "stages", "divprune"),
        ({"method": "random", "cell": 3}, "cell", "random"),
        ({"stages": [2], "cell": 3}, "cell", "stage 0"),
        ({"entropy_weight": -1}, "entropy_weight", -1),
        ({"alpha": 0.1, "entropy_weight": 0.1}, "alpha", "voter_threshold"),
        ({"method": "vflow"}, "method", '"vflow"'),
    ],
)
def test_wrong_settings_name_file_and_field(tmp_path, settings, field, named):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(settings))
    with refused(RecipeError, f"{path}: {field}: ", named):
        PruneStrategy.load(path)


def test_files_of_earlier_versions_are_read_and_written_anew(tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"threshold": 3.0, "alpha": 0.2}))
    strategy = PruneStrategy.load(path)
    assert strategy == PruneStrategy(voter_threshold=3.0, entropy_weight=0.2)
    strategy.save(path)
    assert not {"threshold", "alpha"} & json.loads(path.read_text()).keys()


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_files_that_are_no_json_object(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with refused(RecipeError, tmp_path / "s.json", "JSON"):
        PruneStrategy.load(tmp_path / "s.json")
