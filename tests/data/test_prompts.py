"""Prompts with images as calibration data, and checkpoints whose images cannot be calibrated on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.data.prompts import ImagePrompts, calibration_data, probe_prompt
from compress.data.source import has_images
from compress.data.windows import CalibrationWindows
from compress.errors import CheckpointError, UsageError
from compress.models.families import architecture_of
from compress.models.skeleton import Skeleton
from compress.pipeline.inputs import RunInputs
from compress.recipe.recipe import Recipe
from support.refusals import refused
from support.tiny_folders import tiny_folder, write_samples
from support.tiny_models import tiny_inputs, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("vlm") / "model")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    path = write_samples(tmp_path_factory.mktemp("samples") / "data")
    rows = [json.loads(line) | {"answer": "w20"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(folder, dataset, method="vflowopt", **calibration):
    calibration = {"dataset": str(dataset), "samples": 3} | calibration
    pruning = {"keep": 0.6, "strategy": {"method": method}}
    return Recipe.from_dict(
        {"model": str(folder), "calibration": calibration, "prune_visual_tokens": pruning}
    )


def data_of(folder, dataset, **options):
    skeleton = Skeleton(folder)
    recipe = recipe_of(folder, dataset, **options)
    return calibration_data(RunInputs.of(recipe, skeleton).source, skeleton)


def test_prompts_are_drawn_from_the_seed_and_their_hash_tells_them_apart(folder, samples):
    drawn = [data_of(folder, samples, seed=seed) for seed in (0, 0, 1)]
    assert [len(data) for data in drawn] == [3, 3, 3]
    digests = [data.digest() for data in drawn]
    assert digests[0] == digests[1] != digests[2]
    inputs = drawn[0].inputs[0]
    brighter = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
    changed = ImagePrompts((brighter, *drawn[0].inputs[1:]))
    assert changed.digest() != digests[0]
    assert drawn[0].facts() == {
        "prompts": 3,
        "tokens": 3 * 40,  # 36 of the image, three of the prompt, one of the answer
        "sha256": digests[0].hex(),
    }


@pytest.mark.parametrize(("method", "length"), [("vflowopt", 40), ("pyramiddrop", 39)])
def test_answers_are_left_out_where_the_prompts_last_token_ranks(folder, samples, method, length):
    data = data_of(folder, samples, method=method)
    assert {ids.shape[1] for ids, _ in data.batches(1024)} == {length}


def test_the_demo_scenes_are_a_dataset_of_images(folder):
    data = data_of(folder, "demo-scenes")
    assert isinstance(data, ImagePrompts) and len(data) == 3


def test_text_stays_text(folder, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": "w3 w4 w5 " * 20}) + "\n" for _ in range(9)))
    assert not has_images(path) and not has_images(tmp_path / "none.jsonl")
    assert isinstance(data_of(folder, path, length=16), CalibrationWindows)


def test_a_text_model_reads_no_images(checkpoint, samples):
    recipe = Recipe.from_dict({"calibration": {"dataset": str(samples), "length": 16}})
    with refused(UsageError, f"{samples}:1: ", "'text'"):
        calibration_data(
            RunInputs.of(recipe, Skeleton(checkpoint())).source, Skeleton(checkpoint())
        )


def test_a_prompt_beyond_the_context_is_refused(folder, samples, tmp_path):
    short = shutil.copytree(folder, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 39
    (short / "config.json").write_text(json.dumps(config))
    with refused(UsageError, samples, "40 tokens", 39):
        data_of(short, samples)


def test_the_probe_is_always_the_same_prompt(folder):
    first, second = (probe_prompt(Skeleton(folder)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (first["input_ids"] == 90).sum() == 36


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer.json"])
def test_a_checkpoint_without_its_processor_is_refused_in_one_line(folder, tmp_path, file):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / file).unlink()
    with refused(UsageError, damaged, "processor"):
        Skeleton(damaged).processor()


def test_a_template_without_images_is_refused_in_one_line(folder, tmp_path):
    blind = shutil.copytree(folder, tmp_path / "blind")
    (blind / "chat_template.jinja").write_text("{{ messages[0]['content'][-1]['text'] }}")
    with refused(UsageError, blind, "<image>", "found 0"):
        probe_prompt(Skeleton(blind))


def test_a_tensor_under_two_spellings_is_refused(folder, tmp_path):
    twice = shutil.copytree(folder, tmp_path / "twice")
    tensors = load_file(twice / "model.safetensors")
    tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"].clone()
    save_file(tensors, twice / "model.safetensors")
    with refused(CheckpointError, twice, "'language_model.lm_head.weight'"):
        Skeleton(twice)


def test_a_decoder_that_is_not_supported_is_named(folder):
    from transformers import AutoConfig, BloomConfig

    config = AutoConfig.from_pretrained(folder)
    config.text_config = BloomConfig()
    with refused(UsageError, "'llava'", "'bloom'"):
        architecture_of(config)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_one_layer_is_in_memory_and_the_tower_only_while_it_encodes(family, tmp_path):
    from compress.models.vision import encode, rows_of, vision_at_work
    from compress.recipe.sections import Rotate
    from compress.rotation.model import RotatedModel

    skeleton = Skeleton(tiny_folder(tmp_path / "model", family, noisy=True))

    def real():
        return {name for name, p in skeleton.model.named_parameters() if not p.is_meta}

    tensors = RotatedModel(skeleton, Rotate(kind="none"), skeleton.dtype, "cpu").vision_tensors()
    table = skeleton.read(skeleton.spec.embedding)
    inputs = tiny_inputs(tiny_model(family))
    assert real() == set()
    with vision_at_work(skeleton, tensors, "cpu"):
        assert real() == set(skeleton.vision_names())
        encoded = encode(skeleton, inputs, rows_of(table))
    assert real() == set()
    assert encoded.embeds.shape == (1, inputs["input_ids"].shape[1], table.shape[1])
    text = inputs["input_ids"] != 90
    assert torch.equal(encoded.embeds[text], table[inputs["input_ids"][text]])
    with skeleton.layer(1, skeleton.read_layer(1)):
        assert {name.split(".layers.")[1].split(".")[0] for name in real()} == {"1"}
