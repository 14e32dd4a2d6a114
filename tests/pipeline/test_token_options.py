"""Options of token importance in a run: which Hessians, and what plan, facts and card say."""

import json
import shutil

import pytest
import torch

from compress.data.windows import CalibrationWindows
from compress.models.skeleton import Skeleton
from compress.pipeline.description import module_rows
from compress.pipeline.inputs import RunInputs
from compress.pipeline.plan import make_plan
from compress.pipeline.run import run
from support.refusals import check_line
from support.tiny_checkpoints import (
    LAYERS,
    WINDOWS,
    all_count,
    change_config,
    random_ids,
    read_tensors,
    recipe_for,
    weight_files,
)

NORM = {"name": "activation_norm", "minimum": 0.0, "power": 2}
FIRST = "model.layers.0.self_attn."


def plan_of(folder, **importance):
    recipe = recipe_for(folder, quantize={"token_importance": importance})
    return make_plan(RunInputs.of(recipe, Skeleton(folder)))


def pressed(press, folder, windows=WINDOWS, **importance):
    recipe = recipe_for(folder, quantize={"token_importance": importance})
    return press(recipe, windows)


def facts_of(folder) -> list[dict]:
    return json.loads((folder / "modelpress.json").read_text())["layers"]


# ---- what queries see ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention_concentration", "position"])
def test_a_window_that_a_type_does_not_read_changes_nothing(checkpoint, press, tmp_path, name):
    made = [pressed(press, checkpoint(), name=name)]
    shutil.copytree(checkpoint(), tmp_path / "model")
    change_config(tmp_path / "model", sliding_window=4)
    made.append(pressed(press, tmp_path / "model", name=name))
    assert weight_files(made[0]) == weight_files(made[1])


# ---- the linears that the weights are for -------------------------------------------------------


def test_weights_for_all_linears_are_weights_for_those_that_all_names_match(checkpoint, press):
    every = pressed(press, checkpoint(), **NORM)
    named = pressed(press, checkpoint(), **NORM, modules=["re:.*"])
    uniform = pressed(press, checkpoint(), name="uniform")
    assert weight_files(every) == weight_files(named) != weight_files(uniform)


@pytest.mark.parametrize("masked", [False, True])
def test_linears_that_the_weights_are_not_for_are_those_of_a_uniform_run(checkpoint, press, masked):
    """Layer 0's q, k and v read what nothing has changed. Errors are of the linears as written."""
    windows = WINDOWS
    if masked:
        length = 24 - torch.arange(6)[:, None]
        windows = CalibrationWindows(WINDOWS.input_ids, torch.arange(24) < length)
    found = {
        "some": pressed(press, checkpoint(), windows, **NORM, modules=["re:.*k_proj"]),
        "all": pressed(press, checkpoint(), windows, **NORM),
        "none": pressed(press, checkpoint(), windows, name="uniform"),
    }
    errors = {
        case: {m["name"]: m["error"] for m in facts_of(folder)[0]["modules"]}
        for case, folder in found.items()
    }
    codes = {case: read_tensors(folder) for case, folder in found.items()}
    for name, right, wrong in (("k", "all", "none"), ("q", "none", "all"), ("v", "none", "all")):
        linear = f"{FIRST}{name}_proj"
        # A product of other shape may round a code the other way.
        assert errors["some"][linear] == pytest.approx(errors[right][linear], rel=0.05)
        packed = f"{linear}.weight_packed"
        same = (codes["some"][packed] == codes[right][packed]).double().mean()
        print(float(same))
        assert same > 0.98 > (codes["some"][packed] == codes[wrong][packed]).double().mean()


def test_a_linear_says_how_many_tokens_it_was_fitted_to(checkpoint, press):
    folder = pressed(press, checkpoint(), **NORM, modules=["re:.*k_proj", "re:.*mlp"])
    for layer in facts_of(folder):
        assert layer["effective_sample_size"] < 24
        own = {m["name"]: m.get("effective_sample_size") for m in layer["modules"]}
        assert {n.rpartition(".")[2] for n, size in own.items() if size == 24.0} == {
            "q_proj", "v_proj", "o_proj",
        }  # fmt: skip
        assert sum(size is None for size in own.values()) == 4
    sizes = {row["name"]: row["effective_sample_size"] for row in module_rows(facts_of(folder))}
    assert len(sizes) == 7 * LAYERS
    assert all(
        (size == 24.0) == ("k_proj" not in n and "mlp" not in n) for n, size in sizes.items()
    )


def test_a_plan_counts_the_second_hessians_and_their_memory(checkpoint, text):
    folder = checkpoint()

    def plan_of(folder, **importance):
        recipe = recipe_for(folder, text, quantize={"token_importance": importance})
        return make_plan(RunInputs.of(recipe, Skeleton(folder)))

    plain = plan_of(folder, **NORM)
    K = 64  # inputs of q, k, v, gate and up
    for modules, split in ((["re:.*k_proj"], 1), (["re:.*[kv]_proj", "re:.*up_proj"], 2)):
        plan = plan_of(folder, **NORM, modules=modules)
        assert plan.problems == []
        assert plan.peak_memory["host"] >= plain.peak_memory["host"] + 4 * K**2
        check_line(" ".join(plan.notes), "token_importance.modules", f": {split}", "16.38 kB")
    whole = plan_of(folder, **NORM, modules=["re:.*[qkv]_proj", "re:.*down_proj"])
    assert whole.peak_memory == plain.peak_memory
    (note,) = [note for note in whole.notes if "modules" in note]
    check_line(note, "8 of 14")


def test_a_group_of_which_the_rest_is_ignored_has_one_hessian(checkpoint):
    quantize = {"token_importance": NORM | {"modules": ["re:.*k_proj"]}}
    quantize["ignore"] = ["lm_head", "re:.*[qv]_proj"]
    folder = checkpoint()
    plan = make_plan(RunInputs.of(recipe_for(folder, quantize=quantize), Skeleton(folder)))
    assert plan.peak_memory == plan_of(folder, **NORM).peak_memory


@pytest.mark.parametrize("pattern", ["re:.*k_porj", "lm_head", "model.layers.9.self_attn.k_proj"])
def test_a_pattern_that_no_weighable_linear_matches_is_a_problem(checkpoint, pattern):
    plan = plan_of(checkpoint(), **NORM, modules=["re:.*q_proj", pattern])
    (problem,) = plan.problems
    check_line(problem, "quantize.token_importance.modules", repr(pattern))


# ---- what is said -------------------------------------------------------------------------------


def test_a_plan_names_the_options_and_nothing_where_there_are_none(checkpoint):
    notes = plan_of(checkpoint(), **NORM, sinks="drop", weight_cap=5.5).notes
    (note,) = [note for note in notes if "token_importance" in note]
    check_line(note, "activation_norm", "sinks drop", "weight_cap 5.5")
    assert not any("token_importance" in note for note in plan_of(checkpoint(), **NORM).notes)


def test_what_was_done_to_the_weights_is_in_the_facts_and_the_report(checkpoint, press):
    plain = pressed(press, checkpoint(), **NORM)
    options = {"sinks": "clamp", "weight_cap": 1.5, "sample_size_floor": 0.95}
    bounded = pressed(press, checkpoint(), **NORM, **options)
    for layer, before in zip(facts_of(bounded), facts_of(plain), strict=True):
        assert not {"sinks_per_window", "capped_per_window", "uniform_share"} & before.keys()
        assert layer["sinks_per_window"] == 0  # none in windows of 24 random tokens
        assert 0 < layer["capped_per_window"] < 24
        assert 0 <= layer["uniform_share"] < 1
        assert layer["effective_sample_size"] >= 0.95 * 24 - 0.1 > before["effective_sample_size"]
    rows = module_rows(facts_of(bounded))
    assert all(row["capped_per_window"] > 0 for row in rows)
    card = (bounded / "README.md").read_text()
    assert "weight_cap 1.5" in card and "sinks clamp" in card


def test_windows_whose_tokens_all_score_the_same_are_counted_and_said(checkpoint, tmp_path):
    """Two of six windows are one token over and over: their tokens are equally frequent."""
    ids = random_ids(6, 24)
    ids[1], ids[4] = 7, 9
    warnings: list[str] = []
    recipe = recipe_for(checkpoint(), quantize={"token_importance": "token_frequency"})
    result = run(recipe, tmp_path / "out", windows=all_count(ids), self_check=False)
    assert [layer["flat_windows"] for layer in result.layers] == [2] * LAYERS
    said = json.loads((tmp_path / "out" / "modelpress.json").read_text())
    warnings = [w for w in said.get("warnings", []) if "token_frequency" in w]
    assert len(warnings) == LAYERS
    check_line(warnings[0], "layer 0", "2 windows", "token_frequency")
