"""A cached tower gives what it gives without a cache, and does not run twice for one picture."""

import pytest
import torch

from compress.pruning.engine import prune_visual_tokens
from compress.pruning.tower_cache import OutputCache, tower_cached
from compress.recipe.strategy import PruneStrategy
from support.tiny_models import BATCH, SINGLE, tiny_inputs, tiny_model

FAMILIES = ("llava", "llava_siglip", "llava_next", "llava_onevision")
STRATEGIES = [
    PruneStrategy(
        stages=(0, 2), ratios=(0.5, 0.5), voter_threshold=1.1, entropy_weight=0.2, cell=3
    ),
    PruneStrategy(method="visionzip", ratios=(0.4,)),
    PruneStrategy(method="divprune", ratios=(0.4,)),
]


def layers_of(model):
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower).encoder.layers


def logits(model, inputs, strategy):
    with torch.no_grad(), prune_visual_tokens(model, strategy):
        return model(**inputs).logits


def runs_of_the_first_layer(model, calls):
    """Appends to `calls` when the first layer's attention is really computed."""
    first = layers_of(model)[0].self_attn
    return first.register_forward_hook(lambda *_: calls.append(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_strategy_sees_the_same_to_the_bit_and_the_tower_runs_once(family):
    model, calls, cache = tiny_model(family), [], OutputCache()
    prompts = [tiny_inputs(model, rows) for rows in (SINGLE, BATCH)]
    plain = [logits(model, p, s) for p in prompts for s in STRATEGIES]
    handle = runs_of_the_first_layer(model, calls)
    with tower_cached(model, cache):
        cached = [logits(model, p, s) for p in prompts for s in STRATEGIES]
    with tower_cached(model, cache):  # opened again
        again = [logits(model, p, s) for p in prompts for s in STRATEGIES]
    handle.remove()
    for a, b, c in zip(plain, cached, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert len(calls) == len(prompts)


def test_other_pixels_are_other_pictures():
    model, calls = tiny_model("llava"), []
    inputs = tiny_inputs(model, SINGLE)
    other = inputs | {"pixel_values": inputs["pixel_values"] + 1e-3}
    plain = [logits(model, x, STRATEGIES[0]) for x in (inputs, other)]
    runs_of_the_first_layer(model, calls)
    with tower_cached(model, OutputCache()):
        cached = [logits(model, x, STRATEGIES[0]) for x in (inputs, other)]
    assert len(calls) == 2 and all(map(torch.equal, plain, cached))
    assert not torch.equal(*cached)


def test_what_does_not_fit_is_computed_each_time():
    model, calls = tiny_model("llava"), []
    inputs = tiny_inputs(model, SINGLE)
    runs_of_the_first_layer(model, calls)
    cache = OutputCache(most_bytes=100)
    with tower_cached(model, cache):
        logits(model, inputs, STRATEGIES[0])
        logits(model, inputs, STRATEGIES[0])
    assert len(calls) == 2 and cache.kept == {} and cache.left == 100


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2_vl"])
def test_the_model_is_left_as_it_was(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model, SINGLE)
    logits(model, inputs, STRATEGIES[0])  # transformers notes things in a model's first forward
    before = [set(vars(m)) for m in model.modules()]
    with pytest.raises(RuntimeError), tower_cached(model, OutputCache()):
        logits(model, inputs, STRATEGIES[0])
        raise RuntimeError
    assert [set(vars(m)) for m in model.modules()] == before
    assert not any(m._forward_pre_hooks for m in model.modules())
