"""The check against the source: silent where we read as transformers does, loud where we do not.

Faults are put into our own path, one for each part of a family that could be misread.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.errors import CheckpointError
from compress.models.skeleton import Skeleton
from compress.pipeline import source_check
from compress.pipeline.inputs import RunInputs
from compress.pipeline.run import run
from compress.pipeline.source_check import check_source
from compress.pipeline.source_script import source_logits
from compress.rotation import model as rotated
from compress.rotation import table as tables
from support.tiny_checkpoints import FAMILIES, recipe_for
from support.tiny_recipes import recipe_of

MULTIMODAL = ["llava", "llava_siglip", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl"]
rotations = pytest.mark.parametrize("rotate", ["none", "hadamard", "random"])


def check(folder, budget=10**10, **sections):
    made = recipe_of if Skeleton(folder).spec.vision else recipe_for
    return check_source(RunInputs.of(made(folder, **sections), Skeleton(folder)), budget)


def errors_of(facts):
    return {name: probe["relative_error"] for name, probe in facts["probes"].items()}


# ---- agreement ----------------------------------------------------------------------------------


@rotations
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees(checkpoint, family, rotate):
    facts = check(checkpoint(family, dtype=torch.bfloat16), rotate=rotate)
    assert errors_of(facts).keys() == {"text"}
    assert errors_of(facts)["text"] < 1e-5
    assert facts["offloaded"] is False


@pytest.mark.parametrize("rotate", ["none", "hadamard"])
@pytest.mark.parametrize("family", MULTIMODAL)
def test_every_multimodal_family_agrees_with_and_without_an_image(folder_of, family, rotate):
    facts = check(folder_of(family), rotate=rotate)
    assert errors_of(facts).keys() == {"text", "image"}
    assert max(errors_of(facts).values()) < 1e-5
    assert facts["probes"]["image"]["tokens"] > 16


@pytest.mark.parametrize("rotate", ["none", "hadamard"])
def test_the_dtype_of_the_output_plays_no_part(folder_of, rotate):
    facts = check(folder_of(), rotate=rotate, model={"path": str(folder_of()), "dtype": "bfloat16"})
    assert max(errors_of(facts).values()) < 1e-5


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", *MULTIMODAL])
def test_weights_on_disk_give_the_same_logits(checkpoint, folder_of, tmp_path, family, tied):
    """accelerate's offload, in this process."""
    text = family == "llama"
    folder = checkpoint(family) if text else folder_of(family)
    if tied:
        folder = shutil.copytree(folder, tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        tensors = {n: t for n, t in tensors.items() if "lm_head" not in n}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    kind = "AutoModelForCausalLM" if text else "AutoModelForImageTextToText"
    probes = list(source_check._probes(Skeleton(folder)).values())
    whole = source_logits(str(folder), kind, probes)
    places = source_check._places(Skeleton(folder))
    on_disk = source_logits(str(folder), kind, probes, places, str(tmp_path / "offload"))
    for found, expected in zip(on_disk, whole, strict=True):
        assert torch.equal(found, expected)


def test_a_model_beyond_the_budget_runs_in_a_process_of_its_own(folder_of, monkeypatch, capfd):
    monkeypatch.setattr(source_check, "SMALL", 0)
    facts = check(folder_of("qwen2_vl"), budget=0, rotate="hadamard")
    assert facts["offloaded"] is True
    assert max(errors_of(facts).values()) < 1e-5
    assert capfd.readouterr().out == ""


# ---- faults -------------------------------------------------------------------------------------


def one_window_too_long(monkeypatch):
    inputs = Skeleton.layer_inputs
    monkeypatch.setattr(
        Skeleton,
        "layer_inputs",
        lambda self, index, x, positions=None: (
            inputs(self, index, x, positions) | {"attention_mask": None}
        ),
    )


def head_of_another(monkeypatch):
    monkeypatch.setattr(Skeleton, "table", property(lambda self: self.spec.head))


def norms_left_as_they_are(monkeypatch):
    monkeypatch.setattr(tables, "fuse_and_rotate_head", lambda W, gamma, Q: Q.right(W))


def layers_in_another_order(monkeypatch):
    read = Skeleton.read_layer
    monkeypatch.setattr(
        Skeleton, "read_layer", lambda self, index, **how: read(self, 1 - index, **how)
    )


def bias_left_out(monkeypatch):
    read = Skeleton.read_layer

    def without(self, index, **how):
        tensors = read(self, index, **how)
        return tensors | {n: t * 0 for n, t in tensors.items() if n == "self_attn.v_proj.bias"}

    monkeypatch.setattr(Skeleton, "read_layer", without)


def projector_not_rotated(monkeypatch):
    monkeypatch.setattr(rotated, "rotate_vision", lambda tensors, vision, residual: tensors)


def positions_forgotten(monkeypatch):
    inputs = Skeleton.layer_inputs
    monkeypatch.setattr(
        Skeleton, "layer_inputs", lambda self, index, x, positions=None: inputs(self, index, x)
    )


FAULTS = [
    ("mistral", one_window_too_long),
    ("qwen2-sliding", one_window_too_long),
    ("llama", head_of_another),
    ("llama", norms_left_as_they_are),
    ("qwen3", layers_in_another_order),
    ("qwen2", bias_left_out),
    ("llava", projector_not_rotated),
    ("qwen2_5_vl", projector_not_rotated),
    ("qwen2_vl", positions_forgotten),
]


@pytest.mark.parametrize("family, fault", FAULTS)
def test_faults_of_our_own_path_are_found(checkpoint, folder_of, monkeypatch, family, fault):
    folder = folder_of(family) if family in MULTIMODAL else checkpoint(family)
    check(folder, rotate="hadamard")
    fault(monkeypatch)
    with pytest.raises(CheckpointError, match=r"relative error \d.*tolerance 0\.0001") as caught:
        check(folder, rotate="hadamard")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("whole", [True, False], ids=["here", "elsewhere"])
def test_what_does_not_run_in_transformers_is_one_line(checkpoint, tmp_path, monkeypatch, whole):
    folder = shutil.copytree(checkpoint(), tmp_path / "model")
    inputs = RunInputs.of(recipe_for(folder), Skeleton(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "no-such-thing"}))
    monkeypatch.setattr(source_check, "SMALL", 0)
    with pytest.raises(CheckpointError, match=r"does not run in transformers.*no-such") as caught:
        check_source(inputs, 10**10 if whole else 0)
    assert "\n" not in str(caught.value)


# ---- in a run, and in a plan --------------------------------------------------------------------


def facts_of(folder):
    return json.loads((folder / "modelpress.json").read_text())


def test_a_run_tells_what_it_found(checkpoint, tmp_path):
    recipe = recipe_for(checkpoint(), rotate="hadamard", quantize={"method": "rtn"})
    result = run(recipe, tmp_path / "out", self_check=False)
    assert errors_of(result.source_check)["text"] < 1e-5
    assert facts_of(tmp_path / "out")["source_check"] == result.source_check
    assert "source_check" in result.seconds
    assert result.as_dict()["source_check"] == result.source_check


def test_a_run_that_skips_it_says_so(checkpoint, tmp_path, monkeypatch):
    head_of_another(monkeypatch)
    recipe = recipe_for(checkpoint(), quantize={"method": "rtn"})
    result = run(recipe, tmp_path / "out", self_check=False, check_source=False)
    assert facts_of(tmp_path / "out")["source_check"] == {"skipped": "--no-check-source"}
    assert any("--no-check-source" in warning for warning in result.warnings)


def test_a_run_stops_before_anything_is_quantised(checkpoint, tmp_path, monkeypatch):
    layers_in_another_order(monkeypatch)
    with pytest.raises(CheckpointError, match="relative error"):
        run(recipe_for(checkpoint(), quantize={"method": "rtn"}), tmp_path / "out")
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert left == ["journal.jsonl"]


def test_a_run_that_continues_checks_once(checkpoint, tmp_path, monkeypatch):
    from compress.pipeline import run as module
    from compress.pipeline.layer_walk import LayerWalk

    recipe = recipe_for(checkpoint(), quantize={"method": "rtn"})
    walk, checks = LayerWalk.run, []

    def noted(*arguments):
        checks.append(arguments)
        return check_source(*arguments)

    def killed(self, done):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "check_source", noted)
    monkeypatch.setattr(LayerWalk, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out", self_check=False)
    monkeypatch.setattr(LayerWalk, "run", walk)
    result = run(recipe, tmp_path / "out", self_check=False)
    assert len(checks) == 1
    assert "text" in result.source_check["probes"]


def test_a_plan_checks_when_it_is_asked_to(checkpoint, monkeypatch):
    recipe = recipe_for(checkpoint(), quantize={"method": "rtn"})
    assert compress.plan(recipe).source_check is None
    planned = compress.plan(recipe, check_source=True)
    assert errors_of(planned.as_dict()["source_check"])["text"] < 1e-5
    assert planned.problems == []
    layers_in_another_order(monkeypatch)
    (problem,) = compress.plan(recipe, check_source=True).problems
    assert "relative error" in problem
