"""Any group size that divides, and `auto`: planned, run, inspected, loaded and exported alike."""

import json

import pytest
import torch

from compress.checkpoint.export import export
from compress.checkpoint.inspect import inspect
from compress.checkpoint.packed import PackedLinears
from compress.loading.load import load
from compress.models.skeleton import Skeleton
from compress.pipeline.inputs import RunInputs
from compress.pipeline.plan import make_plan
from compress.pipeline.run import run
from support.refusals import check_line
from support.tiny_checkpoints import (
    dequantised,
    logits_of,
    read_tensors,
    recipe_for,
    relative_error,
    tiny_model,
    widths_of,
    write_checkpoint,
)

# hidden size, MLP: what is asked for -> the size for inputs of either width
CASES = {
    "auto": (192, 128, "auto", {192: 64, 128: 128}),
    "auto, whole rows": (96, 44, "auto", {96: 32, 44: None}),
    "16": (96, 64, 16, {96: 16, 64: 16}),
    "24": (96, 48, 24, {96: 24, 48: 24}),
    "512": (64, 512, 512, {64: 64, 512: 512}),
    "-1": (96, 64, -1, {96: None, 64: None}),
}
WHOLE = [{"match": "re:(?!.*down_proj)", "group_size": 64}]


def ready(tmp_path, case, **quantize):
    hidden, inner, asked, sizes = CASES[case]
    changes = {"hidden_size": hidden, "intermediate_size": inner, "layers": 1}
    folder = write_checkpoint(tmp_path / "model", **changes)
    settings = {"method": "rtn", "group_size": asked} | quantize
    if case == "512":
        settings["overrides"] = WHOLE
    return folder, recipe_for(folder, quantize=settings), changes, sizes


@pytest.mark.parametrize("case", CASES)
def test_every_reader_goes_by_the_sizes_of_the_plan(tmp_path, case):
    folder, recipe, changes, sizes = ready(tmp_path, case)
    result = run(recipe, tmp_path / "out")
    planned = {m.name: m.scheme.group_size for m in result.plan.modules}
    assert planned == {m.name: sizes[m.shape[1]] for m in result.plan.modules}
    listed = inspect(tmp_path / "out")
    found = {m["name"]: m["group_size"] for m in listed["modules"] if m["symmetric"] is not None}
    assert found == planned
    assert listed["bytes"] == result.plan.bytes

    tensors = read_tensors(tmp_path / "out")
    for name, size in planned.items():
        N, K = tensors[f"{name}.weight_shape"].tolist()
        assert tensors[f"{name}.weight_scale"].shape == (N, K // (size or K))
    model = tiny_model("llama", **changes)
    model.load_state_dict(dequantised(tensors, widths_of(recipe, folder)))
    expected = logits_of(model.eval())
    assert relative_error(logits_of(tmp_path / "out"), expected) < 1e-5
    packed, _ = load(tmp_path / "out", dtype="float32", packed=True)
    assert relative_error(logits_of(packed), expected) < 1e-5


def test_gptq_names_the_modules_of_other_sizes(tmp_path):
    """One size holds for all but what `dynamic` names; GPTQ's zero points move no scale."""
    _, recipe, _, sizes = ready(tmp_path, "auto")
    result = run(recipe, tmp_path / "out", self_check=False)
    exported = export(tmp_path / "out", "gptq", tmp_path / "gptq", round_scales=True)
    section = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    schemes = PackedLinears(tmp_path / "gptq").schemes
    for module in result.plan.modules:
        assert schemes[module.name].group_size == sizes[module.shape[1]]
    assert section["group_size"] == 64  # of most weights
    assert [rule["group_size"] for rule in section["dynamic"].values()] == [128]
    assert "transformers" in " ".join(exported.notes)
    ours, theirs = (load(tmp_path / name, dtype="float32")[0] for name in ("out", "gptq"))
    # scales are fp16 there, fp32 here
    assert relative_error(logits_of(theirs), logits_of(ours)) < 1e-3


def test_gguf_takes_groups_of_any_multiple_of_its_blocks(tmp_path):
    pytest.importorskip("gguf")
    changes = {"hidden_size": 192, "intermediate_size": 128, "layers": 1}
    folder = write_checkpoint(tmp_path / "model", dtype=torch.bfloat16, **changes)
    recipe = recipe_for(folder, quantize={"method": "rtn", "group_size": "auto"})
    run(recipe, tmp_path / "out", self_check=False)
    assert not export(tmp_path / "out", "gguf", tmp_path / "gguf", keep_embeddings=True).notes
    listed = inspect(tmp_path / "gguf")["modules"]
    assert {m["group_size"] for m in listed if m["symmetric"] is not None} == {32}


# ---- what a person is told ----------------------------------------------------------------------


def notes_of(tmp_path, case, **quantize):
    folder, recipe, _, _ = ready(tmp_path, case, **quantize)
    plan = make_plan(RunInputs.of(recipe, Skeleton(folder)))
    return [note for note in plan.notes if "group_size" in note]


def test_what_auto_has_chosen_is_noted(tmp_path):
    (note,) = notes_of(tmp_path, "auto")
    check_line(note, "quantize.group_size: ", "128 for 1 linear", "64 for 6 linears")


def test_rows_that_no_size_divides_are_counted(tmp_path):
    (note,) = notes_of(tmp_path, "auto, whole rows")
    check_line(
        note, "quantize.group_size: ", "channel", "1 linear", "model.layers.0.mlp.down_proj", 44
    )


def test_a_size_that_was_asked_for_needs_no_note(tmp_path):
    assert notes_of(tmp_path, "-1") == []


def test_the_card_and_the_run_say_it_too(tmp_path):
    _, recipe, _, _ = ready(tmp_path, "auto, whole rows")
    result = run(recipe, tmp_path / "out")
    assert any("one scale a row" in warning for warning in result.warnings)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 4 | 32 | 6 |" in card
    assert "| 4 | channel | 1 |" in card
