"""A disk that is full or fails: one line, and nothing that is half a checkpoint."""

import errno
import os
import resource
import shutil

import pytest

from compress.pipeline.run import run
from support.failing_runs import Case, failure, visible
from support.tiny_checkpoints import (
    WINDOWS,
    all_count,
    every_file,
    load_whole,
    random_ids,
    recipe_for,
    weight_files,
)


@pytest.mark.parametrize("allowed", [0, 1, 2, 3, 5, 7])
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(
    checkpoint, finished, tmp_path, monkeypatch, allowed
):
    """The disk takes about so many files: journal, embedding, layers, head, shard."""
    written = []

    def fsync(descriptor):
        written.append(descriptor)
        if len(written) > 2 * allowed:  # for most files, the file itself and then its folder
            raise OSError(errno.ENOSPC, "No space left on device")

    recipe = recipe_for(checkpoint(), rotate="hadamard")
    output = shutil.copytree(finished, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        failure(recipe, output, Case(("No space left",)), overwrite=True)
    assert visible(output) == every_file(finished)
    run(recipe, output, windows=WINDOWS, self_check=False, overwrite=True)
    run(recipe, tmp_path / "fresh", windows=WINDOWS, self_check=False)
    assert weight_files(output) == weight_files(tmp_path / "fresh")


def test_a_disk_that_fills_up_behind_the_weights_costs_only_the_reports(
    checkpoint, tmp_path, monkeypatch
):
    output, fresh, fsync = tmp_path / "out", tmp_path / "fresh", os.fsync

    def full_once_published(descriptor):
        if (output / "config.json").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    recipe = recipe_for(checkpoint())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_once_published)
        failure(recipe, output, Case(("No space left", str(output))))
    run(recipe, fresh, windows=WINDOWS, self_check=False)
    assert weight_files(output) == weight_files(fresh)
    assert (output / "config.json").read_bytes() == (fresh / "config.json").read_bytes()
    load_whole(output)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.EACCES, "Permission denied", "there/vocab.json"),
            ("there/vocab.json", "Permission denied"),
        ),
        (OSError(errno.EIO, "Input/output error"), ("out: Input/output error",)),
        (OSError("12 bytes requested and 0 written"), ("out: 12 bytes requested and 0 written",)),
    ],
    ids=["named", "nameless", "without a number"],
)
def test_a_write_that_fails_anywhere_is_one_line(checkpoint, tmp_path, monkeypatch, error, said):
    """Here while the tokenizer is copied, where nothing expects it."""

    def copyfile(*_):
        raise error

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copyfile)
        failure(recipe_for(checkpoint()), output, Case(said))
    assert visible(output) == {}
    run(recipe_for(checkpoint()), output, windows=WINDOWS, self_check=False)
    load_whole(output)


@pytest.mark.parametrize("offload", ["ram", "disk"])
def test_activations_that_do_not_fit_on_the_disk_are_one_line(checkpoint, tmp_path, offload):
    """A limit on the size of files stands for the disk: only the activations are above it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    case = Case((str(tmp_path / "out"),), windows=all_count(random_ids(40, 64)))
    recipe = recipe_for(checkpoint(), calibration={"offload": offload})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        failure(recipe, tmp_path / "out", case)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert visible(tmp_path / "out") == {}
