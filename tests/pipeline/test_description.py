"""A finished folder's documents made again: with later evaluations, and what they replace."""

import json
import shutil

import pytest
import yaml

from compress.checkpoint.export import ScaleRounding
from compress.cli.main import main
from compress.pipeline.card import model_card
from compress.pipeline.description import edited, facts_of, merged, record_evaluation
from compress.pipeline.publishing import export
from compress.pipeline.run import run
from support.tiny_checkpoints import recipe_for, write_checkpoint


def scores(value: float, tasks=("arc_easy",), text=True, **conditions) -> dict:
    """An evaluation as `compress.evaluate` gives it, in small."""
    results = {task: {"acc": value, "acc_stderr": 0.02} for task in tasks}
    paired = {task: {"acc": {"value": -0.02, "stderr": 0.01, "count": 9}} for task in tasks}
    found = {
        "results": results,
        "baseline": {"results": {task: {"acc": value + 0.02} for task in tasks}},
        "difference": {"results": paired},
        "conditions": {"model": f"/home/alice/{value}", "limit": 100, "samples": {}} | conditions,
    }
    if text:
        found["perplexity"] = {"value": 10 * value, "value_stderr": 0.1, "line": f"text {value}"}
        found["perplexity"] |= {"mean_nll": 2.0, "stderr": 0.01}
        found["baseline"]["perplexity"] = {"value": 9 * value}
        found["difference"]["mean_nll"] = {"value": 0.1, "stderr": 0.01, "count": 4}
        found["kl"] = {"mean": 0.05, "stderr": 0.01, "line": "kl"}
        found["conditions"]["perplexity_dataset"] = "/home/alice/text.txt (held out)"
    return found


@pytest.fixture
def model(tmp_path):
    return write_checkpoint(tmp_path / "model")


@pytest.fixture
def folder(packed, tmp_path):
    return shutil.copytree(packed().folder, tmp_path / "result")


def facts(folder) -> dict:
    return json.loads((folder / "modelpress.json").read_text())


def test_figures_go_into_card_report_and_facts(folder):
    weights = (folder / "model.safetensors").read_bytes()
    before = facts(folder)
    written = record_evaluation(folder, scores(0.5))
    assert set(written) == {"README.md", "report.html", "eval/results.json", "modelpress.json"}
    card = (folder / "README.md").read_text()
    assert "Not evaluated" not in card
    assert "0.500 ± 0.020" in card and "| 0.52 |" in card and "-0.020 ± 0.010" in card
    assert "96.2 ± 1.9 %" in card  # 1 - 0.02 / 0.52
    assert "0.500 ± 0.020" in (folder / "report.html").read_text()
    assert "alice" not in card
    after = facts(folder)
    assert after["evaluations"] == [scores(0.5)]
    assert {key: after[key] for key in before if key not in ("files", "card_digest")} == {
        key: before[key] for key in before if key not in ("files", "card_digest")
    }
    assert set(after["files"]) == set(before["files"]) | {"eval/results.json"}
    assert (folder / "model.safetensors").read_bytes() == weights
    index = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"]
    assert {(r["dataset"]["name"], m["type"], m["value"]) for r in index for m in r["metrics"]} == {
        ("arc_easy (limit 100)", "acc", 0.5),
        ("text.txt", "perplexity", 5.0),
        ("text.txt", "kl_divergence", 0.05),
    }


def test_later_figures_stand_beside_earlier_ones(folder):
    record_evaluation(folder, scores(0.5, text=False))
    record_evaluation(folder, scores(0.25, tasks=("piqa",)))
    record_evaluation(folder, scores(0.75, text=False, limit=7))
    card = (folder / "README.md").read_text()
    for figure in ("0.500", "0.250", "0.750"):
        assert f"{figure} ± 0.020" in card
    assert card.index("0.750 ±") < card.index("0.250 ±") < card.index("0.500 ±")


def test_the_same_measured_again_takes_the_earlier_ones_place():
    first = scores(0.5, tasks=("a", "b"))
    again = merged(scores(0.6, tasks=("a",), text=False), [first])
    assert [set(found["results"]) for found in again] == [{"a"}, {"b"}]
    assert "perplexity" in again[1]
    assert set(again[1]["difference"]["results"]) == set(again[1]["baseline"]["results"]) == {"b"}
    assert merged(scores(0.6, tasks=("a", "b")), [first]) == [scores(0.6, tasks=("a", "b"))]
    limited = scores(0.6, tasks=("a", "b"), text=False, limit=7)
    assert merged(limited, [first]) == [limited, first]
    assert first == scores(0.5, tasks=("a", "b"))  # which nobody has changed


def with_text(value: float, **changed) -> dict:
    """An evaluation whose text was cut as it says."""
    found = scores(value, tasks=())
    found["perplexity"] |= {"tokens": 4088, "windows": 8, "length": 512, "stride": 512} | changed
    return found


@pytest.mark.parametrize(
    ("other", "replaces"),
    [
        ({}, True),
        ({"tokens": 8176, "windows": 16}, False),
        ({"length": 256}, False),
        ({"stride": 128}, False),
        ({"bos": True}, True),  # the earlier one does not say
    ],
)
def test_a_text_is_the_same_if_it_was_cut_alike(other, replaces):
    kept = merged(with_text(0.6, **other), [with_text(0.5)])
    assert len(kept) == (1 if replaces else 2)
    assert kept[0]["perplexity"]["value"] == 6


def test_figures_by_position_stay_until_they_are_measured_anew():
    stretch = {"first": 1, "last": 63, "tokens": 63, "perplexity": 5.0}
    whole, parted = with_text(0.6), with_text(0.5) | {"by_position": [stretch]}
    assert merged(whole, [parted]) == [whole, parted]
    assert merged(parted, [whole]) == [parted]
    with_tasks = parted | {"results": scores(0.5)["results"]}
    (_, rest) = merged(parted | {"by_position": []}, [with_tasks])
    assert rest["results"] and "by_position" not in rest


@pytest.mark.parametrize(
    "other",
    [
        {"limit": 50},
        {"chat_template": True},
        {"system_instruction": "Be brief."},
        {"gen_kwargs": {"temperature": 1}},
        {"max_length": 64},
        {"activation_bits": 8},
        {"shots": {"a": 5}},
        {"samples": {"a": 50}},
    ],
)
def test_a_task_put_otherwise_stands_beside_the_earlier_one(other):
    how = {"chat_template": False, "shots": {"a": 0}, "samples": {"a": 100}}
    first = scores(0.5, tasks=("a",), text=False, **how)
    for new, old in ((how | other, how), (how, how | other)):
        one, two = (scores(0.5, tasks=("a",), text=False, **facts) for facts in (new, old))
        assert merged(one, [two]) == [one, two]
    same = how | {"warnings": {"x": 1}, "batch_size": "auto", "perplexity_dataset": "y"}
    assert len(merged(scores(0.6, tasks=("a",), text=False, **same), [first])) == 1


def test_figures_beside_a_baseline_stay_when_it_is_measured_without_one():
    alone = scores(0.6)
    for part in ("baseline", "difference", "kl"):
        del alone[part]
    assert merged(alone, [scores(0.5)]) == [alone, scores(0.5)]
    assert merged(scores(0.5), [alone]) == [scores(0.5)]


def test_a_model_that_was_a_folder_of_the_run_is_none_of_the_hub(folder):
    history = facts(folder)
    source = yaml.safe_load((folder / "recipe.yaml").read_text())["model"]["path"]
    assert source in history["local"]
    recipe = {"model": {"path": "models/tiny"}}
    local = facts_of(folder, history | {"local": ["models/tiny"]}, recipe=recipe)
    assert local["local_model"] is True
    assert facts_of(folder, history, recipe=recipe)["local_model"] is False
    said = history | {"local": ["models/tiny"], "card": {"base_model": "maker/tiny"}}
    assert facts_of(folder, said, recipe=recipe)["local_model"] is False
    del history["local"]
    assert facts_of(folder, history, recipe=recipe)["local_model"] is None


def test_a_card_that_was_edited_by_hand_stays(folder):
    (folder / "README.md").write_text("# Mine\n")
    assert "README.md" not in record_evaluation(folder, scores(0.5))
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert facts(folder)["evaluations"]


# ---- exports ------------------------------------------------------------------------------------


def exported(packed, tmp_path, format: str, embedding=None, **options):
    """An export of a measured result: its folder, its card and what modelpress.json says of it."""
    if format == "gguf":
        pytest.importorskip("gguf")
    source = packed(model={"tied": True}, bits=8, embedding=embedding).folder
    measured = shutil.copytree(source, tmp_path / "measured")
    record_evaluation(measured, scores(0.5))
    export(measured, format, tmp_path / "export", round_scales=True, **options)
    return tmp_path / "export", (tmp_path / "export" / "README.md").read_text()


@pytest.mark.parametrize(
    ("format", "embedding", "differs"),
    [
        ("gptq", None, []),
        ("gptq", {"bits": 8}, ["model.embed_tokens was rounded to bfloat16"]),
        ("gguf", {"bits": 8}, []),
        ("gguf", None, ["model.embed_tokens was rounded to Q8_0"]),
    ],
)
def test_an_export_says_on_what_its_figures_were_measured(
    packed, tmp_path, format, embedding, differs
):
    folder, card = exported(packed, tmp_path, format, embedding)
    assert facts(folder)["export"]["differs"] == differs
    assert "| metric | before export | 16 bits |" in card and "0.500 ± 0.020" in card
    assert all(line in card for line in differs)
    assert ("model-index" in card) == (not differs)
    assert "before export" in (folder / "report.html").read_text()
    if format == "gptq":  # measured on the export itself, the same takes the place of the earlier
        record_evaluation(folder, scores(0.25))
        card = (folder / "README.md").read_text()
        assert "| metric | this model |" in card and "before export" not in card


def test_an_export_that_changed_values_by_itself_has_no_figures(packed, tmp_path):
    folder, card = exported(packed, tmp_path, "gguf", requantise=True)
    assert facts(folder)["evaluations"] == [] and "Not evaluated" in card


def test_scales_that_were_rounded_leave_no_figures(packed, tmp_path, monkeypatch):
    rounded = ScaleRounding(scales=9, changed=1, largest=1e-4)
    monkeypatch.setattr("compress.checkpoint.export._check_scales", lambda *_: rounded)
    folder, card = exported(packed, tmp_path, "gptq")
    assert facts(folder)["evaluations"] == [] and "Not evaluated" in card


def test_an_earlier_export_does_not_say_what_differs(packed, tmp_path):
    folder, _ = exported(packed, tmp_path, "gptq")
    history = facts(folder)
    del history["export"]["differs"], history["evaluations"][0]["before_export"]
    card = model_card(facts_of(folder, history))
    assert "was not written down" in card and "model-index" not in card


def test_other_folders_are_left_alone(folder, tmp_path):
    (folder / "modelpress.json").unlink()
    before = sorted(folder.iterdir())
    assert record_evaluation(folder, scores(0.5)) == []
    assert sorted(folder.iterdir()) == before


def test_the_command_records_and_says_so(folder, monkeypatch, capsys):
    monkeypatch.setattr("compress.pipeline.evaluation.evaluate", lambda *a, **k: scores(0.5))
    asked = ["eval", str(folder), "--perplexity", "python-stdlib"]
    before = (folder / "README.md").read_bytes()
    assert main([*asked, "--no-record"]) == 0
    assert (folder / "README.md").read_bytes() == before
    assert main(asked) == 0
    assert f"recorded in {folder}: README.md" in capsys.readouterr().out.replace("\n", " ")
    assert "0.500 ± 0.020" in (folder / "README.md").read_text()


def test_figures_are_shown_though_they_cannot_be_recorded(folder, monkeypatch, capsys):
    monkeypatch.setattr("compress.pipeline.evaluation.evaluate", lambda *a, **k: scores(0.5))
    (folder / "modelpress.json").write_text("[1, ")
    assert main(["eval", str(folder), "--perplexity", "python-stdlib", "--json"]) == 0
    seen = capsys.readouterr()
    assert json.loads(seen.out)["results"]
    assert "not recorded" in seen.err and "modelpress.json" in seen.err


def test_a_run_that_measures_writes_the_figures_into_its_card(model, tmp_path, monkeypatch):
    """And an evaluation that follows does: nobody has edited the card in between."""
    text = tmp_path / "text.txt"
    text.write_text("some words to be read, and others. " * 40)
    measured = {"perplexity": {"dataset": str(text), "length": 16, "tokens": 64}}
    recipe = recipe_for(model, text, evaluate=measured)
    made = run(recipe, tmp_path / "out", self_check=False, check_source=False)
    card = (made.path / "README.md").read_text()
    assert "Not evaluated" not in card and "perplexity" in card
    assert not edited(made.path, facts(made.path))
    monkeypatch.setattr("compress.pipeline.evaluation.evaluate", lambda *a, **k: scores(0.5))
    assert "README.md" in record_evaluation(made.path, scores(0.5))
    assert "0.500 ± 0.020" in (made.path / "README.md").read_text()
