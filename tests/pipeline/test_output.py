"""The output folder: what may be written over, and that it holds a whole checkpoint or none."""

import json
import os
from pathlib import Path

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.pipeline.inputs import RunInputs
from compress.pipeline.output import assemble
from compress.pipeline.plan import make_plan
from compress.storage.output_folder import WORK_FOLDER, check_output, publish, tidy
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
       "model.safetensors.index.json", "README.md", "report.html", "recipe.yaml", "pruning.json",
       "eval/results.json", "chat_template.jinja", "tokenizer.json", "extra/LICENSE"]  # fmt: skip
NEW = ["config.json", "model.safetensors", "recipe.yaml", "tokenizer.json", "more/tekken.json"]
MINE = ["thesis.txt", "tokenizer-notes.txt", "lora.safetensors", "extra/mine.txt"]


def put_result(folder: Path, *names: str) -> None:
    """A result that lists its files."""
    put(folder, *names)
    listed = json.dumps({"files": [*names, "modelpress.json"]})
    (folder / "modelpress.json").write_text(listed)


def moved_to(output: Path) -> None:
    publish(output / FINAL, output)
    tidy(output)


def published(names) -> dict[str, bytes]:
    return {name: (FINAL + name).encode() for name in names}


def test_publishing_replaces_a_result_and_leaves_what_is_not_its_own(tmp_path):
    put_result(tmp_path, *OLD)
    put(tmp_path, *MINE, *(FINAL + name for name in NEW), f"{WORK_FOLDER}/journal.jsonl")
    moved_to(tmp_path)
    assert every_file(tmp_path) == published(NEW) | {name: name.encode() for name in MINE}


@pytest.mark.parametrize("listing", ["none", "damaged", "of other kinds"])
def test_of_a_model_that_lists_nothing_all_that_a_model_has_is_replaced(tmp_path, listing):
    put(tmp_path, *OLD[:-1], "thesis.txt", *(FINAL + name for name in NEW))
    if listing != "none":
        text = "{" if listing == "damaged" else '{"files": 3}'
        (tmp_path / "modelpress.json").write_text(text)
    moved_to(tmp_path)
    assert every_file(tmp_path) == published(NEW) | {"thesis.txt": b"thesis.txt"}


@pytest.mark.parametrize("name", ["../thesis.txt", "/{}/thesis.txt", "link/thesis.txt"])
def test_a_list_that_points_elsewhere_removes_nothing_there(tmp_path, name):
    """modelpress.json came with the folder, from wherever."""
    output, elsewhere = tmp_path / "out", tmp_path / "thesis.txt"
    put(output, "config.json", *(FINAL + name for name in NEW))
    put(tmp_path, "thesis.txt")
    (output / "link").symlink_to(tmp_path)
    (output / "modelpress.json").write_text(json.dumps({"files": [name.format(tmp_path)]}))
    moved_to(output)
    assert elsewhere.read_text() == "thesis.txt"


def watch_folder(monkeypatch, folder, seen) -> None:
    """Puts what the folder holds into `seen`, after each move and each removal in it."""

    def watched(operation):
        def watch(path, *arguments, **options):
            result = operation(path, *arguments, **options)
            found = every_file(folder).items()
            seen.append({n: b for n, b in found if not n.startswith(WORK_FOLDER)})
            return result

        return watch

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))


def test_config_is_there_only_while_all_else_is(tmp_path, monkeypatch):
    """At each move and removal: no config.json, or one among its own files and no others."""
    seen = []
    put_result(tmp_path, *OLD)
    put(tmp_path, *(FINAL + name for name in NEW))
    watch_folder(monkeypatch, tmp_path, seen)
    moved_to(tmp_path)
    old, new = {*OLD, "modelpress.json"}, published(NEW)
    for files in seen:
        if "config.json" in files:
            assert files == new or (files.keys() == old and not new.items() & files.items())
        else:  # and never weights of both
            assert not (set(files) & set(OLD[1:4]) and "model.safetensors" in files)


def test_what_is_moved_is_on_disk_before_config_json_is(tmp_path, monkeypatch):
    """A power cut may undo what was not flushed: files first, then the names of the folder."""
    put(tmp_path, *(FINAL + name for name in NEW))
    flushed, replace, fsync = [], Path.replace, os.fsync

    def noted(file, target):
        flushed.append(f"move {Path(target).name}")
        return replace(file, target)

    def flush(descriptor):
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(Path, "replace", noted)
    monkeypatch.setattr(os, "fsync", flush)
    moved_to(tmp_path)
    last, folder = flushed.index("move config.json"), tmp_path.name
    for name in NEW:
        name = Path(name).name
        assert flushed.index(name) < flushed.index(f"move {name}") <= last
    assert flushed[last - 1] == folder == flushed[last + 1]


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
