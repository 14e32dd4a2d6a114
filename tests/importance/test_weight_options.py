"""Every option of the token weights against plain Python, one sample and one number at a time."""

import math
import random

import numpy as np
import pytest
import torch

from compress.errors import CompressError
from compress.importance.tokens import TOKEN_IMPORTANCE
from compress.importance.weighting import (
    TokenSettings,
    effective_sample_size,
    find_sinks,
    hold_cap,
    hold_sample_size,
    mean_one,
    token_weights,
)
from support.refusals import refused
from support.token_contexts import context_of, settings_of, weights_of, whole_context

HARD = {"first_n", "first_last_n", "chunks"}
SCORED = sorted(set(TOKEN_IMPORTANCE) - HARD - {"uniform"})
NAN = float("nan")


# ---- the oracle ---------------------------------------------------------------------------------


def bisected(function, target, low, high):
    """Where an increasing function reaches the target."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return high


def seen_by(t, mask, window):
    return sum(mask[t : t + (window or len(mask))])


def by_hand(s, mask, o: TokenSettings, window=None) -> list[float]:
    """The weights of one sample in 64 bits; `s` and `mask` are lists."""
    everyone = [t for t, m in enumerate(mask) if m]
    n = len(everyone)
    typical = sum(abs(s[t]) for t in everyone) / n
    sinks = {t for t in everyone if o.sinks != "keep" and abs(s[t]) > 20 * typical}
    tokens = [t for t in everyone if not (o.sinks == "drop" and t in sinks)]
    power = {None: 1, "square": 2, "sqrt": 0.5}[o.scale]
    value = {t: math.copysign(abs(s[t]) ** power, s[t]) * (-1 if o.reverse else 1) for t in tokens}
    for t in tokens:
        value[t] /= seen_by(t, mask, window) ** {"linear": 1, "sqrt": 0.5}.get(o.normalize, 0)
    span = [value[t] for t in tokens if t not in sinks]
    q = 1.0 if o.quantile is None else o.quantile
    low, high = np.quantile(span, 1 - q), np.quantile(span, q)
    r = {}
    for t in tokens:
        share = min(max((value[t] - low) / (high - low), 0), 1)
        r[t] = value[t] if o.normalize == "none" else o.minimum + share * (o.maximum - o.minimum)
    ranked = sorted(tokens, key=lambda t: (value[t], t))
    for rank, t in enumerate(ranked):
        if o.mask is not None:
            r[t] = float(rank >= math.floor(round(o.mask * len(tokens), 6)))
        if o.truncate is not None and rank < math.floor(round(o.truncate * len(tokens), 6)):
            r[t] = 0.0
        if o.bins is not None:
            r[t] = np.linspace(o.minimum, o.maximum, o.bins)[rank * o.bins // len(tokens)]
    w = {t: r[t] ** o.power for t in tokens}
    total = sum(w.values())
    w = {t: x * n / total for t, x in w.items()}
    if o.weight_cap is not None:
        cap = o.weight_cap
        c = bisected(lambda c: sum(min(cap, c * x) for x in w.values()), n, 0, 1e9)
        w = {t: min(cap, c * x) for t, x in w.items()}
    if o.sample_size_floor is not None:
        carried = {t: x for t, x in w.items() if x > 0}

        def mixed(a):
            return {t: (1 - a) * x + a * n / len(carried) for t, x in carried.items()}

        def size(a):
            return n**2 / sum(x**2 for x in mixed(a).values())

        least = o.sample_size_floor * n
        a = 0.0 if size(0) >= least else bisected(size, least, 0, 1)
        w |= mixed(a)
    return [w.get(t, 0.0) for t in range(len(mask))]


def check(scores, mask, settings, monkeypatch, window=None, tolerance=1e-6):
    """The weights of given scores, to a millionth of the largest one."""
    given = type("Given", (), {"score": lambda self, context: scores})
    monkeypatch.setitem(TOKEN_IMPORTANCE, "given", given)
    context = context_of(torch.zeros(*scores.shape, 1), mask=mask, sliding_window=window)
    found = token_weights(settings, context)
    for s, m, w in zip(scores.double(), mask, found.w, strict=True):
        expected = torch.tensor(by_hand(s.tolist(), m.tolist(), settings, window))
        assert (w - expected).abs().max() <= tolerance * expected.max(), settings
    return found


def drawn(seed, length=60, signed=False, sinks=True):
    """Scores [4, T] that spread over two decades, a sink in some, and a mask."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, length, generator=draw).exp()
    if signed:
        scores *= torch.randn(4, length, generator=draw).sign()
    if sinks:
        scores[1, 7], scores[2, 0] = 300.0, 900.0
    mask = torch.rand(4, length, generator=draw) > 0.2
    mask[:, [0, 7]] = True
    mask[3] = True
    return scores, mask


OPTIONS = {
    "scale": ["square", "sqrt"],
    "reverse": [True],
    "normalize": ["linear", "sqrt", "none"],
    "quantile": [0.51, 0.9, 0.99],
    "mask": [0.1, 0.5, 0.98],
    "truncate": [0.1, 0.5, 0.7],
    "bins": [2, 5, 1000],
    "sinks": ["clamp", "drop"],
    "weight_cap": [1.01, 3.0, 1e6],
    "sample_size_floor": [0.1, 0.5, 1.0],
    "power": [2],
}


@pytest.mark.parametrize(("option", "value"), [(o, v) for o in OPTIONS for v in OPTIONS[o]])
@pytest.mark.parametrize("window", [None, 9])
def test_each_option_alone(option, value, window, monkeypatch):
    signed = value not in ("none",)
    if (option, value) == ("sample_size_floor", 1.0):
        signed = False
    for seed in range(3):
        settings = TokenSettings("given", **{"minimum": 0.02} | {option: value})
        check(*drawn(seed, signed=signed), settings, monkeypatch, window)


@pytest.mark.parametrize("seed", range(60))
def test_options_together(seed, monkeypatch):
    """Any that a recipe may hold at once, drawn at random."""
    chance = random.Random(seed)  # noqa: S311  tests, not secrets
    chosen = {"minimum": chance.choice([0.005, 0.1, 0.5]), "maximum": chance.choice([1.0, 3.0])}
    for option in chance.sample(sorted(OPTIONS), 5):
        chosen[option] = chance.choice(OPTIONS[option])
    for one in chance.sample(["mask", "truncate", "bins"], 2):
        chosen.pop(one, None)
    if chosen.get("normalize") == "none":
        for name in ("reverse", "bins", "quantile"):
            chosen.pop(name, None)
    if "mask" in chosen or "truncate" in chosen:
        chosen.pop("weight_cap", None)
        chosen.pop("sample_size_floor", None)
    if "sinks" in chosen and chosen.get("sample_size_floor") == 1.0:
        chosen["sample_size_floor"] = 0.9
    if chosen.get("weight_cap") == 1.01:
        chosen["weight_cap"] = 1.2
    signed = chosen.get("normalize") != "none" and chance.random() < 0.5
    check(*drawn(seed, signed=signed), TokenSettings("given", **chosen), monkeypatch)


# ---- what each promises -------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.7, 0.875, 0.999])
@pytest.mark.parametrize("length", [10, 40, 77])
def test_ranks_keep_exactly_the_stated_count_whatever_is_tied(share, length, monkeypatch):
    draw = torch.Generator().manual_seed(length)
    scores = torch.randint(3, (5, length), generator=draw).float()
    scores[:, :3] = torch.arange(3.0)
    mask = torch.ones(5, length, dtype=torch.bool)
    for option in ("mask", "truncate"):
        settings = TokenSettings("given", 0.1, **{option: share})
        found = check(scores, mask, settings, monkeypatch).w
        assert ((found == 0).sum(dim=-1) == math.floor(round(share * length, 9))).all()
    counts = check(scores, mask, TokenSettings("given", 0.1, bins=4), monkeypatch).w
    for row in counts:
        _, sizes = row.unique(return_counts=True)
        assert sizes.max() - sizes.min() <= 1 and len(sizes) == 4


def test_sinks_are_found_wherever_they_are_and_no_place_alone_is_one():
    uniform = TOKEN_IMPORTANCE["position"]().score(
        context_of(torch.zeros(1, 4096, 1))  # what evenly spread attention gives
    )
    mask = torch.ones(1, 4096, dtype=torch.bool)
    assert not find_sinks(uniform, mask).any()
    for place in (0, 25, 4095):
        scores = uniform.clone()
        scores[0, place] = 100.0  # 2 % of what is given away
        assert find_sinks(scores, mask).nonzero().tolist() == [[0, place]]
        mask_of_it = mask.clone()
        mask_of_it[0, place] = False
        assert not find_sinks(scores, mask_of_it).any()


def test_a_sink_no_longer_decides_what_others_weigh(monkeypatch):
    scores, mask = drawn(0)
    mask[:] = True
    plain = TokenSettings("given", 0.01)
    sizes = {}
    for sinks in ("keep", "clamp", "drop"):
        settings = TokenSettings("given", 0.01, sinks=sinks)
        found = check(scores, mask, settings, monkeypatch)
        sizes[sinks] = effective_sample_size(found.w[1:3])
        assert found.sinks.tolist() == ([0, 0, 0, 0] if sinks == "keep" else [0, 1, 1, 0])
        assert torch.equal(found.w[0], check(scores, mask, plain, monkeypatch).w[0])
    assert found.w[1, 7] == 0 and found.w[2, 0] == 0
    assert sizes["clamp"] > 1.5 * sizes["keep"]


def test_the_cap_holds_and_changes_nothing_that_is_below_it():
    draw = torch.Generator().manual_seed(0)
    mask = torch.rand(20, 200, generator=draw) > 0.3
    w = mean_one(torch.randn(20, 200, generator=draw).mul(2).exp(), mask)
    for cap in (1.001, 2.0, 10.0, 1e9):
        held = hold_cap(w, mask, cap)
        assert held.max() <= cap * (1 + 1e-6)
        torch.testing.assert_close(held.sum(dim=-1), mask.sum(dim=-1).float())
        free = held < cap * (1 - 1e-6)
        for row, before, part in zip(held, w, free & mask, strict=True):
            ratio = row[part] / before[part]
            assert len(ratio) == 0 or ratio.max() / ratio.min() < 1 + 1e-5
        assert torch.equal(held > 0, w > 0)
    torch.testing.assert_close(hold_cap(w, mask, 1e9), w)


def test_the_floor_is_met_by_the_smallest_mixture_and_is_idle_above_it():
    draw = torch.Generator().manual_seed(1)
    mask = torch.rand(20, 200, generator=draw) > 0.3
    w = mean_one(torch.randn(20, 200, generator=draw).mul(3).exp(), mask)
    n = mask.sum(dim=-1)
    for share in (0.01, 0.3, 0.9, 1.0):
        mixed, a = hold_sample_size(w, mask, share)
        for j in range(20):
            size, before = (effective_sample_size(x[j : j + 1]) for x in (mixed, w))
            assert size >= share * n[j] * (1 - 1e-5)
            if before >= share * n[j]:
                assert a[j] == 0 and torch.equal(mixed[j], w[j])
            else:  # met exactly: any less of the mixture would miss it
                assert size == pytest.approx(float(share * n[j]), rel=1e-5) and 0 < a[j] <= 1
        torch.testing.assert_close(mixed.sum(dim=-1), n.float())
        assert (mixed[~mask] == 0).all()


@pytest.mark.parametrize("option", ["weight_cap", "sample_size_floor"])
def test_a_bound_that_too_few_tokens_could_hold_is_an_error(option, monkeypatch):
    """Nine tenths weigh nothing: their scores are the lowest, and r_min is 0."""
    scores = torch.zeros(2, 100)
    scores[0], scores[1, :10] = torch.arange(1.0, 101), 1.0
    value = {"weight_cap": 5, "sample_size_floor": 0.5}[option]
    mask = torch.ones(2, 100, dtype=torch.bool)
    with refused(CompressError, "sample 1", "10 of 100", f"token_importance.{option}", value):
        check(scores, mask, TokenSettings("given", **{option: value}), monkeypatch)


# ---- faults of the published code, each a test --------------------------------------------------


@pytest.mark.parametrize("scale", [None, "square", "sqrt"])
@pytest.mark.parametrize("normalize", ["default", "linear", "sqrt"])
@pytest.mark.parametrize("name", SCORED)
def test_reversing_gives_numbers_and_the_other_order(name, scale, normalize):
    """A square root of negated scores would be NaN."""
    context = whole_context()
    options = {"scale": scale, "normalize": normalize}
    forth = weights_of(name, context, **options)
    back = weights_of(name, context, reverse=True, **options)
    assert forth.isfinite().all() and back.isfinite().all()
    for a, b in zip(forth, back, strict=True):
        a, b = a / a.max(), b / b.max()  # r: its range is [0.01, 1] both ways
        torch.testing.assert_close(a + b, torch.full_like(a, 1.01), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", SCORED)
def test_the_quantile_is_honoured_for_every_strategy(name, monkeypatch):
    context = whole_context()
    scores = settings_of(name).strategy().score(context)
    settings = settings_of(name, quantile=0.8)
    found = token_weights(settings, context).w
    given = TokenSettings("given", 0.01, quantile=0.8)
    torch.testing.assert_close(found, check(scores, context.mask, given, monkeypatch).w)
    assert not torch.allclose(found, weights_of(name, context))


@pytest.mark.parametrize(("option", "value"), [(o, v) for o in OPTIONS for v in OPTIONS[o]])
@pytest.mark.parametrize("constant", [0.25, 3.3])
def test_equal_scores_are_uniform_whatever_is_asked_for(option, value, constant, monkeypatch):
    """Min-max of a constant is 0 / 0; here it is plain GPTQ to the bit, and it is counted."""
    scores, mask = torch.full((3, 40), constant), torch.rand(3, 40) > 0.3
    given = type("Given", (), {"score": lambda self, context: scores})
    monkeypatch.setitem(TOKEN_IMPORTANCE, "given", given)
    if option == "normalize" and value in ("linear", "sqrt"):  # by place, so no longer equal
        return
    context = context_of(torch.zeros(3, 40, 1), mask=mask)
    found = token_weights(TokenSettings("given", 0.1, **{option: value}), context)
    assert found.flat.all()
    assert (found.w[mask] == 1).all() and (found.w[~mask] == 0).all()


@pytest.mark.parametrize("option", ["scale", "reverse", "quantile", "mask", "bins", "sinks"])
@pytest.mark.parametrize("value", [NAN, math.inf])
def test_scores_that_are_no_numbers_are_an_error_with_every_option(option, value, monkeypatch):
    scores, mask = drawn(0)
    scores[0, 0] = value
    with refused(CompressError, "token importance", "NaN"):
        settings = TokenSettings("given", 0.1, **{option: OPTIONS[option][0]})
        check(scores, mask, settings, monkeypatch)


def test_raw_scores_below_zero_name_what_asked_for_them(monkeypatch):
    scores, mask = drawn(0, signed=True)
    with refused(CompressError, "token weights", "normalize", "none"):
        check(scores, mask, TokenSettings("given", normalize="none"), monkeypatch)
