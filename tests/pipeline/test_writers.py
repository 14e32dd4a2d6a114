"""Several processes in one folder: one of them works there, the others are told, nothing is mixed.

Twenty times with MODELPRESS_CRASHES=all, a few times by default.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from compress.checkpoint.export import export
from compress.comparison import results
from compress.comparison.compare import compare
from compress.errors import UsageError
from compress.pipeline.run import run
from compress.storage import lease as leases
from compress.storage.lease import lease
from support.crashes import FORKS
from support.tiny_checkpoints import every_file, recipe_for, weight_files, write_checkpoint

TIMES = 20 if os.environ.get("MODELPRESS_CRASHES") == "all" else 3
DONE, REFUSED, FAILED = 0, 2, 3

pytestmark = [FORKS, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("writers") / "model", hidden_size=32)


def at_once(*jobs: Callable[[], object]) -> list[int]:
    """How each of the jobs ended, each in a process of its own, all started together."""
    started = []
    for job in jobs:
        child = os.fork()
        if child == 0:
            code = FAILED
            try:
                torch.set_num_threads(1)
                leases.PATIENCE = 0
                job()
                code = DONE
            except UsageError as error:
                code = REFUSED if "in use by" in str(error) or "exists" in str(error) else FAILED
                if code == FAILED:
                    print(error, file=sys.stderr)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            finally:
                os._exit(code)
        started.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started]


def test_two_runs_in_one_folder_never_make_a_mixture(model, text, tmp_path):
    """They differ in their seed: each other's tensors would fit."""
    drawn = [{"calibration": {"seed": seed}, "rotate": {"seed": seed}} for seed in (0, 1)]
    recipes = [recipe_for(model, text, **sections) for sections in drawn]
    alone = []
    for seed, recipe in enumerate(recipes):
        run(recipe, tmp_path / f"alone-{seed}", self_check=False)
        alone.append(weight_files(tmp_path / f"alone-{seed}"))
    assert alone[0] != alone[1]

    def both(output, **options):
        jobs = [partial(run, recipe, output, self_check=False, **options) for recipe in recipes]
        codes = at_once(*jobs)
        assert FAILED not in codes and DONE in codes
        finished = [w for w, code in zip(alone, codes, strict=True) if code == DONE]
        assert weight_files(output) in finished
        assert not (output / ".modelpress").exists()
        return codes

    for time in range(TIMES):
        output = tmp_path / f"both-{time}"
        assert sorted(both(output)) == [DONE, REFUSED]
        both(output, overwrite=True)


def test_comparisons_and_a_run_in_one_folder_never_make_a_mixture(model, text, tmp_path):
    """Three comparisons in one folder, and a run in the place of one of their results."""
    perplexity = {"dataset": str(text), "length": 16, "tokens": 64}
    recipes = [
        recipe_for(
            model, text, name=f"w{bits}", quantize={"method": "rtn", "bits": bits},
            evaluate={"perplexity": perplexity, "baseline": False},
        )
        for bits in (8, 3)
    ]  # fmt: skip
    other = recipe_for(model, text, quantize={"method": "rtn", "bits": 2})

    def rows(folder):
        found = compare(recipes, folder, self_check=False).as_dict()["rows"]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in found]

    expected = rows(tmp_path / "alone")
    weights = [weight_files(tmp_path / "alone" / name) for name in ("w8-0", "w3-0")]
    run(other, tmp_path / "other", self_check=False)
    for time in range(TIMES):
        output = tmp_path / f"out-{time}"

        def three(output=output):
            assert rows(output) == expected

        codes = at_once(three, three, three, lambda output=output: run(other, output / "w3-0"))
        assert FAILED not in codes
        found = weight_files(output / "w3-0")
        if codes[3] == DONE:  # it came first: the comparison that asks next finds it there
            assert found == weight_files(tmp_path / "other")
        else:
            assert codes[:3].count(DONE) >= 1
            assert [weight_files(output / name) for name in ("w8-0", "w3-0")] == weights


def test_an_export_does_not_write_where_a_run_does(packed, model, tmp_path):
    source, output = packed().folder, tmp_path / "out"
    with lease(output):
        codes = at_once(
            lambda: export(source, "gptq", output, round_scales=True),
            lambda: export(source, "gptq", output, round_scales=True, overwrite=True),
            lambda: run(recipe_for(model), output, overwrite=True),
        )
        assert codes == [REFUSED] * 3
        assert sorted(every_file(output)) == [".modelpress/holder.json", ".modelpress/lock"]


def test_a_comparison_holds_its_results_while_it_measures(model, text, tmp_path, monkeypatch):
    perplexity = {"dataset": str(text), "length": 16, "tokens": 64}
    recipe = recipe_for(
        model, text, name="only", quantize={"method": "rtn"},
        evaluate={"perplexity": perplexity, "baseline": False},
    )  # fmt: skip
    asked = []
    measured = results.Evaluator.measure

    def measure(self, folder, **options):
        asked.extend(at_once(partial(run, recipe, folder, overwrite=True)))
        return measured(self, folder, **options)

    monkeypatch.setattr(results.Evaluator, "measure", measure)
    compare([recipe], tmp_path / "out", self_check=False)
    assert asked == [REFUSED]
    assert not (tmp_path / "out" / "only-0" / ".modelpress").exists()
