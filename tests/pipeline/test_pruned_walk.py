"""The calibration walk prunes as the live model does: same tokens, same hidden states.

The oracle is transformers' whole model under `prune_visual_tokens`, with a hook behind its last
decoder layer.
"""

import pytest
import torch

import compress
from compress.data.prompts import ImagePrompts, probe_prompt
from compress.models.skeleton import Skeleton
from compress.observer import Observer
from compress.pipeline.inputs import RunInputs
from compress.pipeline.journal import Journal
from compress.pipeline.plan import make_plan
from compress.pipeline.run import Job, RunLog, run, settle_pruning
from compress.pruning.costs import PruningStats
from compress.pruning.engine import prune_visual_tokens
from compress.recipe.pruning import StrategySettings
from compress.recipe.recipe import Recipe
from compress.recipe.strategy import PruneStrategy
from compress.rotation.rotate import make_rotation
from compress.storage.output_folder import WORK_FOLDER
from support.reopened import opened
from support.seeing_families import PROCESSORS, write_seeing
from support.tiny_models import LAYERS, OWN_TOWERS, tiny_inputs

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl")
PROMPTS = ([[3, (20, 40), 5]], [[2, (44, 24), 1, (24, 24), 4]])  # the second has two images
STRATEGIES = {
    "before": PruneStrategy(ratios=(0.5,), voter_threshold=1.1),
    "stages": PruneStrategy(
        stages=(0, 1, 3), ratios=(0.6, 0.7, 0.5), voter_threshold=1.1, entropy_weight=0.3
    ),
    "late": PruneStrategy(stages=(2,), ratios=(0.4,), voter_threshold=1.1),
    "recycled": PruneStrategy(stages=(0, 2), ratios=(0.6, 0.7), voter_threshold=1.1, cell=3.0),
    "renumbered": PruneStrategy(
        stages=(0, 2), ratios=(0.5, 0.5), voter_threshold=1.1, positions="renumbered"
    ),
    "pyramiddrop": PruneStrategy(method="pyramiddrop", stages=(1, 3), ratios=(0.6, 0.5)),
    "divprune": PruneStrategy(method="divprune", ratios=(0.4,)),
    "visionzip": PruneStrategy(method="visionzip", ratios=(0.6,)),
}
CASES = [(family, name) for family in ("llava", "qwen2_vl") for name in STRATEGIES]
CASES += [(family, "stages") for family in FAMILIES if family not in ("llava", "qwen2_vl")]
CASES += [("qwen3_vl", name) for name in ("stages", "late", "recycled", "renumbered", "visionzip")]
CASES += [("qwen3_vl_moe", "stages"), ("qwen3_vl_moe", "recycled")]


def recipe_of(folder, strategy, quantize="none", rotate="none"):
    quantize = quantize if isinstance(quantize, dict) else {"method": quantize}
    pruning = None
    if strategy is not None:
        settings = StrategySettings.of(strategy).model_dump(exclude={"file"})
        pruning = {"stages": list(strategy.stages), "strategy": settings}
    return Recipe.from_dict(
        {
            "model": str(folder),
            "rotate": rotate,
            "calibration": {"length": 64},
            "quantize": quantize,
            "prune_visual_tokens": pruning,
        }
    )


def prompts_for(model):
    return ImagePrompts(tuple(tiny_inputs(model, rows) for rows in PROMPTS))


@torch.no_grad()
def walked(recipe, data, output):
    """A run up to behind its last layer."""
    inputs, log = RunInputs.open(recipe), RunLog(Observer())
    plan = make_plan(inputs)
    assert not plan.problems
    journal = Journal(output / WORK_FOLDER, "mark")
    done = journal.open(resume=True)
    pruning = settle_pruning(inputs, plan, journal, True, log)
    job = Job(inputs, plan, data, journal, pruning, log)
    job.start(done)
    job.walk(done)
    return job


@torch.no_grad()
def live_states(model, inputs):
    """What leaves the last decoder layer, before the final norm."""
    seen = []
    layer = model.model.get_decoder().layers[-1]
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        model(**inputs)
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_last_hidden_states_equal_those_of_the_live_pruned_model(folder_of, tmp_path, family, name):
    strategy = STRATEGIES[name]
    model, processor = compress.load(folder_of(family), prune=False)
    data = prompts_for(model)
    job = walked(recipe_of(folder_of(family), strategy), data, tmp_path / "out")
    with prune_visual_tokens(model, strategy, processor) as pruning:
        for i, inputs in enumerate(data.inputs):
            expected = live_states(model, inputs)
            assert expected.shape[1] < inputs["input_ids"].shape[1]  # or nothing was tested
            torch.testing.assert_close(job.stream.x[i], expected, atol=1e-5, rtol=1e-5)
            kept = pruning.last.kept(LAYERS - 1)
            assert torch.equal(job.stream.batches[i][0], inputs["input_ids"][kept][None])
        assert job.stream.pruning_stats(4) == PruningStats(pruning.stats.prompts).as_dict()


@pytest.mark.parametrize("family", OWN_TOWERS)
def test_types_with_towers_of_their_own_do_so_too(tmp_path, monkeypatch, family):
    family = family.replace("llava_pixtral", "llava-pixtral")
    folder = write_seeing(tmp_path / "model", family)
    if family in PROCESSORS:
        monkeypatch.setattr(Skeleton, "processor", lambda skeleton: PROCESSORS[family]())
    strategy = PruneStrategy(
        stages=(0, 1), ratios=(0.6, 0.5), voter_threshold=1.1, entropy_weight=0.3
    )
    data = ImagePrompts((probe_prompt(Skeleton(folder)),))
    job = walked(recipe_of(folder, strategy), data, tmp_path / "out")
    model, processor = opened(folder), Skeleton(folder).processor()
    with torch.no_grad(), prune_visual_tokens(model, strategy, processor) as pruning:
        expected = live_states(model, data.inputs[0])
    assert expected.shape[1] < data.inputs[0]["input_ids"].shape[1]
    torch.testing.assert_close(job.stream.x[0], expected, atol=1e-5, rtol=1e-5)
    assert job.stream.pruning_stats(4) == PruningStats(pruning.stats.prompts).as_dict()


def test_the_probe_passes_unpruned_behind_pruned_prompts(folder_of, tmp_path):
    model, _ = compress.load(folder_of("qwen2_vl"), prune=False)
    job = walked(
        recipe_of(folder_of("qwen2_vl"), STRATEGIES["stages"]), prompts_for(model), tmp_path / "out"
    )
    expected = live_states(model, job.stream.probe)
    assert expected.shape[1] == job.stream.probe["input_ids"].shape[1]
    torch.testing.assert_close(job.stream.x[len(PROMPTS)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["stages", "divprune", "pyramiddrop"])
def test_rotation_neither_changes_what_is_kept_nor_the_states(folder_of, tmp_path, name):
    folder = folder_of("llava_next")
    model, _ = compress.load(folder, prune=False)
    data, strategy = prompts_for(model), STRATEGIES[name]
    plain = walked(recipe_of(folder, strategy), data, tmp_path / "plain")
    rotated = walked(recipe_of(folder, strategy, rotate="hadamard"), data, tmp_path / "rotated")
    Q = make_rotation("hadamard", model.config.text_config.hidden_size, 0)
    for i in range(len(data)):
        assert torch.equal(plain.stream.batches[i][0], rotated.stream.batches[i][0])
        expected = Q.right(plain.stream.x[i]).float()
        scale = float(expected.abs().max())
        torch.testing.assert_close(rotated.stream.x[i] / scale, expected / scale, atol=1e-5, rtol=0)


GPTQ = {"bits": 8, "group_size": "channel", "token_importance": "uniform"}


def test_hessians_count_exactly_the_tokens_that_are_left(folder_of, tmp_path):
    folder, strategy = folder_of("llava"), STRATEGIES["stages"]
    model, _ = compress.load(folder, prune=False)
    data = prompts_for(model)
    result = run(
        recipe_of(folder, strategy, GPTQ), tmp_path / "out", windows=data, self_check=False
    )
    with prune_visual_tokens(model, strategy) as pruning, torch.no_grad():
        for inputs in data.inputs:
            model(**inputs)
    for layer in range(LAYERS):
        tokens = [prompt.tokens[0][layer] for prompt in pruning.stats.prompts]
        expected = pytest.approx(sum(tokens) / len(tokens), abs=0.06)
        assert result.layers[layer]["effective_sample_size"] == expected


def test_pruned_tokens_do_not_reach_the_hessians(folder_of, tmp_path, monkeypatch):
    """All that a pruned prompt adds to the sums is what the prompt without those tokens adds."""
    from compress.quantization import shares
    from compress.quantization.hessian import Hessian

    folder, strategy = folder_of("llava"), STRATEGIES["before"]
    model, _ = compress.load(folder, prune=False)
    data = prompts_for(model)
    rows: list[int] = []

    class Counting(Hessian):
        def add_batch(self, x, weights=None, x0=None):
            rows.append(x.shape[1])
            super().add_batch(x, weights, x0)

    monkeypatch.setattr(shares, "Hessian", Counting)
    run(recipe_of(folder, strategy, GPTQ), tmp_path / "out", windows=data, self_check=False)
    lengths = [inputs["input_ids"].shape[1] for inputs in data.inputs]
    images = [1, 2]
    expected = [n - 18 * k for n, k in zip(lengths, images, strict=True)]  # half of 36 each
    assert rows == expected * 4 * LAYERS  # four groups of linears a layer; the probe not among them


class Stopped(Observer):
    """Stops a run when a layer is about to begin."""

    def __init__(self, layer):
        self.layer, self.started = layer, []

    def layers(self, done, total):
        self.started.append(done)
        if done == self.layer:
            raise KeyboardInterrupt


@pytest.mark.parametrize("offload", ["ram", "disk"])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llava", "stages"),
        ("qwen2_vl", "recycled"),
        ("qwen3_vl", "recycled"),
        ("llava", "pyramiddrop"),
        ("llava", "random"),
    ],
)
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    folder_of, tmp_path, family, name, offload
):
    random = PruneStrategy(method="random", stages=(0, 2), ratios=(0.6, 0.5), seed=3)
    folder, strategy = folder_of(family), STRATEGIES.get(name, random)
    data = prompts_for(compress.load(folder, prune=False)[0])
    recipe = recipe_of(folder, strategy, GPTQ | {"bits": 4}, rotate="hadamard")
    recipe = recipe.with_changes(calibration={"offload": offload})
    options = {"windows": data, "self_check": False}
    whole = run(recipe, tmp_path / "whole", **options)
    for layer in (1, 2, 3):  # before and behind the stages
        watch = Stopped(layer)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "out", observer=watch, **options)
        assert watch.started == [layer - 1, layer]
    resumed = run(recipe, tmp_path / "out", **options)
    for file in ("model.safetensors", "config.json", "pruning.json"):
        assert (tmp_path / "out" / file).read_bytes() == (whole.path / file).read_bytes()
    assert resumed.pruning == whole.pruning
