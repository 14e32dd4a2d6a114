"""What a pruned model refuses, and how generation goes on with a pruned cache."""

import copy

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.pruning.engine import prune_visual_tokens
from compress.recipe.strategy import PruneStrategy
from support.refusals import refused
from support.tiny_models import LAYERS, VIDEO, masked_run, tiny_inputs, tiny_model

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl")
HALF = PruneStrategy(ratios=(0.5,), voter_threshold=1.1)
THREE = PruneStrategy(stages=(0, 1, 3), ratios=(0.6, 0.7, 0.5), voter_threshold=1.1)
INSIDE = PruneStrategy(stages=(2,), ratios=(0.3,), voter_threshold=1.1)


REFUSED = {
    "beam search": ({"num_beams": 2}, "num_beams=2"),
    "static cache": ({"cache_implementation": "static"}, "cache_implementation=static"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2"),
    "chunks": ({"prefill_chunk_size": 8}, "prefill_chunk_size=8"),
    "early exit": ({"assistant_early_exit": 1}, "assistant_early_exit=1"),
    "token prediction": ({"use_mtp": True}, "use_mtp=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_generation_that_pruned_caches_cannot_follow_is_refused(case):
    settings, named = REFUSED[case]
    model = tiny_model("llava")
    with (
        prune_visual_tokens(model, HALF),
        refused(UsageError, named),
    ):
        model.generate(**tiny_inputs(model), max_new_tokens=2, **settings)


def test_settings_are_refused_wherever_generate_would_take_them_from():
    from transformers import GenerationConfig

    model = tiny_model("llava")
    inputs, plain = tiny_inputs(model), GenerationConfig(max_new_tokens=2)
    beams = GenerationConfig(max_new_tokens=2, num_beams=2)
    with prune_visual_tokens(model, HALF):
        for args, settings in [((None, beams), {}), ((), {"generation_config": beams})]:
            with refused(UsageError, "num_beams=2"):
                model.generate(*args, **inputs, **settings)
        expected = model.generate(**inputs, generation_config=plain)
        model.generation_config.num_beams = 3
        for settings in ({"max_new_tokens": 2}, {"generation_config": plain}):
            with refused(UsageError, "num_beams=3"):
                model.generate(**inputs, **settings)
        greedy = GenerationConfig(max_new_tokens=2, num_beams=1)  # overrules the model's own
        assert torch.equal(model.generate(**inputs, generation_config=greedy), expected)


def second_turn(model, inputs, whole):
    """Logits of an answer, then of another after four more tokens, with the cache of the first.

    `whole`: all tokens are given again, not the new ones alone.
    """
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first = model.generate(**inputs, max_new_tokens=4, **settings)
    ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7, 8]])], dim=1)
    cached = ids.shape[1] - 5  # the last answered token is not in the cache
    inputs = {
        "input_ids": ids if whole else ids[:, cached:],
        "attention_mask": torch.ones_like(ids),
        "past_key_values": first.past_key_values,
    }
    return model.generate(**inputs, max_new_tokens=3, **settings).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("strategy", "whole"), [(THREE, False), (INSIDE, True)], ids=["three", "inside"]
)
def test_a_second_turn_goes_on_with_the_pruned_cache(family, strategy, whole):
    model = tiny_model(family)
    inputs = tiny_inputs(model)
    with prune_visual_tokens(model, strategy) as pruning:
        logits = second_turn(model, inputs, whole)
    with masked_run(model, [pruning.last.kept(layer) for layer in range(LAYERS)]):
        for a, b in zip(logits, second_turn(model, inputs, whole), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_second_turn_that_generate_would_cut_wrongly_is_refused():
    """It leaves out as many of the tokens as the cache is long, which is too few here."""
    model = tiny_model("llava")
    inputs = tiny_inputs(model)
    with prune_visual_tokens(model, THREE):
        with refused(UsageError, 47, 52):
            second_turn(model, inputs, whole=True)
        cache = model(**inputs, use_cache=True).past_key_values
        with refused(UsageError, 44, "1 tokens"):
            model.generate(torch.tensor([[5]]), past_key_values=cache, max_new_tokens=2)


@torch.no_grad()
def test_forwards_that_cannot_be_pruned_are_refused():
    from transformers import StaticCache

    model = tiny_model("llava")
    inputs = tiny_inputs(model)
    static = StaticCache(config=model.config.text_config, max_cache_len=64)
    full = model(**inputs, use_cache=True).past_key_values
    token = torch.tensor([[5]])
    features = model.get_image_features(inputs["pixel_values"], return_dict=True)
    with prune_visual_tokens(model, HALF):
        with refused(UsageError, "StaticCache"):
            model(**inputs, past_key_values=static)
        with refused(UsageError, "cache"):
            model(input_ids=token, past_key_values=full)
        with refused(UsageError, "input_ids"):
            model(inputs_embeds=torch.zeros(1, 3, 32))
        with refused(UsageError, "frames"):
            model(**inputs, pixel_values_videos=torch.zeros(1, 2, 3, 24, 24))
        with refused(UsageError, "attention_mask"):
            model(**inputs | {"attention_mask": torch.ones(1, 1, 44, 44)})
        with refused(UsageError, "labels"):
            model(**inputs, labels=inputs["input_ids"])
        cache = model(**inputs, use_cache=True).past_key_values
        with refused(UsageError, "first forward"):
            model(**inputs, past_key_values=cache)
        with refused(UsageError, "pruned"), prune_visual_tokens(model, HALF):
            pass
        model(**inputs)
        with refused(CompressError, 0, 36):
            model(input_ids=inputs["input_ids"])  # not the images of the prompt before
        with refused(UsageError, "image features"):
            model(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": features})
        model(**inputs)  # and goes on


@torch.no_grad()
def test_budgets_that_leave_nothing_keep_the_least_and_are_counted():
    model = tiny_model("llava")
    cases = [
        (PruneStrategy(ratios=(0.01,)), 1, "images_at_least"),
        (PruneStrategy(ratios=(0.1,), cell=2), 4, "images_not_recycled"),
    ]
    for strategy, kept, counted in cases:
        with prune_visual_tokens(model, strategy) as pruning:
            model(**tiny_inputs(model))
        totals = pruning.stats.as_dict()
        assert pruning.stats.images[0].kept == (kept,) * LAYERS
        assert totals["images_at_least"] + totals["images_not_recycled"] == totals[counted] == 1


def test_a_model_is_not_copied_while_it_prunes():
    model = tiny_model("llava")
    with prune_visual_tokens(model, HALF), refused(UsageError, "copied"):
        copy.deepcopy(model)
    copied = copy.deepcopy(model)
    with prune_visual_tokens(copied, HALF) as pruning:
        copied.generate(**tiny_inputs(model), max_new_tokens=1)
        model.generate(**tiny_inputs(model), max_new_tokens=1)
    assert len(pruning.stats.prompts) == 1


def test_models_that_cannot_be_pruned_are_refused():
    import transformers as hf

    with refused(UsageError, "'gpt2'", "llava"):
        prune_visual_tokens(hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=8, n_head=1)), HALF)
    model = tiny_model("llava")
    with refused(UsageError, "layer 4", "4 layers"):
        prune_visual_tokens(model, PruneStrategy(stages=(4,), ratios=(0.5,)))
    with refused(UsageError, "vit_layer", 3):
        prune_visual_tokens(model, PruneStrategy(vit_layer=3))
    with refused(UsageError, "AutoModelForImageTextToText"):
        prune_visual_tokens(model.model, HALF)
    model.config.vision_feature_select_strategy = "full"
    with refused(UsageError, "'full'", "clip_vision_model"):
        prune_visual_tokens(model, HALF)
    windows = tiny_model(
        "llava_onevision", use_sliding_window=True, sliding_window=8, max_window_layers=1
    )
    with refused(UsageError, "sliding-window"):
        prune_visual_tokens(windows, HALF)


def video_inputs(model):
    """Arguments for a prompt with one video of two frames; its tokens are never counted."""
    if model.config.model_type == "llava_onevision":
        pixels = {"pixel_values_videos": torch.randn(1, 2, 3, 24, 24)}
    else:
        pixels = {
            "pixel_values_videos": torch.randn(16, 3 * 2 * 16),
            "video_grid_thw": torch.tensor([[1, 4, 4]]),
        }
    ids = torch.tensor([[5, *[VIDEO] * 4, 6]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | pixels


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_a_video_is_refused_wherever_it_is_given(family):
    model = tiny_model(family)
    inputs = video_inputs(model)
    videos = {k: v for k, v in inputs.items() if "video" in k}
    features = model.model.get_video_features(**videos, return_dict=True)
    encoded = {k: v for k, v in inputs.items() if k not in videos}
    encoded["mm_encoder_outputs"] = {"video": features}
    beside = tiny_inputs(model) | videos
    for given in (inputs, encoded, beside):
        with prune_visual_tokens(model, HALF) as pruning:
            with refused(UsageError, "videos", "frames"):
                model(**given)
            with refused(UsageError, "videos", "frames"):
                model.generate(**given, max_new_tokens=2)
            assert not pruning.stats.prompts


@torch.no_grad()
def test_generation_from_embeddings_is_refused():
    model = tiny_model("llava")
    embeddings = model.get_input_embeddings()(torch.tensor([[5, 6]]))
    with prune_visual_tokens(model, HALF), refused(UsageError, "input_ids"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=2)
