"""A run that is killed at any operation on its files is gone on with, and ends with the same bytes.

Each kill is one of a forked child, after which the same run is started again in this process. By
default every few operations; all of them with MODELPRESS_CRASHES=all.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from compress.checkpoint.export import export
from compress.pipeline.run import run
from support.crashes import FORKS, killed_at
from support.tiny_checkpoints import (
    WINDOWS,
    every_file,
    recipe_for,
    write_checkpoint,
)

EVERY = 1 if os.environ.get("MODELPRESS_CRASHES") == "all" else 17
# What takes time into account, or says what a process needed.
TIMED = ("modelpress.json", "README.md", "report.html", "eval/results.json")

pytestmark = [FORKS, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("crash") / "model", hidden_size=32)


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prose") / "text.txt"
    path.write_text("a few words of prose, and a few more of them. " * 4)
    return path


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All files but those that say how long it took; of these, that they are there and whole."""
    files = every_file(folder)
    for name in TIMED:
        if name in files:
            if name.endswith(".json"):
                json.loads(files[name])
            files[name] = b""
    return files


def facts_of(folder: Path) -> dict:
    """What modelpress.json says, but for times and memory."""
    facts = json.loads((folder / "modelpress.json").read_text())
    for layer in facts["layers"]:
        layer.pop("seconds", None)
        for module in layer["modules"]:
            module.pop("seconds")
    facts["source_check"].pop("seconds")
    # The card has the seconds, and an evaluation says which folder it measured.
    of_the_machine = (
        "seconds",
        "peak_memory",
        "evaluation_memory",
        "card_digest",
        "evaluations",
    )
    return {name: facts[name] for name in facts if name not in of_the_machine}


def recipe_of(model, prose, **sections):
    sections = {"save": {"shard_size": "30KB"}, "rotate": "hadamard"} | sections
    if sections.pop("evaluated", False):
        text = {"dataset": str(prose), "length": 16, "tokens": 64}
        sections["evaluate"] = {"perplexity": text, "baseline": False}
    return recipe_for(model, **sections)


CASES = {
    "ram": {"calibration": {"offload": "ram"}},
    "disk": {"calibration": {"offload": "disk"}},
    "full precision": {
        "calibration": {"offload": "disk"}, "quantize": {"target": "full_precision"}
    },
    "evaluated": {"evaluated": True, "quantize": {"method": "rtn"}},
    "allocated": {
        "allocate": {"importance": "output_error", "method": "knapsack", "average_bits": 3.5,
                     "widths": [3, 4]}
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(model, prose, tmp_path, case):
    recipe = recipe_of(model, prose, **CASES[case])

    def start(output, **options):
        return run(recipe, output, windows=WINDOWS, self_check=False, **options)

    start(tmp_path / "whole")
    expected, facts = bytes_of(tmp_path / "whole"), facts_of(tmp_path / "whole")
    number = 4 * [*CASES].index(case) % EVERY
    while True:
        output = tmp_path / f"out-{number}"
        if not killed_at(number, output, lambda output=output: start(output)):
            break
        result = start(output)
        assert bytes_of(output) == expected, f"killed at {number}"
        assert facts_of(output) == facts
        assert bool(result.metrics) == ("eval/results.json" in expected)
        shutil.rmtree(output)
        number += EVERY
    assert number > 40


@pytest.mark.parametrize("overwritten", ["a result", "another model's folder"])
def test_a_run_that_is_killed_replacing_something_leaves_no_mixture(
    model, prose, tmp_path, overwritten
):
    """Whoever looks at any time finds the old one whole, the new one whole, or no config.json."""
    recipe = recipe_of(model, prose, quantize={"method": "rtn"})
    other = write_checkpoint(tmp_path / "other", seed=1)
    (other / "chat_template.jinja").write_text("old")
    before = tmp_path / "before"
    if overwritten == "a result":
        run(recipe_for(other, quantize={"method": "rtn", "bits": 8}), before, self_check=False)
    else:
        shutil.copytree(other, before)
    (before / "mine.txt").write_text("mine")

    def start(output):
        return run(recipe, output, windows=WINDOWS, self_check=False, overwrite=True)

    start(shutil.copytree(before, tmp_path / "whole"))
    expected, old, number = bytes_of(tmp_path / "whole"), bytes_of(before), 1
    assert "chat_template.jinja" not in expected and expected["mine.txt"] == b"mine"
    while True:
        output = shutil.copytree(before, tmp_path / f"out-{number}")
        if not killed_at(number, output, lambda output=output: start(output)):
            break
        seen = {n: b for n, b in bytes_of(output).items() if not n.startswith(".modelpress")}
        if "config.json" in seen:
            assert seen in (old, expected), f"killed at {number}"
        start(output)
        assert bytes_of(output) == expected, f"killed at {number}"
        shutil.rmtree(output)
        number += EVERY
    assert number > 40


@pytest.mark.parametrize("format", ["gptq", "gguf"])
def test_an_export_that_is_killed_anywhere_ends_with_the_same_bytes(packed, tmp_path, format):
    if format == "gguf":
        pytest.importorskip("gguf")
    source = packed(group_size=32, bits=4).folder

    def start(output):
        export(source, format, output, round_scales=True, requantise=format == "gguf")

    start(tmp_path / "whole")
    expected, number = every_file(tmp_path / "whole"), 0
    while True:
        output = tmp_path / f"out-{number}"
        if not killed_at(number, output, lambda output=output: start(output)):
            break
        start(output)
        assert every_file(output) == expected, f"killed at {number}"
        shutil.rmtree(output)
        number += -(-EVERY // 3)
    assert number > 8
