"""What a run makes of a budget: widths, bytes, layers that are left out, and refusals."""

import json
from pathlib import Path

import pytest
import torch

import compress
from compress.errors import UsageError
from compress.pipeline.run import run
from compress.recipe.recipe import shipped_folder
from compress.registry import LAYER_IMPORTANCE
from compress.storage.files import parse_size
from compress.storage.safetensors import CheckpointReader
from support.calling import pretend
from support.mixed_widths import DEPTH, QUICK, plan_of, widths_in_file, with_budget
from support.refusals import refused
from support.tiny_checkpoints import (
    WINDOWS,
    dequantised,
    load_whole,
    logits_of,
    read_tensors,
    recipe_for,
    relative_error,
    weight_files,
    write_checkpoint,
)


@pytest.fixture(scope="session")
def deep(checkpoint) -> Path:
    """Four layers, of which the last three slide over a window."""
    return checkpoint("qwen2-sliding", layers=DEPTH)


METHODS = ("top_n", "knapsack", "greedy", "evolve")
SHORT = {"samples": 2, "generations": 1, "offspring": 2}


@pytest.mark.parametrize("importance", LAYER_IMPORTANCE.shipped)
def test_every_score_with_every_method_is_planned_within_the_budget(deep, importance):
    for method, kind in zip(METHODS, ("average_bits", "budget") * 2, strict=True):
        widths = [4, 2] if method == "top_n" else [4, 3, 2]
        score = {"name": importance} | ({"of": "position"} if importance == "reverse" else {})
        section = SHORT | {"method": method, "widths": widths, "importance": score}
        section |= {"average_bits": 4, "unit": "fused_group"}
        quantize = {"method": "rtn", "clip_search": "none"}
        recipe = with_budget(deep, kind, 0.6, quantize=quantize, allocate=section)
        plan = plan_of(recipe)
        chosen = plan.allocation
        assert set(chosen.widths.values()) <= set(widths)
        assert {m.name: m.bits for m in plan.modules} == chosen.bits()
        assert plan.average_bits == pytest.approx(chosen.average_bits)
        narrow, wide = min(widths), max(widths)
        if kind == "average_bits":
            used, limit = plan.average_bits, recipe.allocate.average_bits
        else:
            used, limit = plan.file_bytes, parse_size(recipe.allocate.budget)
        assert used <= limit
        assert narrow < plan.average_bits < wide  # there was something to choose
        assert (chosen.fitness is not None) == (method == "evolve")
        assert {m.name: m.score for m in plan.modules} == chosen.score_of()


@pytest.mark.parametrize(
    "method, importance, kind",
    [
        ("top_n", "layer_embedding_change", "average_bits"),
        ("knapsack", "output_error", "budget"),
        ("greedy", "logit_divergence", "average_bits"),
        ("knapsack", "hidden_state_error", "average_bits"),
        ("evolve", "weight_error", "budget"),
    ],
)
def test_the_file_has_the_widths_and_the_bytes_of_the_plan(deep, press, method, importance, kind):
    section = SHORT | {"method": method, "importance": importance, "unit": "fused_group"}
    recipe = with_budget(deep, kind, 0.5, quantize=QUICK, allocate=section | {"average_bits": 4})
    plan = plan_of(recipe)
    first, second = press(recipe), press(recipe)
    assert widths_in_file(first) == plan.allocation.bits()
    assert len(set(plan.allocation.widths.values())) == 2
    tensors = read_tensors(first).values()
    assert sum(t.numel() * t.element_size() for t in tensors) == plan.bytes["total"]
    assert weight_files(first) == weight_files(second)
    assert not (first / ".modelpress").exists()
    facts = json.loads((first / "modelpress.json").read_text())
    reported = {m["name"]: m["bits"] for layer in facts["layers"] for m in layer["modules"]}
    assert reported == widths_in_file(first)


def test_a_mixed_checkpoint_reloads_as_what_was_computed(checkpoint, tmp_path):
    """In a process of its own, against the logits of the walk; and in plain transformers."""
    folder = checkpoint("qwen3", layers=DEPTH)
    section = {"widths": [2, 3, 4, 8], "average_bits": 4.25, "unit": "fused_group"}
    recipe = recipe_for(
        folder, rotate="hadamard",
        allocate=section | {"importance": {"name": "random", "seed": 3}},
    )  # fmt: skip
    result = run(recipe, tmp_path / "out", windows=WINDOWS, self_check=True)
    assert result.self_check["relative_error"] < 1e-4
    widths = widths_in_file(tmp_path / "out")
    assert len(set(widths.values())) > 2
    model = load_whole(folder)
    plain = dequantised(read_tensors(tmp_path / "out"), widths)
    model.config.tie_word_embeddings = False
    model.load_state_dict(plain)
    assert torch.allclose(logits_of(model), logits_of(tmp_path / "out"), atol=1e-4)


def test_the_demo_model_at_four_widths_is_the_same_in_transformers_and_here(press):
    demo = shipped_folder() / "demo" / "lm"
    section = {"widths": [2, 3, 4, 8], "average_bits": 4.25, "unit": "fused_group"}
    made = press(recipe_for(
        demo, quantize={"method": "rtn", "group_size": 64, "clip_search": "none"},
        allocate=section | {"importance": {"name": "random", "seed": 3}},
    ))  # fmt: skip
    assert set(widths_in_file(made).values()) == {2, 3, 4, 8}
    ours, _ = compress.load(made, dtype=torch.float32)
    plain = logits_of(made)
    assert relative_error(logits_of(ours), plain) < 1e-5
    assert relative_error(logits_of(demo), plain) > 1e-2  # it is not the model it was made of


@pytest.mark.parametrize("symmetric", [False, True])
def test_several_asymmetric_widths_are_written_and_said_not_to_be_checked(
    checkpoint, tmp_path, monkeypatch, symmetric
):
    """transformers cannot load them, so reloading there would throw a good result away."""
    checks = pretend(monkeypatch, "compress.pipeline.run", "reload_and_compare", {"tokens": 1})
    recipe = recipe_for(
        checkpoint(), quantize=QUICK | {"method": "rtn", "symmetric": symmetric},
        allocate={"widths": [8, 3], "narrow": 1, "importance": "position"},
    )  # fmt: skip
    result = run(recipe, tmp_path / "out", windows=WINDOWS, self_check=True)
    said = [warning for warning in result.warnings if warning.startswith("no self-check: ")]
    assert (len(said), len(checks)) == ((0, 1) if symmetric else (1, 0))
    widths = widths_in_file(tmp_path / "out")
    assert set(widths.values()) == {3, 8}
    model = load_whole(checkpoint())
    model.load_state_dict(dequantised(read_tensors(tmp_path / "out"), widths))
    loaded, _ = compress.load(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits_of(loaded), logits_of(model), atol=1e-4)


@pytest.mark.parametrize("unit", ["layer", "fused_group"])
def test_the_size_of_the_file_is_known_before(press, unit):
    """On the shipped model, whose tensors outweigh their names."""
    demo = shipped_folder() / "demo" / "lm"
    section = {"widths": [2, 3, 4, 8], "importance": "outlier_weight_count", "average_bits": 4}
    recipe = with_budget(
        demo, "budget", 0.4, allocate=section | {"unit": unit},
        quantize={"method": "rtn", "group_size": 64, "clip_search": "none"},
    )  # fmt: skip
    plan = plan_of(recipe)
    made = press(recipe)
    size = sum(file.stat().st_size for file in made.glob("*.safetensors"))
    assert plan.file_bytes == pytest.approx(size, rel=0.005)
    budget = parse_size(recipe.allocate.budget)
    assert 0.95 * budget < plan.file_bytes <= budget
    assert widths_in_file(made) == plan.allocation.bits()


def test_what_a_recipe_fixes_keeps_its_width(deep, press):
    quantize = QUICK | {
        "ignore": ["lm_head", "model.layers.1.self_attn.o_proj"],
        "overrides": [
            {"match": "re:.*layers.2.mlp.down_proj", "bits": 8},
            {"match": "re:.*layers.3.*", "group_size": 64},
            {"match": "model.layers.0.mlp.up_proj", "bits": 16},
        ],
    }
    section = {"average_bits": 3.25, "importance": "position"}
    recipe = recipe_for(deep, quantize=quantize, allocate=section)
    plan, made = plan_of(recipe), press(recipe)
    found = widths_in_file(made)
    assert found.pop("model.layers.2.mlp.down_proj") == 8
    unpacked = {"model.layers.1.self_attn.o_proj", "model.layers.0.mlp.up_proj"}
    assert not unpacked & set(found)
    assert found == plan.allocation.bits()  # so they are in no unit
    weights = {m.name: m.weights for m in plan.modules}
    bits = sum(found[name] * weights[name] for name in found)
    assert bits <= 3.25 * sum(weights[name] for name in found)
    groups = {m.name: m.scheme.group_size for m in plan.modules}
    assert {size for name, size in groups.items() if ".3." in name} == {64}


# ---- removal -------------------------------------------------------------------------------------


def without_layers(folder: Path, removed: list[int]):
    """The transformers model with these layers deleted."""
    model = load_whole(folder)
    kept = [i for i in range(len(model.model.layers)) if i not in removed]
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    return model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2-sliding", "qwen3"])
@pytest.mark.parametrize("rotate", ["none", "hadamard"])
def test_removal_equals_deleting_layers_in_transformers(checkpoint, press, family, rotate):
    folder = checkpoint(family, layers=DEPTH)
    ends = {"name": "reverse", "of": "position"}  # the first layer goes, so that all are renamed
    section = {"method": "remove", "narrow": 2, "importance": ends}
    recipe = recipe_for(folder, rotate=rotate, quantize={"method": "none"}, allocate=section)
    assert plan_of(recipe).allocation.removed() == [0, 3]
    made = press(recipe)
    config = json.loads((made / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    source = json.loads((folder / "config.json").read_text())
    if "layer_types" in source:
        assert config["layer_types"] == source["layer_types"][1:3]
    expected = logits_of(without_layers(folder, [0, 3]))
    assert torch.allclose(logits_of(made), expected, atol=1e-3)
    assert not torch.allclose(logits_of(folder), expected, atol=1e-1)


def test_removal_from_a_config_that_derives_its_layer_types(tmp_path, press):
    """As older Qwen2 checkpoints do: from the number of layers, which is another one now."""
    folder = write_checkpoint(tmp_path / "model", "qwen2-sliding", layers=DEPTH)
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config))
    ends = {"name": "reverse", "of": "position"}
    section = {"method": "remove", "narrow": 2, "importance": ends}
    made = press(recipe_for(folder, quantize={"method": "none"}, allocate=section))
    expected = logits_of(without_layers(folder, [0, 3]))
    assert torch.allclose(logits_of(made), expected, atol=1e-4)


def test_what_is_kept_is_quantised_as_if_the_rest_had_never_been(deep, press, tmp_path):
    """Each layer with its own attention window, which is not that of its new number."""
    without_layers(deep, [0, 3]).save_pretrained(tmp_path / "short")
    sections = {"quantize": {"bits": 3, "token_importance": "attention_concentration"}}
    ends = {"name": "reverse", "of": "position"}
    section = {"method": "remove", "narrow": 2, "importance": ends}
    made = press(recipe_for(deep, **sections, allocate=section))
    assert weight_files(made) == weight_files(press(recipe_for(tmp_path / "short", **sections)))


@pytest.mark.parametrize("importance", ["layer_embedding_change", "outlier_weight_count"])
def test_removal_takes_the_lowest_scores_and_quantises_the_rest(deep, press, importance):
    quantize = QUICK | {"bits": 3}
    quantize["overrides"] = [{"match": "re:.*layers.[12].mlp.down_proj", "bits": 8}]
    section = {"method": "remove", "narrow": 1, "importance": importance}
    recipe = recipe_for(deep, quantize=quantize, allocate=section)
    plan = plan_of(recipe)
    (gone,) = plan.allocation.removed()
    scores = list(plan.allocation.scores.values())
    assert gone == scores.index(min(scores))
    made = press(recipe)
    load_whole(made)
    kept = [index for index in range(DEPTH) if index != gone]
    eight = {f"model.layers.{kept.index(i)}.mlp.down_proj" for i in (1, 2) if i in kept}
    assert {n for n, bits in widths_in_file(made).items() if bits == 8} == eight
    assert set(widths_in_file(made).values()) == {3, 8}
    plain = dequantised(read_tensors(made), widths_in_file(made))
    model = without_layers(deep, [gone])
    model.load_state_dict(plain)
    assert torch.allclose(logits_of(made), logits_of(model), atol=1e-4)


# ---- refusals ------------------------------------------------------------------------------------

REFUSED = {
    "bits": ({"average_bits": 1.9}, "average_bits", 1.9, 2),
    "bytes": ({"budget": "20KB"}, "budget", "20,000 bytes"),
    "narrow": ({"narrow": 5}, "allocate.narrow", "5 of 4"),
    "remove all": ({"narrow": 4, "method": "remove"}, "allocate.narrow", 4),
    "remove too many": ({"narrow": 5, "method": "remove"}, "allocate.narrow", "5 of 4"),
}


@pytest.fixture
def no_weights(monkeypatch):
    """Reading a tensor is a failure of the test."""

    def read(*args):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(CheckpointReader, "tensor", read)
    monkeypatch.setattr(CheckpointReader, "tensors", read)


def refusal(recipe, output: Path, *named) -> str:
    with refused(UsageError, *named) as caught:
        run(recipe, output, self_check=False)
    assert not output.exists()
    return str(caught.value)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_met_is_told_before_a_weight_is_read(deep, no_weights, tmp_path, case):
    section, *named = REFUSED[case]
    recipe = recipe_for(deep, allocate=section)
    assert plan_of(recipe).problems == [refusal(recipe, tmp_path / "out", *named)]


@pytest.mark.parametrize("importance", ["position", "layer_embedding_change", "weight_error"])
@pytest.mark.parametrize("bound", [{"narrow": 0}, {"average_bits": 4}])
def test_nothing_to_choose_a_width_for_is_told(deep, no_weights, tmp_path, importance, bound):
    """Where an override has said every width."""
    overrides = [{"match": "re:model.layers.*", "bits": 8}]
    section = {"importance": importance} | bound
    recipe = recipe_for(deep, quantize={"overrides": overrides}, allocate=section)
    refusal(recipe, tmp_path / "out", "allocate", "width")


def test_the_bound_in_the_refusal_can_be_met(deep, tmp_path):
    """The bytes that it names are the least: one less is refused, as many are planned."""
    widths = {"widths": [4, 3]}
    message = refusal(recipe_for(deep, allocate={"budget": "1KB"} | widths), tmp_path / "out")
    least = int(message.split("take ")[1].split(" bytes")[0].replace(",", ""))
    for nbytes, met in ((least, True), (least - 1, False)):
        section = {"budget": f"{nbytes / 1000:.3f}KB", "importance": "position"} | widths
        assert (plan_of(recipe_for(deep, allocate=section)).problems == []) == met


def test_a_cost_of_quantising_needs_a_quantiser(deep, no_weights, tmp_path):
    section = {"method": "remove", "narrow": 1, "importance": "output_error"}
    recipe = recipe_for(deep, quantize={"method": "none"}, allocate=section)
    refusal(recipe, tmp_path / "out", "allocate.importance", "output_error", "quantize.method")


def test_a_predicted_kl_that_no_width_reaches_is_told(deep, tmp_path):
    section = {"maximum_kl": 1e-9, "importance": "logit_divergence", "samples": 2}
    with refused(UsageError, "maximum_kl", "1e-09"):
        plan_of(recipe_for(deep, quantize={"method": "rtn"}, allocate=section))
