"""One decoder layer run in stages, against the family's own layer run whole with hooks on it."""

import copy
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from compress.data.activations import ActivationStore
from compress.importance.weighting import mean_one, normalise
from compress.models.skeleton import Skeleton
from compress.quantization.inside import without
from compress.quantization.layer import run_layer
from compress.quantization.token_weights import TokenWeigher, keys_seen
from compress.recipe.token_importance import TokenImportance
from support.small_linears import second_moment
from support.tiny_checkpoints import FAMILIES, load_whole, random_ids

LAST = 1  # the layer that is run; in one family the only one with a sliding window
SIZES = ((2, 12), (1, 12), (3, 12))  # batches [B, T]

every_family = pytest.mark.parametrize("family", [*FAMILIES])


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@contextmanager
def opened(checkpoint, family="llama"):
    """A skeleton and its last layer with weights in it."""
    skeleton = Skeleton(checkpoint(family))
    with skeleton.layer(LAST, skeleton.read_layer(LAST)) as layer:
        yield skeleton, layer


def batches(hidden=64, seed=0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, hidden, generator=draw) + 0.3 for B, T in SIZES]


def token_weights(seed=1) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(B, T, generator=draw).exp() for B, T in SIZES]
    return [mean_one(r, torch.ones_like(r, dtype=torch.bool)) for r in drawn]


def stored(tensors, folder=None, name="x") -> ActivationStore:
    store = ActivationStore(folder, name)
    for tensor in tensors:
        store.append(tensor.clone())
    return store


def coarse(layer: nn.Module, group) -> None:
    """A quantisation that nobody could overlook: every weight to a multiple of 1/8."""
    for name in group:
        linear = layer.get_submodule(name)
        linear.weight = nn.Parameter((linear.weight * 8).round() / 8, requires_grad=False)


class Walk:
    """`run_layer` with everything it calls recorded: Hessians, the order of groups, tokens seen."""

    def __init__(
        self,
        skeleton,
        layer,
        quantise=coarse,
        weights=None,
        needs=lambda group: True,
        weighed=lambda name: True,
        alike=None,
    ):
        self.chosen, self.alike = weighed, alike
        self.skeleton, self.layer, self.change, self.weights = skeleton, layer, quantise, weights
        self.needs = needs
        self.groups: list[tuple[str, ...]] = []
        self.H: dict[str, Tensor] = {}
        self.weighed: list[tuple[int, Tensor, Tensor]] = []
        self.drift: dict[str, tuple[Tensor, Tensor] | None] = {}

    def quantise(self, group, H) -> None:
        self.groups.append(group)
        if H is not None:
            drift = H.take_drift()
            self.drift |= dict.fromkeys(group, drift)
            matrix = H.matrix()
            self.H |= dict.fromkeys(group, matrix)
        self.change(self.layer, group)

    def weigh(self, i, x, normed):
        self.weighed.append((i, x.clone(), normed.clone()))
        return None if self.weights is None else self.weights[i]

    def run(self, x: ActivationStore, y=None, work=None, **more) -> list[Tensor]:
        y = x if y is None else y
        run_layer(
            self.layer,
            self.skeleton.spec.layer(LAST),
            lambda i, z: self.skeleton.layer_inputs(LAST, z),
            x,
            y,
            ActivationStore() if work is None else work,
            quantise=self.quantise,
            needs_hessian=self.needs,
            weigh=self.weigh,
            uniform=lambda i, x: None if self.alike is None else self.alike[i],
            split=self.split,
            **more,
        )
        return list(y)

    def split(self, group):
        kinds = {on: tuple(n for n in group if self.chosen(n) == on) for on in (True, False)}
        return [(names, on) for on, names in kinds.items() if names]


def whole(skeleton, layer, xs) -> list[Tensor]:
    """The layer's own forward."""
    outputs = [layer(x, **skeleton.layer_inputs(LAST, x)) for x in xs]
    return [y[0] if isinstance(y, tuple) else y for y in outputs]


def seen_by(skeleton, layer, name, xs) -> Tensor:
    """What reaches one linear when the whole layer runs: [N, T, K]."""
    seen: list[Tensor] = []
    hook = layer.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    whole(skeleton, layer, xs)
    hook.remove()
    return torch.cat(seen)


def assert_close(found: Tensor, expected: Tensor, tolerance=1e-5) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


# ---- outputs ------------------------------------------------------------------------------------


@every_family
def test_with_nothing_quantised_it_is_the_layer(checkpoint, family):
    with opened(checkpoint, family) as (skeleton, layer):
        expected = whole(skeleton, layer, batches())
        walk = Walk(skeleton, layer, quantise=lambda *_: None)
        for found, y in zip(walk.run(stored(batches())), expected, strict=True):
            assert_close(found, y)


@every_family
def test_the_output_is_that_of_the_quantised_layer(checkpoint, family):
    with opened(checkpoint, family) as (skeleton, layer):
        before = whole(skeleton, layer, batches())
        found = Walk(skeleton, layer).run(stored(batches()))
        for y, expected, unquantised in zip(
            found, whole(skeleton, layer, batches()), before, strict=True
        ):
            assert_close(y, expected)
            assert (y - unquantised).abs().max() > 0.01 * unquantised.abs().max()


def test_where_activations_live_changes_no_bit(checkpoint, tmp_path):
    with opened(checkpoint) as (skeleton, layer):
        weights = copy.deepcopy(layer.state_dict())
        expected = None
        for folder in (None, tmp_path):
            for apart in (False, True):
                layer.load_state_dict(weights)
                x = stored(batches(), folder)
                y = ActivationStore(folder, "y") if apart else x
                work = ActivationStore(folder, "work")
                walk = Walk(skeleton, layer)
                outputs = walk.run(x, y, work)
                assert len(work) == 0
                assert len(y) == len(SIZES)
                if apart:
                    assert all(map(torch.equal, x, batches()))
                expected = expected or (outputs, walk.H)
                assert all(map(torch.equal, outputs, expected[0]))
                assert all(torch.equal(H, expected[1][name]) for name, H in walk.H.items())


# ---- Hessians -----------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("weighted", [False, True])
def test_hessians_are_those_of_a_layer_whose_earlier_groups_are_quantised(
    checkpoint, family, weighted
):
    weights = token_weights() if weighted else None
    with opened(checkpoint, family) as (skeleton, layer):
        oracle = copy.deepcopy(layer)
        walk = Walk(skeleton, layer, weights=weights)
        walk.run(stored(batches()))
        assert walk.groups == list(skeleton.spec.layer(LAST).groups)
        for group in skeleton.spec.layer(LAST).groups:
            for name in group:
                x = seen_by(skeleton, oracle, name, batches())
                expected = second_moment(x, torch.cat(weights) if weighted else None)
                assert_close(walk.H[name], expected)
            coarse(oracle, group)


@every_family
@pytest.mark.parametrize("masked", [False, True])
def test_linears_of_one_input_have_two_hessians_where_the_weights_are_for_some(
    checkpoint, family, masked
):
    """q and down are weighed; k, v, gate, up are not, o neither: what is masked counts nowhere."""
    weights, alike = token_weights(), None
    if masked:
        draw = torch.Generator().manual_seed(5)
        masks = [torch.rand(B, T, generator=draw) > 0.3 for B, T in SIZES]
        weights = [mean_one(w, mask) for w, mask in zip(weights, masks, strict=True)]
        alike = [mean_one(mask.float(), mask) for mask in masks]

    with opened(checkpoint, family) as (skeleton, layer):
        spec = skeleton.spec.layer(LAST)
        oracle = copy.deepcopy(layer)
        walk = Walk(
            skeleton,
            layer,
            weights=weights,
            alike=alike,
            weighed=lambda name: name in (spec.attention_in[0], spec.mlp_out),
        )
        walk.run(stored(batches()))
        assert set(walk.H) == set(spec.linears)
        assert [n for group in walk.groups for n in group] == [n for g in spec.groups for n in g]
        for group in spec.groups:
            for name in group:
                x = seen_by(skeleton, oracle, name, batches())
                chosen = weights if name in (spec.attention_in[0], spec.mlp_out) else alike
                expected = second_moment(x, None if chosen is None else torch.cat(chosen))
                assert_close(walk.H[name], expected)
            coarse(oracle, group)


def test_quantising_one_group_shows_in_the_hessians_of_the_next(checkpoint):
    with opened(checkpoint) as (skeleton, layer):
        weights = copy.deepcopy(layer.state_dict())
        groups, found = skeleton.spec.layer(LAST).groups, {}
        for first in [*groups, ()]:
            layer.load_state_dict(weights)
            walk = Walk(skeleton, layer, quantise=lambda _, g, f=first: g == f and coarse(layer, f))
            walk.run(stored(batches()))
            found[first] = [walk.H[group[0]] for group in groups]
        for i, first in enumerate(groups):
            same = [torch.equal(a, b) for a, b in zip(found[first], found[()], strict=True)]
            assert same == [True] * (i + 1) + [False] * (len(groups) - i - 1)


def test_each_linear_sees_each_token_once(checkpoint):
    with opened(checkpoint) as (skeleton, layer):
        tokens: Counter[str] = Counter()
        for name in skeleton.spec.layer(LAST).linears:
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: tokens.update({name: args[0].shape[:-1].numel()})
            )
        Walk(skeleton, layer).run(stored(batches()))
        assert tokens == dict.fromkeys(
            skeleton.spec.layer(LAST).linears, sum(B * T for B, T in SIZES)
        )


def test_groups_that_need_no_hessian_get_none(checkpoint):
    with opened(checkpoint) as (skeleton, layer):
        spec = skeleton.spec.layer(LAST)
        walk = Walk(skeleton, layer, needs=lambda group: group == spec.mlp_in)
        expected = Walk(skeleton, copy.deepcopy(layer))
        outputs = expected.run(stored(batches()))
        assert all(map(torch.equal, walk.run(stored(batches())), outputs))
        assert walk.groups == list(spec.groups)
        assert set(walk.H) == set(spec.mlp_in)
        assert torch.equal(walk.H[spec.mlp_in[0]], expected.H[spec.mlp_in[0]])


# ---- beside the 16-bit model --------------------------------------------------------------------


def damaged() -> list[Tensor]:
    return [x + 0.1 * noise for x, noise in zip(batches(), batches(seed=9), strict=True)]


@every_family
@pytest.mark.parametrize("weighted", [False, True])
def test_the_drift_is_that_between_a_layer_half_quantised_and_the_16_bit_layer(
    checkpoint, family, weighted
):
    weights = token_weights() if weighted else None
    with opened(checkpoint, family) as (skeleton, layer):
        before, oracle = copy.deepcopy(layer), copy.deepcopy(layer)
        expected_outputs = whole(skeleton, before, batches())
        x0 = stored(batches())
        walk = Walk(skeleton, layer, weights=weights)
        outputs = walk.run(stored(damaged()), x0=x0, y0=x0)
        plain = Walk(skeleton, copy.deepcopy(before), weights=weights)
        assert all(map(torch.equal, outputs, plain.run(stored(damaged()))))
        for found, expected in zip(x0, expected_outputs, strict=True):
            assert_close(found, expected)
        w = torch.cat(weights).unsqueeze(-1) if weighted else 1.0
        for group in skeleton.spec.layer(LAST).groups:
            for name in group:
                x = seen_by(skeleton, oracle, name, damaged()).double()
                difference = seen_by(skeleton, before, name, batches()).double() - x
                D, F = walk.drift[name]
                assert_close(
                    walk.H[name], second_moment(x, torch.cat(weights) if weighted else None)
                )
                K, N = x.shape[-1], len(x)
                cross = 2 / N * (w * difference).reshape(-1, K).T @ x.reshape(-1, K)
                square = 2 / N * (w * difference).reshape(-1, K).T @ difference.reshape(-1, K)
                assert_close(D, cross, 1e-4)
                assert_close(F, square, 1e-4)
            coarse(oracle, group)


def test_only_where_quantised_weights_come_before_has_equal_input_drifted(checkpoint):
    with opened(checkpoint) as (skeleton, layer):
        x0 = stored(batches())
        walk = Walk(skeleton, layer)
        walk.run(stored(batches()), x0=x0, y0=x0)
        drifted = [walk.drift[group[0]] is not None for group in skeleton.spec.layer(LAST).groups]
        assert drifted == [False, True, True, True]


def test_with_nothing_quantised_both_models_stay_the_same_to_the_bit(checkpoint):
    with opened(checkpoint) as (skeleton, layer):
        x0 = stored(batches())
        walk = Walk(skeleton, layer, quantise=lambda *_: None)
        outputs = walk.run(stored(batches()), x0=x0, y0=x0)
        assert all(map(torch.equal, outputs, x0))
        assert set(walk.drift.values()) == {None}


def test_where_the_16_bit_activations_live_changes_no_bit(checkpoint, tmp_path):
    """And the last batch, which does not count, has no twin."""
    with opened(checkpoint) as (skeleton, layer):
        weights = copy.deepcopy(layer.state_dict())
        expected = None
        for folder, apart in ((None, False), (None, True), (tmp_path, False), (tmp_path, True)):
            layer.load_state_dict(weights)
            x0 = stored(batches()[:2], folder, "x0")
            y0 = ActivationStore(folder, "y0") if apart else x0
            walk = Walk(skeleton, layer)
            outputs = walk.run(stored(damaged()), counted=2, x0=x0, y0=y0)
            assert len(outputs) == 3 and len(y0) == 2
            if apart:
                assert all(map(torch.equal, x0, batches()))
            drift = [D for pair in walk.drift.values() for D in pair]
            expected = expected or (outputs, list(y0), drift)
            for found, before in zip((outputs, y0, drift), expected, strict=True):
                assert all(map(torch.equal, found, before))


def test_groups_that_need_no_hessian_pass_the_16_bit_model_all_the_same(checkpoint):
    with opened(checkpoint) as (skeleton, layer):
        expected = whole(skeleton, copy.deepcopy(layer), batches())
        x0 = stored(batches())
        walk = Walk(
            skeleton, layer, needs=lambda group: group == (skeleton.spec.layer(LAST).mlp_out,)
        )
        walk.run(stored(damaged()), x0=x0, y0=x0)
        assert set(walk.drift) == set(walk.H) == {"mlp.down_proj"}
        for found, y in zip(x0, expected, strict=True):
            assert_close(found, y)


# ---- the layer's own parts ----------------------------------------------------------------------


def test_without_a_linear_its_place_is_taken_by_the_identity_and_given_back(checkpoint):
    with opened(checkpoint) as (_, layer):
        linear = layer.self_attn.o_proj
        with pytest.raises(KeyboardInterrupt), without(layer, "self_attn.o_proj") as parent:
            assert parent is layer.self_attn
            z = torch.randn(2, 64)
            assert parent.o_proj(z) is z
            raise KeyboardInterrupt
        assert layer.self_attn.o_proj is linear


def test_after_the_walk_every_linear_is_in_its_place(checkpoint):
    with opened(checkpoint) as (skeleton, layer):
        before = {name: layer.get_submodule(name) for name in skeleton.spec.layer(LAST).linears}
        Walk(skeleton, layer).run(stored(batches()))
        for name, linear in before.items():
            assert layer.get_submodule(name) is linear


# ---- token weights ------------------------------------------------------------------------------


def test_tokens_are_weighed_once_before_anything_is_quantised(checkpoint):
    with opened(checkpoint) as (skeleton, layer):
        walk = Walk(skeleton, layer)
        order = []
        walk.change = lambda layer, group: order.append(len(walk.weighed))
        walk.run(stored(batches()))
        assert order == [len(SIZES)] * 4
        assert [i for i, _, _ in walk.weighed] == list(range(len(SIZES)))
        for (_, x, normed), expected in zip(walk.weighed, batches(), strict=True):
            assert torch.equal(x, expected)
            assert torch.equal(normed, layer.input_layernorm(expected))


IDS = random_ids(2, 24, seed=3)  # three sliding windows long
ALL = torch.ones_like(IDS, dtype=torch.bool)
SOME = ALL.clone()
SOME[0, 15:] = False


def weighed(skeleton, layer, x, name, mask, minimum=0.01, power=1):
    """Token weights of the last layer for its input x [2, 24, d]."""
    counts = torch.bincount(IDS[mask], minlength=skeleton.config.vocab_size)
    weigher = TokenWeigher(
        TokenImportance(name=name, minimum=minimum, power=power), [(IDS, mask)], counts
    )
    inputs = skeleton.layer_inputs(LAST, x)
    normed = layer.input_layernorm(x)
    return weigher.weights(0, x, normed, layer, skeleton.spec.layer(LAST), inputs)


def test_uniform_tokens_have_no_weights_unless_some_are_masked(checkpoint):
    x = torch.randn(*IDS.shape, 64)
    with opened(checkpoint) as (skeleton, layer):
        assert weighed(skeleton, layer, x, "uniform", ALL) is None
        assert torch.equal(weighed(skeleton, layer, x, "uniform", SOME), SOME.float())


def test_what_a_query_sees_is_read_from_its_mask():
    causal = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    for width in (1, 4, 8):
        band = causal.triu(1 - width)
        assert keys_seen({"attention_mask": band}) == (width, None)
        low = torch.finfo(torch.float32).min
        assert keys_seen({"attention_mask": torch.where(band, 0.0, low)}) == (width, None)
    assert keys_seen({"attention_mask": None}) == keys_seen({"attention_mask": causal})
    assert keys_seen({"attention_mask": causal}) == (None, None)
    chunks = causal.clone()
    chunks[..., 5:, :5] = False
    ahead = causal.clone()
    ahead[..., 2, 3] = True
    padded = causal.clone()
    padded[..., -1, :] = False
    for mask in (chunks, ahead, padded):
        window, seen = keys_seen({"attention_mask": mask})
        assert window is None
        assert torch.equal(seen, mask[0])


def weigher_of(mask, **section):
    return TokenWeigher(TokenImportance(minimum=0.1, **section), [(IDS, mask)], torch.zeros(512))


def test_a_group_is_in_two_parts_where_patterns_take_some_of_it():
    group = ("a.q", "a.k", "a.v")
    cases = {
        None: [(group, True)],
        ("re:.*",): [(group, True)],
        ("m.0.a.k",): [(("a.q", "a.v"), False), (("a.k",), True)],
        ("re:.*[qv]$", "m.0.a.q"): [(("a.q", "a.v"), True), (("a.k",), False)],
        ("m.1.a.q",): [(group, False)],
    }
    for patterns, parts in cases.items():
        weigher = weigher_of(ALL, modules=patterns and list(patterns))
        assert weigher.parts("m.0.", group) == parts


def test_where_all_tokens_are_alike_those_that_are_masked_still_weigh_nothing():
    assert weigher_of(ALL).uniform(0, torch.zeros(1)) is None
    assert torch.equal(weigher_of(SOME).uniform(0, torch.zeros(1)), SOME.float())


@every_family
@pytest.mark.parametrize("mask", [ALL, SOME], ids=["all", "some"])
def test_attention_weights_are_the_column_sums_of_the_models_own_maps(checkpoint, family, mask):
    """transformers' eager attention on the whole model, against q, k and the streamed sums."""
    model = load_whole(checkpoint(family), attn_implementation="eager")
    result = model(IDS, output_attentions=True, output_hidden_states=True)
    maps = result.attentions[LAST].double()  # [B, h, T, T]
    sums = (maps * mask[:, None, :, None]).sum(dim=(1, 2))
    with opened(checkpoint, family) as (skeleton, layer):
        x = result.hidden_states[LAST]
        for power in (1, 2):
            found = weighed(skeleton, layer, x, "attention_concentration", mask, power=power)
            expected = mean_one(normalise(sums, 0.01, 1.0, mask) ** power, mask)
            assert_close(found, expected.double(), 1e-4)
            assert (found[~mask] == 0).all()


@every_family
def test_difference_weights_are_those_of_the_layers_output_at_full_precision(checkpoint, family):
    x = torch.randn(*IDS.shape, 64, generator=torch.Generator().manual_seed(0))
    with opened(checkpoint, family) as (skeleton, layer):
        (y,) = whole(skeleton, layer, [x])
        found = weighed(skeleton, layer, x, "activation_difference", ALL)
        scores = -(x - y).double().norm(dim=-1)
        assert_close(found, mean_one(normalise(scores, 0.01, 1.0, ALL), ALL).double(), 1e-4)
