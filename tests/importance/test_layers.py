"""Layer importance: closed forms of LIM and ZD, streaming, errors of quantisers, and controls."""

import math

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.importance.layers import (
    LAYER_IMPORTANCE,
    EmbeddingChange,
    UnitFacts,
    outlier_share,
)
from support.refusals import refused

B, T, D = 4, 32, 16
AVERAGES = ("token", "flattened")
every_average = pytest.mark.parametrize("average", AVERAGES)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def change(x, y, mask=None, **options) -> float:
    lim = EmbeddingChange(**options)
    lim.add_batch(x, y, mask)
    return lim.score()


def perpendicular(x):
    """Random vectors at right angles to x, token by token, and of its length."""
    u = torch.randn_like(x)
    u -= x * ((u * x).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True))
    return u * (x.norm(dim=-1, keepdim=True) / u.norm(dim=-1, keepdim=True))


def units(weights, **parts) -> list[UnitFacts]:
    """One unit a layer, with these lists of tensors as its linears."""
    return [
        UnitFacts(f"layer{i}", i, weights=lambda t=t: t, **parts) for i, t in enumerate(weights)
    ]


def bare(count, **parts) -> list[UnitFacts]:
    return [UnitFacts(f"layer{i}", i, **parts) for i in range(count)]


# Layer embedding change


@every_average
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_identity_scores_minus_one_a_reversal_one_a_right_angle_zero(average, dtype):
    x = (1000 * torch.randn(B, T, D)).to(dtype)
    assert change(x, x, average=average) == pytest.approx(-1, abs=1e-12)
    assert change(x, 0.5 * x, average=average) == pytest.approx(-1, abs=1e-12)
    assert change(x, -x, average=average) == pytest.approx(1, abs=1e-12)
    x = torch.randn(B, T, D, dtype=torch.float64)
    assert change(x, perpendicular(x), average=average) == pytest.approx(0, abs=1e-12)


@every_average
def test_a_larger_update_at_right_angles_scores_as_its_tangent_says(average):
    x = torch.randn(B, T, D, dtype=torch.float64)
    u = perpendicular(x)
    scores = [change(x, x + a * u, average=average) for a in (0, 0.1, 1, 3)]
    expected = [-1 / math.sqrt(1 + a * a) for a in (0, 0.1, 1, 3)]
    assert scores == pytest.approx(expected, abs=1e-12)
    assert scores == sorted(scores)


def test_one_token_of_great_norm_rules_the_flattened_average_and_not_the_mean_of_tokens():
    x = torch.randn(1, T, D, dtype=torch.float64)
    y = perpendicular(x)
    x[:, 0] *= 1e6
    y[:, 0] = x[:, 0]  # an attention sink that the layer leaves alone
    assert change(x, y, average="flattened") == pytest.approx(-1, abs=1e-9)
    assert change(x, y, average="token") == pytest.approx(-1 / T, abs=1e-9)
    assert change(x, y, average="flattened", sink=False) == pytest.approx(0, abs=1e-9)


@every_average
def test_without_the_sink_is_without_the_first_token_that_counts(average):
    x, y = torch.randn(2, B, T, D)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, :5] = False  # padding on the left
    later = mask & (torch.arange(T) > 0)
    later[1, 5] = False
    without = change(x, y, mask, average=average, sink=False)
    assert without == pytest.approx(change(x, y, later, average=average), abs=1e-12)
    assert without != pytest.approx(change(x, y, mask, average=average), abs=1e-4)


@every_average
def test_what_is_masked_does_not_count_whatever_it_holds(average):
    x, y = torch.randn(2, B, T, D)
    mask = torch.rand(B, T) < 0.6
    mask[2] = False  # a sample of padding
    expected = change(x, y, mask, average=average)
    x[~mask], y[~mask] = math.nan, math.inf
    assert change(x, y, mask, average=average) == expected
    if average == "token":
        rows = change(x[mask][None], y[mask][None])
        assert expected == pytest.approx(rows, abs=1e-12)


@every_average
def test_batches_of_any_size_give_the_same_score(average):
    x, y = torch.randn(2, 6, T, D)
    mask = torch.rand(6, T) < 0.8
    whole = change(x, y, mask, average=average)
    for size in (1, 4):
        streamed = EmbeddingChange(average)
        for part in torch.arange(6).split(size):
            streamed.add_batch(x[part], y[part], mask[part])
        assert streamed.score() == pytest.approx(whole, abs=1e-12)


def test_zero_vectors_are_unchanged_only_among_themselves():
    x, y = torch.zeros(1, 2, D), torch.zeros(1, 2, D)
    assert change(x, y) == -1
    y[0, 1] = 1.0
    assert change(x, y) == -0.5


def test_units_of_a_layer_share_what_it_changes():
    parts = [
        UnitFacts(f"{layer}.{part}", layer, change=-layer) for layer in range(3) for part in "ab"
    ]
    scores = LAYER_IMPORTANCE["layer_embedding_change"]().scores(iter(parts))
    assert list(scores) == [unit.name for unit in parts]
    assert list(scores.values()) == [0, 0, -1, -1, -2, -2]


def test_lim_of_nothing_or_of_nan_is_an_error_that_says_so():
    x = torch.randn(B, T, D)
    with refused(CompressError, "layer_embedding_change", "masked"):
        change(x, x, torch.zeros(B, T, dtype=torch.bool))
    with refused(CompressError, "layer_embedding_change", "first"):
        change(x[:, :1], x[:, :1], sink=False)
    broken = x.clone()
    broken[0, 3, 2] = math.nan
    with refused(CompressError, "layer_embedding_change", "NaN"):
        change(x, broken)


# Outlier weight count

COUNT = 400_000
GAUSSIAN, LAPLACIAN = 0.1586553, math.exp(-math.sqrt(2)) / 2


def laplacian(*shape):
    return torch.distributions.Laplace(0.0, 1.0).sample(shape)


@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
@pytest.mark.parametrize(
    ("draw", "share"), [(torch.randn, GAUSSIAN), (laplacian, LAPLACIAN)], ids=["gauss", "laplace"]
)
def test_share_of_outliers_is_that_of_the_distribution(draw, share, two_sided):
    W = 0.02 * draw(COUNT // 100, 100) + 0.003
    expected = 2 * share if two_sided else share
    tolerance = 4 * math.sqrt(expected * (1 - expected) / COUNT)
    assert outlier_share([W], two_sided) == pytest.approx(expected, abs=tolerance)


def test_zd_by_hand():
    W = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 4]])  # mean 0.5, deviation sqrt(1.75)
    assert outlier_share([W]) == 1 / 8
    assert outlier_share([-W]) == 0
    assert outlier_share([-W], two_sided=True) == 1 / 8
    # deviation 0.624 over all weights, not the 0.764 of a sample
    assert outlier_share([torch.tensor([0, 1, 1.5])]) == 1 / 3


def test_zd_sees_all_linears_of_a_unit_as_one_and_no_scale_or_shift():
    parts = [torch.randn(30, 40), 3 * torch.randn(20, 10), torch.randn(50, 8) - 1]
    pooled = outlier_share(parts)
    assert pooled == outlier_share([torch.cat([p.flatten() for p in parts])])
    assert pooled == outlier_share([8 * p + 2 for p in parts])
    own = [outlier_share([p]) for p in parts]
    assert pooled != pytest.approx(sum(own) / 3, abs=1e-3)


def test_zd_does_not_depend_on_how_a_matrix_is_cut_into_chunks(monkeypatch):
    W = torch.randn(100, 77)
    whole = outlier_share([W])
    monkeypatch.setattr("compress.importance.layers.CHUNK", 64)
    assert outlier_share([W]) == whole


def test_zd_ranks_heavy_tails_above_gaussians_and_reads_one_unit_at_a_time():
    log = []

    def unit(i, draw):
        def weights():
            log.append(f"read {i}")
            return [draw(100, 100), draw(100, 200)]

        return UnitFacts(f"layer{i}", i, weights=weights)

    def walk():
        for i, draw in enumerate((torch.randn, laplacian)):
            log.append(f"open {i}")
            yield unit(i, draw)

    scores = LAYER_IMPORTANCE["outlier_weight_count"]().scores(walk())
    assert scores["layer1"] > scores["layer0"]
    assert scores["layer0"] == pytest.approx(-GAUSSIAN, abs=0.01)
    assert log == ["open 0", "read 0", "open 1", "read 1"]


@pytest.mark.parametrize("W", [torch.ones(3, 3), torch.full((2, 2), math.nan), torch.empty(0, 4)])
def test_zd_of_weights_without_a_spread_is_an_error_that_names_the_unit(W):
    with refused(CompressError, "layer0", "outlier_weight_count"):
        LAYER_IMPORTANCE["outlier_weight_count"]().scores(units([[W]]))


# Errors by width

KINDS = ("weight_error", "output_error", "hidden_state_error", "logit_divergence")


@pytest.mark.parametrize("kind", KINDS)
def test_measured_errors_score_what_narrowing_costs(kind):
    tables = [{2: 0.5, 4: 0.1, 8: 0.0}, {8: 0.25, 2: 0.75}, {4: 0.3}]
    made = [UnitFacts(f"u{i}", i, errors={kind: table}) for i, table in enumerate(tables)]
    assert LAYER_IMPORTANCE[kind]().scores(made) == {"u0": 0.5, "u1": 0.5, "u2": 0.3}
    with refused(CompressError, "layer0", "nan"):
        LAYER_IMPORTANCE[kind]().scores(bare(1, errors={kind: {4: math.nan}}))


# Controls


def test_position_puts_the_ends_first_and_the_middle_last():
    scores = list(LAYER_IMPORTANCE["position"]().scores(bare(7)).values())
    assert scores == scores[::-1]
    assert scores[0] == 1
    assert scores[3] == 0
    assert scores[:4] == sorted(scores[:4], reverse=True)
    assert LAYER_IMPORTANCE["position"]().scores(bare(1)) == {"layer0": 1}
    parts = [UnitFacts(f"{layer}.{part}", layer) for layer in range(3) for part in "ab"]
    by_part = LAYER_IMPORTANCE["position"]().scores(parts)
    assert list(by_part.values()) == [1, 1, 0, 0, 1, 1]


def test_random_depends_on_seed_and_name_alone_and_is_uniform():
    draw = LAYER_IMPORTANCE["random"]
    scores = draw(seed=1).scores(bare(2000))
    assert scores == draw(seed=1).scores(bare(2000))
    assert draw(seed=1).scores(bare(2000)[7:9]) == {n: scores[n] for n in ("layer7", "layer8")}
    assert scores != draw(seed=2).scores(bare(2000))
    values = sorted(scores.values())
    # Kolmogorov-Smirnov: above 1.95 / sqrt(n) one time in a thousand, were they uniform
    assert max(abs(v - i / 2000) for i, v in enumerate(values)) < 1.95 / math.sqrt(2000)


def test_reverse_turns_the_order_round():
    scores = LAYER_IMPORTANCE["random"](3).scores(bare(20))
    reverse = LAYER_IMPORTANCE["reverse"](LAYER_IMPORTANCE["random"](3))
    turned = reverse.scores(bare(20))
    assert sorted(scores, key=scores.get) == sorted(turned, key=turned.get)[::-1]
    assert LAYER_IMPORTANCE["reverse"](reverse).scores(bare(20)) == scores
    weights = LAYER_IMPORTANCE["outlier_weight_count"]()
    assert LAYER_IMPORTANCE["reverse"](weights).needs == "weights"


OPTIONS = {"reverse": {"of": LAYER_IMPORTANCE["position"]()}}


@pytest.mark.parametrize("name", sorted(LAYER_IMPORTANCE))
def test_every_strategy_asks_for_what_it_needs_and_nothing_else(name):
    offers = {
        "weights": lambda: [torch.randn(4, 4)],
        "change": -0.5,
        "errors": {kind: {4: 0.1} for kind in KINDS},
    }
    importance = LAYER_IMPORTANCE[name](**OPTIONS.get(name, {}))
    given = {importance.needs: offers[importance.needs]} if importance.needs else {}
    scores = importance.scores(iter(bare(3, **given)))
    assert list(scores) == ["layer0", "layer1", "layer2"]
    if importance.needs:
        with refused(AssertionError, importance.needs):
            importance.scores(bare(3))


def test_an_unknown_importance_is_answered_with_the_known_ones():
    with refused(UsageError, "'outlier_weights_count'", "'outlier_weight_count'", "random"):
        LAYER_IMPORTANCE["outlier_weights_count"]
