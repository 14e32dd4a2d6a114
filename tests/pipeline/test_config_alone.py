"""A plan from config.json alone: no weights are there, and no file but that one is opened."""

import json
import math
import sys
from pathlib import Path

import huggingface_hub
import pytest

import compress
from compress.errors import CheckpointError, UsageError
from compress.models.families import ARCHITECTURES, MIXTURES, MULTIMODAL, experts_of
from compress.models.pretrained import load_config
from compress.models.skeleton import Skeleton
from compress.pipeline.plan import Plan
from compress.recipe.recipe import Recipe, shipped_folder
from support.calling import call, only_line
from support.popular_models import (
    COUNTS,
    NAMES,
    NO_FAMILY_YET,
    config_of,
    decoder_linears,
    text_of,
)
from support.refusals import check_line, refused
from support.tiny_checkpoints import recipe_for, write_checkpoint

OPENED: list[Path] | None = None  # while a test notes it


def note(event: str, arguments: tuple) -> None:
    if OPENED is not None and event == "open" and isinstance(arguments[0], str | Path):
        OPENED.append(Path(arguments[0]))


sys.addaudithook(note)  # it stays, and does nothing outside `opened_in`


@pytest.fixture
def opened_in(monkeypatch):
    """What is opened from now on, and is there: `opened_in(folder)` are the names in a folder."""
    monkeypatch.setattr(sys.modules[__name__], "OPENED", [])
    return lambda folder: {p.name for p in OPENED if p.parent == folder and p.exists()}


def config_only(folder: Path, name: str = "Llama-3.2-1B", **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(name) | changes))
    return folder


def rsq(folder: Path, **sections) -> Recipe:
    recipe = Recipe.load(shipped_folder() / "rsq-w4.yaml")
    return recipe.with_changes(model={"path": str(folder)}, **sections)


def first_note(plan: Plan) -> str:
    return plan.notes[0]


# ---- the shapes of popular models ---------------------------------------------------------------

ANSWERED = [name for name in NAMES if config_of(name)["model_type"] not in NO_FAMILY_YET]
STOPPED = [name for name in NAMES if name not in ANSWERED]


# Where the residual stream cannot be rotated; the tables then stay one, in 16 bits.
UNTURNED = {"rotate": "none", "quantize": {"embedding": None, "head": None}}


@pytest.mark.parametrize("name", ANSWERED)
def test_a_popular_model_is_planned_from_its_config(name, tmp_path, opened_in):
    """Bits, bytes and memory; bytes and counts by the numbers of the config alone."""
    config = config_of(name)
    rows = {**ARCHITECTURES, **MIXTURES, **MULTIMODAL}
    turned = rows[config["model_type"]].unrotatable is None
    sections = {} if turned else UNTURNED
    plan = compress.plan(rsq(config_only(tmp_path, name), **sections))
    assert opened_in(tmp_path) == {"config.json"}
    assert plan.problems == []
    check_line(first_note(plan), "no weights", "config.json")

    text = load_config(tmp_path).get_text_config().to_dict() | text_of(config)
    table, itemsize = text["vocab_size"] * text["hidden_size"], 2
    if "float32" in (config.get("dtype"), config.get("torch_dtype")):
        itemsize = 4
    linears = list(decoder_linears(config))  # of keys that are there
    inside = sum(count * N * K for count, N, K in linears)
    decoder = [m for m in plan.modules if m.bits == 4]
    assert sum(m.weights for m in decoder) == inside
    quantised = 2 * table if turned else 0
    assert [m.weights for m in plan.modules if m.bits == 8] == [table, table] * turned
    assert plan.average_bits == pytest.approx((4 * inside + 8 * quantised) / (inside + quantised))

    size = {K: next(g for g in (128, 64, 32) if K % g == 0) for _, _, K in linears}
    words = sum(count * N * math.ceil(K / 8) * 4 for count, N, K in linears)
    scales = sum(count * N * (K // size[K]) * itemsize for count, N, K in linears)
    shapes = len(decoder) * 2 * 8
    tables = 2 * (table + text["vocab_size"] * itemsize) * turned
    assert plan.bytes["quantized"] == words + scales + shapes + tables
    assert plan.bytes["total"] == plan.bytes["quantized"] + plan.bytes["other"]
    assert plan.bytes["total"] < plan.file_bytes < plan.bytes["total"] * 1.001 + 2**20

    tied = table if plan.untied else 0
    count = inside + quantised - tied + plan.bytes["other"] // itemsize
    assert count == pytest.approx(COUNTS[name] * 1e9, rel=0.01)
    # A layer in fp32 and its rotation's copy at least; of one with experts what is written of it.
    layer = inside // text["num_hidden_layers"]
    whole = 8 if experts_of(config["model_type"]) is None else 0.5
    assert plan.peak_memory["host"] > whole * layer
    if experts_of(config["model_type"]) is not None:
        assert plan.peak_memory["host"] < plan.bytes["total"]


@pytest.mark.parametrize("name", STOPPED)
def test_a_family_that_is_not_there_yet_is_named(name, tmp_path):
    """Where this fails a family has come: take its type out of NO_FAMILY_YET."""
    kind = config_of(name)["model_type"]
    with refused(UsageError, kind):
        compress.plan(rsq(config_only(tmp_path, name)))


def test_no_type_is_left_that_no_config_has():
    assert {config_of(name)["model_type"] for name in NAMES} >= NO_FAMILY_YET


# ---- what such a plan says ----------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rotate", ["none", "hadamard"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_plan_is_that_of_the_weights(kind, rotate, tied, tmp_path):
    """The same folder without its weights gives the same numbers, and one note more."""
    folder = write_checkpoint(tmp_path / "model", kind, tie_word_embeddings=tied)
    recipe = recipe_for(folder, rotate=rotate)
    whole = compress.plan(recipe)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    alone = compress.plan(recipe)
    assert alone.notes[1:] == whole.notes
    for key in ("modules", "bytes", "file_bytes", "peak_memory", "untied", "schemes", "problems"):
        assert getattr(alone, key) == getattr(whole, key)


def test_what_is_taken_for_granted_is_said(tmp_path):
    said = first_note(compress.plan(rsq(config_only(tmp_path))))
    check_line(said, tmp_path, "one tensor")
    assert "dtype" not in said
    said = first_note(compress.plan(rsq(config_only(tmp_path, torch_dtype=None))))
    check_line(said, "bfloat16", "dtype")
    said = first_note(compress.plan(rsq(config_only(tmp_path, tie_word_embeddings=False))))
    assert "one tensor" not in said


def test_a_packed_model_is_planned_as_its_copy_in_16_bits(tmp_path):
    packed = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    plan = compress.plan(rsq(config_only(tmp_path, **packed)))
    check_line(plan.notes[1], "fp8", "quantization_config", 16)
    folder = config_only(tmp_path / "plain")
    assert plan.bytes == compress.plan(rsq(folder)).bytes


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": -1},
        {"num_hidden_layers": 20_000},
        {"num_key_value_heads": 7},
        {"rope_scaling": {"rope_type": "nope"}},
    ],
    ids=str,
)
def test_a_wrong_value_is_named_without_weights_too(change, tmp_path):
    folder = config_only(tmp_path, **change)
    with refused(
        UsageError, folder / "config.json", *change if "rope_scaling" not in change else ()
    ):
        compress.plan(rsq(folder))


def test_other_files_than_weights_change_nothing(tmp_path, opened_in):
    """A tokenizer is not needed, so it is not read."""
    folder = config_only(tmp_path)
    (folder / "tokenizer.json").write_text("no JSON")
    (folder / "README.md").write_text("# A model")
    OPENED.clear()
    assert compress.plan(rsq(folder)).problems == []
    assert opened_in(folder) == {"config.json"}


# ---- what needs weights -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, parts",
    [
        (["--check-source"], ["--check-source"]),
        (["--average-bits", "3.5"], ["allocate.importance", "layer_embedding_change"]),
        (
            ["--average-bits", "3.5", "--set", "allocate.importance=outlier_weight_count"],
            ["allocate.importance", "outlier_weight_count"],
        ),
        (
            ["--average-bits", "3.5", "--set", "allocate.importance=output_error"],
            ["allocate.importance", "output_error"],
        ),
        (
            ["--average-bits", "3.5", "--set", "allocate={importance: random, method: evolve}"],
            ["allocate.method", "evolve"],
        ),
    ],
    ids=str,
)
def test_what_reads_weights_stops_in_a_line(options, parts, tmp_path, capsys):
    folder = config_only(tmp_path / "model")
    assert call("plan", "rsq-w4", "--model", folder, *options) == 2
    check_line(only_line(capsys), *parts, folder, "no weights")


@pytest.mark.parametrize(
    "importance", ["position", "random", {"name": "reverse", "of": "position"}]
)
def test_scores_that_need_no_weights_are_taken(importance, tmp_path):
    section = {"importance": importance, "method": "top_n", "widths": [2, 4], "average_bits": 3}
    plan = compress.plan(rsq(config_only(tmp_path), allocate=section))
    assert plan.problems == []
    assert {m.bits for m in plan.modules} == {2, 4, 8}
    check_line(first_note(plan), "no weights")


def test_a_budget_that_cannot_be_met_is_told(tmp_path, capsys):
    folder = config_only(tmp_path / "model")
    options = ["--budget", "1MB", "--set", "allocate.importance=position"]
    assert call("plan", "rsq-w4", "--model", folder, *options) == 2
    check_line(capsys.readouterr().err.strip(), "budget", "1,000,000")


@pytest.mark.parametrize(
    ("beside", "kind"),
    [("model-00001-of-00002.safetensors", CheckpointError), ("pytorch_model.bin", UsageError)],
)
def test_a_folder_with_a_part_of_its_weights_is_no_config_alone(beside, kind, tmp_path):
    folder = config_only(tmp_path)
    (folder / beside).write_bytes(b"")
    with refused(kind, folder):
        compress.plan(rsq(folder))


def test_a_run_still_needs_weights(tmp_path):
    with refused(UsageError, tmp_path, "model.safetensors"):
        compress.run(recipe_for(config_only(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_numbers_of_absent_weights_cannot_be_had(tmp_path):
    skeleton = Skeleton.foretell(config_only(tmp_path))
    for asked in (lambda: skeleton.read_layer(0), skeleton.reader.fingerprint):
        with refused(UsageError, tmp_path, "no weights"):
            asked()


# ---- models of the hub --------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model, `someone/some-model`: `hub` is its folder there."""
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()

    def snapshot_download(name, revision=None, allow_patterns=None, ignore_patterns=()):
        assert name == "someone/some-model"
        here.mkdir(exist_ok=True)
        for file in there.iterdir():
            wanted = allow_patterns is None or any(file.match(p) for p in allow_patterns)
            if wanted and not any(file.match(p) for p in ignore_patterns):
                (here / file.name).write_bytes(file.read_bytes())
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return there


def test_a_hub_model_is_planned_without_fetching_its_weights(hub, tmp_path):
    write_checkpoint(hub, "llama")
    recipe = recipe_for(Path("someone/some-model"))
    plan = compress.plan(recipe)
    here = tmp_path / "here"
    assert {p.name for p in here.iterdir()} == {p.name for p in hub.iterdir()} - {
        "model.safetensors"
    }
    check_line(first_note(plan), "no weights", "config.json")
    assert plan.bytes == compress.plan(recipe_for(hub)).bytes


def test_a_hub_model_with_nothing_but_a_config_is_planned(hub):
    config_only(hub)
    assert compress.plan(rsq(Path("someone/some-model"))).bytes["total"] > 10**8


def test_weights_of_a_hub_model_that_are_here_are_looked_at(hub):
    write_checkpoint(hub, "llama")
    recipe = recipe_for(Path("someone/some-model"))
    Skeleton.open("someone/some-model")
    assert not any("no weights" in note for note in compress.plan(recipe).notes)


def test_a_hub_model_that_is_partly_here_is_planned_by_its_config(hub, tmp_path):
    """As an interrupted run leaves it: the next run fetches the rest."""
    config_only(hub)
    config_only(tmp_path / "here")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "here" / "model.safetensors.index.json").write_text(json.dumps(index))
    check_line(first_note(compress.plan(rsq(Path("someone/some-model")))), "no weights")


def test_scores_of_a_hub_model_fetch_its_weights(hub, tmp_path):
    write_checkpoint(hub, "llama")
    section = {"importance": "outlier_weight_count", "method": "top_n", "widths": [2, 4]}
    recipe = recipe_for(Path("someone/some-model"), allocate=section | {"narrow": 1})
    assert compress.plan(recipe).allocation is not None
    assert (tmp_path / "here" / "model.safetensors").is_file()
