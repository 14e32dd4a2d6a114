"""A model and its baseline in one call: the same data, paired differences, nothing twice."""

import json
from dataclasses import replace

import pytest

from compress.errors import UsageError
from compress.eval import evaluate as evaluating
from compress.eval.evaluate import Baseline, evaluate_model
from compress.eval.perplexity import perplexity
from compress.eval.settings import EvaluationSettings
from compress.eval.windows import Text
from support.calling import pretend
from support.refusals import refused
from support.tiny_lm import byte_tokenizer, random_ids, tiny_llama

TEXT_ALONE = EvaluationSettings()


def test_model_and_baseline_on_the_same_data():
    model, baseline, tokenizer = tiny_llama(1), tiny_llama(2), byte_tokenizer()
    ids = random_ids(200, 257)
    settings = EvaluationSettings(tasks=["demo_code"], limit=4)
    report = evaluate_model(model, tokenizer, settings, Text(ids, length=32), Baseline(baseline))
    assert set(report) == {
        "results",
        "perplexity",
        "kl",
        "windows",
        "baseline",
        "difference",
        "conditions",
    }
    assert set(report["baseline"]) == {"results", "perplexity"}
    ours, theirs = (perplexity(m, Text(ids, length=32)) for m in (model, baseline))
    assert report["perplexity"]["value"] == pytest.approx(ours.value)
    assert report["baseline"]["perplexity"]["value"] == pytest.approx(theirs.value)
    difference = report["difference"]["mean_nll"]
    assert difference["value"] == pytest.approx(ours.mean_nll - theirs.mean_nll)
    totals = report["windows"]
    assert totals["tokens"] == list(ours.window_tokens)
    assert totals["nll"] == pytest.approx(ours.window_nll)
    assert sum(totals["kl"]) / sum(totals["tokens"]) == pytest.approx(report["kl"]["mean"])
    acc = report["difference"]["results"]["demo_code"]["acc"]
    a, b = (part["results"]["demo_code"]["acc"] for part in (report, report["baseline"]))
    assert acc["value"] == pytest.approx(a - b)
    assert acc["count"] == 4
    assert report["conditions"]["samples"] == {"demo_code": 4}
    assert json.loads(json.dumps(report)) == report


def test_a_model_is_no_worse_than_itself():
    model = tiny_llama()
    documents = [random_ids(n, 257, seed=n).tolist() for n in (8, 20)]
    text = Text(documents=documents, length=16)
    report = evaluate_model(model, None, TEXT_ALONE, text, Baseline(model))
    assert report["kl"]["mean"] == 0
    assert (report["difference"]["mean_nll"]["value"], report["kl"]["top1_agreement"]) == (0, 1)
    assert report["perplexity"] == report["baseline"]["perplexity"]
    assert "results" not in report


def test_without_a_baseline_there_is_nothing_to_compare():
    text = Text(random_ids(64, 257), length=16)
    report = evaluate_model(tiny_llama(), None, TEXT_ALONE, text)
    assert set(report) == {"perplexity", "windows"}
    assert "kl" not in report["windows"]


def test_a_baseline_is_measured_once_for_every_model_that_is_compared_with_it(monkeypatch):
    """And the figures are those of measuring it anew."""
    models, fp, tokenizer = [tiny_llama(1), tiny_llama(3)], tiny_llama(2), byte_tokenizer()
    settings = EvaluationSettings(tasks=["demo_code"], limit=2)
    text = Text(random_ids(200, 257), length=32)
    anew = evaluate_model(models[1], tokenizer, settings, text, Baseline(fp))
    measured = []
    real = evaluating.score_tasks
    monkeypatch.setattr(
        evaluating,
        "score_tasks",
        lambda model, *rest, **options: measured.append(model) or real(model, *rest, **options),
    )
    baseline = Baseline(fp)
    kept = [evaluate_model(model, tokenizer, settings, text, baseline) for model in models]
    assert kept[1] == anew
    assert [measured.count(model) for model in (fp, *models)] == [1, 1, 1]


def test_one_pass_of_both_models_gives_every_figure_of_a_text(monkeypatch):
    model, fp = tiny_llama(1), tiny_llama(2)
    text = Text(random_ids(200, 257), length=32)
    alone = [perplexity(m, text, TEXT_ALONE.text_batch_size) for m in (model, fp)]
    passes = {id(model): 0, id(fp): 0}

    def counted(module, *args):
        passes[id(module)] += 1

    hooks = [m.register_forward_pre_hook(counted) for m in (model, fp)]
    report = evaluate_model(model, None, TEXT_ALONE, text, Baseline(fp))
    for hook in hooks:
        hook.remove()
    batches = len(list(text.batches(TEXT_ALONE.text_batch_size)))
    assert list(passes.values()) == [batches, batches]
    for part, found in zip((report, report["baseline"]), alone, strict=True):
        assert part["perplexity"] == found.to_dict() | {"line": found.line()}


@pytest.mark.parametrize(
    "change",
    [{"length": 16}, {"stride": 8}, {"bos": 3}, {"ids": random_ids(150, 257, seed=1)}],
    ids=lambda change: next(iter(change)),
)
def test_what_was_kept_of_a_baseline_is_not_used_for_other_conditions(change):
    model, fp = tiny_llama(1), tiny_llama(2)
    text = Text(random_ids(150, 257), length=32)
    baseline, changed = Baseline(fp), replace(text, **change)
    first = evaluate_model(model, None, TEXT_ALONE, text, baseline)
    other = evaluate_model(model, None, TEXT_ALONE, changed, baseline)
    again = evaluate_model(model, None, TEXT_ALONE, text, baseline)
    assert other == evaluate_model(model, None, TEXT_ALONE, changed, Baseline(fp))
    assert first == again != other


@pytest.mark.parametrize("change", [{"limit": 3}, {"seed": 1}, {"num_fewshot": 1}])
def test_what_was_kept_of_a_baseline_is_not_used_for_other_tasks(change, monkeypatch):
    calls = pretend(monkeypatch, "compress.eval.evaluate", "score_tasks", None)
    baseline, settings = Baseline(tiny_llama()), EvaluationSettings(tasks=["demo_code"], limit=2)
    for asked in (settings, replace(settings, **change), replace(settings)):
        baseline.scores(byte_tokenizer(), asked)
    assert [call["settings"] for call in calls] == [settings, replace(settings, **change)]


def test_contradictory_requests():
    with refused(UsageError, "evaluate", "tasks"):
        evaluate_model(tiny_llama(), None, TEXT_ALONE)
    with refused(UsageError, "ids", "documents"):
        Text(random_ids(64, 257), documents=[[1, 2]], length=4)
    with refused(UsageError, "stride 4"):
        Text(documents=[[1, 2]], length=8, stride=4)
