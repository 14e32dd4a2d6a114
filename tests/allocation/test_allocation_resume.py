"""A run with an `allocate` section that stops goes on without scoring again, to the same bytes."""

from pathlib import Path

import pytest

from compress.allocation import scores as layer_scores
from compress.allocation.score_walk import ScoreWalk
from compress.errors import CheckpointError, UsageError
from compress.pipeline.inputs import RunInputs
from compress.pipeline.plan import allocated_plan
from compress.pipeline.run import run
from support.mixed_widths import DEPTH
from support.refusals import refused
from support.tiny_checkpoints import WINDOWS, every_file, recipe_for, weight_files
from support.watching import Watch

EVOLVE = {
    "method": "evolve", "generations": 3, "offspring": 3, "samples": 2, "unit": "fused_group",
    "average_bits": 3.1, "importance": "output_error", "widths": [2, 3, 4],
}  # fmt: skip


def recipe_of(checkpoint, **section):
    """A quick recipe for four layers."""
    quantize = {"clip_search": "none", "refine_sweeps": 0}
    return recipe_for(checkpoint(layers=DEPTH), quantize=quantize, allocate=section)


class Counts:
    """Walks of the scores and measured assignments; Ctrl-C in place of one of these."""

    def __init__(self, monkeypatch):
        self.walks = self.measured = 0
        self.stop: int | None = None
        walk, divergence = ScoreWalk.run, layer_scores.divergence

        def counted_walk(*args, **kwargs):
            self.walks += 1
            return walk(*args, **kwargs)

        def counted_divergence(*args):
            if self.stop == self.measured:
                raise KeyboardInterrupt
            self.measured += 1
            return divergence(*args)

        monkeypatch.setattr(ScoreWalk, "run", counted_walk)
        monkeypatch.setattr("compress.allocation.scores.divergence", counted_divergence)

    def start(self, recipe, output, stop: int | None = None, **options) -> tuple[int, int]:
        """Walks and measured assignments of one run; `stop`: before which it is interrupted."""
        self.walks, self.measured, self.stop = 0, 0, stop
        options = {"windows": WINDOWS, "self_check": False} | options
        interrupted = stop is not None or getattr(options.get("observer"), "stop", None) is not None
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                run(recipe, output, **options)
        else:
            run(recipe, output, **options)
        return self.walks, self.measured


@pytest.fixture
def counts(monkeypatch) -> Counts:
    return Counts(monkeypatch)


def test_a_run_that_is_stopped_after_the_allocation_does_not_score_again(
    checkpoint, counts, tmp_path
):
    recipe = recipe_of(checkpoint, **EVOLVE)
    walks, measured = counts.start(recipe, tmp_path / "whole")
    assert walks == 1
    assert measured > 3
    for stop in ("layers", "model.layers.2.mlp.up_proj", "head"):
        output = tmp_path / f"stopped-{stop}"
        assert counts.start(recipe, output, observer=Watch(stop)) == (1, measured)
        assert counts.start(recipe, output) == (0, 0)
        assert weight_files(output) == weight_files(tmp_path / "whole")
        assert not (output / ".modelpress").exists()


def test_a_run_that_is_stopped_while_it_evolves_goes_on_there(checkpoint, counts, tmp_path):
    recipe, output = recipe_of(checkpoint, **EVOLVE), tmp_path / "out"
    _, measured = counts.start(recipe, tmp_path / "whole")
    assert counts.start(recipe, output, stop=0) == (1, 0)
    assert counts.start(recipe, output, stop=1) == (0, 1)  # the first is in the state
    rest = counts.start(recipe, output, stop=measured - 2)
    assert rest == (0, measured - 2)
    walks, left = counts.start(recipe, output)
    assert walks == 0
    assert 0 < left < measured
    assert weight_files(output) == weight_files(tmp_path / "whole")


@pytest.mark.parametrize("name", ["scores.json", "evolve.json", "00001-2.safetensors"])
def test_work_files_that_were_damaged_are_noticed(checkpoint, counts, tmp_path, name):
    recipe, output = recipe_of(checkpoint, **EVOLVE), tmp_path / "out"
    counts.start(recipe, output, stop=3)
    damage(output, name)
    with refused(CheckpointError, name, "--no-resume"):
        run(recipe, output, windows=WINDOWS, self_check=False)
    counts.start(recipe, output, resume=False)
    counts.start(recipe, tmp_path / "fresh")
    assert weight_files(output) == weight_files(tmp_path / "fresh")


def test_an_allocation_that_was_damaged_is_noticed(checkpoint, counts, tmp_path):
    recipe, output = recipe_of(checkpoint, **EVOLVE), tmp_path / "out"
    counts.start(recipe, output, observer=Watch("layers"))
    damage(output, "allocation.json")
    with refused(CheckpointError, "allocation.json", "--no-resume"):
        run(recipe, output, windows=WINDOWS, self_check=False)


def damage(folder: Path, name: str) -> None:
    """Turns a digit of a JSON file's content, or a bit of another, into another one."""
    (file,) = folder.rglob(name)
    content = bytearray(file.read_bytes())
    if file.suffix == ".json":
        at = max(i for i, byte in enumerate(content) if chr(byte).isdigit())
        content[at] = ord("1") + (content[at] == ord("1"))
    else:
        content[-1] ^= 1
    file.write_bytes(content)


def test_activations_on_disk_go_when_the_scores_are_there(checkpoint, tmp_path):
    """One set for each unit and width: too much to leave there for the rest of the run."""
    section = {"importance": "logit_divergence", "average_bits": 3, "samples": 2}
    found = {}
    for offload in ("ram", "disk"):
        recipe = recipe_of(checkpoint, **section).with_changes(calibration={"offload": offload})
        work = tmp_path / offload
        plan = allocated_plan(RunInputs.open(recipe), WINDOWS, work)
        found[offload] = plan.allocation
        assert files_in(work) == {"scores.json", "allocation.json"}
    assert found["ram"] == found["disk"]


def test_the_candidates_of_a_search_go_when_it_has_ended(checkpoint, tmp_path):
    recipe = recipe_of(checkpoint, **EVOLVE)
    allocated_plan(RunInputs.open(recipe), WINDOWS, tmp_path)
    assert files_in(tmp_path) == {"scores.json", "evolve.json", "allocation.json"}


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_scores_are_kept_for_their_own_recipe_alone(checkpoint, counts, tmp_path):
    """Another recipe is refused before it scores, and leaves what is there as it is."""
    recipe, output = recipe_of(checkpoint, **EVOLVE), tmp_path / "out"
    other = recipe_of(checkpoint, **EVOLVE | {"average_bits": 2.5})
    counts.start(recipe, output, observer=Watch("model.layers.1.mlp.up_proj"))
    before = every_file(output)
    counts.walks = 0
    with refused(UsageError, "--no-resume"):
        run(other, output, windows=WINDOWS, self_check=False)
    assert counts.walks == 0
    assert every_file(output) == before
    assert counts.start(other, output, resume=False)[0] == 1
    counts.start(other, tmp_path / "fresh")
    assert weight_files(output) == weight_files(tmp_path / "fresh")


def test_no_resume_scores_again(checkpoint, counts, tmp_path):
    recipe = recipe_of(checkpoint, **EVOLVE)
    whole = counts.start(recipe, tmp_path / "out", observer=Watch("layers"))
    assert counts.start(recipe, tmp_path / "out", resume=False) == whole
