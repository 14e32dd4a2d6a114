"""Figures by position: the closed form of a bigram model, however a text is cut and batched."""

import pytest

from compress.eval import windows
from compress.eval.divergence import token_divergence
from compress.eval.evaluate import Baseline, evaluate_model
from compress.eval.perplexity import perplexity
from compress.eval.positions import Stretches, rows_by_position
from compress.eval.settings import EvaluationSettings
from compress.eval.tables import position_lines, position_table
from compress.eval.windows import Text
from support.tiny_lm import random_bigram, random_ids

BY_POSITION = EvaluationSettings(by_position=True, batch_size=2)


def test_stretches_double_and_end_with_the_window():
    assert Stretches(length=64).starts == [1]
    assert Stretches(length=65).starts == [1, 64]
    assert Stretches(length=2048).starts == [1, 64, 128, 256, 512, 1024]


def test_each_stretch_has_the_mean_of_its_own_predictions():
    model, baseline, ids = random_bigram(), random_bigram(seed=3), random_ids(200 * 3 + 7)
    report = evaluate_model(model, None, BY_POSITION, Text(ids, length=200), Baseline(baseline))
    rows = report["by_position"]
    assert [(row["first"], row["last"]) for row in rows] == [(1, 63), (64, 127), (128, 199)]
    kept = ids[:600].view(3, 200)
    ours, theirs = (-m.log_p()[kept[:, :-1], kept[:, 1:]].double() for m in (model, baseline))
    log_p, log_q = baseline.log_p(), model.log_p()
    kl = token_divergence(log_p, log_q).double()[kept[:, :-1]]
    for row in rows:
        part = slice(row["first"] - 1, row["last"])
        a, b = ours[:, part].mean(), theirs[:, part].mean()
        assert row["tokens"] == 3 * (row["last"] - row["first"] + 1)
        assert row["mean_nll"]["value"] == pytest.approx(a.item(), rel=1e-6)
        assert row["perplexity"] == pytest.approx(a.exp().item(), rel=1e-6)
        assert row["baseline"] == pytest.approx(b.exp().item(), rel=1e-6)
        assert row["difference"]["value"] == pytest.approx((a - b).item(), abs=1e-6)
        assert row["difference"]["count"] == 3
        assert row["kl"]["value"] == pytest.approx(kl[:, part].mean().item(), rel=1e-5)
    together = sum(row["mean_nll"]["value"] * row["tokens"] for row in rows)
    assert together / report["perplexity"]["tokens"] == pytest.approx(
        report["perplexity"]["mean_nll"]
    )


def test_a_bos_counts_as_text_in_front():
    ids, model = random_ids(63), random_bigram()
    found = evaluate_model(model, None, BY_POSITION, Text(ids, length=64, bos=2))["by_position"]
    assert [(row["first"], row["last"], row["tokens"]) for row in found] == [(1, 63, 63)]


def test_windows_that_slide_predict_late_tokens_after_the_first():
    ids, model = random_ids(128 + 3 * 16), random_bigram()
    text = Text(ids, length=128, stride=16)
    found = evaluate_model(model, None, BY_POSITION, text)["by_position"]
    assert [(row["first"], row["tokens"]) for row in found] == [(1, 63), (64, 64 + 3 * 16)]
    assert found[0]["mean_nll"]["stderr"] is None  # in one window alone
    assert found[1]["mean_nll"]["count"] == 4


def test_documents_of_any_length_in_batches_and_chunks(monkeypatch):
    model = random_bigram()
    documents = [random_ids(n, seed=n).tolist() for n in (3, 150, 70, 1, 64, 20)]
    whole = evaluate_model(model, None, BY_POSITION, Text(documents=documents, length=140))
    monkeypatch.setattr(windows, "CHUNK_ELEMENTS", 11 * 5)  # five predictions at a time
    nll = Stretches(140)
    perplexity(model, Text(documents=documents, length=140), 5, each=nll.add)
    for row, of_whole in zip(rows_by_position(nll), whole["by_position"], strict=True):
        assert row["tokens"] == of_whole["tokens"]
        assert row["mean_nll"] == pytest.approx(of_whole["mean_nll"])
    assert [(row["first"], row["mean_nll"]["count"]) for row in rows_by_position(nll)] == [
        (1, 5),
        (64, 2),
        (128, 1),
    ]


def test_only_where_it_is_asked_for():
    text = Text(random_ids(200), length=100)
    assert "by_position" not in evaluate_model(
        random_bigram(), None, EvaluationSettings(), text, Baseline(random_bigram())
    )


def test_the_table_has_a_line_a_stretch():
    text = Text(random_ids(400), length=200)
    alone = evaluate_model(random_bigram(), None, BY_POSITION, text)["by_position"]
    beside = evaluate_model(random_bigram(), None, BY_POSITION, text, Baseline(random_bigram()))
    heads, *lines = position_lines(alone)
    assert heads == ["tokens in front", "predictions", "perplexity"]
    assert [line[:2] for line in lines] == [
        ["1 – 63", "126"],
        ["64 – 127", "128"],
        ["128 – 199", "144"],
    ]
    heads, *lines = position_lines(beside["by_position"])
    assert heads[3:] == ["16 bits", "NLL above it", "KL"]
    assert position_table(alone).row_count == 3
    assert position_lines([]) == []
    assert {len(line) for line in lines} == {6}
