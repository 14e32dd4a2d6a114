"""The context: what it leaves alone, refuses and counts, and whom it does not disturb."""

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import compress
from compress.pruning.costs import DecoderShape, kv_bytes
from compress.pruning.engine import prune_visual_tokens
from compress.recipe.strategy import PruneStrategy
from support.tiny_models import (
    BATCH,
    LAYERS,
    PATCHES,
    SINGLE,
    generate,
    masked_run,
    tiny_inputs,
    tiny_model,
)

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl")
THREE = PruneStrategy(stages=(0, 1, 3), ratios=(0.6, 0.7, 0.5), voter_threshold=1.1)
HALF = PruneStrategy(ratios=(0.5,), voter_threshold=1.1)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def same(model, inputs, before):
    """Whether a plain run gives the very bits of an earlier one."""
    return all(map(torch.equal, generate(model, inputs, steps=2)[1], before))


@torch.no_grad()
def by_hand(model, inputs, tokens, masked=True):
    """Logits of a prefill and of `tokens` [B, steps] one by one, without position ids."""
    output = model(**inputs, use_cache=True)
    found, mask = [output.logits[:, -1]], inputs["attention_mask"]
    for step in range(tokens.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        given = {"attention_mask": mask} if masked else {}
        output = model(
            input_ids=tokens[:, step : step + 1], past_key_values=output.past_key_values, **given
        )
        found.append(output.logits[:, -1])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_by_hand_without_positions_equal_the_masked_full_run(family):
    model = tiny_model(family)
    qwen = family.startswith("qwen")  # takes positions from a mask only if that is not too long
    inputs, tokens = tiny_inputs(model, SINGLE if qwen else BATCH), torch.tensor([[5, 6, 7]])
    tokens = tokens.expand(len(inputs["input_ids"]), -1)
    with prune_visual_tokens(model, THREE) as pruning:
        logits = by_hand(model, inputs, tokens, masked=not qwen)
    kept = [pruning.last.kept(layer) for layer in range(LAYERS)]
    with masked_run(model, kept):
        full = by_hand(model, inputs, tokens, masked=not qwen)
    for a, b in zip(logits, full, strict=True):
        close(a, b)


@pytest.mark.parametrize("strategy", [HALF, THREE], ids=["half", "three"])
@torch.no_grad()
def test_several_tokens_at_once_after_the_prompt(strategy):
    model = tiny_model("llava")
    inputs, tokens = tiny_inputs(model, BATCH), torch.tensor([[5, 6, 7]]).expand(3, -1)

    def chunk():
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
        return model(input_ids=tokens, past_key_values=cache, attention_mask=mask).logits

    with prune_visual_tokens(model, strategy) as pruning:
        logits = chunk()
    with masked_run(model, [pruning.last.kept(layer) for layer in range(LAYERS)]):
        close(logits, chunk())


@pytest.mark.parametrize("strategy", [HALF, THREE], ids=["half", "three"])
def test_generation_without_a_cache_gives_the_same_logits(strategy):
    model = tiny_model("llava")
    inputs = tiny_inputs(model, BATCH)
    with prune_visual_tokens(model, strategy):
        cached = generate(model, inputs, steps=3)[1]
        for a, b in zip(generate(model, inputs | {"use_cache": False}, 3)[1], cached, strict=True):
            close(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_renumbered_run_equals_a_plain_run_of_the_shorter_prompt(family):
    """Without the pruned placeholders and features, transformers itself numbers what is left."""
    model = tiny_model(family)
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers takes no features that were computed before")
    inputs = tiny_inputs(model)
    strategy = HALF.model_copy(update={"positions": "renumbered"})
    with prune_visual_tokens(model, strategy) as pruning:
        logits = generate(model, inputs, steps=4)[1]
    encoding = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    encoding.pop("mm_token_type_ids", None)
    with torch.no_grad():
        features = model.model.get_image_features(**encoding, return_dict=True)
    features.pooler_output = [features.pooler_output[0][pruning.last.images[0].alive]]
    ids = inputs["input_ids"][pruning.last.kept(0)][None]
    shorter = {"input_ids": ids, "mm_encoder_outputs": {"image": features}}
    if family.startswith("qwen"):
        shorter["position_ids"] = torch.arange(ids.shape[1]).expand(4, 1, -1)
    expected = generate(model, shorter | {"attention_mask": torch.ones_like(ids)}, steps=4)[1]
    for a, b in zip(logits, expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_padded_right_gives_the_logits_of_its_rows(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model, BATCH, side="right")
    with torch.no_grad(), prune_visual_tokens(model, THREE) as pruning:
        logits = model(**inputs).logits
    kept = [pruning.last.kept(layer) for layer in range(LAYERS)]
    with torch.no_grad(), masked_run(model, kept):
        full = model(**inputs).logits
    last = kept[-1].sum(1) - 1  # slots are filled from the left
    last_full = inputs["attention_mask"].sum(1) - 1
    rows = torch.arange(len(last))
    close(logits[rows, last], full[rows, last_full])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_keep_what_they_keep_alone(family):
    model = tiny_model(family)
    with torch.no_grad(), prune_visual_tokens(model, THREE) as pruning:
        model(**tiny_inputs(model, BATCH))
        together = pruning.last.images
        model(**tiny_inputs(model, BATCH[:1]))
        alone = pruning.last.images
    assert len(together) == 3 and len(alone) == 1
    if family == "llava":  # elsewhere the random pixels depend on the batch
        assert torch.equal(together[0].alive, alone[0].alive)
    for image in together:
        assert tuple(n for _, n in image.kept) == THREE.counts(len(image.tokens), LAYERS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["vflowopt", "fastv", "pooling"])
def test_keeping_everything_is_bit_identical(family, method):
    model = tiny_model(family)
    inputs = tiny_inputs(model, BATCH)
    before = generate(model, inputs, steps=2)[1]
    with prune_visual_tokens(model, PruneStrategy.for_budget(method, 1.0, LAYERS)) as pruning:
        assert same(model, inputs, before)
    assert pruning.stats.average_kept == 1.0
    assert pruning.stats.kv_bytes == pruning.stats.prompts[0].kv_bytes_unpruned


@pytest.mark.parametrize("family", FAMILIES)
def test_text_only_prompts_run_unpruned_and_are_counted(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model, [[7], [4]])
    before = generate(model, inputs, steps=2)[1]
    with prune_visual_tokens(model, THREE) as pruning:
        generate(model, tiny_inputs(model), steps=1)
        assert same(model, inputs, before)
    assert pruning.stats.text_only == 1 and len(pruning.stats.images) == 1


def attached(model):
    return [(*m._forward_pre_hooks.values(), *m._forward_hooks.values()) for m in model.modules()]


def test_leaving_the_context_leaves_nothing_behind():
    model = tiny_model("llava")
    inputs = tiny_inputs(model)
    before = generate(model, inputs, steps=2)[1]
    hooks = attached(model)  # transformers has some of its own
    for broken in (False, True):
        try:
            with prune_visual_tokens(model, THREE):
                assert not same(model, inputs, before)
                if broken:
                    raise KeyError
        except KeyError:
            pass
        assert same(model, inputs, before)
        assert attached(model) == hooks
        assert "generate" not in vars(model) and "get_image_features" not in vars(model.model)


def test_two_models_in_two_threads_do_not_disturb_each_other():
    jobs = [("llava", THREE), ("qwen2_5_vl", HALF), ("llava", HALF)]
    models = [tiny_model(family) for family, _ in jobs]
    inputs = [tiny_inputs(model, BATCH) for model in models]

    def run(i):
        with prune_visual_tokens(models[i], jobs[i][1]):
            return [generate(models[i], inputs[i], steps=3)[1] for _ in range(3)]

    alone = [run(i) for i in range(len(jobs))]
    together = [None] * len(jobs)

    def store(i):
        together[i] = run(i)

    threads = [threading.Thread(target=store, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@torch.no_grad()
def test_generations_on_one_model_may_take_turns():
    model = tiny_model("llava")
    prompts = [tiny_inputs(model, SINGLE), tiny_inputs(model, [[9, (24, 24), 2]])]
    token = torch.tensor([[5]])
    with prune_visual_tokens(model, THREE):
        alone = [by_hand(model, p, token, masked=False)[1] for p in prompts]
        caches = [model(**p, use_cache=True).past_key_values for p in prompts]
        turns = [model(input_ids=token, past_key_values=c).logits[:, -1] for c in caches]
    for a, b in zip(alone, turns, strict=True):
        close(a, b)


@torch.no_grad()
def test_a_cache_that_was_reset_starts_afresh():
    model = tiny_model("llava")
    text, token = tiny_inputs(model, [[7]]), torch.tensor([[5]])
    plain = model(**text, use_cache=True).past_key_values
    expected = model(input_ids=token, past_key_values=plain).logits
    with prune_visual_tokens(model, HALF):
        cache = model(**tiny_inputs(model), use_cache=True).past_key_values
        cache.reset()
        if cache.get_seq_length():
            pytest.skip("this transformers' reset leaves the length as it was")
        model(**text, past_key_values=cache)
        assert torch.equal(model(input_ids=token, past_key_values=cache).logits, expected)


def test_several_answers_to_one_prompt_are_those_of_one():
    model = tiny_model("llava")
    inputs = tiny_inputs(model, BATCH[:2])
    inputs["pixel_values"] = inputs["pixel_values"][:3]
    likeliest = {"do_sample": True, "top_k": 1}

    def same() -> bool:
        single = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        double = model.generate(**inputs, max_new_tokens=4, **likeliest, num_return_sequences=2)
        return torch.equal(double, single.repeat_interleave(2, dim=0))

    if not same():
        pytest.skip("this transformers mixes up the images of several prompts")
    with prune_visual_tokens(model, THREE):
        assert same()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [SINGLE, BATCH], ids=["single", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_kv_bytes_are_those_of_the_cache(family, rows, dtype):
    model = tiny_model(family).to(dtype)
    inputs = tiny_inputs(model, rows)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with prune_visual_tokens(model, THREE) as pruning:
        cache = model(**inputs, use_cache=True).past_key_values
    measured = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert pruning.stats.kv_bytes == measured
    full = model(**inputs, use_cache=True).past_key_values
    measured = sum(x.nbytes for layer in full.layers for x in (layer.keys, layer.values))
    assert pruning.stats.prompts[0].kv_bytes_unpruned == measured


@torch.no_grad()
def test_stats_add_up():
    model = tiny_model("llava")
    k = torch.zeros(32, 32)
    model.model.vision_tower.encoder.layers[1].self_attn.k_proj.weight.copy_(k)  # nobody stands out
    with (
        prune_visual_tokens(model, THREE) as pruning,
        pytest.warns(UserWarning, match=f"voter_threshold {THREE.voter_threshold:g}") as warned,
    ):
        model(**tiny_inputs(model, BATCH))
        model(**tiny_inputs(model))
    assert len([w for w in warned if w.category is UserWarning]) == 1  # once a context
    totals = pruning.stats.as_dict()
    assert totals["prompts"] == 4 and totals["images"] == 4
    assert totals["visual_tokens"] == 4 * PATCHES
    assert totals["crops_without_voters"] == 4
    counts = [22, 15, 15, 7]  # of 21.6, 15.12, 7.56: nearest to the budget, 59.4 in all
    assert pruning.stats.images[0].kept == tuple(counts)
    assert totals["average_kept"] == pytest.approx(sum(counts) / 4 / PATCHES)
    assert totals["average_kept"] == pytest.approx(THREE.average_kept(LAYERS), abs=0.5 / PATCHES)
    assert totals["prefill_flops"] < totals["prefill_flops_unpruned"]


def test_the_cache_of_a_token_is_that_of_its_key_value_heads():
    """Qwen2-7B has 4 of 28."""
    assert kv_bytes(DecoderShape(28, 3584, 3584, 512, 18944, 2), [1] * 28) == 57_344


def test_the_package_offers_it():
    assert compress.prune_visual_tokens is prune_visual_tokens
    assert compress.PruneStrategy is PruneStrategy


def in_threads(jobs):
    """What each job returns, run in a thread of its own beside the others; raises its error."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("llava", THREE),
        ("llava_onevision", HALF),
        ("qwen2_5_vl", THREE),
        ("llava", PruneStrategy(method="fastv", stages=(2,), ratios=(0.5,))),
        ("llava", PruneStrategy(method="visionzip", ratios=(0.5,))),
        ("llava", PruneStrategy(stages=(0, 2), ratios=(0.5, 0.5), cell=3.0)),
    ],
    ids=["llava", "onevision", "qwen", "fastv", "visionzip", "recycling"],
)
def test_threads_share_a_model_and_each_forward_is_what_it_is_alone(family, strategy):
    model = tiny_model(family)
    prompts = [BATCH, SINGLE, [[9, (20, 40), 11]], [[7], [2, (24, 24), 4]]]
    inputs = [tiny_inputs(model, rows) for rows in prompts]
    with prune_visual_tokens(model, strategy) as pruning:

        def forwards(given, times):
            with torch.no_grad():
                found = [model(**given).logits for _ in range(times)]
                images = pruning.last.images
            return found, [image.alive.tolist() for image in images]

        alone = [forwards(given, 1) for given in inputs]
        together = in_threads([partial(forwards, given, 25) for given in inputs])
        assert len(pruning.stats.prompts) == 4 * 26
    for (expected, tokens), (found, kept) in zip(alone, together, strict=True):
        assert kept == tokens
        assert all(torch.equal(logits, expected[0]) for logits in found)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_threads_may_generate_on_one_model(family):
    model = tiny_model(family)
    inputs = [tiny_inputs(model, rows) for rows in (BATCH, SINGLE, [[9, (20, 40), 11]], [[7]])]
    with prune_visual_tokens(model, THREE):
        jobs = [partial(generate, model, given, steps=3) for given in inputs]
        alone = [job()[1] for job in jobs]
        for _ in range(3):
            for expected, (_, found) in zip(alone, in_threads(jobs), strict=True):
                assert all(map(torch.equal, expected, found))


def test_another_threads_prompt_is_not_the_latest_of_this_one():
    model = tiny_model("llava")
    with torch.no_grad(), prune_visual_tokens(model, HALF) as pruning:
        model(**tiny_inputs(model, SINGLE))
        mine = pruning.last
        in_threads([lambda: model(**tiny_inputs(model, BATCH))])
        assert pruning.last is mine
        assert in_threads([lambda: pruning.last])[0] is not mine  # the latest of all


class NoStream:
    """Stands for an accelerator's stream where there is none."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def wait_stream(self, other):
        pass


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_an_offloaded_cache_gives_the_same_logits(family, monkeypatch):
    model = tiny_model(family)
    inputs = tiny_inputs(model, BATCH)
    settings = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    with prune_visual_tokens(model, THREE):
        expected = model.generate(**inputs, do_sample=False, **settings)
        monkeypatch.setattr(torch, "Stream", NoStream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: NoStream())
        found = model.generate(
            **inputs, do_sample=False, cache_implementation="offloaded", **settings
        )
    assert found.past_key_values.offloading
    for a, b in zip(found.logits, expected.logits, strict=True):
        close(a, b)
