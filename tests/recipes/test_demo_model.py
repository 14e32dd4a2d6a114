"""The demo multimodal model that is shipped: small, many visual tokens, and it needs them."""

from pathlib import Path

import pytest
import torch

import compress
from compress.data.samples import prompt_inputs
from compress.pruning.engine import prune_visual_tokens
from compress.recipe.strategy import PruneStrategy
from compress.recipes.demo import scenes
from support.calling import call, refuses

FOLDER = Path(scenes.__file__).parent / "vlm"
QUESTIONS = 12 * len(scenes.TYPES)


@pytest.fixture(scope="module")
def model_and_processor():
    return compress.load(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def items():
    return list(scenes.examples("held_out", 11, QUESTIONS))


def share_right(model, processor, items):
    """Exact match of whole answers: a word, and then the end."""
    right = 0
    for item in items:
        inputs = prompt_inputs(processor, item["question"], [item["image"]])
        said = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        new = said[0, inputs["input_ids"].shape[1] :]
        text = processor.tokenizer.decode(new, skip_special_tokens=True)
        right += text.strip() == item["answer"]
    return right / len(items)


def test_it_is_small_and_sees_many_tokens(model_and_processor, items):
    model, processor = model_and_processor
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 16 * 2**20
    inputs = prompt_inputs(processor, items[0]["question"], [items[0]["image"]])
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) >= 144


def test_it_answers_questions_of_every_type_about_scenes_it_has_not_seen(
    model_and_processor, items
):
    assert len(scenes.TYPES) >= 6 and {item["type"] for item in items} == set(scenes.TYPES)
    assert share_right(*model_and_processor, items) >= 0.9


def test_it_needs_its_visual_tokens(model_and_processor, items):
    """Otherwise nothing that is measured with it would tell one method from another."""
    model, processor = model_and_processor
    found = {}
    for keep in (0.5, 1 / 144):
        strategy = PruneStrategy(method="divprune", ratios=(keep,))
        with prune_visual_tokens(model, strategy, processor):
            found[keep] = share_right(model, processor, items[:42])
    assert found[0.5] >= 0.8 and found[1 / 144] <= 0.6


def test_it_answers_from_the_command_line(items, tmp_path, capsys):
    asked = ["--prompt", items[0]["question"], "--max-tokens", "3"]
    items[0]["image"].save(tmp_path / "scene.png")
    assert call("generate", FOLDER, *asked, "--image", tmp_path / "scene.png") == 0
    assert capsys.readouterr().out.split() == items[0]["answer"].split()
    for folder, prompt, image, named in (
        (FOLDER, asked, "none.png", (tmp_path / "none.png",)),
        (FOLDER, ["--prompt", "<image> what?"], "scene.png", ("<image>", "found 2")),
        (FOLDER.parent / "lm", asked, "scene.png", ("lm", "text")),
    ):
        refuses(capsys, ["generate", folder, *prompt, "--image", tmp_path / image], *named)
