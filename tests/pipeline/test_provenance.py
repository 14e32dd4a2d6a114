"""Where a result comes from: what its run wrote down, and whether a recipe has made a folder."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.data.prompts import calibration_data
from compress.errors import UsageError
from compress.kernels.cpu import native
from compress.models.skeleton import Skeleton
from compress.pipeline import provenance
from compress.pipeline.inputs import RunInputs
from compress.pipeline.provenance import fingerprint, made_by
from compress.pipeline.run import run
from compress.recipe.recipe import Recipe
from support.tiny_checkpoints import (
    WINDOWS,
    all_count,
    every_file,
    random_ids,
    recipe_for,
    write_checkpoint,
)


@pytest.fixture
def recipe(checkpoint, text):
    return recipe_for(checkpoint(), text, name="mine", rotate={"kind": "hadamard", "seed": 3})


@pytest.fixture
def folder(press, recipe) -> Path:
    return press(recipe, None)


# ---- whether a recipe has made a folder ---------------------------------------------------------


def mark_of(recipe, model=None, device="cpu") -> str:
    """The fingerprint of the run of this recipe, with its own data."""
    inputs = RunInputs.of(recipe, Skeleton(model or Path(recipe.model.path)), device)
    return fingerprint(inputs, calibration_data(inputs.source, inputs.skeleton))


def made(folder, recipe, *arguments) -> bool:
    return made_by(folder, recipe, mark_of(recipe, *arguments))


def test_a_folder_is_made_by_the_recipe_that_made_it(folder, recipe, checkpoint, tmp_path):
    assert made(folder, recipe)
    moved = shutil.copytree(folder, tmp_path / "moved")
    copied = shutil.copytree(checkpoint(), tmp_path / "model")
    assert made(moved, recipe, copied)


@pytest.mark.parametrize(
    "change",
    [
        {"quantize": {"bits": 3}},
        {"quantize": {"damping": 0.02}},
        {"rotate": {"seed": 4}},
        {"calibration": {"seed": 1}},
        {"name": "yours"},
    ],
    ids=str,
)
def test_it_is_not_made_by_another_recipe(folder, recipe, change):
    assert not made(folder, recipe.with_changes(**change))


@pytest.mark.parametrize("place", [0, -1], ids=["first weight", "last weight"])
def test_it_is_not_made_of_another_model_or_on_another_device(folder, recipe, tmp_path, place):
    assert not made(folder, recipe, None, "cuda")
    other = shutil.copytree(recipe.model.path, tmp_path / "model")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[place] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert not made(folder, recipe, other)


def test_it_is_not_made_of_other_data_under_the_same_name(checkpoint, text, press, tmp_path):
    copy = shutil.copyfile(text, tmp_path / "text.jsonl")
    recipe = recipe_for(checkpoint(), copy)
    folder = press(recipe, None)
    assert made(folder, recipe)
    lines = copy.read_text().splitlines()
    copy.write_text("\n".join(reversed(lines)) + "\n")
    assert not made(folder, recipe)


@pytest.mark.parametrize("package", ["modelpress", "torch", "safetensors", "python"])
def test_it_is_not_made_with_other_versions(folder, recipe, monkeypatch, package):
    now = provenance.versions()
    assert set(now) > {"modelpress", "torch", "transformers", "python"}
    monkeypatch.setattr(provenance, "versions", lambda: now | {package: "0.0.1"})
    assert not made(folder, recipe)


@pytest.mark.parametrize("lost", ["modelpress.json", "config.json", "recipe.yaml"])
def test_what_is_not_finished_was_made_by_nobody(folder, recipe, tmp_path, lost):
    assert not made(tmp_path / "nothing", recipe)
    (folder / lost).unlink()
    assert not made(folder, recipe)


# ---- what a run that continues must share -------------------------------------------------------


def test_equal_runs_have_one_fingerprint_and_others_have_their_own(
    recipe, checkpoint, text, tmp_path
):
    def mark(changes=None, model=None, windows=WINDOWS, device="cpu"):
        changed = recipe.with_changes(**changes or {})
        return fingerprint(RunInputs.of(changed, Skeleton(model or checkpoint()), device), windows)

    same = [
        mark(),
        mark({"name": "yours"}),
        mark({"calibration": {"offload": "disk"}}),
        mark({"evaluate": {"tasks": ["demo_code"]}}),
        mark(model=shutil.copytree(checkpoint(), tmp_path / "copy")),
    ]
    assert len(set(same)) == 1
    mask = WINDOWS.mask.clone()
    mask[0, -1] = False
    others = [
        mark({"quantize": {"refine_sweeps": 1}}),
        mark({"rotate": {"seed": 4}}),
        mark({"save": {"shard_size": "1MB"}}),
        mark(model=write_checkpoint(tmp_path / "other", seed=1)),
        mark(windows=all_count(random_ids(6, 24, seed=1))),
        mark(windows=type(WINDOWS)(WINDOWS.input_ids, mask)),
        mark(device="cuda"),
    ]
    assert len({same[0], *others}) == 1 + len(others)


# ---- what it wrote down -------------------------------------------------------------------------


def test_modelpress_json_says_what_was_done_and_from_what(folder, recipe, checkpoint):
    facts = json.loads((folder / "modelpress.json").read_text())
    skeleton = Skeleton(checkpoint())
    assert facts["versions"] == provenance.versions()
    assert facts["model"]["fingerprint"] == skeleton.reader.fingerprint()
    assert facts["model"]["path"] == str(checkpoint())
    assert facts["fingerprint"] == mark_of(recipe)
    assert facts["files"] == sorted(every_file(folder))
    assert facts["seeds"] == {"calibration": 0, "rotate": 3}
    assert facts["bytes"]["original"] == skeleton.reader.nbytes()
    assert facts["bytes"]["total"] == facts["bytes"]["quantized"] + facts["bytes"]["other"]
    modules = [module["name"] for layer in facts["layers"] for module in layer["modules"]]
    assert modules == skeleton.linear_names()[:-1]
    assert facts["average_bits"] == 4
    assert all(seconds >= 0 for seconds in facts["seconds"].values())
    assert facts["peak_memory"]["host"] > 10**7


def test_modelpress_json_says_what_rounded_the_weights(press, recipe):
    def told(made):
        return json.loads((press(made) / "modelpress.json").read_text()).get("cpu_kernels")

    assert told(recipe) == native.reason()
    uniform = {"token_importance": "uniform", "group_size": 32}
    for quantize, loops in (
        ({"method": "none"}, False),
        ({"method": "rtn", "bits": 8}, False),  # whose scales are not searched
        ({"method": "rtn", "bits": 4, "clip_search": "none"}, False),
        ({"method": "rtn", "bits": 4}, True),
    ):
        other = Recipe.from_dict(recipe.model_dump() | {"quantize": uniform | quantize})
        assert told(other) == (native.reason() if loops else None)


def test_a_processor_that_is_none_is_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELPRESS_CPU", "avx1024")
    native._outcome.cache_clear()
    try:
        with pytest.raises(UsageError, match="MODELPRESS_CPU: expected native, avx2, generic"):
            run(recipe, tmp_path / "out", windows=WINDOWS)
    finally:
        native._outcome.cache_clear()
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_run_without_a_compiler_is_warned_of(recipe, tmp_path, monkeypatch):
    why = "torch's operators: no C++ compiler was found"
    monkeypatch.delenv("MODELPRESS_NATIVE", raising=False)
    monkeypatch.setattr(native, "kernels", lambda: None)
    monkeypatch.setattr(native, "reason", lambda: why)
    slow = "slower than with compiled kernels: no C++ compiler was found; MODELPRESS_NATIVE=0 hides"
    for place, expected in (("a", True), ("b", True), ("c", False)):
        if not expected:
            monkeypatch.setenv("MODELPRESS_NATIVE", "0")
        result = run(recipe, tmp_path / place, windows=WINDOWS, self_check=False)
        assert any(text.startswith(slow) for text in result.warnings) is expected
        facts = json.loads((tmp_path / place / "modelpress.json").read_text())
        assert facts["cpu_kernels"] == why


def test_the_tokens_are_known_by_their_hash_where_there_were_any(press, recipe):
    def calibration(folder):
        return json.loads((folder / "modelpress.json").read_text())["calibration"]

    digest = hashlib.sha256(WINDOWS.input_ids.to(torch.int64).numpy().tobytes()).hexdigest()
    tokens = WINDOWS.input_ids.numel()
    expected = {"windows": list(WINDOWS.input_ids.shape), "sha256": digest}
    expected |= {"tokens": tokens, "counted_tokens": tokens}
    assert calibration(press(recipe)) == expected
    assert calibration(press(recipe.with_changes(quantize={"method": "none"}))) is None
