"""Every family with experts, tiny and random, through all that its row promises.

The oracle is plain transformers, as in `test_dense_families`.
"""

import shutil
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.checkpoint.packed import UnpackableError
from compress.data.activations import ActivationStore
from compress.errors import CheckpointError, UsageError
from compress.models.experts import OpenedExperts
from compress.models.families import MIXTURES
from compress.models.skeleton import Skeleton
from compress.pipeline.inputs import RunInputs
from compress.pipeline.plan import make_plan
from compress.pipeline.reload_script import TOGETHER
from compress.pipeline.run import run
from compress.pipeline.source_check import check_source
from compress.quantization.layer import run_layer
from compress.recipe.quantize import Experts
from compress.storage.files import read_json
from compress.storage.safetensors import CheckpointReader
from support.dense_families import LAYERS, type_of
from support.eager_maps import compare_with_eager_maps
from support.moe_families import CHOSEN, HIDDEN, MIXED, write_mixture
from support.refusals import check_line, refused
from support.reopened import compared_here, opened
from support.tiny_checkpoints import (
    all_count,
    change_config,
    load_whole,
    logits_of,
    random_ids,
    recipe_for,
    relative_error,
)

every_family = pytest.mark.parametrize("family", MIXED)
IDS = random_ids(2, 18, seed=3)
WINDOWS = all_count(random_ids(6, 20))
GROUPS = 16
TURNING = [name for name in MIXED if MIXTURES[type_of(name)].unrotatable is None]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """One folder a family, for all tests here."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = write_mixture(tmp_path_factory.mktemp(family) / "model", family)
        return made[family]

    return folder


def recipe(folder, rotate="none", **quantize):
    return recipe_for(folder, rotate=rotate, quantize={"group_size": GROUPS} | quantize)


def inputs_of(folder, **settings):
    return RunInputs.of(recipe(folder, **settings), Skeleton(folder))


@pytest.fixture
def reloaded(monkeypatch):
    """How far the run's logits are from those of transformers."""
    return compared_here(monkeypatch)


def test_every_row_is_tested_and_nothing_else():
    assert list(dict.fromkeys(map(type_of, MIXED))) == list(MIXTURES)
    assert {*TOGETHER_ALONE} | {"qwen3_vl_moe"} == {*TOGETHER}


@every_family
def test_the_row_says_what_is_found(folder_of, family):
    row, spec = MIXTURES[type_of(family)], Skeleton(folder_of(family)).spec
    assert spec.unrotatable == row.unrotatable
    assert all(kind.attends for kind in spec.kinds) == (row.weighs == "all layers")


@every_family
@pytest.mark.parametrize("kind", ["none", "hadamard", "random"])
def test_logits_are_those_of_transformers(folder_of, family, kind):
    if kind != "none" and family not in TURNING:
        with refused(UsageError, "rotate", repr(type_of(family)), "rotate: none"):
            inputs_of(folder_of(family), rotate=kind).rotated_model()
        return
    facts = check_source(inputs_of(folder_of(family), rotate=kind), 10**10)
    assert facts["probes"]["text"]["relative_error"] < 1e-5


@every_family
def test_rounded_to_8_bits_it_hardly_differs(folder_of, family, tmp_path, reloaded):
    folder = folder_of(family)
    made = recipe(folder, method="rtn", bits=8)
    run(made, tmp_path / "out", windows=WINDOWS, check_source=False)
    assert max(reloaded) < 1e-5
    # A token whose scores of two experts are near may go to the other; most do not.
    found, expected = logits_of(opened(tmp_path / "out"), IDS), logits_of(folder, IDS)
    errors = (found - expected).abs().amax(-1) / expected.abs().max()
    assert 0 < float(errors.median()) < 0.05


@every_family
def test_quantised_to_4_bits_it_is_the_model_of_the_run(folder_of, family, tmp_path, reloaded):
    """Rotated, its tokens weighed: every stage of the walk is in the logits."""
    weights = {"name": "attention_concentration"}
    rotate = "hadamard" if family in TURNING else "none"
    made = recipe(folder_of(family), rotate, method="gptq", token_importance=weights)
    result = run(made, tmp_path / "out", windows=WINDOWS)
    assert max(reloaded) < 1e-5
    skeleton = Skeleton(folder_of(family))
    loaded, _ = compress.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected = logits_of(opened(tmp_path / "out"), IDS)
        assert relative_error(loaded(IDS).logits, expected) < 1e-5
    modules = [module for layer in result.layers for module in layer["modules"]]
    assert [module["name"] for module in modules] == skeleton.linear_names()[:-1]
    assert all(module["error"] < 0.1 for module in modules)


@every_family
def test_written_names_are_those_of_the_source(folder_of, family, tmp_path, reloaded):
    """Which engines read: an expert's matrices by its number, the router in 16 bits."""
    run(recipe(folder_of(family), method="rtn"), tmp_path / "out", windows=WINDOWS)
    source, found = Skeleton(folder_of(family)).reader, CheckpointReader(tmp_path / "out")
    assert {n.replace("weight_packed", "weight") for n in found.names if "weight_s" not in n} == {
        *source.names
    }
    ends = (".gate.weight", "expert_gate.weight", ".router.weight", ".router.layer.weight")
    ends += (".router.gate.weight", ".gate.wg.weight")
    routers = [n for n in source.names if n.endswith(ends)]
    assert routers and all(torch.equal(source.tensor(n), found.tensor(n)) for n in routers)


@pytest.mark.parametrize("rotate", ["none", "hadamard"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_tables_of_their_own_width(folder_of, family, rotate, tmp_path):
    """Their schemes are not taken for those of experts, nor the other way round."""
    tables = {"embedding": {"bits": 8}, "head": {"bits": 8}}
    result = run(recipe(folder_of(family), rotate, **tables), tmp_path / "out", windows=WINDOWS)
    assert result.self_check["relative_error"] < 1e-5
    assert {module.bits for module in result.plan.modules} == {4, 8}


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_what_a_router_adds_stays_in_32_bits(folder_of, family, tmp_path):
    """In 16 bits experts that are near would change places."""
    folder = tmp_path / "model"
    shutil.copytree(folder_of(family), folder)
    file, added = folder / "model.safetensors", "mlp.gate.e_score_correction_bias"
    tensors = load_file(file)
    tensors = {n: t if n.endswith(added) else t.bfloat16() for n, t in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    change_config(folder, dtype="bfloat16")
    result = run(recipe(folder), tmp_path / "out", windows=WINDOWS)
    assert result.self_check["relative_error"] < 1e-4
    found = CheckpointReader(tmp_path / "out")
    exact = [name for name in tensors if name.endswith(added)]
    assert exact and all(torch.equal(found.tensor(n), tensors[n]) for n in exact)
    assert found.dtype("model.layers.1.mlp.gate.weight") == torch.bfloat16


# ---- Hessians -----------------------------------------------------------------------------------


@every_family
def test_the_hessian_of_an_expert_is_that_of_its_tokens(folder_of, family):
    """Of every linear's input, as the family's own forward gives it."""
    skeleton = Skeleton(folder_of(family))
    index = skeleton.num_layers - 1
    spec = skeleton.spec.layer(index)
    x = torch.randn(2, 40, HIDDEN, generator=torch.Generator().manual_seed(2))
    found, read = {}, {}

    def quantise(names, H):
        found[names] = H.matrix()

    with torch.no_grad(), skeleton.layer(index, skeleton.read_layer(index)) as layer:
        for name in spec.linears:
            note = partial(lambda name, module, given: read.setdefault(name, given[0]), name)
            layer.get_submodule(name).register_forward_pre_hook(note)
        expected = layer(x, **skeleton.layer_inputs(index, x))
        expected = expected[0] if isinstance(expected, tuple) else expected
        for name in spec.linears:
            layer.get_submodule(name)._forward_pre_hooks.clear()
        stores = ActivationStore(), ActivationStore(), ActivationStore()
        stores[0].append(x)
        run_layer(
            layer,
            spec,
            lambda i, x: skeleton.layer_inputs(index, x),
            *stores,
            quantise=quantise,
            needs_hessian=lambda group: True,
            weigh=lambda i, x, normed: None,
            experts=Experts(least_rows=1),
        )
    assert relative_error(stores[1][0], expected) < 1e-5
    assert tuple(found) == spec.groups
    for names, H in found.items():
        rows = read[names[0]].flatten(0, -2)
        expected = rows.T @ rows
        assert relative_error(H / H.trace(), expected / expected.trace()) < 1e-5


@pytest.mark.parametrize("weighed", [False, True])
def test_the_hessian_of_an_expert_can_have_the_weights_of_the_router(folder_of, weighed):
    """sum w r x x^T over its tokens: w the token's weight, r the router's."""
    skeleton = Skeleton(folder_of("qwen3_moe"))
    spec, draw = skeleton.spec.layer(0), torch.Generator().manual_seed(2)
    x, w = torch.randn(2, 40, HIDDEN, generator=draw), torch.rand(2, 40, generator=draw)
    found, seen = {}, {}

    def quantise(names, H):
        found[names] = H.matrix()

    with torch.no_grad(), skeleton.layer(0, skeleton.read_layer(0)) as layer:
        opened = layer.get_submodule(spec.experts.module)
        hook = opened.register_forward_pre_hook(lambda module, given: seen.update(given=given))
        layer(x, **skeleton.layer_inputs(0, x))
        hook.remove()
        stores = ActivationStore(), ActivationStore(), ActivationStore()
        stores[0].append(x)
        run_layer(
            layer,
            spec,
            lambda i, x: skeleton.layer_inputs(0, x),
            *stores,
            quantise=quantise,
            needs_hessian=lambda group: True,
            weigh=lambda i, x, normed: w if weighed else None,
            experts=Experts(least_rows=1, routing_weight=True),
        )
        rows, index, weights = seen["given"]
        for number in range(opened.count):
            token, place = torch.where(index == number)
            factor = weights[token, place] * (w.flatten()[token] if weighed else 1.0)
            for group, inner in (
                (spec.experts.inner(number), rows[token]),
                ((spec.experts.outer(number),), opened.widened(number, rows[token])),
            ):
                expected, H = inner.T @ (factor[:, None] * inner), found[group]
                assert relative_error(H / H.trace(), expected / expected.trace()) < 1e-5


def test_shared_hessians_are_the_sum_of_all(folder_of):
    """Of the last expert, the only one with few rows, they are those of all routed tokens."""
    skeleton = Skeleton(folder_of("qwen3_moe"))
    spec, draw = skeleton.spec.layer(0), torch.Generator().manual_seed(2)
    x = torch.randn(2, 40, HIDDEN, generator=draw)
    seen, found, told = {}, {}, []
    with torch.no_grad(), skeleton.layer(0, skeleton.read_layer(0)) as layer:
        opened = layer.get_submodule(spec.experts.module)
        hook = opened.register_forward_pre_hook(lambda module, given: seen.update(given=given))
        layer(x, **skeleton.layer_inputs(0, x))
        hook.remove()
        rows, index, _ = seen["given"]
        counts = [int((index == number).sum()) for number in range(opened.count)]
        fewest = counts.index(min(counts))
        assert sorted(counts)[1] > min(counts)
        stores = ActivationStore(), ActivationStore(), ActivationStore()
        stores[0].append(x)
        run_layer(
            layer,
            spec,
            lambda i, x: skeleton.layer_inputs(0, x),
            *stores,
            quantise=lambda names, H: found.update({names: H.matrix()}),
            needs_hessian=lambda group: True,
            weigh=lambda i, x, normed: None,
            experts=Experts(least_rows=min(counts) + 1, policy="shared_hessian"),
            scarce=lambda *facts: told.append(facts),
        )
        assert told == [(fewest, min(counts), "shared_hessian")]
        inside = [rows[(index == number).any(-1)] for number in range(opened.count)]
        wide = [opened.widened(number, part) for number, part in enumerate(inside)]
        groups = spec.experts.inner(fewest), (spec.experts.outer(fewest),)
        for group, parts in zip(groups, (inside, wide), strict=True):
            expected, H = torch.cat(parts).T @ torch.cat(parts), found[group]
            assert relative_error(H / H.trace(), expected / expected.trace()) < 1e-5


@pytest.mark.parametrize("weights", ["attention_concentration", "activation_difference"])
def test_one_expert_is_in_memory_at_a_time(folder_of, tmp_path, weights, reloaded, monkeypatch):
    """In the check against the source, when tokens are weighed, and when experts are solved."""
    most, at_hand = [], OpenedExperts.at_hand

    @contextmanager
    def noting(self, number):
        with at_hand(self, number) as expert:
            weights = [next(self.expert(n).parameters()) for n in range(self.count)]
            most.append([n for n, weight in enumerate(weights) if not weight.is_meta])
            yield expert

    monkeypatch.setattr(OpenedExperts, "at_hand", noting)
    made = recipe(folder_of("glm4_moe"), "hadamard", token_importance={"name": weights})
    run(made, tmp_path / "out", windows=WINDOWS)
    assert max(reloaded) < 1e-5
    assert len(most) > 4 and all(len(held) == 1 for held in most)


# ---- experts that few tokens reach --------------------------------------------------------------


def write_scarce(folder, reached):
    """A GLM-4.5 whose expert 3 in layer 0 gets so many tokens of WINDOWS, and in layer 1 none."""
    write_mixture(folder, "glm4_moe", first_k_dense_replace=0)
    model = load_whole(folder)
    routers = [layer.mlp.gate for layer in model.model.layers]
    routers[0].e_score_correction_bias[3] = routers[1].e_score_correction_bias[3] = -100.0
    scores = []
    hook = routers[0].register_forward_hook(lambda module, given, gave: scores.append(gave[0]))
    with torch.no_grad():
        model(WINDOWS.input_ids)
    hook.remove()
    chance = scores[0].sigmoid()
    others = (chance + routers[0].e_score_correction_bias)[:, :3].topk(CHOSEN).values[:, -1]
    margins = (others - chance[:, 3]).sort().values  # what a token's bias has to exceed
    if reached:
        routers[0].e_score_correction_bias[3] = margins[reached - 1 : reached + 1].mean()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scarce_folder(tmp_path_factory):
    """One folder for each number of tokens that reach the expert."""
    made = {}

    def folder(reached):
        if reached not in made:
            made[reached] = write_scarce(tmp_path_factory.mktemp("scarce") / "model", reached)
        return made[reached]

    return folder


@pytest.mark.parametrize("reached", [0, 1, 31])
@pytest.mark.parametrize("weights", ["uniform", "attention_concentration"])
def test_an_expert_that_few_tokens_reach_is_quantised_for_all(
    scarce_folder, tmp_path, reached, weights, reloaded
):
    folder = scarce_folder(reached)
    made = recipe(
        folder, token_importance={"name": weights}, ignore=["lm_head", r"re:.*self_attn.*"]
    )
    result = run(made, tmp_path / "out", windows=WINDOWS)
    assert max(reloaded) < 1e-5
    scarce = [{e["expert"]: e["rows"] for e in layer["scarce_experts"]} for layer in result.layers]
    assert (scarce[0][3], scarce[1][3]) == (reached, 0)
    errors = {m["name"]: m for layer in result.layers for m in layer["modules"]}
    for index in range(2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            module = errors[f"model.layers.{index}.mlp.experts.3.{name}"]
            assert 0 < module["error"] < 0.1
            assert module["dead_columns"] == 0
    assert any("experts were reached by fewer" in warning for warning in result.warnings)


POLICIES = ["all_tokens", "rtn", "shared_hessian"]


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("reached", [0, 1, 31])
def test_an_expert_that_few_tokens_reach_follows_the_policy(
    scarce_folder, tmp_path, reached, policy, routed, reloaded
):
    """It alone: all others are what they are with any policy."""
    experts = {"policy": policy, "routing_weight": routed}
    made = recipe(scarce_folder(reached), experts=experts, ignore=["lm_head", r"re:.*self_attn.*"])
    result = run(made, tmp_path / "out", windows=WINDOWS)
    assert max(reloaded) < 1e-5
    scarce = [e for layer in result.layers for e in layer["scarce_experts"] if e["expert"] == 3]
    assert scarce == [{"expert": 3, "rows": rows, "policy": policy} for rows in (reached, 0)]
    assert any(f"expert 3 by {reached}" in warning for warning in result.warnings)
    modules = {m["name"]: m for layer in result.layers for m in layer["modules"]}
    for name, module in modules.items():
        rounded = policy == "rtn" and name.startswith(
            tuple(
                f"model.layers.{layer['layer']}.mlp.experts.{e['expert']}."
                for layer in result.layers
                for e in layer["scarce_experts"]
            )
        )
        assert (module["error"] is None) == rounded
        assert module["dead_columns"] == 0


def test_where_no_expert_gets_enough_all_tokens_are_shared(scarce_folder, tmp_path, reloaded):
    experts = {"policy": "shared_hessian", "least_rows": 10_000}
    result = run(recipe(scarce_folder(0), experts=experts), tmp_path / "out", windows=WINDOWS)
    assert max(reloaded) < 1e-5
    found = [e["policy"] for layer in result.layers for e in layer["scarce_experts"]]
    assert found == ["all_tokens"] * 2 * 4
    default = run(
        recipe(scarce_folder(0), experts={"least_rows": 10_000}), tmp_path / "same", windows=WINDOWS
    )
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "same")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert default.layers[0]["scarce_experts"] == result.layers[0]["scarce_experts"]


def test_an_expert_that_enough_tokens_reach_is_not_listed(scarce_folder, tmp_path, reloaded):
    folder = scarce_folder(32)
    result = run(
        recipe(folder, ignore=["lm_head", r"re:.*self_attn.*"]), tmp_path / "out", windows=WINDOWS
    )
    assert 3 not in {e["expert"] for e in result.layers[0].get("scarce_experts", [])}


@pytest.mark.parametrize("rotate", ["none", "hadamard"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_ties_between_experts_go_as_in_transformers(tmp_path, family, rotate, reloaded):
    """All rows of a router are one: what is chosen is up to the order of experts."""
    folder = write_mixture(tmp_path / "model", family)
    model = load_whole(folder)
    for name, parameter in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "mlp.router.weight", "mlp.router.bias")):
            parameter.data.copy_(parameter.data[:1].expand_as(parameter))
    model.save_pretrained(folder)
    run(recipe(folder, rotate), tmp_path / "out", windows=WINDOWS)
    assert max(reloaded) < 1e-5


# ---- token importance ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["gpt_oss", "granitemoe", "qwen3_next", "minimax_m2", "llama4_text"]
)
def test_token_weights_are_the_column_sums_of_eager_maps(folder_of, family):
    """Of gpt-oss those with attention sinks, which take their share of every query; of Llama 4
    those of chunks."""
    compare_with_eager_maps(folder_of(family), IDS)


# ---- experts that files hold together -----------------------------------------------------------

PARTED = {kind: row.experts.files for kind, row in MIXTURES.items() if row.experts.files}
TOGETHER_ALONE = [kind for kind in PARTED if not MIXTURES[kind].experts.parted]
every_parted = pytest.mark.parametrize("family", PARTED)


@every_parted
@pytest.mark.parametrize(
    "sections", [{"method": "none"}, {"ignore": ["lm_head", "re:.*experts.*"]}]
)
def test_experts_in_16_bits_are_written_as_they_were_read(folder_of, family, sections, tmp_path):
    """Which plain transformers reads."""
    result = run(
        recipe(folder_of(family), "hadamard", **sections), tmp_path / "out", windows=WINDOWS
    )
    assert result.self_check["relative_error"] < 1e-5
    spec = Skeleton(folder_of(family)).spec
    source, found = CheckpointReader(folder_of(family)), CheckpointReader(tmp_path / "out")
    whole = [n for n in source.names if any(file in n for file in PARTED[family])]
    count = sum(spec.layer(index).experts is not None for index in range(LAYERS))
    assert len(whole) == count * (4 if family == "gpt_oss" else 2)
    if MIXTURES[family].experts.parted and "method" not in sections:
        inner = [name for kind in spec.kinds if kind.experts for name in kind.experts.inner(0)]
        assert all(any(f"{name}.weight" in n for n in found.names) for name in inner)
        assert not {*whole} & {*found.names}
    else:
        assert all(found.shape(name) == source.shape(name) for name in whole)
    assert result.plan.bytes["total"] == found.nbytes()
    error = relative_error(logits_of(tmp_path / "out", IDS), logits_of(folder_of(family), IDS))
    assert error < (1e-5 if "method" in sections else 0.5)


@pytest.mark.parametrize("family", TOGETHER_ALONE)
def test_packed_experts_are_read_by_load_and_by_no_other(folder_of, family, tmp_path):
    result = run(recipe(folder_of(family), method="rtn"), tmp_path / "out", windows=WINDOWS)
    assert result.self_check["relative_error"] < 1e-5
    notes = [note for note in result.plan.notes if note.startswith("loading in transformers")]
    check_line(notes[0], "no", repr(family), "compress.load")
    with refused(UnpackableError, "experts.0", "packed=False"):
        compress.load(tmp_path / "out", packed=True)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    lost = {n for n in tensors if ".1." in n and "experts.2." in n and "weight" in n}
    save_file({n: t for n, t in tensors.items() if n not in lost}, file, {"format": "pt"})
    with refused(CheckpointError, "layers.1", "lacks"):
        compress.load(tmp_path / "out")


def write_mxfp4(folder, family="gpt_oss"):
    """A gpt-oss whose experts are random codes of 4 bits, as its publisher stores them."""
    write_mixture(folder, family)
    change_config(folder, quantization_config={"quant_method": "mxfp4"}, dtype="bfloat16")
    file, draw = folder / "model.safetensors", torch.Generator().manual_seed(4)
    tensors = {}
    for name, tensor in load_file(file).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor.bfloat16()
            continue
        E, K, N = tensor.shape
        codes = torch.randint(256, (E, N, K // 32, 16), generator=draw, dtype=torch.uint8)
        powers = torch.randint(120, 125, (E, N, K // 32), generator=draw, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": powers}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_codes_of_4_bits_are_opened_as_transformers_opens_them(tmp_path, reloaded):
    folder = write_mxfp4(tmp_path / "model")
    for rotate in ("none", "hadamard"):
        facts = check_source(inputs_of(folder, rotate=rotate), 10**10)
        assert facts["probes"]["text"]["relative_error"] < 1e-5
    result = run(recipe(folder, "hadamard"), tmp_path / "out", windows=WINDOWS, check_source=False)
    assert max(reloaded) < 1e-2  # what is not packed is in bf16
    assert result.plan.bytes["total"] == CheckpointReader(tmp_path / "out").nbytes()
    run(recipe(folder, method="none"), tmp_path / "plain", windows=WINDOWS, check_source=False)
    assert "quantization_config" not in read_json(tmp_path / "plain" / "config.json")
    assert relative_error(logits_of(tmp_path / "plain"), logits_of(folder)) < 1e-5


BROKEN = {
    "lost": ("gate_up_proj_scales", None),
    "of other groups": ("down_proj_scales", torch.zeros(4, 32, 2, dtype=torch.uint8)),
    "of other numbers": ("down_proj_blocks", torch.zeros(4, 32, 1, 16)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_codes_of_4_bits_that_do_not_fit_are_named(case, tmp_path):
    end, tensor = BROKEN[case]
    broken = f"model.layers.0.mlp.experts.{end}"
    file = write_mxfp4(tmp_path / "model") / "model.safetensors"
    tensors = {
        n: t for n, t in load_file(file).items() if not n.endswith(f"layers.0.mlp.experts.{end}")
    }
    if tensor is not None:
        tensors[f"model.layers.0.mlp.experts.{end}"] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    with refused(CheckpointError, broken):
        Skeleton(tmp_path / "model")


@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe"])
def test_other_packed_experts_are_refused(folder_of, kind, tmp_path):
    """Only gpt-oss has files in MXFP4, and those alone are read."""
    method = {"gpt_oss": "bitsandbytes", "granitemoe": "mxfp4"}[kind]
    shutil.copytree(folder_of(kind), tmp_path / "model")
    change_config(tmp_path / "model", quantization_config={"quant_method": method})
    with refused(UsageError, method, "quantization_config", "16-bit"):
        Skeleton(tmp_path / "model")


def test_layers_that_predict_further_tokens_are_left_out_and_told(folder_of, tmp_path):
    """As DeepSeek-V3's files have them, which transformers passes over."""
    shutil.copytree(folder_of("deepseek_v3"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    extra = {
        "model.layers.61.eh_proj.weight": torch.zeros(2, 4),
        "model.layers.61.e.weight": torch.ones(1),
    }
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    plan = make_plan(inputs_of(tmp_path / "model"))
    assert plan.problems == []
    assert any("model.layers.61" in note and "further tokens" in note for note in plan.notes)


# ---- what is refused ----------------------------------------------------------------------------

REFUSED = [
    ({"quantize": {"target": "full_precision"}}, "quantize.target"),
    ({"quantize": {"symmetric": False}}, "quantize.symmetric"),
    ({"quantize": {"ignore": ["lm_head", r"re:.*experts\.0\..*"]}}, "experts"),
    ({"quantize": {"overrides": [{"match": r"re:.*down_proj", "bits": 8}]}}, "experts"),
    ({"quantize": {"ignore": ["lm_head", "re:.*experts.*"]}}, "experts in 16 bits"),
    (
        {"quantize": {"ignore": ["re:.*"], "embedding": {"bits": 8}}},
        "experts in 16 bits",
    ),
    ({"allocate": {"average_bits": 3.5, "widths": [3, 4], "importance": "position"}}, "allocate"),
    *(
        ({"allocate": {"method": "remove", "narrow": 1, "importance": importance}}, name)
        for importance, name in (
            ("hidden_state_error", "hidden_state_error"),
            ({"name": "reverse", "of": "output_error"}, "output_error"),
        )
    ),
]


def test_a_weight_that_is_in_what_experts_read_is_given_once(folder_of):
    folder = folder_of("llama4_text")
    made = recipe(folder, method="gptq", experts={"routing_weight": True})
    (problem,) = make_plan(RunInputs.of(made, Skeleton(folder))).problems
    check_line(problem, "routing_weight", "'llama4_text'", "leave it out")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "llama4_text"])
@pytest.mark.parametrize(
    "sections",
    [
        {"embedding": {"bits": 4}},
        {"overrides": [{"match": "re:.*self_attn.*", "symmetric": False, "bits": 6}]},
    ],
)
def test_load_reads_what_transformers_alone_does_not(folder_of, family, sections, tmp_path):
    """A table in words, and zero points, beside packed experts."""
    made = recipe(folder_of(family), method="rtn", bits=8, **sections)
    result = run(made, tmp_path / "out", windows=WINDOWS)
    loaded, _ = compress.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = loaded(IDS).logits
    error = (logits - logits_of(folder_of(family), IDS)).abs().amax(-1) / logits.abs().max()
    assert float(error.median()) < 0.2
    if result.self_check:
        assert result.self_check["relative_error"] < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "makes all weights dense" in card and "keeps the weights packed" not in card


def test_experts_in_64_bits_are_written_in_32(folder_of, tmp_path):
    """In their scales' dtype transformers multiplies by them, which torch does not in fp64."""
    shutil.copytree(folder_of("qwen3_moe"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({n: t.double() for n, t in load_file(file).items()}, file, {"format": "pt"})
    change_config(tmp_path / "model", dtype="float64")
    result = run(recipe(tmp_path / "model", method="rtn"), tmp_path / "out", windows=WINDOWS)
    assert result.self_check["relative_error"] < 1e-5
    loaded, _ = compress.load(tmp_path / "out")
    assert loaded(IDS).logits.dtype == torch.float32


def test_a_shared_expert_that_is_there_zero_times_is_refused(tmp_path):
    write_mixture(tmp_path / "model", "deepseek_v3", n_shared_experts=0)
    with refused(UsageError, "'deepseek_v3'", "shared_experts", "no weights"):
        Skeleton(tmp_path / "model")


def test_a_router_without_experts_is_refused(folder_of, tmp_path):
    shutil.copytree(folder_of("gpt_oss"), tmp_path / "model")
    change_config(tmp_path / "model", num_local_experts=0)
    with refused(UsageError, "config.json", "no experts"):
        Skeleton(tmp_path / "model")


@pytest.mark.parametrize("sections, place", REFUSED)
def test_what_experts_cannot_have_is_told_by_the_plan(folder_of, sections, place):
    quantize = {"group_size": GROUPS} | sections.get("quantize", {})
    made = recipe_for(folder_of("qwen3_moe"), **sections | {"quantize": quantize})
    problems = make_plan(RunInputs.of(made, Skeleton(folder_of("qwen3_moe")))).problems
    assert any(place in problem for problem in problems), problems
