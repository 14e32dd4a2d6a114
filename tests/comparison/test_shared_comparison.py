"""Ranks that torchrun starts share a comparison: its figures are those of one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.comparison.results import ResultComparison
from compress.comparison.study import Entry
from compress.errors import UsageError
from compress.observer import Observer
from compress.ranks import Ranks
from compress.recipe.recipe import Recipe
from support import ranks_at_work
from support.measured_recipes import recipe_of
from support.ranks_at_work import at_work, torchrun
from support.refusals import refused
from support.tiny_checkpoints import weight_files, write_checkpoint
from support.tiny_vlm import write_vlm

pytest.importorskip("optuna")
FAST: dict[str, Any] = {"self_check": False, "check_source": False}
KEPT: dict[str, dict[str, Any]] = {
    "uniform": {"keep": 0.25, "strategy": {"method": "uniform"}},
    "searched": {"keep": 0.5, "search": {"samples": 2, "trials": 2}, "stages": [0, 1]},
    "fastv": {"keep": 0.75, "strategy": {"method": "fastv"}},
}
SEEDS = {"results": [0, 1], "strategies": [2]}


@pytest.fixture(scope="module")
def recipes(text, tmp_path_factory) -> dict[str, list[str]]:
    """Files of recipes that write checkpoints, and of some that only prune."""
    folder = tmp_path_factory.mktemp("recipes")
    model, pictures = write_checkpoint(folder / "lm"), write_vlm(folder / "vlm", word="no")
    made = [recipe_of(model, text, f"w{bits}", bits=bits) for bits in (4, 2)]
    pruned = [
        Recipe.from_dict(
            {
                "name": name,
                "model": str(pictures),
                "calibration": {"dataset": "demo-scenes", "samples": 2},
                "rotate": "none",
                "quantize": {"method": "none"},
                "prune_visual_tokens": section,
                "evaluate": {"tasks": ["demo_vqa"], "limit": 5, "batch_size": 5},
            }
        )
        for name, section in KEPT.items()
    ]
    found = {}
    for kind, chosen in (("results", made), ("strategies", pruned)):
        files = [folder / f"{recipe.name}.yaml" for recipe in chosen]
        for file, recipe in zip(files, chosen, strict=True):
            file.write_text(recipe.dump())
        found[kind] = [str(file) for file in files]
    return found


def job_of(recipes, kind: str, folder: Path, **options: Any) -> dict[str, Any]:
    job = {"compare": recipes[kind], "seeds": SEEDS[kind], "output": str(folder / kind)}
    return job | {"options": FAST | options}


def figures(folder: Path, place: str) -> dict[str, Any]:
    """What was found, wherever it lies, however long it took, and without the picture."""
    found = json.loads((folder / place).read_text().replace(str(folder), "OUT"))
    found.pop("plot")
    for each in [*found["runs"], *found["rows"]]:
        each.pop("seconds", None)
    return found


@pytest.fixture(scope="module")
def alone(recipes, tmp_path_factory) -> Path:
    """Both comparisons as one process makes them."""
    folder = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for kind in recipes:
        ranks_at_work.work(job_of(recipes, kind, folder))
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def shared(request, recipes, tmp_path_factory) -> tuple[int, Path]:
    """The same as so many ranks make them, in order."""
    folder = tmp_path_factory.mktemp("shared")
    jobs = [job_of(recipes, kind, folder, deterministic=True) for kind in recipes]
    done = at_work(folder, request.param, jobs)
    assert done.returncode == 0, done.stderr
    return request.param, folder


@pytest.mark.parametrize("kind", SEEDS)
def test_figures_are_those_of_one_process(alone, shared, kind):
    ranks, folder = shared
    expected = figures(alone, f"{kind}/comparison.json")
    assert len(expected["runs"]) == len(SEEDS[kind]) * (2 if kind == "results" else 3)
    assert figures(folder, f"{kind}/comparison.json") == expected
    for rank in range(ranks):  # whichever has measured what
        assert figures(folder, f"{kind}.{rank}") == expected
    names = {path.name for path in (alone / kind).iterdir()}
    assert {path.name for path in (folder / kind).iterdir()} == names


def test_results_and_strategies_are_those_of_one_process(alone, shared):
    _, folder = shared
    for place in (alone / "results").glob("w*/"):
        assert weight_files(folder / "results" / place.name) == weight_files(place)
    for file in (alone / "strategies").glob("*/*"):
        if file.name in ("pruning.json", "trials.jsonl"):
            ours = folder / "strategies" / file.parent.name / file.name
            assert ours.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind, stop", [("results", [1, 1]), ("strategies", None)])
def test_a_comparison_that_was_stopped_goes_on(alone, recipes, tmp_path, kind, stop):
    """In one process, behind a rank that was killed; with more ranks, where nothing is left."""
    job = job_of(recipes, kind, tmp_path, deterministic=True)
    if stop is not None:
        done = at_work(tmp_path, 2, [job | {"killed_at": stop}])
        assert done.returncode != 0
        assert "another rank has ended" in done.stderr or "SIGTERM" in done.stderr
        assert not (tmp_path / kind / "comparison.json").exists()
        ranks_at_work.work(job)
    else:
        ranks_at_work.work(job_of(recipes, kind, tmp_path))
        before = figures(tmp_path, f"{kind}/comparison.json")
        done = at_work(tmp_path, 2, [job])
        assert done.returncode == 0, done.stderr
        assert figures(tmp_path, f"{kind}/comparison.json") == before
    assert len(figures(tmp_path, f"{kind}/comparison.json")["rows"]) > 2


def test_what_ranks_cannot_share_is_refused_before_anything_is_made(recipes, tmp_path):
    recipe = Recipe.load(recipes["strategies"][0]).with_changes(
        quantize={"method": "rtn", "clip_search": "magnitude", "group_size": 16}
    )
    two = Ranks()
    two.size = 2
    study = ResultComparison(recipe, "cpu", Observer(), ranks=two)
    with refused(UsageError, "prune_visual_tokens", "torchrun"):
        list(study.runs([Entry(recipe, 0, tmp_path / "out")]))
    assert not any(tmp_path.iterdir())


def test_the_command_shares_and_the_first_rank_answers(recipes, tmp_path):
    options = ["--no-self-check", "--no-check-source", "--output", "out", "--json"]
    done = torchrun(2, "-m", "compress", "compare", *recipes["results"], *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads(done.stdout)["rows"]] == ["16-bit", "w4", "w2"]
    assert (tmp_path / "out/comparison.html").is_file()
    wrong = torchrun(2, "-m", "compress", "compare", recipes["results"][0], "nothing.yaml")
    assert wrong.returncode != 0
    assert len([line for line in wrong.stderr.splitlines() if line.startswith("error: ")]) == 1
