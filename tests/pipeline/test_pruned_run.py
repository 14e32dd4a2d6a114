"""A run that prunes visual tokens: the strategy, its search, and what the plan foretells.

The oracle is the live model under `prune_visual_tokens`.
"""

import json
import shutil

import pytest
import torch

import compress
from compress.data.samples import read_samples
from compress.errors import UsageError
from compress.models.skeleton import Skeleton
from compress.observer import Observer
from compress.pipeline.inputs import RunInputs
from compress.pipeline.plan import make_plan
from compress.pipeline.run import run
from compress.pruning.engine import prune_visual_tokens
from compress.pruning.saved import KEY, save_strategy
from compress.recipe.strategy import PruneStrategy
from support.refusals import check_line, refused
from support.tiny_models import LAYERS, tiny_inputs
from support.tiny_recipes import BITS, HALF, images, recipe_of

# ---- the strategy -------------------------------------------------------------------------------


def test_pruning_alone_changes_no_weight_and_is_applied_on_loading(folder_of, tmp_path):
    folder = folder_of()
    result = run(recipe_of(folder, prune_visual_tokens=HALF), tmp_path / "out", self_check=False)
    skeleton, again = Skeleton(folder), Skeleton(tmp_path / "out")
    assert skeleton.reader.names == again.reader.names
    same = (
        skeleton.reader.tensor(name).equal(again.reader.tensor(name)) for name in again.reader.names
    )
    assert all(same)
    model, processor = compress.load(tmp_path / "out")
    strategy = model.visual_token_pruning.strategy
    assert strategy.average_kept(LAYERS) == pytest.approx(0.5)
    assert (strategy.stages, strategy.voter_threshold) == ((0, 2), 1.1)
    assert result.pruning["strategy"] == strategy.model_dump(mode="json")
    plain, _ = compress.load(folder)
    inputs = tiny_inputs(plain)
    with torch.no_grad(), prune_visual_tokens(plain, strategy, processor):
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_a_saved_strategy_stays_and_calibration_follows_it(folder_of, samples, tmp_path):
    folder = shutil.copytree(folder_of(), tmp_path / "pruned")
    strategy = PruneStrategy(ratios=(0.5,), voter_threshold=1.1)
    save_strategy(strategy, folder)
    recipe = recipe_of(folder, calibration=images(samples), quantize=BITS)
    result = run(recipe, tmp_path / "out", self_check=False)
    assert compress.load(tmp_path / "out")[0].visual_token_pruning.strategy == strategy
    assert result.layers[0]["effective_sample_size"] == 39 - 18
    assert any("strategy" in warning for warning in result.warnings)
    other = recipe_of(folder, prune_visual_tokens={"keep": 0.25, "strategy": {"method": "uniform"}})
    run(other, tmp_path / "other", self_check=False)
    replaced = compress.load(tmp_path / "other")[0].visual_token_pruning.strategy
    assert replaced == PruneStrategy(method="uniform", ratios=(0.25,))


def test_card_and_provenance_say_what_was_kept(folder_of, samples, tmp_path):
    calibration = images(samples)
    recipe = recipe_of(
        folder_of(), calibration=calibration, quantize=BITS, prune_visual_tokens=HALF
    )
    result = run(recipe, tmp_path / "out", self_check=False)
    model, processor = compress.load(tmp_path / "out")
    with torch.no_grad():
        for inputs in read_samples(samples, processor, 3, 0):
            model(**inputs)
    expected = model.visual_token_pruning.stats.as_dict()
    assert result.pruning["calibration"] == expected
    written = json.loads((tmp_path / "out" / "modelpress.json").read_text())
    assert written["pruning"] == json.loads(json.dumps(result.pruning))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "compress.load(" in card
    assert "VFlowOpt" in card and "before decoder layers 0, 2" in card
    assert f"{expected['average_kept']:.1%}" in card and "AutoProcessor" in card
    assert "pruning.strategy.method" in (tmp_path / "out" / "report.html").read_text()


# ---- the search ---------------------------------------------------------------------------------


class Trials(Observer):
    """Notes the trials of a search, and stops the run after one of them."""

    def __init__(self, stop=None):
        self.stop, self.told = stop, []

    def trial(self, done, total, score, best):
        self.told.append(done)
        if done == self.stop:
            raise KeyboardInterrupt


def test_a_run_searches_as_the_command_does_and_calibrates_on_what_it_finds(
    folder_of, samples, tmp_path
):
    pytest.importorskip("optuna")
    from compress.pruning.search import search_strategy

    folder = folder_of()
    search = {"samples": 2, "trials": 3, "seed": 1}
    section = {"keep": 0.5, "stages": [0, 2], "search": search}
    recipe = recipe_of(
        folder, calibration=images(samples), quantize=BITS, prune_visual_tokens=section
    )
    watches = [Trials(stop=2), Trials()]
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out", self_check=False, observer=watches[0])
    result = run(recipe, tmp_path / "out", self_check=False, observer=watches[1])
    assert [watch.told for watch in watches] == [[1, 2], [3]]  # it goes on where it was
    model, processor = compress.load(folder)
    prompts = read_samples(samples, processor, 2, 1)
    start = PruneStrategy.for_budget("vflowopt", 0.5, LAYERS, stages=(0, 2))
    found = search_strategy(model, prompts, 0.5, start=start, trials=3, seed=1, processor=processor)
    assert compress.load(result.path)[0].visual_token_pruning.strategy == found.strategy
    assert result.pruning["search"]["score"] == pytest.approx(found.score)
    kept = result.pruning["calibration"]["average_kept"]
    assert kept == pytest.approx(0.5, abs=0.02)
    assert "mean cosine" in (result.path / "README.md").read_text()


# ---- what the plan says -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
def test_the_plan_foretells_what_pruning_costs(folder_of, samples, family):
    folder = folder_of(family)
    recipe = recipe_of(
        folder, calibration=images(samples, samples=1), quantize=BITS, prune_visual_tokens=HALF
    )
    planned = make_plan(RunInputs.of(recipe, Skeleton(folder))).pruning
    model, processor = compress.load(folder)
    strategy = PruneStrategy.from_dict(planned["strategy"])
    with prune_visual_tokens(model, strategy, processor) as pruning, torch.no_grad():
        model(**read_samples(samples, processor, 1, 0)[0])
    stats = pruning.stats.as_dict()
    for name in ("prefill_flops", "prefill_flops_unpruned", "kv_bytes", "kv_bytes_unpruned"):
        assert planned[name] == stats[name]
    assert planned["kept"] == list(pruning.stats.images[0].kept)
    assert planned["prompt"]["visual_tokens"] == stats["visual_tokens"]


def problem_of(folder, **sections):
    plan = make_plan(RunInputs.of(recipe_of(folder, **sections), Skeleton(folder)))
    assert plan.problems and "\n" not in plan.problems[0]
    return plan.problems[0]


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"keep": 0.3, "stages": [2]}, ("keep", 0.5, 0.3)),
        ({"keep": 0.5, "stages": [0, 4]}, ("layer 4", "4 layers")),
        ({"keep": 0.01, "stages": [0]}, ("ratios", 0.01)),
        ({"keep": 0.4, "stages": [0], "strategy": {"ratios": [0.5]}}, ("keep", 0.4, [0.5])),
        ({"keep": 0.5, "strategy": {"vit_layer": 9}}, ("vit_layer", 9, "3 layers")),
        ({"keep": 0.5, "search": {}}, ("search", "images")),
    ],
)
def test_impossible_pruning_is_refused_before_a_weight_is_read(
    folder_of, tmp_path, monkeypatch, section, named
):
    from compress.storage.safetensors import CheckpointReader

    def read(*args, **kwargs):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(CheckpointReader, "tensor", read)
    found = problem_of(folder_of(), prune_visual_tokens=section)
    assert found.startswith("prune_visual_tokens: ")
    with refused(UsageError, *named):
        run(recipe_of(folder_of(), prune_visual_tokens=section), tmp_path / "out")


def test_a_text_model_has_no_visual_tokens_to_prune(checkpoint):
    found = problem_of(checkpoint(), prune_visual_tokens={"keep": 0.5})
    check_line(found, "prune_visual_tokens: ", "'llama'")


@pytest.mark.parametrize("change", [{"expansion": 2}, {"bos": True}])
def test_settings_of_text_windows_are_refused_for_prompts_with_images(folder_of, samples, change):
    found = problem_of(folder_of(), calibration=images(samples, **change), quantize=BITS)
    assert found.startswith(f"calibration.{next(iter(change))}: ")


def test_widths_are_allocated_on_text_or_without_data(folder_of, samples, tmp_path):
    allocate = {"widths": [8, 4], "average_bits": 6}
    calibration = images(samples)
    found = problem_of(folder_of(), calibration=calibration, quantize=BITS, allocate=allocate)
    check_line(found, "allocate", "text")
    free = allocate | {"importance": "outlier_weight_count"}
    recipe = recipe_of(
        folder_of(), calibration=calibration, quantize=BITS, allocate=free,
        prune_visual_tokens=HALF,
    )  # fmt: skip
    result = run(recipe, tmp_path / "free", self_check=False)
    assert {module.bits for module in result.plan.modules} == {4, 8}
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 70 + 3}" for i in range(900)))
    measured = recipe_of(
        folder_of(), calibration={"dataset": str(text), "length": 32, "samples": 4},
        quantize=BITS, allocate=allocate,
    )  # fmt: skip
    result = run(measured, tmp_path / "measured", self_check=False)
    assert {module.bits for module in result.plan.modules} == {4, 8}


def test_strategy_keys_of_a_source_never_hide_that_nothing_prunes(folder_of, tmp_path):
    run(recipe_of(folder_of()), tmp_path / "out", self_check=False)
    assert KEY not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "pruning.json").exists()
