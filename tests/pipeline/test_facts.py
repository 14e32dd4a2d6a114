"""What a run says about its modules: their errors, dead inputs and effective sample sizes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.models.skeleton import Skeleton
from compress.observer import Observer
from compress.pipeline.inputs import RunInputs
from compress.pipeline.plan import make_plan
from compress.pipeline.run import run
from compress.pipeline.verify import reload_memory
from compress.quantization import solvers
from support.calling import pretend
from support.tiny_checkpoints import (
    LAYERS,
    WINDOWS,
    dequantised,
    load_whole,
    read_tensors,
    recipe_for,
    widths_of,
    write_checkpoint,
)


class Recorder(Observer):
    """Remembers what the run says about its modules."""

    def __init__(self):
        self.modules: dict[str, dict] = {}

    def module(self, name, facts):
        self.modules[name] = facts


def first_inputs(source: Skeleton) -> torch.Tensor:
    """What q, k and v of the first layer read of WINDOWS: [tokens, hidden], fp64."""
    x = source.read(source.spec.embedding)[WINDOWS.input_ids.flatten()].double()
    x *= (x.square().mean(-1, keepdim=True) + source.config.rms_norm_eps).rsqrt()
    return x * source.read_layer(0)["input_layernorm.weight"]


def test_gptq_beats_rounding_and_refinement_lowers_its_error(checkpoint, press):
    """||X (W - Q)^T||^2 over ||X W^T||^2 of the first q, k and v, whose input no rounding changes.

    The error that the run reports is that of the weights that it wrote.
    """
    source = Skeleton(checkpoint())
    x, original = first_inputs(source), source.read_layer(0)
    errors: dict[str, list[float]] = {name: [] for name in source.spec.layer(0).groups[0]}
    for method, sweeps in (("rtn", 0), ("gptq", 0), ("gptq", 1), ("gptq", 5)):
        quantize = {"method": method, "bits": 3, "refine_sweeps": sweeps}
        recipe, seen = recipe_for(checkpoint(), quantize=quantize), Recorder()
        folder = press(recipe, observer=seen)
        plain = dequantised(read_tensors(folder), widths_of(recipe, checkpoint()))
        for name, found in errors.items():
            W = original[f"{name}.weight"].double()
            missed = x @ (W - plain[f"model.layers.0.{name}.weight"].double()).T
            found.append((missed.square().sum() / (x @ W.T).square().sum()).item())
            expected = None if method == "rtn" else pytest.approx(found[-1], rel=1e-3)
            assert seen.modules[f"model.layers.0.{name}"]["error"] == expected, (method, sweeps)
    for rtn, loop, once, refined in errors.values():
        assert refined <= once < loop < rtn


def test_every_planned_module_is_reported_in_order(checkpoint, tmp_path):
    """With the facts of a healthy run: damping as asked for, no dead inputs, sweeps counted."""
    seen = Recorder()
    recipe = recipe_for(checkpoint(), quantize={"refine_sweeps": 3, "damping": 0.02})
    result = run(recipe, tmp_path / "out", windows=WINDOWS, self_check=False, observer=seen)
    assert list(seen.modules) == [module.name for module in result.plan.modules]
    for name, facts in seen.modules.items():
        assert (facts["damping"], facts["dead_columns"]) == (0.02, 0), name
        assert 1 <= len(facts["changed"]) <= 3


@pytest.mark.parametrize("importance", ["uniform", "attention_concentration"])
def test_the_effective_sample_size_is_that_of_the_token_weights(checkpoint, tmp_path, importance):
    """All tokens if they weigh the same, fewer if some matter more."""
    recipe = recipe_for(checkpoint(), quantize={"token_importance": importance})
    result = run(recipe, tmp_path / "out", windows=WINDOWS, self_check=False)
    sizes = [layer["effective_sample_size"] for layer in result.layers]
    length = WINDOWS.input_ids.shape[1]
    if importance == "uniform":
        assert sizes == [length] * LAYERS
    else:
        assert len(sizes) == LAYERS
        assert all(1 < size < length for size in sizes)


def test_inputs_that_are_always_zero_are_reported_and_get_zero_weights(tmp_path):
    """One channel of the first norm is off, so q, k and v never see it."""
    source = write_checkpoint(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][3] = 0
    save_file(tensors, source / "model.safetensors")
    seen, warnings = Recorder(), []
    seen.warning = warnings.append
    recipe = recipe_for(source)
    run(recipe, tmp_path / "out", windows=WINDOWS, self_check=False, observer=seen)
    plain = dequantised(read_tensors(tmp_path / "out"), widths_of(recipe, source))
    for name in seen.modules:
        dead = name.startswith("model.layers.0.self_attn.") and not name.endswith("o_proj")
        assert seen.modules[name]["dead_columns"] == int(dead), name
        assert any(name in warning for warning in warnings) == dead, name
        assert bool((plain[f"{name}.weight"][:, 3] == 0).all()) == dead, name


@pytest.mark.parametrize("short", [0, 1])
def test_a_self_check_that_does_not_fit_in_memory_is_left_out_and_said(
    checkpoint, tmp_path, monkeypatch, short
):
    """A layer of it is in fp32 at a time: with one byte less than that it is not tried."""
    plan = make_plan(RunInputs.open(recipe_for(checkpoint())))
    needed = reload_memory(Skeleton.open(checkpoint()), plan.schemes)
    assert needed < 4 * sum(p.numel() for p in load_whole(checkpoint()).parameters())
    memory = SimpleNamespace(available=needed - short)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    verdict = {"relative_error": 0.0}
    checks = pretend(monkeypatch, "compress.pipeline.run", "reload_and_compare", verdict)
    seen, heard = Recorder(), []
    seen.warning = heard.append
    result = run(recipe_for(checkpoint()), tmp_path / "out", windows=WINDOWS, observer=seen)
    load_whole(tmp_path / "out")
    assert result.warnings == heard
    if short:
        (warning,) = heard
        assert warning.startswith("no self-check: ") and "\n" not in warning
        assert (len(checks), result.self_check) == (0, {})
    else:
        assert heard == []
        assert (len(checks), result.self_check) == (1, verdict)


def test_linears_that_are_rounded_to_nearest_after_all_are_said_and_counted(
    checkpoint, tmp_path, monkeypatch
):
    loop = solvers.column_loop

    def worse(*args, **kwargs):
        """Every code one level too low."""
        found = loop(*args, **kwargs)
        found.x.sub_(1).clamp_(min=-4)
        found.error = None
        return found

    quantize = {"method": "gptq", "bits": 3, "refine_sweeps": 0}
    recipe, seen, heard = recipe_for(checkpoint(), quantize=quantize), Recorder(), []
    healthy = run(recipe, tmp_path / "healthy", windows=WINDOWS, self_check=False)
    assert healthy.rounded_to_nearest == 0
    monkeypatch.setattr(solvers, "column_loop", worse)
    seen.warning = heard.append
    result = run(recipe, tmp_path / "out", windows=WINDOWS, self_check=False, observer=seen)
    facts = json.loads((tmp_path / "out" / "modelpress.json").read_text())
    assert result.rounded_to_nearest == facts["rounded_to_nearest"] == len(seen.modules) > 0
    for name, module in seen.modules.items():
        assert module["rounded_to_nearest"]
        assert any(name in warning and "nearest" in warning for warning in heard)


def test_calibration_of_one_repeated_token_is_said(checkpoint, tmp_path):
    ids = torch.full_like(WINDOWS.input_ids, 5)
    windows, seen, heard = replace(WINDOWS, input_ids=ids), Recorder(), []
    seen.warning = heard.append
    run(recipe_for(checkpoint()), tmp_path / "out", windows=windows, observer=seen)
    assert any("calibration" in warning and "1 distinct" in warning for warning in heard)
    assert any("calibration" in warning and "more than once" in warning for warning in heard)
