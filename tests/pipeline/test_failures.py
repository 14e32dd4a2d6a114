"""Runs that cannot succeed: one clear line, and nothing that looks like a checkpoint.

Every case runs twice: into a new folder, and over a finished checkpoint, which must stay whole.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.data.windows import CalibrationWindows
from compress.errors import RecipeError, UsageError
from compress.observer import Observer
from compress.pipeline.run import run
from support.failing_runs import Case, failure, visible
from support.refusals import refused
from support.tiny_checkpoints import (
    VOCABULARY,
    WINDOWS,
    all_count,
    byte_tokenizer,
    every_file,
    load_whole,
    random_ids,
    recipe_for,
    write_checkpoint,
)


def damage(tensor: str, value: float) -> Callable[[Path], None]:
    """Sets one value of a tensor."""

    def change(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        tensors[tensor].view(-1)[7] = value
        save_file(tensors, model / "model.safetensors")

    return change


def scale(tensor: str, factor: float) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        tensors[tensor] *= factor
        save_file(tensors, model / "model.safetensors")

    return change


def truncate(model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)


def lose_a_shard(model: Path) -> None:
    load_whole(model).save_pretrained(model, max_shard_size="200KB")
    assert len(list(model.glob("model-*-of-00003.safetensors"))) == 3
    (model / "model.safetensors").unlink(missing_ok=True)
    (model / "model-00002-of-00003.safetensors").unlink()


def lose_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, model / "model.safetensors")


def set_config(**changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return change


def break_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def shift_tokenizer(model: Path) -> None:
    """The ids of most letters and of the space are now above those that the model knows."""
    byte_tokenizer(first=VOCABULARY - 100).save_pretrained(model)


def drop_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


NAN, INF = float("nan"), float("inf")
ALIKE = all_count(torch.full((2, 24), 7))
MASKED = CalibrationWindows(WINDOWS.input_ids, torch.zeros_like(WINDOWS.mask))
K = "model.layers.1.self_attn.k_proj.weight"
CASES = {
    # the model
    "no such folder": Case(("no/such/model",), sections={"model": "no/such/model"}, usage=True),
    "no config": Case(
        ("model", "config.json"), lambda model: (model / "config.json").unlink(), usage=True
    ),
    "broken config": Case(("config.json",), break_config, usage=True),
    "unknown family": Case(
        ("'gpt2'", "llama", "qwen3"), set_config(model_type="gpt2"), usage=True
    ),
    "quantised already": Case(
        ("model", "quantised"),
        set_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        usage=True,
    ),
    "missing shard": Case(("model-00002-of-00003.safetensors", "missing"), lose_a_shard),
    "missing tensor": Case((K,), lose_a_tensor),
    "wrong shape": Case((".mlp.", "160"), set_config(intermediate_size=160)),
    "truncated": Case(("model.safetensors", "truncated"), truncate),
    "NaN in a layer": Case((K, "model.safetensors", "NaN"), damage(K, NAN)),
    "infinity in a layer": Case((K, "infinite"), damage(K, INF)),
    "NaN in the embedding": Case(
        ("model.embed_tokens.weight",), damage("model.embed_tokens.weight", NAN)
    ),
    "NaN in the last norm": Case(("model.norm.weight",), damage("model.norm.weight", NAN)),
    "NaN in the head": Case(("lm_head.weight",), damage("lm_head.weight", NAN)),
    # the recipe
    "group does not divide": Case(
        ("group_size", "128", "64"), sections={"quantize": {"group_size": 128}}, usage=True
    ),
    "pattern matches nothing": Case(
        ("lm_haed",), sections={"quantize": {"ignore": ["lm_haed"]}}, usage=True
    ),
    "over the context": Case(
        ("calibration.length", "65", "64"), sections={"calibration": {"length": 65}}, usage=True
    ),
    "no such dataset": Case(
        ("nothing.jsonl",),
        sections={"calibration": {"dataset": "nothing.jsonl"}},
        windows=None,
        usage=True,
    ),
    "no such device": Case(("'nonsense'",), options={"device": "nonsense"}, usage=True),
    # the tokens
    "foreign tokenizer": Case(("tokenizer", str(VOCABULARY)), shift_tokenizer, windows=None,
                              usage=True),
    "no tokenizer": Case(("tokenizer",), drop_tokenizer, windows=None, usage=True),
    "token beyond the vocabulary": Case(
        (f"token {VOCABULARY}",), windows=all_count(torch.full((2, 24), VOCABULARY)), usage=True
    ),
    "no windows": Case(("[0, 24]",), windows=all_count(random_ids(0, 24)), usage=True),
    "mask of another shape": Case(
        ("[6, 24]", "[6, 20]"),
        windows=CalibrationWindows(WINDOWS.input_ids, WINDOWS.mask[:, :20]),
        usage=True,
    ),
    "all tokens masked": Case(
        ("masked",), sections={"quantize": {"token_importance": "uniform"}}, windows=MASKED
    ),
    # the numbers
    "singular Hessian, no damping": Case(
        ("model.layers.0.self_attn.q_proj", "damping"),
        sections={"quantize": {"damping": 0}},
        windows=ALIKE,
    ),
    "overflow": Case(
        ("model.layers.0.",), scale("model.layers.0.mlp.up_proj.weight", 1e36)
    ),
}  # fmt: skip


@pytest.fixture
def broken(tmp_path, text):
    """`broken(case)`: the recipe, on a checkpoint of its own."""

    def broken(case: Case):
        model = write_checkpoint(tmp_path / "model")
        case.damage(model)
        return recipe_for(model, text, **case.sections)

    return broken


@pytest.mark.parametrize("name", CASES)
def test_a_failed_run_leaves_no_checkpoint(broken, tmp_path, name):
    output = tmp_path / "out"
    failure(broken(CASES[name]), output, CASES[name])
    assert visible(output) == {}


@pytest.mark.parametrize("name", CASES)
def test_a_failed_run_leaves_the_finished_checkpoint_whole(broken, finished, tmp_path, name):
    output = shutil.copytree(finished, tmp_path / "out")
    failure(broken(CASES[name]), output, CASES[name], overwrite=True)
    assert visible(output) == every_file(finished)


def test_the_cases_are_sound_without_their_damage(broken, tmp_path):
    """Otherwise a test above could see another failure than its own."""
    for number, windows in enumerate((None, WINDOWS)):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        run(broken(Case(())), tmp_path / str(number), windows=windows, self_check=False)


def test_a_hub_model_that_cannot_be_fetched_is_named(monkeypatch, tmp_path):
    def unreachable(*arguments, **options):
        raise ConnectionError("a long\nstory")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    case = Case(("someone/some-model", "network"), usage=True)
    failure(recipe_for(Path("someone/some-model")), tmp_path / "out", case)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "tensor",
    [
        "model.embed_tokens.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.0.self_attn.o_proj.weight",  # not quantised
        "model.norm.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("rotated", [False, True])
def test_values_that_do_not_fit_in_the_dtype_are_named(tmp_path, tensor, rotated):
    """1e7 does not fit in float16; where norms are fused it may show in what they are fused into,
    but never as an infinity in a file."""
    model = write_checkpoint(tmp_path / "model")
    scale(tensor, 1e7)(model)
    recipe = recipe_for(
        model,
        model={"path": str(model), "dtype": "float16"},
        rotate="hadamard" if rotated else "none",
        quantize={"overrides": [{"match": "re:.*o_proj", "ignore": True}]},
    )
    named = () if rotated and "norm" in tensor else (f"{tensor}: its values (up to ",)
    failure(recipe, tmp_path / "out", Case((*named, "float16", "model.dtype")))
    assert visible(tmp_path / "out") == {}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_that_do_not_fit_in_the_dtype_are_named(tmp_path, method, symmetric):
    name = "model.layers.1.mlp.down_proj.weight"
    model = write_checkpoint(tmp_path / "model")
    scale(name, 1e7)(model)
    recipe = recipe_for(
        model,
        model={"path": str(model), "dtype": "float16"},
        quantize={"method": method, "symmetric": symmetric},
    )
    failure(recipe, tmp_path / "out", Case((f"{name}_scale", "float16", "model.dtype")))
    assert visible(tmp_path / "out") == {}


# ---- the output folder --------------------------------------------------------------------------


def test_an_existing_folder_is_not_touched(checkpoint, finished, tmp_path):
    output = shutil.copytree(finished, tmp_path / "out")
    failure(recipe_for(checkpoint()), output, Case((str(output), "--overwrite"), usage=True))
    assert every_file(output) == every_file(finished)


def test_a_folder_of_other_things_is_not_touched(checkpoint, tmp_path):
    (tmp_path / "thesis.txt").write_text("my only copy")
    failure(recipe_for(checkpoint()), tmp_path, Case(("thesis.txt",), usage=True))
    assert every_file(tmp_path) == {"thesis.txt": b"my only copy"}


def test_the_model_itself_is_never_overwritten(broken, tmp_path, monkeypatch):
    case = Case(("itself", "--output"), usage=True)
    recipe, model = broken(case), tmp_path / "model"
    before = every_file(model)
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    for output in (model, "model", tmp_path / "link", model / ".." / "model"):
        failure(recipe, output, case, overwrite=True)
    assert every_file(model) == before


def test_an_output_that_is_a_file_is_refused_even_with_overwrite(checkpoint, tmp_path):
    output = tmp_path / "out"
    output.write_text("my only copy")
    for options in ({}, {"overwrite": True}):
        case = Case((str(output), "file"), usage=True)
        failure(recipe_for(checkpoint()), output, case, **options)
    assert output.read_text() == "my only copy"


def test_an_output_below_a_file_is_refused(checkpoint, tmp_path):
    (tmp_path / "file").write_text("my only copy")
    failure(recipe_for(checkpoint()), tmp_path / "file" / "out", Case((str(tmp_path / "file"),)))


def test_a_failed_self_check_publishes_nothing(checkpoint, tmp_path):
    """The finished files are damaged just before they are reloaded."""
    output = tmp_path / "out"
    spoiled = []

    class Spoil(Observer):
        def stage(self, name):
            if name == "self-check":
                (file,) = output.rglob("model.safetensors")
                tensors = load_file(file)
                tensors["model.norm.weight"] *= 1.01
                save_file(tensors, file)
                spoiled.append(file)

    options = {"self_check": True, "observer": Spoil()}
    failure(recipe_for(checkpoint()), output, Case((str(output), "relative error")), **options)
    assert spoiled
    assert visible(output) == {}


def test_a_wrong_model_is_told_before_a_wrong_text(tmp_path):
    """And a wrong text of calibration before one to be measured."""
    for model, kind, named in (
        ("absent/model/there", RecipeError, "absent/model/there"),
        (write_checkpoint(tmp_path / "model"), UsageError, "'absent.txt'"),
    ):
        sections = {"evaluate": {"perplexity": "also-absent.txt"}}
        recipe = recipe_for(model, calibration={"dataset": "absent.txt"}, **sections)
        with refused(kind, named):
            run(recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()
