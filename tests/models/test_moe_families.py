"""Every family with experts, tiny and random, through all that its row promises.

The oracle is plain transformers, as in `test_dense_families`.
"""

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.models.families import MIXTURES
from compress.models.skeleton import Skeleton
from compress.pipeline import run as run_module
from compress.pipeline.inputs import RunInputs
from compress.pipeline.run import run
from compress.pipeline.source_check import check_source
from compress.storage.safetensors import CheckpointReader
from support.dense_families import type_of
from support.moe_families import MIXED, write_mixture
from support.tiny_checkpoints import (
    all_count,
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
    """The self-check in this process: how far the run's logits are from those of transformers."""
    errors = []

    def compare(folder, probe):
        seen = load_file(probe)
        logits = seen.pop("logits")
        with torch.no_grad():
            errors.append(relative_error(load_whole(folder)(**seen).logits, logits))
        return {"relative_error": errors[-1], "tolerance": 0, "tokens": 0}

    monkeypatch.setattr(run_module, "reload_and_compare", compare)
    return errors


def test_every_row_is_tested_and_nothing_else():
    assert list(dict.fromkeys(map(type_of, MIXED))) == list(MIXTURES)


@every_family
@pytest.mark.parametrize("kind", ["none", "hadamard", "random"])
def test_logits_are_those_of_transformers(folder_of, family, kind):
    facts = check_source(inputs_of(folder_of(family), rotate=kind), 10**10)
    assert facts["probes"]["text"]["relative_error"] < 1e-5


@every_family
def test_rounded_to_8_bits_it_hardly_differs(folder_of, family, tmp_path, reloaded):
    folder = folder_of(family)
    made = recipe(folder, method="rtn", bits=8)
    run(made, tmp_path / "out", windows=WINDOWS, check_source=False)
    assert max(reloaded) < 1e-5
    # A token whose scores of two experts are near may go to the other; most do not.
    found, expected = logits_of(tmp_path / "out", IDS), logits_of(folder, IDS)
    errors = (found - expected).abs().amax(-1) / expected.abs().max()
    assert 0 < float(errors.median()) < 0.05


@every_family
def test_quantised_to_4_bits_it_is_the_model_of_the_run(folder_of, family, tmp_path, reloaded):
    """Rotated, its tokens weighed: every stage of the walk is in the logits."""
    weights = {"name": "attention_concentration"}
    made = recipe(folder_of(family), "hadamard", method="gptq", token_importance=weights)
    result = run(made, tmp_path / "out", windows=WINDOWS)
    assert max(reloaded) < 1e-5
    skeleton = Skeleton(folder_of(family))
    loaded, _ = compress.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(loaded(IDS).logits, logits_of(tmp_path / "out", IDS)) < 1e-5
    modules = [module for layer in result.layers for module in layer["modules"]]
    assert [module["name"] for module in modules] == skeleton.linear_names()[:-1]
    assert all(module["error"] < 0.1 for module in modules)


@every_family
def test_written_names_are_those_of_the_source(folder_of, family, tmp_path, reloaded):
    """Which engines read: an expert's matrices by its number, the router in 16 bits."""
    run(recipe(folder_of(family), method="rtn"), tmp_path / "out", windows=WINDOWS)
    source, found = CheckpointReader(folder_of(family)), CheckpointReader(tmp_path / "out")
    assert {n.replace("weight_packed", "weight") for n in found.names if "weight_s" not in n} == {
        *source.names
    }
    routers = [n for n in source.names if n.endswith((".gate.weight", "expert_gate.weight"))]
    assert routers and all(torch.equal(source.tensor(n), found.tensor(n)) for n in routers)
