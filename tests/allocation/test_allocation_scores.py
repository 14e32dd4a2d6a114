"""What layers score on a real model, against the same quantity taken from plain transformers.

Hooks show what a layer reads and writes; a run at one width gives the solver's weights.
"""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from compress.allocation.allocators import Unit
from compress.allocation.score_walk import ScoreWalk
from compress.allocation.scores import Scorer, copies_of_states
from compress.data.windows import CalibrationWindows
from compress.errors import CompressError, RecipeError
from compress.importance.layers import LAYER_IMPORTANCE
from compress.models.skeleton import Skeleton
from compress.pipeline.inputs import RunInputs
from compress.ranks import Ranks
from compress.recipe.sections import Allocate
from support.mixed_widths import plan_of, widths_in_file
from support.refusals import refused
from support.tiny_checkpoints import (
    FAMILIES,
    WINDOWS,
    dequantised,
    load_whole,
    logits_of,
    random_ids,
    read_tensors,
    recipe_for,
)

LIM = {"average_bits": 3.25}
# Some tokens that do not count, the first of a window among them.
MASKED = CalibrationWindows(
    random_ids(5, 20, seed=3), torch.rand(5, 20, generator=torch.Generator().manual_seed(1)) > 0.3
)


def seen_by_layers(model, ids) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every decoder layer, by hooks on plain transformers."""
    seen = []

    def note(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        seen.append((x.double(), (output[0] if isinstance(output, tuple) else output).double()))

    hooks = [
        layer.register_forward_hook(note, with_kwargs=True, always_call=False)
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_lim_is_minus_the_mean_cosine_of_a_layers_input_and_output(checkpoint, family):
    folder = checkpoint(family)
    seen = seen_by_layers(load_whole(folder), MASKED.input_ids)
    expected = [-float(torch.cosine_similarity(x, y, dim=-1)[MASKED.mask].mean()) for x, y in seen]
    for rotate in ("none", "hadamard", "random"):
        recipe = recipe_for(folder, rotate=rotate, allocate=LIM)
        scores = list(plan_of(recipe, MASKED).allocation.scores.values())
        assert scores == pytest.approx(expected, abs=1e-5), rotate
    assert max(expected) - min(expected) > 1e-3  # or any layer's would do


def test_lim_flattened_and_without_the_sink(checkpoint):
    folder = checkpoint()
    seen = seen_by_layers(load_whole(folder), WINDOWS.input_ids)
    section = {"importance": {"average": "flattened", "sink": False}, "average_bits": 3}
    scores = plan_of(recipe_for(folder, allocate=section)).allocation.scores
    expected = [
        -float(torch.cosine_similarity(x[:, 1:].flatten(1), y[:, 1:].flatten(1)).mean())
        for x, y in seen
    ]
    assert list(scores.values()) == pytest.approx(expected, abs=1e-6)


def units_of(skeleton, unit) -> list[Unit]:
    spec, kind = skeleton.spec, skeleton.spec.layer(0)
    groups = [kind.linears] if unit == "layer" else kind.groups
    return [
        Unit(f"{i} {group[0]}", 1, {}, modules=tuple(names), layer=i)
        for i, group in itertools.product(range(skeleton.num_layers), groups)
        if (names := [f"{spec.layers}.{i}.{name}" for name in group])
    ]


def walked(recipe, windows, widths, unit="layer", folder=None, **asked):
    """The scores of every unit, and which linears it has."""
    skeleton = Skeleton(Path(recipe.model.path))
    units = units_of(skeleton, unit)
    section = recipe.allocate.model_copy(update={"widths": widths})
    model = RunInputs.of(recipe, skeleton).rotated_model()
    walk = ScoreWalk(section, recipe.quantize, model, windows, units, folder)
    found = walk.run(errors=True, **asked)
    return found, {unit.name: list(unit.modules) for unit in units}


@pytest.mark.parametrize("rotate", ["none", "hadamard"])
@pytest.mark.parametrize("tokens", ["uniform", "attention_concentration"])
def test_the_first_output_error_is_what_a_run_reports(checkpoint, press, rotate, tokens):
    """Layer 0's q, k and v read what no quantised layer has changed: the same Hessian."""
    quantize = {"token_importance": tokens, "refine_sweeps": 1}
    found, modules = walked(
        recipe_for(checkpoint(), rotate=rotate, quantize=quantize, allocate=LIM), MASKED, [2, 3],
        "fused_group",
    )  # fmt: skip
    for bits in (2, 3):
        recipe = recipe_for(checkpoint(), rotate=rotate, quantize=quantize | {"bits": bits})
        facts = json.loads((press(recipe, MASKED) / "modelpress.json").read_text())
        reported = {m["name"]: m["error"] for m in facts["layers"][0]["modules"][:3]}
        unit = "0 self_attn.q_proj"
        assert set(reported) == set(modules[unit])
        error = found.errors["output_error"][unit][bits]
        assert error == pytest.approx(sum(reported.values()), rel=1e-4)
    assert found.errors["output_error"][unit][2] > 2 * error


def test_the_output_error_is_weighted_for_the_linears_that_the_weights_are_for(checkpoint):
    """k alone of its group: it scores as where all are weighed, its neighbours as where none is."""
    tokens = {"name": "activation_norm", "minimum": 0, "power": 2}
    errors = {}
    for case, chosen in (
        ("none", "uniform"),
        ("all", tokens),
        ("some", tokens | {"modules": ["re:.*[.]0[.].*k_proj", "re:.*mlp"]}),
    ):
        quantize = {"token_importance": chosen, "refine_sweeps": 0}
        found, _ = walked(
            recipe_for(checkpoint(), quantize=quantize | {"ignore": ["re:.*[qv]_proj", "lm_head"]},
            allocate=LIM), MASKED, [3], "fused_group",
        )  # fmt: skip
        errors[case] = {unit: by[3] for unit, by in found.errors["output_error"].items()}
    for unit, error in errors["some"].items():
        weighed = "mlp" in unit or unit == "0 self_attn.q_proj"  # of whose group only k is left
        right, wrong = ("all", "none") if weighed else ("none", "all")
        assert error == pytest.approx(errors[right][unit], rel=1e-4), unit
        assert error != pytest.approx(errors[wrong][unit], rel=1e-4), unit


@pytest.fixture(params=["none", "hadamard"])
def rounded(request, checkpoint, press):
    """recipe, the model before rounding, and the weights of `rtn` at 4 and 2 bits."""
    folder = checkpoint("qwen2-sliding")

    def recipe(**quantize):
        quantize = {"method": "rtn"} | quantize
        return recipe_for(folder, rotate=request.param, quantize=quantize)

    whole = load_whole(press(recipe(method="none")))
    weights = {}
    for bits in (4, 2):
        made = press(recipe(bits=bits))
        weights[bits] = dequantised(read_tensors(made), widths_in_file(made))
    asked = recipe_for(folder, rotate=request.param, quantize={"method": "rtn"}, allocate=LIM)
    return asked, whole, weights


def put(model, weights, names):
    """Exchanges the weights of these linears; returns what was there."""
    linears = {name: model.get_submodule(name) for name in names}
    before = {f"{name}.weight": linear.weight.data for name, linear in linears.items()}
    for name, linear in linears.items():
        linear.weight.data = weights[f"{name}.weight"]
    return before


@pytest.mark.parametrize("unit, offload", [("layer", False), ("fused_group", True)])
def test_logit_divergence_is_the_kl_with_that_unit_alone_quantised(
    rounded, unit, offload, tmp_path
):
    recipe, model, weights = rounded
    folder = tmp_path if offload else None
    found, modules = walked(recipe, MASKED, [4, 2], unit, folder, divergence=True)
    reference = logits_of(model, MASKED.input_ids).double().log_softmax(-1)[MASKED.mask]
    for name, bits in itertools.product(modules, (4, 2)):
        before = put(model, weights[bits], modules[name])
        q = logits_of(model, MASKED.input_ids).double().log_softmax(-1)[MASKED.mask]
        put(model, before, modules[name])
        expected = float((reference.exp() * (reference - q)).sum(-1).mean())
        assert expected > 1e-5
        error = found.errors["logit_divergence"][name][bits]
        assert error == pytest.approx(expected, rel=2e-3, abs=1e-6), (name, bits)


@pytest.mark.parametrize("unit, offload", [("layer", True), ("fused_group", False)])
def test_hidden_state_error_is_what_the_layer_gives_with_that_unit_alone_quantised(
    rounded, unit, offload, tmp_path
):
    recipe, model, weights = rounded
    folder = tmp_path if offload else None
    found, modules = walked(recipe, MASKED, [4, 2], unit, folder, hidden=True)
    reference = [y[MASKED.mask] for _, y in seen_by_layers(model, MASKED.input_ids)]
    for name, bits in itertools.product(modules, (4, 2)):
        layer = int(name.split()[0])
        before = put(model, weights[bits], modules[name])
        moved = seen_by_layers(model, MASKED.input_ids)[layer][1][MASKED.mask]
        put(model, before, modules[name])
        y = reference[layer]
        expected = float(((moved - y).square().sum(-1) / y.square().sum(-1)).mean())
        assert expected > 1e-6
        error = found.errors["hidden_state_error"][name][bits]
        assert error == pytest.approx(expected, rel=1e-3), (name, bits)
    assert "logit_divergence" not in found.errors


@pytest.mark.parametrize(
    "importance, copies",
    [("output_error", 1), ("hidden_state_error", 2), ("logit_divergence", 1 + 5 * 2)],
)
def test_the_states_that_a_walk_holds_are_counted(importance, copies):
    section = Allocate(importance=importance, average_bits=3, widths=[2, 4], method="knapsack")
    assert copies_of_states(section, units=5) == copies


@pytest.mark.parametrize("unit", ["layer", "fused_group"])
def test_the_fitness_of_evolve_is_the_kl_of_the_whole_assignment(rounded, unit):
    """By plain transformers with all weights exchanged at once, not one unit after the other."""
    recipe, model, weights = rounded
    section = {"method": "evolve", "generations": 1, "offspring": 2, "average_bits": 3.2}
    section |= {"importance": {"name": "random", "seed": 1}, "unit": unit}
    found = plan_of(recipe.with_changes(allocate=section), MASKED).allocation
    assert len(set(found.widths.values())) == 2
    reference = logits_of(model, MASKED.input_ids).double().log_softmax(-1)[MASKED.mask]
    for name, bits in found.widths.items():
        put(model, weights[bits], found.modules[name])
    q = logits_of(model, MASKED.input_ids).double().log_softmax(-1)[MASKED.mask]
    expected = float((reference.exp() * (reference - q)).sum(-1).mean())
    assert found.fitness == pytest.approx(expected, rel=2e-3)


def test_a_hessian_that_cannot_be_factored_is_named(checkpoint):
    """Without damping, from fewer tokens than inputs."""
    quantize = {"damping": 0}
    section = LIM | {"importance": "output_error", "samples": 1}
    recipe = recipe_for(checkpoint(), quantize=quantize, allocate=section)
    with refused(CompressError, "model.layers.0.self_attn.q_proj", "quantize.damping"):
        plan_of(recipe)


@pytest.mark.parametrize("unit", ["layer", "fused_group"])
def test_weight_and_output_errors_by_hand(rounded, unit):
    """Output error of a linear: ||X (W - Q)'||^2 / ||X W'||^2, X what it reads in the model."""
    recipe, model, weights = rounded
    found, modules = walked(recipe, WINDOWS, [4, 2], unit)
    reads = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: reads.update({name: args[0].double()})
        )
        for names in modules.values()
        for name in names
    ]
    logits_of(model, WINDOWS.input_ids)
    for hook in hooks:
        hook.remove()

    def square(x):
        return float(x.double().square().sum())

    for unit_name, bits in itertools.product(modules, (4, 2)):
        pairs = {
            n: (model.get_submodule(n).weight.data.double(), weights[bits][f"{n}.weight"].double())
            for n in modules[unit_name]
        }
        lost = sum(square(W - Q) for W, Q in pairs.values())
        expected = lost / sum(square(W) for W, _ in pairs.values())
        found_error = found.errors["weight_error"][unit_name][bits]
        assert found_error == pytest.approx(expected, rel=1e-4)
        expected = sum(
            square(reads[n] @ (W - Q).T) / square(reads[n] @ W.T) for n, (W, Q) in pairs.items()
        )
        found_error = found.errors["output_error"][unit_name][bits]
        assert found_error == pytest.approx(expected, rel=1e-3)


def test_a_score_of_ones_own_is_named_in_a_recipe(checkpoint, monkeypatch):
    """A class in the registry is all there is to add."""

    class Spread:
        needs = "weights"

        def scores(self, units):
            return {u.name: max(float(W.std()) for W in u.weights()) for u in units}

    with refused(RecipeError, "allocate.importance.name", "'spread'"):
        recipe_for(checkpoint(), allocate=LIM | {"importance": "spread"})
    monkeypatch.setitem(LAYER_IMPORTANCE, "spread", Spread)
    recipe = recipe_for(checkpoint(), allocate=LIM | {"importance": "spread"})
    found = plan_of(recipe).allocation
    weights = load_whole(checkpoint()).state_dict()
    for unit, names in found.modules.items():
        expected = max(float(weights[f"{name}.weight"].std()) for name in names)
        assert found.scores[unit] == pytest.approx(expected)
    assert set(found.widths.values()) == {2, 4}
    monkeypatch.setattr(Spread, "needs", "change")
    (problem,) = plan_of(recipe).problems
    assert "spread needs change" in problem


@pytest.mark.parametrize("of", ["weight_error", "layer_embedding_change", "position", "random"])
def test_reverse_is_the_same_score_turned_round(checkpoint, of):
    first, second = (
        plan_of(
            recipe_for(checkpoint(), allocate=LIM | {"importance": importance})
        ).allocation.scores
        for importance in ({"name": of}, {"name": "reverse", "of": of})
    )
    assert {unit: -score for unit, score in first.items()} == second


@pytest.mark.parametrize("importance", LAYER_IMPORTANCE.shipped)
def test_every_score_comes_from_the_class_that_is_registered_for_it(
    checkpoint, monkeypatch, importance
):
    """Nothing stands in for the registered class: with it broken, there is no allocation."""

    def broken(self, units):
        raise ZeroDivisionError(importance)

    of = {"of": "position"} if importance == "reverse" else {}
    recipe = recipe_for(
        checkpoint(), allocate={"importance": {"name": importance, **of}, "average_bits": 3}
    )
    assert plan_of(recipe).allocation is not None
    monkeypatch.setattr(LAYER_IMPORTANCE[importance], "scores", broken)
    with pytest.raises(ZeroDivisionError, match=importance):
        plan_of(recipe)


class OneOfThree(Ranks):
    """A thread that waits for the others when it collects."""

    size = 3

    def __init__(self, rank: int, all_here: Barrier, had: dict[int, dict[str, float]]):
        self.rank, self.all_here, self.had = rank, all_here, had

    def collect(self, value):
        self.had[self.rank] = value
        self.all_here.wait()
        return [self.had[rank] for rank in range(self.size)]


@pytest.mark.parametrize(
    ("score", "read"),
    [
        ({"name": "outlier_weight_count"}, [2, 1, 1]),
        ({"name": "reverse", "of": "outlier_weight_count"}, [2, 1, 1]),
        ({"name": "position"}, []),
    ],
)
def test_ranks_read_the_weights_of_their_own_layers(checkpoint, tmp_path, score, read):
    folder = checkpoint("qwen2-sliding", layers=4)
    recipe = recipe_for(folder, allocate={"importance": score, "average_bits": 3})
    alone = plan_of(recipe).allocation.scores
    inputs = RunInputs.of(recipe, Skeleton(folder))
    model, units = inputs.rotated_model(), units_of(inputs.skeleton, "layer")
    all_here, had = Barrier(3, timeout=60), {}

    def scores(rank):
        ranks, section = OneOfThree(rank, all_here, had), recipe.allocate
        scorer = Scorer(section, recipe.quantize, model, units, None, tmp_path, "ram", ranks=ranks)
        return [unit.score for unit in scorer.scored()]

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(scores, range(3))) == [list(alone.values())] * 3
    assert [len(had[rank]) for rank in sorted(had)] == read


@pytest.mark.parametrize("plain", ["layer_embedding_change", "outlier_weight_count", "position"])
def test_measured_errors_are_weighed_by_another_score(checkpoint, plain):
    """By that score on [minimum, 1]; what is reported stays what was measured."""
    deep = checkpoint("qwen2-sliding", layers=4)

    def allocation(importance, widths):
        section = {"importance": importance, "widths": widths, "average_bits": 3, "samples": 2}
        quantize = {"method": "rtn", "clip_search": "none"}
        return recipe_for(deep, quantize=quantize, allocate=section)

    weighted = {"name": "output_error", "weighted_by": plain, "minimum": 0.25}
    recipe = allocation(weighted, [4, 3, 2])
    found = plan_of(recipe).allocation
    alone = plan_of(allocation(plain, [4, 2])).allocation.scores
    low, high = min(alone.values()), max(alone.values())
    factors = [0.25 + 0.75 * (score - low) / (high - low) for score in alone.values()]
    errors = list(walked(recipe, WINDOWS.first(2), [4, 3, 2])[0].errors["output_error"].values())

    def lost(widths, factors):
        return sum(f * e[b] for f, e, b in zip(factors, errors, widths, strict=True))

    fitting = [w for w in itertools.product((4, 3, 2), repeat=4) if sum(w) <= 12]
    best = min(fitting, key=lambda widths: lost(widths, factors))
    assert tuple(found.widths.values()) == best
    assert found.error == pytest.approx(lost(best, [1] * 4), rel=1e-9)
    assert list(found.scores.values()) == pytest.approx([e[2] - e[4] for e in errors])
