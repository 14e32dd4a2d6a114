"""The output folder: what may be written over, and that it holds a whole checkpoint or none."""

from pathlib import Path

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.pipeline.inputs import RunInputs
from compress.pipeline.output import assemble
from compress.pipeline.plan import make_plan
from compress.storage.output_folder import WORK_FOLDER, check_output, publish
from compress.storage.safetensors import save_tensors
from support.refusals import refused
from support.tiny_checkpoints import every_file, read_tensors, recipe_for, weight_files

FINAL = f"{WORK_FOLDER}/final/"


def put(folder: Path, *names: str) -> None:
    """Files whose content is their name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


# ---- what may be written over -------------------------------------------------------------------

FREE = {
    "an empty folder": [],
    "an unfinished run": [f"{WORK_FOLDER}/journal.jsonl"],
    "a run that is about to publish": [f"{FINAL}config.json"],
    "a half-published run": ["model-00001-of-00002.safetensors", f"{FINAL}config.json"],
    "one of which only config.json is left to move": ["model.safetensors", f"{FINAL}config.json"],
}
TAKEN = {
    "something else": ["thesis.txt"],
    "a checkpoint": ["config.json", "model.safetensors"],
    "something else beside an unfinished run": ["thesis.txt", f"{WORK_FOLDER}/journal.jsonl"],
    "a checkpoint that is being replaced": ["config.json", f"{FINAL}config.json"],
    "a checkpoint whose work folder was not removed": ["config.json", f"{FINAL}merges.txt"],
}


def test_a_folder_that_is_not_there_is_free(tmp_path):
    check_output(tmp_path / "a" / "b", overwrite=False)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("case", FREE)
def test_what_a_run_has_left_is_its_own(tmp_path, case):
    put(tmp_path, *FREE[case])
    for overwrite in (False, True):
        check_output(tmp_path, overwrite)
    assert len(every_file(tmp_path)) == len(FREE[case])


@pytest.mark.parametrize("case", TAKEN)
def test_anything_else_is_only_written_over_where_that_was_asked_for(tmp_path, case):
    put(tmp_path, *TAKEN[case])
    with refused(UsageError, TAKEN[case][0], "--overwrite"):
        check_output(tmp_path, overwrite=False)
    check_output(tmp_path, overwrite=True)


# ---- publishing ---------------------------------------------------------------------------------

OLD = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
       "model.safetensors.index.json", "modelpress.json", "README.md", "report.html",
       "eval/results.json"]  # fmt: skip
NEW = ["config.json", "model.safetensors", "recipe.yaml", "tokenizer.json"]


def test_publishing_replaces_a_checkpoint_and_what_describes_it(tmp_path):
    put(tmp_path, *OLD, "thesis.txt", *(FINAL + name for name in NEW))
    put(tmp_path, f"{WORK_FOLDER}/journal.jsonl")
    publish(tmp_path / FINAL, tmp_path)
    expected = {name: (FINAL + name).encode() for name in NEW} | {"thesis.txt": b"thesis.txt"}
    assert every_file(tmp_path) == expected
    assert not (tmp_path / WORK_FOLDER).exists()


def test_config_is_there_only_while_all_else_is(tmp_path, monkeypatch):
    """At each move and removal: no config.json, or one among its own files."""
    seen = []

    def watched(operation):
        def watch(path, *arguments, **options):
            config = tmp_path / "config.json"
            result = operation(path, *arguments, **options)
            seen.append(config.read_text() if config.is_file() else None)
            if seen[-1] == f"{FINAL}config.json":
                assert all((tmp_path / name).read_text() == FINAL + name for name in NEW)
            return result

        return watch

    put(tmp_path, *OLD, *(FINAL + name for name in NEW))
    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))
    publish(tmp_path / FINAL, tmp_path)
    assert "config.json" not in seen  # the old one went first
    assert seen[: len(NEW)] == [None] * len(NEW)
    assert set(seen[len(NEW) :]) == {f"{FINAL}config.json"}


# ---- putting it together ------------------------------------------------------------------------


@pytest.fixture
def assembled(checkpoint, press, tmp_path):
    """`assembled(change)`: assembles the tensors of a real run after `change(tensors)`."""
    recipe = recipe_for(checkpoint())
    published = press(recipe)

    def assembled(change=lambda tensors: None, final="final"):
        tensors = read_tensors(published)
        change(tensors)
        save_tensors(tmp_path / "part.safetensors", tensors)
        inputs = RunInputs.open(recipe)
        parts = [tmp_path / "part.safetensors"]
        assemble(tmp_path / final, parts, inputs, make_plan(inputs))
        return tmp_path / final

    assembled.published = published
    return assembled


def test_what_is_put_together_is_what_a_run_publishes(assembled):
    final = every_file(assembled())
    published = every_file(assembled.published)
    described = {"modelpress.json", "README.md", "report.html"}
    assert final == {name: data for name, data in published.items() if name not in described}


def test_what_an_interrupted_run_had_put_together_is_thrown_away(assembled, tmp_path):
    put(tmp_path / "final", "model-00001-of-00002.safetensors", "config.json", "deeper/stale")
    final = assembled()
    assert weight_files(final) == weight_files(assembled.published)
    assert not (final / "deeper").exists()


def test_a_planned_module_that_is_not_written_is_named(assembled):
    name = "model.layers.1.mlp.up_proj"
    with refused(CompressError, name):
        assembled(lambda tensors: tensors.pop(f"{name}.weight_packed"))


@pytest.mark.parametrize("change", ["left over", "in another dtype"])
def test_bytes_that_were_not_planned_are_an_error(assembled, change):
    def grow(tensors):
        norm = "model.norm.weight"
        if change == "left over":
            tensors["model.extra.weight"] = torch.ones(3)
        else:
            tensors[norm] = tensors[norm].double()

    with refused(CompressError, "planned"):
        assembled(grow)
