"""Measuring multimodal checkpoints: pruned as saved, beside an unpruned baseline, with pictures."""

import shutil

import pytest
import torch

import compress
from compress.eval.page import write_report
from compress.eval.settings import EvaluationSettings
from compress.loading.load import load
from compress.pipeline.evaluation import Evaluator, evaluate
from compress.pruning.pictures import KEY
from compress.pruning.saved import save_strategy
from compress.recipe.strategy import PruneStrategy
from compress.recipes.demo import scenes
from support.tiny_vlm import LAYERS, write_vlm

LIMIT = 9
STRATEGY = PruneStrategy(stages=(0, 1), ratios=(0.5, 0.25), voter_threshold=1.2, cell=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same random model, plain and with a strategy."""
    plain = write_vlm(tmp_path_factory.mktemp("vlm") / "plain", word="yes")
    pruned = shutil.copytree(plain, plain.with_name("pruned"))
    save_strategy(STRATEGY, pruned)
    return plain, pruned


def measure(model, **settings):
    return evaluate(model, tasks=["demo_vqa"], limit=LIMIT, batch_size=4, **settings)


def test_a_saved_strategy_is_at_work_and_the_baseline_is_whole(folders, tmp_path):
    plain, pruned = folders
    found = measure(pruned, baseline=plain, seed=2, pictures=tmp_path / "eval")
    pruning = found["pruning"]
    assert (pruning["prompts"], pruning["images"]) == (LIMIT, LIMIT)
    assert pruning["average_kept"] == pytest.approx(STRATEGY.average_kept(LAYERS))
    assert pruning["kv_bytes"] < pruning["kv_bytes_unpruned"]
    assert pruning["strategy"] == STRATEGY.model_dump(mode="json")
    assert len(pruning["pictures"]) == 3
    assert {str(p) for p in (tmp_path / "eval").iterdir()} == set(pruning["pictures"])
    # The head answers yes whatever the layers say: pruned and unpruned agree item by item.
    assert found["baseline"]["results"] == found["results"] == measure(plain, seed=2)["results"]
    assert found["difference"]["results"]["demo_vqa"]["exact_match"]["value"] == 0
    assert found["conditions"]["chat_template"] is True
    assert found["conditions"]["seed"] == 2


def test_a_baseline_with_a_strategy_of_its_own_is_measured_without_it(folders, monkeypatch):
    """A checkpoint can be compared with itself unpruned."""
    _, pruned = folders
    loaded = []
    real = load

    def noting(*args, **kwargs):
        loaded.append(real(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr("compress.pipeline.evaluation.load", noting)
    measure(pruned, baseline=pruned)
    assert [hasattr(model, KEY) for model, _ in loaded] == [True, False]


def test_a_plain_model_has_nothing_to_say_of_pruning(folders, tmp_path):
    found = measure(folders[0], pictures=tmp_path / "eval")
    assert "pruning" not in found and not (tmp_path / "eval").exists()


def test_each_measurement_counts_its_own_prompts(folders):
    """A model that stays loaded may be measured again, under another strategy and seed."""
    from compress.pruning.saved import apply_strategy, stop_pruning

    model, processor = compress.load(folders[1], dtype=torch.float32)
    evaluator = Evaluator(EvaluationSettings(tasks=["demo_vqa"], limit=4, batch_size=4))
    twice = [evaluator.measure_loaded(model, processor, "it", seed=s) for s in (0, 1)]
    assert [found["pruning"]["prompts"] for found in twice] == [4, 4]
    assert [found["conditions"]["seed"] for found in twice] == [0, 1]
    stop_pruning(model)
    apply_strategy(model, PruneStrategy(method="uniform", ratios=(0.125,)), processor)
    other = evaluator.measure_loaded(model, processor, "it")["pruning"]
    assert other["average_kept"] == 0.125 and other["visual_tokens"] == 4 * scenes.GRID**2


def test_text_is_measured_with_the_processors_tokenizer(folders, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("what is red ? " * 60)
    settings = {"perplexity": str(text), "length": 16, "tokens": 160}
    plain, pruned = (evaluate(folder, **settings) for folder in folders)
    assert plain["perplexity"]["tokens"] == 150
    assert pruned["perplexity"] == plain["perplexity"]
    assert pruned["pruning"]["images"] == 0 and "pictures" not in pruned["pruning"]


def test_the_pictures_are_in_the_report(folders, tmp_path):
    found = measure(folders[1], pictures=tmp_path / "eval")
    page = write_report(tmp_path / "report.html", {"name": "it", "evaluation": found}).read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "pruning.average_kept" in page
    write_report(tmp_path / "other.html", {"name": "it", "evaluation": measure(folders[0])})
    assert "data:image" not in (tmp_path / "other.html").read_text()
