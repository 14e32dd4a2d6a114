"""A run that stops anywhere goes on from its last whole layer, and ends with the same bytes.

Most tests stop it with an exception, which leaves on disk what a kill would; one really kills it.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from compress.errors import CheckpointError, CompressError, UsageError
from compress.pipeline.publishing import push
from compress.pipeline.run import run
from support.refusals import refused
from support.tiny_checkpoints import (
    WINDOWS,
    all_count,
    every_file,
    random_ids,
    recipe_for,
    weight_files,
    write_checkpoint,
)
from support.watching import Watch

DEPTH = 4
RSQ = {"rotate": "hadamard", "quantize": {"bits": 3, "token_importance": "attention_concentration"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("deep") / "model", "mistral", layers=DEPTH)


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory) -> dict[str, str]:
    """The files of the RSQ recipe, made in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    run(recipe_for(model, **RSQ), folder, windows=WINDOWS, self_check=False)
    return weight_files(folder)


def start(recipe, output, stop=None, windows=WINDOWS, **options) -> list[int]:
    """The layers that a run starts before it is stopped."""
    watch = Watch(stop)
    options = {"windows": windows, "self_check": False, "observer": watch} | options
    if stop is None:
        run(recipe, output, **options)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(recipe, output, **options)
        assert [path.name for path in output.iterdir()] == [".modelpress"]
    return watch.started


# ---- where it stops -----------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["ram", "disk"])
@pytest.mark.parametrize(
    "stop, layers_done",
    [
        (0, 0),
        ("model.layers.0.mlp.up_proj", 0),
        (1, 1),
        ("model.layers.2.self_attn.o_proj", 2),
        (3, 3),
        (DEPTH, DEPTH),
        ("head", DEPTH),
        ("writing", DEPTH),
    ],
)
def test_a_stopped_run_continues_at_its_layer(
    model, uninterrupted, tmp_path, stop, layers_done, offload
):
    recipe, output = recipe_for(model, **RSQ, calibration={"offload": offload}), tmp_path / "out"
    start(recipe, output, stop)
    assert start(recipe, output) == list(range(layers_done, DEPTH))
    assert weight_files(output) == uninterrupted
    assert not (output / ".modelpress").exists()


def test_a_run_that_is_stopped_again_and_again_gets_there(model, uninterrupted, tmp_path):
    recipe, output = recipe_for(model, **RSQ), tmp_path / "out"
    seen = [start(recipe, output, stop) for stop in (1, 2, "model.layers.2.mlp.down_proj", 3)]
    assert seen == [[0, 1], [1, 2], [2], [2, 3]]
    assert start(recipe, output) == [3]
    assert weight_files(output) == uninterrupted


def test_a_killed_process_continues_at_its_layer(model, uninterrupted, tmp_path):
    """os._exit in the middle of layer 2: nothing is flushed, closed or tidied up."""
    output = tmp_path / "out"
    child = """
        import os, sys
        sys.path.insert(0, sys.argv[1])
        from support.tiny_checkpoints import WINDOWS
        from compress.observer import Observer
        from compress.pipeline.run import run
        from compress.recipe.recipe import Recipe

        class Kill(Observer):
            def module(self, name, facts):
                if name == "model.layers.2.self_attn.v_proj":
                    os._exit(137)

        recipe = Recipe.load(sys.argv[2])
        run(recipe, sys.argv[3], windows=WINDOWS, self_check=False, observer=Kill())
    """
    recipe = recipe_for(model, **RSQ)
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    arguments = [Path(__file__).parents[1], tmp_path / "recipe.yaml", output]
    command = [sys.executable, "-c", textwrap.dedent(child), *map(str, arguments)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == 137, killed.stderr
    assert [path.name for path in output.iterdir()] == [".modelpress"]
    assert start(recipe, output) == [2, 3]
    assert weight_files(output) == uninterrupted


@pytest.mark.parametrize("moved_before", [0, 2, 5])
@pytest.mark.parametrize("replaced", [False, True], ids=["fresh", "replaced"])
def test_a_run_that_stops_while_it_publishes_leaves_no_checkpoint(
    model, tmp_path, monkeypatch, moved_before, replaced
):
    """config.json comes last: without it the folder is no model, and the journal is still there.

    So the run goes on without --overwrite, whatever half of which checkpoint lies there.
    """
    recipe = recipe_for(model, **RSQ, save={"shard_size": "50KB"})
    output, rename, moved = tmp_path / "out", Path.replace, []
    if replaced:
        other = recipe_for(model, quantize={"method": "rtn"}, save={"shard_size": "20KB"})
        run(other, output, self_check=False)

    def replace(file, target):
        if Path(target).parent == output:
            if len(moved) == moved_before:
                raise KeyboardInterrupt
            moved.append(file)
        return rename(file, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, output, windows=WINDOWS, self_check=False, overwrite=replaced)
    assert not (output / "config.json").exists()
    assert start(recipe, output) == []
    fresh = tmp_path / "fresh"
    run(recipe, fresh, windows=WINDOWS, self_check=False)
    assert weight_files(output) == weight_files(fresh)
    assert every_file(output).keys() == every_file(fresh).keys()


@pytest.mark.parametrize("offload", ["ram", "disk"])
def test_the_activations_of_one_layer_are_kept(model, tmp_path, offload):
    """What lies on the disk beside finished layers does not grow from layer to layer.

    Two sets of files take turns, so the second layer's are the last that are new.
    """
    recipe = recipe_for(model, **RSQ, calibration={"offload": offload})
    sizes = []
    for stop in (2, 3, DEPTH):
        start(recipe, tmp_path / "out", stop)
        files = every_file(tmp_path / "out").items()
        others = [n for n, _ in files if not n.endswith((".safetensors", ".jsonl"))]
        sizes.append(sum(len(data) for name, data in files if name in others))
    assert sizes[0] == sizes[1] == sizes[2] > 0


# ---- what it continues --------------------------------------------------------------------------


def test_no_resume_starts_over(model, uninterrupted, tmp_path):
    recipe, output = recipe_for(model, **RSQ), tmp_path / "out"
    start(recipe, output, 2)
    assert start(recipe, output, resume=False) == list(range(DEPTH))
    assert weight_files(output) == uninterrupted


CHANGES = {
    "bits": {"quantize": {"bits": 4}},
    "rotation": {"rotate": {"kind": "hadamard", "seed": 1}},
    "importance": {"quantize": {"bits": 3, "token_importance": "uniform"}},
    "dtype": {"model": {"dtype": "bfloat16"}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_recipe_does_not_continue_the_run(model, uninterrupted, tmp_path, change):
    """It is refused, so that no work is lost by a slip; --no-resume starts over."""
    sections = RSQ | CHANGES[change]
    if change == "dtype":
        sections["model"] = {"path": str(model)} | sections["model"]
    first, second, output = (
        recipe_for(model, **RSQ),
        recipe_for(model, **sections),
        tmp_path / "out",
    )
    start(first, output, 2)
    before = every_file(output)
    with refused(UsageError, output, "recipe", "--no-resume"):
        start(second, output)
    assert every_file(output) == before
    assert start(second, output, resume=False) == list(range(DEPTH))
    fresh = tmp_path / "fresh"
    assert start(second, fresh) == list(range(DEPTH))
    assert weight_files(output) == weight_files(fresh) != uninterrupted


def test_other_tokens_or_another_model_do_not_continue_the_run(model, tmp_path):
    output, other = tmp_path / "out", write_checkpoint(tmp_path / "b", "mistral", layers=4, seed=1)
    start(recipe_for(model, **RSQ), output, 2)
    with refused(UsageError, output, "--no-resume"):
        start(recipe_for(model, **RSQ), output, windows=all_count(random_ids(6, 24, seed=1)))
    sections = RSQ | {"model": str(other)}
    with refused(UsageError, output, "--no-resume"):
        start(recipe_for(model, **sections), output)


@pytest.mark.parametrize("part", ["layers.3.mlp.down_proj.weight", "embed_tokens.weight"])
def test_weights_that_changed_since_do_not_continue_the_run(model, tmp_path, part):
    """The last number of one tensor; the files' size and all else are as before."""
    other = Path(shutil.copytree(model, tmp_path / "model"))
    recipe, output = recipe_for(other, **RSQ), tmp_path / "out"
    start(recipe, output, 2)
    tensors = load_file(other / "model.safetensors")
    tensors[f"model.{part}"].view(-1)[-1] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="model or data"):
        start(recipe, output)


@pytest.mark.parametrize("offload", ["ram", "disk"])
def test_activations_of_which_one_bit_changed_are_refused(model, tmp_path, offload):
    recipe, output = recipe_for(model, **RSQ, calibration={"offload": offload}), tmp_path / "out"
    start(recipe, output, 2)
    (file,) = (output / ".modelpress" / "activations").glob("inputs-0-*.f32")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"inputs-0-00000\.f32 .*--no-resume"):
        start(recipe, output)


def test_an_embedding_that_was_damaged_is_written_again(model, uninterrupted, tmp_path):
    recipe, output = recipe_for(model, **RSQ), tmp_path / "out"
    start(recipe, output, 2)
    (output / ".modelpress" / "embedding.safetensors").write_bytes(b"")
    assert start(recipe, output) == [2, 3]
    assert weight_files(output) == uninterrupted


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), CompressError("no memory")])
def test_a_result_whose_evaluation_fails_is_described_and_measured_later(
    model, text, tmp_path, monkeypatch, failure
):
    perplexity = {"dataset": str(text), "length": 16, "tokens": 64}
    section = {"perplexity": perplexity, "baseline": False}
    recipe, output = recipe_for(model, evaluate=section), tmp_path / "out"

    def fails(*_):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr("compress.pipeline.finish.evaluate_section", fails)
        with pytest.raises(type(failure)):
            run(recipe, output, windows=WINDOWS, self_check=False)
    before = weight_files(output)
    for name in ("README.md", "report.html", "modelpress.json", "recipe.yaml", "config.json"):
        assert (output / name).is_file()
    made = json.loads((output / "modelpress.json").read_text())
    assert made["peak_memory"]["host"] > 0 and "evaluation_memory" not in made
    assert push(output, "me/model", dry_run=True)["card"]
    watch = Watch()
    result = run(recipe, output, windows=WINDOWS, self_check=False, observer=watch)
    assert watch.started == [] and result.metrics["perplexity"]["value"] > 1
    told = json.loads((output / "modelpress.json").read_text())
    assert told["peak_memory"] == made["peak_memory"] == result.peak_memory  # of the other process
    assert told["evaluation_memory"] == result.evaluation_memory
    assert result.evaluation_memory["host"] > 0
    assert weight_files(output) == before and not (output / ".modelpress").exists()
    assert "Not evaluated" not in (output / "README.md").read_text()
    with pytest.raises(UsageError, match="--overwrite"):
        run(recipe, output, windows=WINDOWS, self_check=False)


def interrupted(*_):
    raise KeyboardInterrupt


def test_the_memory_of_an_evaluation_is_that_of_who_made_it(model, text, tmp_path, monkeypatch):
    """One that was ended between its figures and the documents is not the one that goes on."""
    perplexity = {"dataset": str(text), "length": 16, "tokens": 64}
    recipe = recipe_for(model, evaluate={"perplexity": perplexity, "baseline": False})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("compress.pipeline.finish.peak_memory", lambda device: {"host": 7})
        patch.setattr("compress.pipeline.finish.replace_documents", interrupted)
        run(recipe, tmp_path / "out", windows=WINDOWS, self_check=False)
    result = run(recipe, tmp_path / "out", windows=WINDOWS, self_check=False)
    assert result.evaluation_memory == {"host": 7}
    nothing = recipe_for(model, evaluate={"tasks": []})
    result = run(nothing, tmp_path / "nothing", windows=WINDOWS, self_check=False)
    assert result.evaluation_memory == {} and not result.metrics


def test_what_does_not_change_the_bytes_does_not_stop_it(model, uninterrupted, tmp_path):
    """The recipe's name, what is evaluated, and where activations live."""
    output = tmp_path / "out"
    start(recipe_for(model, **RSQ, calibration={"offload": "ram"}), output, 2)
    changed = recipe_for(model, **RSQ, calibration={"offload": "disk"}, name="other")
    assert start(changed, output) == [2, 3]
    assert weight_files(output) == uninterrupted


def test_a_journal_that_lost_a_file_is_refused(model, uninterrupted, tmp_path):
    recipe, output = recipe_for(model, **RSQ), tmp_path / "out"
    start(recipe, output, 2)
    (output / ".modelpress" / "layer-00000.safetensors").unlink()
    with refused(CheckpointError, "layer-00000.safetensors", "--no-resume"):
        start(recipe, output)
    assert start(recipe, output, resume=False) == list(range(DEPTH))
    assert weight_files(output) == uninterrupted


@pytest.mark.parametrize("offload", ["ram", "disk"])
@pytest.mark.parametrize("damage", ["cut short", "lost"])
def test_activations_that_are_not_whole_are_refused(
    model, uninterrupted, tmp_path, offload, damage
):
    """What the next layer would read, wherever it then keeps it."""
    recipe, output = recipe_for(model, **RSQ, calibration={"offload": offload}), tmp_path / "out"
    start(recipe, output, 2)
    (file,) = (output / ".modelpress" / "activations").glob("inputs-0-*.f32")
    if damage == "lost":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 4)
    with refused(CheckpointError, file, "--no-resume"):
        start(recipe, output)
    assert start(recipe, output, resume=False) == list(range(DEPTH))
    assert weight_files(output) == uninterrupted


def test_a_finished_checkpoint_stays_until_the_new_one_is_whole(model, uninterrupted, tmp_path):
    output = tmp_path / "out"
    run(recipe_for(model), output, windows=WINDOWS, self_check=False)
    old = every_file(output)
    watch = Watch("writing")
    recipe = recipe_for(model, **RSQ)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, output, windows=WINDOWS, self_check=False, overwrite=True, observer=watch)
    assert {n: b for n, b in every_file(output).items() if not n.startswith(".")} == old
    assert start(recipe, output, overwrite=True) == []
    assert weight_files(output) == uninterrupted
