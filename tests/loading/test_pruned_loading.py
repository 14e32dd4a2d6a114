"""A strategy saved with a checkpoint prunes what is loaded from it, and nothing else."""

import json
import shutil

import pytest
import torch

import compress
from compress.data.samples import read_samples
from compress.errors import CheckpointError, CompressError, RecipeError, UsageError
from compress.loading.load import load
from compress.pipeline.run import run
from compress.pruning.engine import prune_visual_tokens
from compress.pruning.saved import FILE, KEY, save_strategy, stop_pruning
from compress.recipe.strategy import PruneStrategy
from support.calling import last_line, refuses
from support.refusals import check_line, refused
from support.tiny_folders import tiny_folder, write_samples
from support.tiny_models import LAYERS, generate, tiny_inputs
from support.tiny_recipes import recipe_of

STRATEGY = PruneStrategy(stages=(0, 2), ratios=(0.5, 0.6), voter_threshold=1.1, entropy_weight=0.3)


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("vlm") / "model")


@pytest.fixture
def folder(plain_folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(plain_folder, tmp_path / "model")


def logits(model):
    return torch.stack(generate(model, tiny_inputs(model), steps=2)[1])


def test_a_multimodal_model_loads_with_its_processor_and_unpruned(plain_folder, tmp_path):
    model, processor = compress.load(plain_folder)
    assert type(model).__name__ == "LlavaForConditionalGeneration" and not model.training
    assert not hasattr(model, KEY)
    samples = read_samples(write_samples(tmp_path), processor, 2)
    with torch.no_grad():
        assert all(model(**sample).logits.shape == (1, 39, 96) for sample in samples)


def test_a_saved_strategy_is_applied_as_by_the_context(folder):
    model, processor = compress.load(folder)
    plain = logits(model)
    with prune_visual_tokens(model, STRATEGY, processor):
        pruned = logits(model)
    assert not torch.equal(plain, pruned)
    save_strategy(STRATEGY, folder)
    loaded, _ = compress.load(folder)
    assert torch.equal(logits(loaded), pruned)
    stats = loaded.visual_token_pruning.stats
    assert loaded.visual_token_pruning.strategy == STRATEGY
    assert stats.average_kept == pytest.approx(STRATEGY.average_kept(LAYERS), abs=0.02)
    # One model is pruned, not its class: the other, and the one that is asked for bare, are not.
    assert torch.equal(logits(model), plain)
    assert torch.equal(logits(compress.load(folder, prune=False)[0]), plain)


def test_an_applied_strategy_can_be_taken_off(folder):
    save_strategy(STRATEGY, folder)
    model, _ = compress.load(folder)
    with refused(UsageError, "pruned"):
        prune_visual_tokens(model, STRATEGY).__enter__()
    stop_pruning(model)
    assert torch.equal(logits(model), logits(compress.load(folder, prune=False)[0]))
    assert not {KEY, "generate"} & set(vars(model))
    with refused(UsageError, "strategy"):
        stop_pruning(model)


def test_key_and_file_hold_the_strategy_and_the_config_keeps_the_rest(folder):
    before = json.loads((folder / "config.json").read_text())
    for strategy in (STRATEGY, STRATEGY.model_copy(update={"cell": 3.0})):  # the second replaces
        save_strategy(strategy, folder)
        config = json.loads((folder / "config.json").read_text())
        assert PruneStrategy.from_dict(config.pop(KEY)) == strategy
        assert config == before
        assert PruneStrategy.load(folder / FILE) == strategy


@pytest.mark.parametrize("missing", ["key", "file"])
def test_one_of_the_two_is_enough(folder, missing):
    save_strategy(STRATEGY, folder)
    if missing == "file":
        (folder / FILE).unlink()
    else:
        change_config(folder, lambda config: config.pop(KEY))
    assert compress.load(folder)[0].visual_token_pruning.strategy == STRATEGY


def test_names_of_earlier_versions_are_read(folder):
    def age(config):
        settings = config[KEY]
        settings["threshold"] = settings.pop("voter_threshold")
        settings["alpha"] = settings.pop("entropy_weight")

    save_strategy(STRATEGY, folder)
    change_config(folder, age)
    assert compress.load(folder)[0].visual_token_pruning.strategy == STRATEGY  # as the file beside
    change_config(folder, lambda config: config[KEY].update(alpha=0.9))
    with refused(CheckpointError, KEY, FILE):
        compress.load(folder)


def test_a_strategy_outlives_saving_the_loaded_model(folder, tmp_path):
    """By transformers itself, which knows nothing of it: it only keeps the config's keys."""
    save_strategy(STRATEGY, folder)
    model, processor = compress.load(folder)
    expected = logits(model)
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    again, _ = compress.load(tmp_path / "again")
    assert again.visual_token_pruning.strategy == STRATEGY
    assert torch.equal(logits(again), expected)


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def set_key(value):
    return lambda folder: change_config(folder, lambda config: config.update({KEY: value}))


@pytest.mark.parametrize(
    ("damage", "kind", "named"),
    [
        (set_key({"ratios": [0.5]}), CheckpointError, (KEY, FILE)),
        (set_key({"ratio": [0.5]}), RecipeError, (f"config.json: {KEY}: ratio: ", "'ratios'")),
        (set_key("half"), CheckpointError, (KEY, "'half'")),
        (lambda folder: (folder / FILE).write_text("{"), RecipeError, (FILE, "JSON")),
    ],
)
def test_damaged_strategies_stop_the_loading_unless_they_are_not_asked_for(
    folder, damage, kind, named
):
    save_strategy(STRATEGY, folder)
    damage(folder)
    with refused(kind, folder, *named):
        compress.load(folder)
    assert not hasattr(compress.load(folder, prune=False)[0], KEY)


def test_strategies_that_the_model_cannot_follow_are_not_saved(folder, checkpoint, tmp_path):
    before = (folder / "config.json").read_text()
    with refused(UsageError, "layer 4", "4 layers"):
        save_strategy(PruneStrategy(stages=(4,)), folder)
    assert (folder / "config.json").read_text() == before
    assert not (folder / FILE).exists()
    with refused(UsageError, "'llama'"):
        save_strategy(STRATEGY, checkpoint())
    with refused(UsageError, tmp_path):
        save_strategy(STRATEGY, tmp_path)


@pytest.mark.parametrize("fault", ["no processor", "another token", "too few patches"])
def test_a_processor_that_is_not_the_models_is_told(plain_folder, tmp_path, fault):
    folder = shutil.copytree(plain_folder, tmp_path / "model")
    if fault == "no processor":
        for file in folder.glob("*processor*"):
            file.unlink()
    elif fault == "another token":
        file = folder / "config.json"
        values = json.loads(file.read_text())
        changed = {key: 7 for key in values if key.startswith("image_token")}
        file.write_text(json.dumps(values | changed))
    else:
        file = folder / "processor_config.json"
        values = json.loads(file.read_text())
        file.write_text(json.dumps(values | {"patch_size": 2 * values["patch_size"]}))
    with pytest.raises(CompressError) as caught:
        run(recipe_of(folder), tmp_path / "out", self_check=False, check_source=False)
    check_line(str(caught.value), folder, "processor")
    if fault != "too few patches":  # which shows with an image alone
        with pytest.raises(CompressError) as caught:
            load(folder)
        check_line(str(caught.value), folder)


def test_a_processor_with_videos_reads_images_without_torchvision(tmp_path):
    folder = tiny_folder(tmp_path / "qwen", "qwen2_vl")
    model, processor = compress.load(folder)
    samples = read_samples(write_samples(tmp_path / "data"), processor, 2)
    for sample in samples:
        placeholders = int((sample["input_ids"] == model.config.image_token_id).sum())
        assert placeholders == int(sample["image_grid_thw"].prod()) // 4
    save_strategy(STRATEGY.model_copy(update={"entropy_weight": 0.0}), folder)
    model, _ = compress.load(folder)
    with torch.no_grad():
        model(**samples[0])
    assert model.visual_token_pruning.stats.images[0].kept[0] == round(placeholders / 2)


def test_text_is_continued_from_the_command_line(folder, capsys):
    from compress.cli.main import main

    save_strategy(STRATEGY, folder)
    options = ["--prompt", "w7 w8 w9", "--max-tokens", "3"]
    assert main(["generate", str(folder), *options]) == 0
    assert capsys.readouterr().out.strip()


def test_search_saves_with_the_model(folder, tmp_path, empty_folder, capsys):
    pytest.importorskip("optuna")
    from compress.cli.main import main

    data = write_samples(tmp_path / "data", 2)
    options = ["--data", str(data), "--keep", "0.5", "--samples", "2", "--trials", "1", "--save"]
    assert main(["search-pruning", str(folder), *options]) == 0
    assert "saved with" in capsys.readouterr().out
    found = PruneStrategy.load("pruning.json")
    assert compress.load(folder)[0].visual_token_pruning.strategy == found
    refuses(capsys, ["search-pruning", "someone/model", *options], "--save", read=last_line)
