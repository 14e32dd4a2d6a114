"""Every dense family, tiny and random, through all that its row promises.

The oracle is plain transformers: its logits of the source and of what is written, its attention
maps. Assumptions of ours that are wrong for one family show in one of these.
"""

from dataclasses import replace

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.models import skeleton as skeleton_module
from compress.models.families import ARCHITECTURES
from compress.models.skeleton import Skeleton
from compress.pipeline.inputs import RunInputs
from compress.pipeline.plan import make_plan
from compress.pipeline.run import run
from compress.pipeline.source_check import check_source
from compress.quantization.token_weights import keys_seen
from support.dense_families import DENSE, HIDDEN, WINDOW, type_of, write_dense
from support.eager_maps import compare_with_eager_maps
from support.refusals import check_line, refused
from support.reopened import compared_here
from support.tiny_checkpoints import (
    all_count,
    logits_of,
    random_ids,
    recipe_for,
    relative_error,
)

every_family = pytest.mark.parametrize("family", DENSE)
TURNING = [family for family in DENSE if ARCHITECTURES[type_of(family)].unrotatable is None]
FIXED = [family for family in DENSE if family not in TURNING]
IDS = random_ids(2, 3 * WINDOW, seed=3)
WINDOWS = all_count(random_ids(6, 20))
GROUPS = 16


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """One folder a family, for all tests here."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = write_dense(tmp_path_factory.mktemp(family) / "model", family)
        return made[family]

    return folder


def recipe(folder, rotate="none", **quantize):
    return recipe_for(folder, rotate=rotate, quantize={"group_size": GROUPS} | quantize)


def inputs_of(folder, **settings):
    return RunInputs.of(recipe(folder, **settings), Skeleton(folder))


def test_every_row_is_tested_and_nothing_else():
    assert list(dict.fromkeys(map(type_of, DENSE))) == list(ARCHITECTURES)
    assert len(ARCHITECTURES) >= 25


# ---- what is read -------------------------------------------------------------------------------


@every_family
def test_logits_are_those_of_transformers(folder_of, family):
    facts = check_source(inputs_of(folder_of(family)), 10**10)
    assert facts["probes"]["text"]["relative_error"] < 1e-5


@every_family
def test_the_row_says_what_is_found(folder_of, family):
    skeleton = Skeleton(folder_of(family))
    row, spec = ARCHITECTURES[type_of(family)], skeleton.spec
    assert spec.unrotatable == row.unrotatable
    mapped = [spec.layer(index).attends for index in range(skeleton.num_layers)]
    assert all(mapped) == (row.weighs == "all layers")
    for index in range(skeleton.num_layers):
        layer = skeleton.model.get_submodule(f"{spec.layers}.{index}")
        linears = {n for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        assert sorted(spec.layer(index).linears) == sorted(linears)


@every_family
def test_a_mask_is_all_before_a_query_or_a_window(folder_of, family):
    """No family of these pays for a map of what each query sees."""
    skeleton = Skeleton(folder_of(family))
    x = torch.zeros(1, IDS.shape[1], HIDDEN)
    found = [keys_seen(skeleton.layer_inputs(i, x)) for i in range(skeleton.num_layers)]
    assert {seen for _, seen in found} == {None}
    config = skeleton.config
    slides = "sliding_window" in DENSE[family]
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * skeleton.num_layers
    windows = [WINDOW if slides and kind == "sliding_attention" else None for kind in kinds]
    assert [window for window, _ in found] == windows


# ---- what is written ----------------------------------------------------------------------------


@pytest.fixture
def reloaded(monkeypatch):
    """How far the run's logits are from those of transformers."""
    return compared_here(monkeypatch)


@every_family
def test_rounded_to_8_bits_it_hardly_differs(folder_of, family, tmp_path, reloaded):
    folder = folder_of(family)
    made = recipe(folder, method="rtn", bits=8)
    run(made, tmp_path / "out", windows=WINDOWS, check_source=False)
    assert max(reloaded) < 1e-5
    error = relative_error(logits_of(tmp_path / "out", IDS), logits_of(folder, IDS))
    assert 0 < error < 0.1


@every_family
def test_quantised_to_4_bits_it_is_the_model_of_the_run(folder_of, family, tmp_path, reloaded):
    """Rotated where it can be, its tokens weighed: every stage of the walk is in the logits."""
    rotate = "hadamard" if family in TURNING else "none"
    weights = {"name": "attention_concentration"}
    made = recipe(folder_of(family), rotate, method="gptq", token_importance=weights)
    result = run(made, tmp_path / "out", windows=WINDOWS)
    assert max(reloaded) < 1e-5
    skeleton = Skeleton(folder_of(family))
    modules = [module for layer in result.layers for module in layer["modules"]]
    assert [module["name"] for module in modules] == skeleton.linear_names()[:-1]
    assert all(module["error"] < 0.1 for module in modules)
    for index, facts in enumerate(result.layers):
        attends = skeleton.spec.layer(index).attends
        assert facts.get("windows_without_map", 0) == (0 if attends else len(WINDOWS.input_ids))


SEQUENTIAL = ["gemma2", "granite", "olmo2", "phi3", "qwen3_5_text", "nemotron", "exaone4"]
PARALLEL = ["cohere", "phi", "stablelm-parallel"]


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_with_the_16_bit_model_beside_it(folder_of, family, tmp_path, reloaded):
    made = recipe(folder_of(family), method="gptq", target="full_precision")
    run(made, tmp_path / "out", windows=WINDOWS, check_source=False)
    assert max(reloaded) < 1e-5


@pytest.mark.parametrize("family", PARALLEL)
def test_parallel_layers_have_no_16_bit_model_beside_them(folder_of, family):
    problems = make_plan(inputs_of(folder_of(family), target="full_precision")).problems
    (problem,) = problems
    check_line(problem, "quantize.target", "full_precision", repr(type_of(family)))


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_a_scaled_embedding_is_not_quantised(folder_of, family):
    (problem,) = make_plan(inputs_of(folder_of(family), embedding={"bits": 8})).problems
    check_line(problem, "quantize.embedding", repr(family))


@pytest.mark.parametrize("family", ["granite", "qwen3_5_text", "phi3", "phi", "olmo2"])
def test_tables_and_widths_of_their_own(folder_of, family, tmp_path, reloaded):
    """An embedding and a head in 8 bits, and widths that are chosen on measured errors."""
    allocate = {"average_bits": 3.5, "widths": [3, 4], "importance": "output_error", "samples": 2}
    tables = {"embedding": {"bits": 8}, "head": {"bits": 8}}
    quantize = {"group_size": GROUPS, "method": "gptq"} | tables
    made = recipe_for(folder_of(family), quantize=quantize, allocate=allocate)
    result = run(made, tmp_path / "out", windows=WINDOWS, check_source=False)
    assert max(reloaded) < 1e-5
    assert {module.bits for module in result.plan.modules} == {3, 4, 8}


@pytest.mark.parametrize("family", ["smollm3", "cohere2", "gemma3_text"])
def test_a_layer_left_out_takes_its_kind_along(folder_of, family, tmp_path, reloaded):
    removal = {"method": "remove", "narrow": 1, "importance": "position"}
    made = recipe_for(folder_of(family), quantize={"method": "none"}, allocate=removal)
    run(made, tmp_path / "out", windows=WINDOWS, check_source=False)
    assert max(reloaded) < 1e-5


# ---- rotation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("family", TURNING)
def test_rotated_logits_are_equal(folder_of, family, kind):
    facts = check_source(inputs_of(folder_of(family), rotate=kind), 10**10)
    assert facts["probes"]["text"]["relative_error"] < 1e-5


@pytest.mark.parametrize("family", FIXED)
def test_a_family_that_cannot_be_rotated_is_refused_in_one_line(folder_of, family):
    folder = folder_of(family)
    row = ARCHITECTURES[type_of(family)]
    with refused(UsageError, "rotate", repr(type_of(family)), row.unrotatable):
        inputs_of(folder, rotate="hadamard").rotated_model()
    problems = make_plan(inputs_of(folder, rotate="hadamard")).problems
    assert sum(row.unrotatable in problem for problem in problems) == 1


# ---- faults -------------------------------------------------------------------------------------


def mistaken(monkeypatch, **fields):
    """Every layer that is opened from now on is taken for one with these fields."""
    look = skeleton_module.look

    def wrong(*arguments):
        spec = look(*arguments)
        return replace(spec, kinds=tuple(replace(kind, **fields) for kind in spec.kinds))

    monkeypatch.setattr(skeleton_module, "look", wrong)


IN_THE_WALK = [
    ("granite", {"scales": (1.0, 0.37)}),
    ("granite", {"scales": (0.37, 1.0)}),
    ("cohere", {"parallel": False}),
    ("llama", {"parallel": True}),
    ("gemma2", {"attention_after": None}),
    ("olmo2", {"mlp_after": None}),
    ("glm4", {"post_norm": "post_self_attn_layernorm"}),
]
IN_ROTATION = [
    ("gemma", {"gain": 0.0}),
    ("phi3", {"value_start": 0}),
    ("qwen3_5_text", {"value": "self_attn.v_proj", "output": "self_attn.o_proj"}),
    ("cohere", {"norms": "rms"}),
    ("olmo2", {"attention_after": None, "mlp_after": None, "input_norm": "post_attention_layernorm",
               "post_norm": "post_feedforward_layernorm"}),
]  # fmt: skip


@pytest.mark.parametrize("family, fields", IN_THE_WALK)
def test_a_mistake_in_the_walk_shows_in_the_logits(
    folder_of, family, fields, tmp_path, reloaded, monkeypatch
):
    mistaken(monkeypatch, **fields)
    run(recipe(folder_of(family), method="gptq"), tmp_path / "out", windows=WINDOWS)
    assert min(reloaded) > 1e-3


@pytest.mark.parametrize("family, fields", IN_ROTATION)
def test_a_mistake_in_rotation_is_found_before_anything_is_quantised(
    folder_of, family, fields, monkeypatch
):
    mistaken(monkeypatch, **fields)
    with pytest.raises((CompressError, AssertionError)):
        check_source(inputs_of(folder_of(family), rotate="hadamard"), 10**10)


# ---- token importance ---------------------------------------------------------------------------


@every_family
def test_token_weights_are_the_column_sums_of_eager_maps(folder_of, family):
    compare_with_eager_maps(folder_of(family), IDS)
