"""What a run writes of a model whose layers differ when some of them are left out.

The oracle is the transformers model with these layers deleted.
"""

import json

import pytest
import torch

from compress.errors import UsageError
from compress.models.skeleton import Skeleton
from compress.pipeline import kept_layers
from compress.pipeline.inputs import RunInputs
from compress.pipeline.kept_layers import kept_problems, shorten
from compress.pipeline.plan import make_plan
from compress.pipeline.run import run
from support.dense_families import DENSE, write_dense
from support.dense_families import type_of as dense_type
from support.mixed_widths import plan_of
from support.moe_families import MIXED, write_mixture
from support.refusals import refused
from support.reopened import compared_here, opened
from support.seeing_families import PROCESSORS, write_seeing
from support.tiny_checkpoints import (
    all_count,
    change_config,
    load_whole,
    logits_of,
    random_ids,
    recipe_for,
    relative_error,
)

DEPTH = 4
IDS = random_ids(2, 18, seed=3)
WINDOWS = all_count(random_ids(6, 20))
ENDS = {"name": "reverse", "of": "position"}  # the first and the last go
INNER = "position"  # those between go
SLIDES = ["sliding_attention", "full_attention"] * 2
DENSE_SPARSE = ["dense", "sparse", "sparse", "dense"]

# The family, what is changed, and what config.json says without the first and the last layer.
CASES = {
    "every second": (
        "qwen3_moe", {"decoder_sparse_step": 2},
        {"decoder_sparse_step": 1, "mlp_only_layers": [1]},
    ),
    "all but one": ("qwen3_moe", {"mlp_only_layers": [3]}, {"mlp_only_layers": []}),
    "all but the second": ("qwen2_moe", {"mlp_only_layers": [1]}, {"mlp_only_layers": [0]}),
    "linear attention": (
        "qwen3_next",
        {"layer_types": ["linear_attention", "full_attention"] * 2, "mlp_only_layers": [0, 2]},
        {"layer_types": ["full_attention", "linear_attention"], "mlp_only_layers": [1]},
    ),
    "three dense": ("deepseek_v3", {"first_k_dense_replace": 3}, {"first_k_dense_replace": 2}),
    "one dense": ("deepseek_v2", {"first_k_dense_replace": 1}, {"first_k_dense_replace": 0}),
    "two dense": ("glm4_moe", {"first_k_dense_replace": 2}, {"first_k_dense_replace": 1}),
    "typed MLPs": (
        "mellum", {"layer_types": SLIDES, "mlp_layer_types": DENSE_SPARSE},
        {"layer_types": SLIDES[1:3], "mlp_layer_types": ["sparse", "sparse"]},
    ),
    "typed MLPs, no period": (
        "cohere2_moe",
        {"layer_types": SLIDES, "mlp_layer_types": ["dense", "dense", "sparse", "sparse"]},
        {"layer_types": SLIDES[1:3], "mlp_layer_types": ["dense", "sparse"]},
    ),
    "typed by default": ("glm4_moe_lite", {}, {"mlp_layer_types": ["sparse", "sparse"]}),
    "leading": (
        "lfm2_moe",
        {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
        {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    ),
    "from one on": (
        "ernie4_5_moe", {"moe_layer_start_index": 2, "moe_layer_end_index": 3},
        {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
    ),
    "counts": (
        "hunyuan_v1_moe", {"num_experts_per_tok": [1, 2, 3, 1]},
        {"moe_topk": [2, 3], "num_experts_per_tok": None},
    ),
    "numbered": (
        "llama4_text",
        {"moe_layers": [1, 3], "interleave_moe_layer_step": 2, "no_rope_layers": [1, 1, 0, 0],
         "layer_types": None},
        {"moe_layers": [0], "interleave_moe_layer_step": None, "no_rope_layers": [1, 0],
         "layer_types": ["chunked_attention", "full_attention"]},
    ),
    "a period": (
        "exaone4", {"layer_types": ["sliding_attention"] * 3 + ["full_attention"],
                    "sliding_window_pattern": 4},
        {"layer_types": ["sliding_attention"] * 2, "sliding_window_pattern": 4},
    ),
    "no period": (
        "gemma3_text", {"layer_types": SLIDES, "sliding_window_pattern": 2},
        {"layer_types": SLIDES[1:3], "sliding_window_pattern": None},
    ),
}  # fmt: skip


def written(folder, family, changes):
    changes = {"num_hidden_layers": DEPTH} | changes
    return (write_mixture if family in MIXED else write_dense)(folder, family, **changes)


def removing(folder, importance=ENDS, narrow=2, rotate="none", **quantize):
    section = {"method": "remove", "narrow": narrow, "importance": importance}
    quantize = {"method": "none"} | quantize
    return recipe_for(folder, rotate=rotate, quantize=quantize, allocate=section)


def logits_without(folder, removed):
    """Those of the transformers model with these layers deleted."""
    model = load_whole(folder)
    kept = [i for i in range(len(model.model.layers)) if i not in removed]
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
    model.config.num_hidden_layers = len(kept)
    if types := getattr(model.config, "layer_types", None):
        model.config.layer_types = [types[i] for i in kept]
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.fixture
def reloaded(monkeypatch):
    """How far the run's logits are from those of transformers."""
    return compared_here(monkeypatch)


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_is_said_of_each_layer(tmp_path, reloaded, case):
    family, changes, expected = CASES[case]
    folder = written(tmp_path / "model", family, changes)
    if period := changes.get("sliding_window_pattern"):  # of which not all types keep the key
        change_config(folder, sliding_window_pattern=period)
    run(removing(folder), tmp_path / "ends", windows=WINDOWS, check_source=False)
    config = json.loads((tmp_path / "ends" / "config.json").read_text())
    assert {key: config.get(key) for key in expected} == expected
    run(removing(folder, INNER), tmp_path / "inner", windows=WINDOWS, check_source=False)
    assert max(reloaded) < 1e-5
    for out, removed in (("ends", [0, 3]), ("inner", [1, 2])):
        with torch.no_grad():
            found = logits_of(opened(tmp_path / out), IDS)
        assert relative_error(found, logits_without(folder, removed)) < 1e-5


@pytest.mark.parametrize("case", ["every second", "three dense", "typed MLPs", "numbered"])
def test_what_is_left_is_quantised_too(tmp_path, reloaded, case):
    family, changes, _ = CASES[case]
    folder = written(tmp_path / "model", family, changes)
    weights = {"name": "attention_concentration"}
    quantize = {"method": "gptq", "bits": 4, "group_size": 16, "token_importance": weights}
    run(removing(folder, **quantize), tmp_path / "out", windows=WINDOWS, check_source=False)
    assert max(reloaded) < 1e-5


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "llama4", "gemma3", "exaone4_5"])
def test_the_decoder_of_a_multimodal_model(tmp_path, family, monkeypatch):
    reloaded = compared_here(monkeypatch, "pixel_values")
    folder = write_seeing(tmp_path / "model", family)
    if family in PROCESSORS:
        monkeypatch.setattr(Skeleton, "processor", lambda skeleton: PROCESSORS[family]())
    recipe = removing(folder, ENDS, narrow=1)
    (gone,) = plan_of(recipe).allocation.removed()
    run(recipe, tmp_path / "out", check_source=False)
    assert max(reloaded) < 1e-5
    before, after = (
        json.loads((place / "config.json").read_text())["text_config"]
        for place in (folder, tmp_path / "out")
    )
    assert after["num_hidden_layers"] == 2
    kept = [index for index in range(3) if index != gone]
    for key in ("layer_types", "no_rope_layers"):
        if before.get(key):
            assert after[key] == [before[key][index] for index in kept]
    for key in ("moe_layers", "mlp_only_layers"):
        if key in before:
            assert after[key] == [new for new, old in enumerate(kept) if old in before[key]]


@pytest.mark.parametrize("family", [*MIXED, *DENSE])
def test_layers_of_every_family_can_be_left_out(tmp_path, family):
    """Unless they follow a rule that no others would."""
    rows = MIXED | DENSE
    lists = ("layer_types", "mlp_layer_types", "no_rope_layers", "num_experts_per_tok")
    changes = {k: v * 2 for k, v in rows[family].items() if k in lists and isinstance(v, list)}
    skeleton = Skeleton(written(tmp_path / "model", family, changes))
    assert skeleton.model_config.model_type == dense_type(family)
    for layers in ([1, 2, 3], [0, 2], [1, 3], [3]):
        assert kept_problems(skeleton, layers) == []


# ---- what cannot be said ------------------------------------------------------------------------


@pytest.fixture
def every_second(tmp_path):
    """A type whose rule has a step, but no list of exceptions."""
    changes = {"moe_layer_start_index": 0, "moe_layer_end_index": 4, "moe_layer_interval": 2}
    return written(tmp_path / "model", "ernie4_5_moe", changes | {"num_hidden_layers": 5})


def test_a_rule_that_no_longer_holds_is_refused_before_layers_are_written(every_second, tmp_path):
    recipe, skeleton = removing(every_second), Skeleton(every_second)
    assert make_plan(RunInputs.of(recipe, skeleton)).problems == []  # which go is not known yet
    assert kept_problems(skeleton, [1, 3]) == []
    plan = plan_of(recipe, WINDOWS)
    assert plan.allocation.removed() == [0, 4]
    (problem,) = plan.problems
    assert problem.startswith("allocate.method: ")
    assert "'ernie4_5_moe'" in problem
    assert "without layers 0, 4 (layer 1 would be of another kind)" in problem
    assert "\n" not in problem
    with refused(UsageError, "allocate.method", "'ernie4_5_moe'"):
        run(recipe, tmp_path / "out", windows=WINDOWS, check_source=False)
    assert [place.name for place in (tmp_path / "out").iterdir()] == [".modelpress"]  # the scores


def test_a_list_that_is_not_known_is_found_by_its_layers(tmp_path, monkeypatch):
    """What config.json says is checked, not trusted."""
    folder = written(tmp_path / "model", *CASES["typed MLPs"][:2])
    skeleton = Skeleton(folder)
    assert kept_problems(skeleton, [1, 2]) == []
    monkeypatch.setattr(kept_layers, "PER_LAYER", ("layer_types",))
    (problem,) = kept_problems(skeleton, [1, 2])
    assert "mellum" in problem
    monkeypatch.setattr(kept_layers, "PER_LAYER", ("mlp_layer_types",))
    assert len(kept_problems(skeleton, [1, 2])) == 1


def test_keys_that_hold_are_left_as_they_are(tmp_path):
    folder = written(tmp_path / "model", "qwen3_moe", {})
    config = json.loads((folder / "config.json").read_text())
    shortened = dict(config)
    shorten(shortened, Skeleton(folder), [0, 2, 3])
    assert shortened == config | {"num_hidden_layers": 3}
