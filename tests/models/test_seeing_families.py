"""Every multimodal family, tiny and random, through all that its row promises.

The oracle is plain transformers, with an image in the prompt: its logits of the source and of what
is written, its attention maps. What LLaVA and Qwen2-VL are put through beside that is in
tests/pipeline.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import is_torchvision_available

import compress
from compress.cli.main import main
from compress.data.prompts import ImagePrompts, probe_prompt
from compress.errors import CheckpointError, UsageError
from compress.importance.weighting import mean_one, normalise
from compress.loading import load as load_module
from compress.models.families import MULTIMODAL
from compress.models.skeleton import Skeleton
from compress.models.structure import plain
from compress.models.vision import Added, encode, rows_of, vision_at_work
from compress.pipeline import run as run_module
from compress.pipeline.inputs import RunInputs
from compress.pipeline.plan import make_plan
from compress.pipeline.run import run
from compress.pipeline.source_check import check_source
from compress.pruning.engine import prune_visual_tokens
from compress.pruning.saved import save_strategy
from compress.quantization.token_weights import TokenWeigher
from compress.recipe.strategy import PruneStrategy
from compress.recipe.token_importance import TokenImportance
from compress.rotation.model import RotatedModel
from compress.rotation.rotate import rotate_vision
from support.refusals import refused
from support.reopened import compared_here, opened
from support.seeing_families import (
    PROCESSORS,
    SEEING,
    VOCABULARY,
    tiny_seeing,
    type_of,
    write_seeing,
)
from support.tiny_checkpoints import recipe_for, relative_error

every_family = pytest.mark.parametrize("family", SEEING)
TURNING = [family for family in SEEING if MULTIMODAL[type_of(family)].unrotatable is None]
FIXED = [family for family in SEEING if family not in TURNING]
ELSEWHERE = {"llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl"}  # tests/pipeline
GROUPS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder a family, for all tests here."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = write_seeing(tmp_path_factory.mktemp(family) / "model", family)
        return made[family]

    return folder


@pytest.fixture
def folder_of(folders, monkeypatch):
    """The same; where no processor can be read, another stands in its place."""

    def folder(family):
        if family in PROCESSORS:
            monkeypatch.setattr(Skeleton, "processor", lambda skeleton: PROCESSORS[family]())
        return folders(family)

    return folder


def recipe(folder, rotate="none", **quantize):
    return recipe_for(folder, rotate=rotate, quantize={"group_size": GROUPS} | quantize)


def inputs_of(folder, **settings):
    return RunInputs.of(recipe(folder, **settings), Skeleton(folder))


def prompts_of(folder, count=2):
    """Prompts with an image, of other noise and words each."""
    probe, draw = probe_prompt(Skeleton(folder)), torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        pixels = probe["pixel_values"]
        noise = torch.randn(pixels.shape, generator=draw)
        made.append(probe | {"pixel_values": pixels + 0.5 * noise})
    return ImagePrompts(tuple(made))


@torch.no_grad()
def logits_of(folder, prompt):
    return opened(folder)(**prompt).logits


def test_every_row_is_tested_and_nothing_else():
    assert {*map(type_of, SEEING)} | ELSEWHERE == {*MULTIMODAL}
    assert len(MULTIMODAL) >= 10


# ---- what is read -------------------------------------------------------------------------------


@every_family
def test_logits_are_those_of_transformers(folder_of, family):
    facts = check_source(inputs_of(folder_of(family)), 10**10)
    assert facts["probes"].keys() == {"text", "image"}
    assert all(probe["relative_error"] < 1e-5 for probe in facts["probes"].values())


@every_family
def test_the_row_says_what_is_found(folder_of, family):
    skeleton = Skeleton(folder_of(family))
    assert skeleton.spec.unrotatable == MULTIMODAL[type_of(family)].unrotatable
    for index in range(skeleton.num_layers):
        layer = skeleton.model.get_submodule(f"{skeleton.spec.layers}.{index}")
        linears = {n for n, m in layer.named_modules() if plain(m)}
        assert sorted(skeleton.spec.layer(index).linears) == sorted(linears)  # no router is one
    mapped = [skeleton.spec.layer(index).attends for index in range(skeleton.num_layers)]
    assert all(mapped) == (MULTIMODAL[type_of(family)].weighs == "all layers")


# ---- what is written ----------------------------------------------------------------------------


@pytest.fixture
def reloaded(monkeypatch):
    """How far the run's logits are from those of transformers."""
    return compared_here(monkeypatch, "pixel_values")


@every_family
def test_rounded_to_8_bits_it_hardly_differs(folder_of, family, tmp_path, reloaded, monkeypatch):
    """And is loaded whole, packed or not."""
    folder = folder_of(family)
    run(recipe(folder, method="rtn", bits=8), tmp_path / "out", check_source=False)
    assert max(reloaded) < 1e-5
    probe = probe_prompt(Skeleton(folder))
    found = logits_of(tmp_path / "out", probe)
    assert 0 < relative_error(found, logits_of(folder, probe)) < 0.1
    monkeypatch.setattr(load_module, "_read_processor", lambda *_, **options: None)
    loaded, _ = compress.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(loaded(**probe).logits, found) < 1e-5


@every_family
def test_quantised_to_4_bits_it_is_the_model_of_the_run(
    folder_of, family, tmp_path, reloaded, monkeypatch
):
    """On prompts with images, rotated where it can be, their tokens weighed."""
    folder = folder_of(family)
    rotate = "hadamard" if family in TURNING else "none"
    prompts = prompts_of(folder)
    monkeypatch.setattr(run_module, "calibration_data", lambda source, skeleton: prompts)
    weights = {"name": "attention_concentration"}
    made = recipe(folder, rotate, method="gptq", token_importance=weights)
    result = run(made, tmp_path / "out")
    assert max(reloaded) < 1e-5
    modules = [module for layer in result.layers for module in layer["modules"]]
    assert [module["name"] for module in modules] == Skeleton(folder).linear_names()[:-1]
    assert all(module["error"] < 0.1 for module in modules)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"][-1].startswith("re:")


@pytest.mark.parametrize(
    "tables", [{"embedding": {"bits": 8}, "head": {"bits": 8}}, {"head": {"bits": 4}}]
)
def test_a_head_inside_the_decoder_is_quantised(folder_of, tables, tmp_path, monkeypatch):
    """Of Llama 4: by its full name, whatever its format."""
    folder, out = folder_of("llama4"), tmp_path / "out"
    prompts = prompts_of(folder)
    monkeypatch.setattr(run_module, "calibration_data", lambda source, skeleton: prompts)
    result = run(recipe(folder, "hadamard", method="gptq", **tables), out)
    assert result.self_check["relative_error"] < 1e-5
    planned = {module.name: module.bits for module in result.plan.modules}
    assert planned["language_model.lm_head"] == tables["head"]["bits"]
    probe = probe_prompt(Skeleton(folder))
    monkeypatch.setattr(load_module, "_read_processor", lambda *_, **options: None)
    loaded, _ = compress.load(out, dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(loaded(**probe).logits, logits_of(out, probe)) < 1e-5


def test_experts_lie_as_their_file_has_them(folder_of, tmp_path):
    """[E, d, 2 m] as published, or [E, 2 m, d] as transformers writes them: both are read, and what
    stays in 16 bits is written the same way."""
    family = "qwen3_vl_moe"
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(folder_of(family), folder)
    tensors = load_file(folder / "model.safetensors")
    parts = {n: t for n, t in tensors.items() if n.endswith(("gate_up_proj", "experts.down_proj"))}
    assert len(parts) == 4  # of two layers: the first is dense
    turned = {n: t.transpose(1, 2).contiguous() for n, t in parts.items()}
    save_file(tensors | turned, folder / "model.safetensors", {"format": "pt"})
    facts = check_source(inputs_of(folder), 10**10)
    assert all(probe["relative_error"] < 1e-5 for probe in facts["probes"].values())
    made = recipe(folder, method="rtn", ignore=["lm_head", "re:.*experts.*"])
    run(made, out, check_source=False, self_check=False)
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in turned.items())
    first = next(iter(parts))
    save_file(tensors | {first: parts[first][:, :, :-1].contiguous()}, folder / "model.safetensors")
    with refused(CheckpointError, first, "config.json"):
        Skeleton(folder)


# ---- rotation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("family", TURNING)
def test_rotated_logits_are_equal(folder_of, family, kind):
    facts = check_source(inputs_of(folder_of(family), rotate=kind), 10**10)
    assert all(probe["relative_error"] < 1e-5 for probe in facts["probes"].values())


@pytest.mark.parametrize("family", FIXED)
def test_a_family_that_cannot_be_rotated_is_refused_in_one_line(folder_of, family):
    row = MULTIMODAL[type_of(family)]
    inputs = inputs_of(folder_of(family), rotate="hadamard")
    with refused(UsageError, "rotate", repr(type_of(family)), row.unrotatable):
        inputs.rotated_model()
    assert sum(row.unrotatable in problem for problem in make_plan(inputs).problems) == 1


# ---- faults -------------------------------------------------------------------------------------


def nothing_added(monkeypatch):
    monkeypatch.setattr(Added, "to", lambda self, x: x)


def mergers_forgotten(monkeypatch):
    def without(tensors, vision, residual):
        rotated = rotate_vision(tensors, vision, residual)
        return {n: tensors[n] if "deepstack" in n else t for n, t in rotated.items()}

    monkeypatch.setattr("compress.rotation.model.rotate_vision", without)


def told_nothing(monkeypatch):
    inputs = Skeleton.layer_inputs
    monkeypatch.setattr(
        Skeleton, "layer_inputs", lambda self, index, x, told=None: inputs(self, index, x)
    )


FAULTS = [
    ("qwen3_vl", nothing_added),
    ("qwen3_vl", mergers_forgotten),
    ("qwen3_vl", told_nothing),
    ("glm4v", told_nothing),
    ("gemma3", told_nothing),
]


@pytest.mark.parametrize("family, fault", FAULTS)
def test_a_mistake_shows_in_the_logits_of_an_image(folder_of, family, fault, monkeypatch):
    rotate = "hadamard" if family in TURNING else "none"
    inputs = inputs_of(folder_of(family), rotate=rotate)
    fault(monkeypatch)
    with refused(CheckpointError, "image", "relative error"):
        check_source(inputs, 10**10)


# ---- token importance ---------------------------------------------------------------------------


@every_family
def test_token_weights_are_the_column_sums_of_eager_maps(folder_of, family):
    """Of a prompt with an image, within which some look ahead."""
    folder = folder_of(family)
    skeleton = Skeleton(folder)
    prompt = probe_prompt(skeleton)
    ids = prompt["input_ids"]
    counted = torch.ones_like(ids, dtype=torch.bool)
    model = opened(folder, attn_implementation="eager")
    with torch.no_grad():
        result = model(**prompt, output_attentions=True)
    source = RotatedModel(skeleton, recipe(folder).rotate, torch.float32, "cpu")
    with vision_at_work(skeleton, source.vision_tensors(), "cpu"):
        encoded = encode(skeleton, prompt, rows_of(source.embedding().dense(torch.float32)))
    x, counts = encoded.embeds, torch.bincount(ids.flatten(), minlength=VOCABULARY)
    section = TokenImportance(name="attention_concentration", minimum=0.01)
    maps = iter([seen for seen in result.attentions if seen is not None])
    for index in range(skeleton.num_layers):
        spec, weigher = skeleton.spec.layer(index), TokenWeigher(section, [(ids, counted)], counts)
        inputs = skeleton.layer_inputs(index, x, encoded.told)
        with torch.no_grad(), source.layer(index) as layer:
            normed = layer.get_submodule(spec.input_norm)(x) if spec.input_norm else x
            found = weigher.weights(0, x, normed, layer, spec, inputs)
            x = source.forward(layer, index, x, encoded.told)
        x = encoded.added[index].to(x) if index in encoded.added else x
        if not spec.attends:
            assert found is None
            continue
        sums = next(maps).double().sum(dim=(1, 2))
        expected = mean_one(normalise(sums, 0.01, 1.0, counted), counted)
        assert (found - expected).abs().max() < 2e-4 * expected.max()


# ---- visual tokens ------------------------------------------------------------------------------

HALF = {"keep": 0.5, "stages": [0, 1], "strategy": {"voter_threshold": 1.1}}
KEEPING = [family for family in SEEING if MULTIMODAL[type_of(family)].unprunable is not None]


@pytest.mark.parametrize("family", KEEPING)
def test_where_tokens_cannot_be_pruned_a_line_says_why(folder_of, family):
    why = MULTIMODAL[type_of(family)].unprunable
    made = recipe_for(folder_of(family), prune_visual_tokens=HALF)
    (problem,) = make_plan(RunInputs.of(made, Skeleton(folder_of(family)))).problems
    assert problem.startswith("prune_visual_tokens") and why in problem
    assert repr(type_of(family)) in problem


def test_a_live_model_and_a_saved_strategy_are_refused_with_the_reason(folder_of, tmp_path):
    strategy = PruneStrategy(ratios=(0.5,))
    why = MULTIMODAL["gemma3"].unprunable
    with refused(UsageError, "'gemma3'", why):
        prune_visual_tokens(tiny_seeing("gemma3"), strategy)
    with refused(UsageError, "'gemma3'", why):
        save_strategy(strategy, folder_of("gemma3"))


@pytest.mark.skipif(is_torchvision_available(), reason="nothing is missing")
def test_a_processor_that_needs_another_package_is_refused_by_its_name(folders):
    with refused(CheckpointError, "PixtralProcessor", "Torchvision"):
        compress.load(folders("mistral3"))


def test_the_command_says_which_can_be_pruned(capsys):
    assert main(["families", "--json"]) == 0
    rows = {row["type"]: row for row in json.loads(capsys.readouterr().out)["families"]}
    for kind, row in MULTIMODAL.items():
        assert rows[kind]["prune_visual_tokens"].startswith("no: " if row.unprunable else "yes")
