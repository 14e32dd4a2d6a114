"""The oracle: a pruned run equals the full run whose pruned keys are masked, step by step."""

import pytest
import torch

from compress.errors import UsageError
from compress.pruning.engine import prune_visual_tokens
from compress.recipe.strategy import PruneStrategy
from support.refusals import refused
from support.tiny_models import (
    BATCH,
    IMAGE,
    LAYERS,
    ON_GRIDS,
    OWN_TOWERS,
    SINGLE,
    generate,
    masked_run,
    tiny_inputs,
    tiny_model,
)

LLAVA = ("llava", "llava_siglip", "llava_next", "llava_onevision")
TOWERS = ("idefics3", "internvl", "mistral3")  # one of each kind; the others differ in names
ALIKE = [family for family in OWN_TOWERS if family not in TOWERS]
FAMILIES = (*LLAVA, *TOWERS, *(family for family in ON_GRIDS if family != "glm46v"))
STAGES = {
    "before": PruneStrategy(ratios=(0.4,), voter_threshold=1.1),
    "inside": PruneStrategy(stages=(2,), ratios=(0.3,), voter_threshold=1.1),
    "three": PruneStrategy(
        stages=(0, 1, 3), ratios=(0.6, 0.7, 0.4), voter_threshold=1.1, entropy_weight=0.1
    ),
    "recycled": PruneStrategy(stages=(0, 2), ratios=(0.5, 0.5), voter_threshold=1.1, cell=2.5),
}
MERGING = ("pooling", "visionzip")
BASELINES = {
    "fastv": PruneStrategy(method="fastv", stages=(2,), ratios=(0.3,)),
    "pyramiddrop": PruneStrategy(method="pyramiddrop", stages=(1, 3), ratios=(0.5, 0.5)),
} | {
    name: PruneStrategy(method=name, ratios=(0.3,))
    for name in ("random", "uniform", "pooling", "visionzip", "divprune")
}


def merged_values(prompt, embeds):
    """Embeddings that the pruned run put in place of others: {(row, position): [D]}."""
    return {
        (row, position): embeds[row, slot(prompt, 0, row, position)]
        for row, position in merged_places(prompt)
    }


def merged_additions(prompt, read, gave):
    """The same of what was added behind each layer: [{(row, position): [D]}].

    `read`, `gave`: what layers read and gave. A token that is gone behind a layer has none.
    """
    return [
        {
            (row, at): read[i + 1][row, slot(prompt, i + 1, row, at)]
            - gave[i][row, slot(prompt, i, row, at)]
            for row, at in merged_places(prompt)
            if prompt.kept(i + 1)[row, at]
        }
        for i in range(LAYERS - 1)
    ]


def merged_places(prompt):
    """Row and position of the tokens that hold a mixture."""
    for image in prompt.images:
        for token in [] if image.merged is None else image.merged.tolist():
            yield image.row, int(image.positions[token])


def slot(prompt, layer, row, position):
    return int((prompt.view(layer).index[row] == position).nonzero()[-1])


def rounding(logits):
    """How far apart two fp32 runs of the same sums in another order may be.

    A sum of K terms errs by about u sqrt(K) of its size, u = eps / 2 (Higham and Mary, 2019), and a
    product adds as much to the error of what it reads; there are two runs. That is 1e-4 here. One
    pruned key that one layer goes on seeing changes logits by 4e-2 or more.
    """
    in_a_row = 6 * LAYERS + 1  # a layer's values, scores, mean, output, up, down; and the head
    longest = 48  # terms: the intermediate size
    return 2 * torch.finfo(torch.float32).eps / 2 * longest**0.5 * in_a_row * logits.abs().max()


def check(family, strategy, rows, attention):
    model = tiny_model(family, attention)
    inputs = tiny_inputs(model, rows)
    read, gave = [], []
    with prune_visual_tokens(model, strategy) as pruning:
        handles = []
        for layer in model.model.get_decoder().layers:
            before = layer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
            after = layer.register_forward_hook(lambda module, args, y: gave.append(y))
            handles += [before, after]
        tokens, logits = generate(model, inputs)
        for handle in handles:
            handle.remove()
    prompt = pruning.last
    for image in prompt.images:
        assert image.kept_at(LAYERS - 1) < len(image.tokens)
    values = merged_values(prompt, read[0])
    assert bool(values) == (strategy.cell is not None or strategy.method in MERGING)
    added = merged_additions(prompt, read, gave) if family.startswith("qwen3_vl") else ()
    with masked_run(model, [prompt.kept(layer) for layer in range(LAYERS)], values, added):
        full_tokens, full_logits = generate(model, inputs)
    assert len(logits) == 9
    for a, b in zip(logits, full_logits, strict=True):
        torch.testing.assert_close(a, b, atol=float(rounding(b)), rtol=0)
    assert torch.equal(tokens, full_tokens)
    unpruned = generate(model, inputs, steps=0)[1]
    assert (unpruned[0] - logits[0])[0].abs().max() > 1e-3  # the pruned tokens did matter


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [SINGLE, BATCH], ids=["single", "batch"])
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_run_equals_the_full_run_with_masked_keys(family, name, rows, attention):
    check(family, STAGES[name], rows, attention)


@pytest.mark.parametrize("family", ALIKE)
@pytest.mark.parametrize("name", ["three", "recycled"])
def test_towers_alike_under_other_names_do_so_too(family, name):
    check(family, STAGES[name], BATCH, "sdpa")


@pytest.mark.parametrize("family", OWN_TOWERS)
def test_several_answers_to_one_prompt_find_its_images(family):
    """`generate` repeats the features: of some types as copies."""
    model = tiny_model(family)
    inputs = tiny_inputs(model, SINGLE)
    with prune_visual_tokens(model, STAGES["three"]) as pruning:
        alone, _ = generate(model, inputs, steps=2)
        kept = pruning.last.kept(LAYERS - 1)
        both = model.generate(
            **inputs, max_new_tokens=3, do_sample=True, top_k=1, num_return_sequences=2
        )
    length = inputs["input_ids"].shape[1]
    assert torch.equal(both[:, length:], alone.expand(2, -1))
    assert torch.equal(pruning.last.kept(LAYERS - 1), kept.expand(2, -1))


@pytest.mark.parametrize("family", OWN_TOWERS)
def test_where_nothing_is_pruned_logits_are_the_same_to_the_bit(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model, BATCH)
    whole = PruneStrategy(stages=(0, 2), ratios=(1.0, 1.0), voter_threshold=1.1)
    with torch.no_grad():
        plain = model(**inputs).logits
        with prune_visual_tokens(model, whole) as pruning:
            assert torch.equal(model(**inputs).logits, plain)
    images = pruning.last.images
    assert sum(map(len, (image.tokens for image in images))) == int(
        (inputs["input_ids"] == IMAGE).sum()
    )


def test_glm_4_6_is_glm_4_1_under_another_name():
    check("glm46v", STAGES["three"], BATCH, "sdpa")


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "mistral3"])
def test_baselines_do_so_too(family, name):
    check(family, BASELINES[name], BATCH, "sdpa")


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "divprune"])
def test_baselines_do_so_on_tiles_too(name):
    check("idefics3", BASELINES[name], BATCH, "sdpa")


@pytest.mark.parametrize("name", MERGING)
def test_what_is_added_between_layers_is_mixed_like_the_tokens(name):
    check("qwen3_vl", BASELINES[name], BATCH, "sdpa")


@pytest.mark.parametrize("family", ["qwen3_vl", "glm4v"])
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop"])
def test_queries_that_are_turned_otherwise_rank_nothing(family, name):
    """By a norm, or channel by channel."""
    model = tiny_model(family)
    attention = type(model.model.get_decoder().layers[0].self_attn).__name__
    with refused(UsageError, attention, name):
        prune_visual_tokens(model, BASELINES[name])
