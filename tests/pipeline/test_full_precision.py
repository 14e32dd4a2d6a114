"""A run whose linears aim at the 16-bit model's own outputs: `quantize.target: full_precision`.

The oracle of the second stream is transformers' whole model on the result that quantises nothing.
"""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compress
from compress.data.prompts import ImagePrompts
from compress.errors import CheckpointError, UsageError
from compress.observer import Observer
from compress.pipeline.inputs import RunInputs
from compress.pipeline.journal import Journal
from compress.pipeline.plan import make_plan
from compress.pipeline.run import Job, RunLog, run, settle_pruning
from compress.pruning.saved import save_strategy
from compress.recipe.strategy import PruneStrategy
from compress.storage.output_folder import WORK_FOLDER
from support.refusals import check_line, refused
from support.tiny_checkpoints import WINDOWS, recipe_for, weight_files, write_checkpoint
from support.tiny_models import LAYERS, tiny_inputs
from support.tiny_recipes import BITS, HALF, images, recipe_of
from support.watching import Watch

DEPTH = 3
FULL = {"bits": 3, "target": "full_precision"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("deep") / "model", "mistral", layers=DEPTH)


@pytest.fixture(scope="module")
def recipes(model):
    """By where activations live; one result."""
    weighted = FULL | {"token_importance": "attention_concentration", "ignore": []}
    return {
        offload: recipe_for(
            model, rotate="hadamard", quantize=weighted, calibration={"offload": offload}
        )
        for offload in ("ram", "disk")
    }


@pytest.fixture(scope="module")
def uninterrupted(recipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    run(recipes["ram"], folder, windows=WINDOWS, self_check=False)
    return weight_files(folder)


@torch.no_grad()
def walked(recipe, output, data=WINDOWS) -> Job:
    """A run up to behind its last layer."""
    inputs, log = RunInputs.open(recipe), RunLog(Observer())
    plan = make_plan(inputs)
    assert not plan.problems
    journal = Journal(output / WORK_FOLDER, "mark")
    done = journal.open(resume=True)
    job = Job(inputs, plan, data, journal, settle_pruning(inputs, plan, journal, True, log), log)
    job.start(done)
    job.walk(done)
    return job


@pytest.mark.parametrize("rotate", ["none", "hadamard"])
def test_the_second_stream_is_the_16_bit_model_as_it_is_rotated(model, tmp_path, rotate):
    source = recipe_for(model, rotate=rotate, quantize={"method": "none"}, model={
        "path": str(model), "dtype": "float32"
    })  # fmt: skip
    run(source, tmp_path / "source", self_check=False)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    layers = whole.model.layers
    seen: list[torch.Tensor] = []
    layers[-1].register_forward_hook(
        lambda _, args, y: seen.append(y[0] if isinstance(y, tuple) else y)
    )
    for target, twin in (("full_precision", True), ("quantized", False)):
        recipe = recipe_for(model, rotate=rotate, quantize={"bits": 3, "target": target}, model={
            "path": str(model), "dtype": "float32"
        })  # fmt: skip
        job = walked(recipe, tmp_path / target)
        assert (job.stream.x0 is not None) == twin
        if not twin:
            continue
        for i, (ids, _) in enumerate(job.stream.batches):
            with torch.no_grad():
                whole(ids)
            expected = seen.pop()
            scale = float(expected.abs().max())
            torch.testing.assert_close(
                job.stream.x0[i] / scale, expected / scale, atol=1e-5, rtol=0
            )
            assert (job.stream.x[i] - expected).abs().max() > 0.01 * scale


def test_the_first_group_is_the_plain_targets_and_later_ones_are_not(model, tmp_path):
    """Nothing has drifted before the first linear is quantised."""
    codes = []
    for target in ("full_precision", "quantized"):
        recipe = recipe_for(model, quantize={"bits": 3, "target": target})
        run(recipe, tmp_path / target, windows=WINDOWS, self_check=False)
        tensors = load_file(tmp_path / target / "model.safetensors")
        codes.append({name: t for name, t in tensors.items() if name.endswith("weight_packed")})
    same = {name for name in codes[0] if torch.equal(codes[0][name], codes[1][name])}
    first = {f"model.layers.0.self_attn.{x}_proj.weight_packed" for x in "qkv"}
    assert first <= same
    assert "model.layers.1.mlp.down_proj.weight_packed" in codes[0].keys() - same


def test_layers_that_are_left_out_are_left_out_of_both_models(model, tmp_path):
    recipe = recipe_for(
        model, quantize=FULL, allocate={"importance": "position", "method": "remove", "narrow": 1}
    )
    result = run(recipe, tmp_path / "out", windows=WINDOWS, self_check=False, check_source=False)
    assert len(result.layers) == DEPTH - 1


# ---- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["ram", "disk"])
@pytest.mark.parametrize(
    "stop", [0, 1, "model.layers.1.self_attn.o_proj", "model.layers.2.mlp.down_proj", DEPTH, "head"]
)
def test_a_stopped_run_ends_with_the_same_bytes(recipes, uninterrupted, tmp_path, stop, offload):
    recipe, output = recipes[offload], tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(recipe, output, windows=WINDOWS, self_check=False, observer=Watch(stop))
    other = recipes["disk" if offload == "ram" else "ram"]  # and moves its activations
    run(other, output, windows=WINDOWS, self_check=False)
    assert weight_files(output) == uninterrupted
    assert not (output / WORK_FOLDER).exists()


@pytest.mark.parametrize("offload", ["ram", "disk"])
@pytest.mark.parametrize("damage", ["cut short", "lost", "changed"])
def test_damaged_activations_of_the_16_bit_model_are_refused(
    recipes, uninterrupted, tmp_path, offload, damage
):
    recipe, output = recipes[offload], tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(recipe, output, windows=WINDOWS, self_check=False, observer=Watch(2))
    (file,) = (output / WORK_FOLDER / "activations").glob("full-precision-0-*.f32")
    if damage == "lost":
        file.unlink()
    elif damage == "cut short":
        os.truncate(file, file.stat().st_size - 4)
    else:
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)
    with refused(CheckpointError, file, "--no-resume"):
        run(recipe, output, windows=WINDOWS, self_check=False)
    run(recipe, output, windows=WINDOWS, self_check=False, resume=False)
    assert weight_files(output) == uninterrupted


# ---- images -------------------------------------------------------------------------------------


def test_prompts_with_images_pass_both_models(folder_of, samples, tmp_path):
    quantize = BITS | {"bits": 3, "target": "full_precision"}
    recipe = recipe_of(folder_of("qwen2_vl"), calibration=images(samples), quantize=quantize)
    result = run(recipe, tmp_path / "out", self_check=False, check_source=False)
    assert [layer["layer"] for layer in result.layers] == list(range(LAYERS))
    errors = [module["error"] for layer in result.layers for module in layer["modules"]]
    assert all(0 < error < 1 for error in errors)


@pytest.mark.parametrize("saved", [False, True], ids=["in the recipe", "saved with the model"])
def test_pruned_prompts_are_refused(folder_of, samples, tmp_path, saved):
    """By the plan; and, where prompts are given from Python, before a layer is read."""
    folder, pruning = folder_of("llava"), {"prune_visual_tokens": HALF}
    if saved:
        folder, pruning = shutil.copytree(folder, tmp_path / "model"), {}
        save_strategy(PruneStrategy(ratios=(0.5,), voter_threshold=1.1), folder)
    quantize = BITS | {"target": "full_precision"}
    recipe = recipe_of(folder, calibration=images(samples), quantize=quantize, **pruning)
    (problem,) = make_plan(RunInputs.open(recipe)).problems
    check_line(problem, "quantize.target", "full_precision", "visual tokens", "quantized")
    with refused(UsageError, "quantize.target", "full_precision"):
        run(recipe, tmp_path / "out", self_check=False)
    assert not (tmp_path / "out" / "config.json").exists()


def test_pruned_prompts_from_python_are_refused(folder_of, tmp_path):
    folder = folder_of("llava")
    loaded, _ = compress.load(folder, prune=False)
    data = ImagePrompts((tiny_inputs(loaded, [[3, (20, 40), 5]]),))
    recipe = recipe_of(
        folder, quantize=BITS | {"target": "full_precision"}, prune_visual_tokens=HALF
    )
    assert not make_plan(RunInputs.open(recipe)).problems  # of text, which is not pruned
    with refused(UsageError, "quantize.target", "full_precision", "prune_visual_tokens"):
        run(recipe, tmp_path / "out", windows=data, self_check=False)


# ---- memory -------------------------------------------------------------------------------------


def host_memory(folder, text, target, **calibration) -> int:
    recipe = recipe_for(folder, text, quantize={"target": target}, calibration=calibration)
    return make_plan(RunInputs.open(recipe)).peak_memory["host"]


def test_the_plan_counts_the_second_stream_and_its_statistics(model, text):
    memory = {
        (target, offload, samples): host_memory(
            model, text, target, samples=samples, length=64, offload=offload
        )
        for target in ("quantized", "full_precision")
        for offload in ("ram", "disk")
        for samples in (4000, 8000)
    }
    hidden, widest, tokens = 64, 128, 4000 * 64
    more = memory["full_precision", "ram", 8000] - memory["full_precision", "ram", 4000]
    assert more == tokens * (2 * hidden + widest) * 4
    assert memory["quantized", "ram", 8000] - memory["quantized", "ram", 4000] == (
        tokens * (hidden + widest) * 4
    )
    assert memory["full_precision", "disk", 8000] == memory["full_precision", "disk", 4000]
    # H, D and F, and a batch of both models at once.
    statistics = memory["full_precision", "disk", 4000] - memory["quantized", "disk", 4000]
    assert statistics >= 3 * 4 * widest**2
