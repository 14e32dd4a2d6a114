"""Models that PEFT wraps are pruned as the model inside, with what the adapter changes."""

import pytest
import torch

import compress
from compress.errors import UsageError
from compress.pruning.engine import prune_visual_tokens
from compress.pruning.saved import KEY, apply_strategy
from compress.recipe.strategy import PruneStrategy
from support.refusals import refused
from support.tiny_models import BATCH, LAYERS, generate, masked_run, tiny_inputs, tiny_model

peft = pytest.importorskip("peft")
THREE = PruneStrategy(stages=(0, 1, 3), ratios=(0.6, 0.7, 0.5), voter_threshold=1.1)
FASTV = PruneStrategy(method="fastv", stages=(2,), ratios=(0.5,))
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False),
    "ia3": lambda: peft.IA3Config(
        target_modules=["v_proj"], feedforward_modules=[], init_ia3_weights=False
    ),
}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("strategy", [THREE, FASTV], ids=["vflowopt", "fastv"])
def test_a_wrapped_model_equals_the_masked_full_run(family, strategy, adapter):
    model = tiny_model(family)
    inputs = tiny_inputs(model, BATCH)
    bare = generate(model, inputs, steps=1)[1]
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, ADAPTERS[adapter]())
    with prune_visual_tokens(wrapped, strategy) as pruning:
        found = generate(wrapped, inputs, steps=3)[1]
        assert len(pruning.stats.prompts) == 1
        if strategy is FASTV:
            merged = pruning.last.kept(LAYERS - 1)
    with masked_run(model, [pruning.last.kept(layer) for layer in range(LAYERS)]):
        for a, b in zip(found, generate(wrapped, inputs, steps=3)[1], strict=True):
            close(a, b)
    plain = generate(wrapped, inputs, steps=1)[1]
    assert not torch.allclose(plain[0], bare[0], atol=1e-3)  # the adapter matters
    if strategy is FASTV:  # and ranks as the merged model does
        whole = wrapped.merge_and_unload()
        with prune_visual_tokens(whole, strategy) as pruning:
            generate(whole, inputs, steps=1)
        assert torch.equal(pruning.last.kept(LAYERS - 1), merged)


def test_a_wrapped_model_refuses_what_a_bare_one_does():
    wrapped = peft.get_peft_model(tiny_model("llava"), ADAPTERS["lora"]())
    inputs = tiny_inputs(wrapped.get_base_model())
    with prune_visual_tokens(wrapped, THREE), torch.no_grad():
        for module in (wrapped, wrapped.base_model, wrapped.get_base_model()):
            with refused(UsageError, "labels"):
                module(**inputs, labels=inputs["input_ids"])
        with refused(UsageError, "num_beams=2"):
            wrapped.generate(**inputs, max_new_tokens=2, num_beams=2)
        with refused(UsageError, "already pruned"):
            prune_visual_tokens(wrapped, THREE).__enter__()
    text = peft.get_peft_model(
        tiny_model("llava").model.language_model, peft.LoraConfig(target_modules=["q_proj"])
    )
    with refused(UsageError, "llama"):
        prune_visual_tokens(text, THREE)


def test_an_adapter_that_comes_while_a_model_is_pruned_is_refused():
    model = tiny_model("llava")
    inputs = tiny_inputs(model)
    apply_strategy(model, THREE)
    wrapped = peft.get_peft_model(model, ADAPTERS["lora"]())
    with refused(UsageError, "adapters", "stop_pruning"):
        wrapped(**inputs)
    compress.stop_pruning(wrapped)
    assert not hasattr(model, KEY)
    apply_strategy(wrapped, THREE)
    with torch.no_grad():
        wrapped(**inputs)
    assert len(getattr(wrapped, KEY).stats.prompts) == 1
    second = peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    wrapped.add_adapter("second", second)
    with refused(UsageError, "adapters", "stop_pruning"):
        wrapped(**inputs)
    compress.stop_pruning(model)
    assert not hasattr(wrapped, KEY)
    apply_strategy(wrapped, THREE)
    wrapped.set_adapter("second")  # the two take turns
    with torch.no_grad():
        wrapped(**inputs)
    wrapped.delete_adapter("default")
    with refused(UsageError, "adapters", "stop_pruning"):
        wrapped(**inputs)
