import json
import re
import socket
import sys

import pytest
import torch
import yaml

from compress.errors import UsageError
from compress.eval.harness import clean_metrics, score_tasks
from compress.eval.settings import EvaluationSettings
from compress.eval.task_names import LOCAL_TASKS
from support.refusals import refused
from support.tiny_lm import byte_tokenizer, tiny_llama

LIMIT = 6


def results_of(model, tokenizer, **settings):
    return score_tasks(model, tokenizer, EvaluationSettings(**settings)).results


@pytest.fixture(scope="module")
def parts():
    return tiny_llama(), byte_tokenizer()


@pytest.fixture(scope="module")
def scores(parts):
    return score_tasks(
        *parts, EvaluationSettings(tasks=["demo_code"], limit=LIMIT, batch_size=4), per_item=True
    )


@pytest.fixture
def only_local_tasks(monkeypatch):
    """The harness's own task index takes ten seconds to read."""
    import lm_eval.tasks

    whole = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_path, include_defaults=True, metadata=None: whole(
            include_path=include_path, include_defaults=False, metadata=metadata
        ),
    )


def test_metrics_and_errors(scores):
    metrics = scores.results["demo_code"]
    assert set(metrics) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    for metric in ("acc", "acc_norm"):
        items = scores.items["demo_code"][metric].values
        assert len(items) == LIMIT == scores.samples["demo_code"]
        p = sum(items) / LIMIT
        assert metrics[metric] == pytest.approx(p)
        assert metrics[metric + "_stderr"] == pytest.approx((p * (1 - p) / (LIMIT - 1)) ** 0.5)


def test_items_agree_with_scoring_them_by_hand(parts, scores):
    model, tokenizer = parts
    lines = (LOCAL_TASKS / "demo_code" / "items.jsonl").read_text(encoding="utf-8").splitlines()
    by_hand = []
    for line in lines[:LIMIT]:
        item = json.loads(line)
        start = len(tokenizer.encode(item["context"].rstrip()))
        scored = []
        for choice in item["choices"]:
            ids = torch.tensor([tokenizer.encode(item["context"] + choice)])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            tokens = log_p.gather(1, ids[0, 1:, None]).flatten()
            scored.append(tokens[start - 1 :].sum().item())
        by_hand.append(float(scored.index(max(scored)) == item["answer"]))
    assert scores.items["demo_code"]["acc"].values == tuple(by_hand)


def test_scores_do_not_depend_on_the_batch(parts, scores):
    assert results_of(*parts, tasks=["demo_code"], limit=LIMIT, batch_size=1) == scores.results


def test_nothing_is_left_changed_and_no_network_is_sought(parts, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, tokenizer = parts
    model.train()
    results_of(model, tokenizer, tasks="demo_code", limit=2)
    assert tokenizer.pad_token is None
    assert model.training
    model.eval()


def test_quiet(parts, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # not a git repository, which the harness would complain about
    results_of(*parts, tasks=["demo_code"], limit=2)
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")


def test_what_the_harness_warns_of_is_kept(parts):
    model, tokenizer = parts
    model.config.max_position_embeddings = 64  # shorter than any context
    try:
        warnings = score_tasks(
            model, tokenizer, EvaluationSettings(["demo_code"], limit=2)
        ).warnings
    finally:
        model.config.max_position_embeddings = 1024
    (message, count), *others = warnings.items()
    assert re.search(r"Truncating \d+ tokens", message)  # the first, as it was said
    assert count == 2 * 4
    assert not others


def test_included_folder(parts, tmp_path):
    definition = (LOCAL_TASKS / "demo_code" / "demo_code.yaml").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(
        definition.replace("task: demo_code", "task: mine"), encoding="utf-8"
    )
    for name in ("utils.py", "items.jsonl"):
        text = (LOCAL_TASKS / "demo_code" / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text, encoding="utf-8")
    results = results_of(*parts, tasks=["mine", "demo_c*"], include_path=tmp_path, limit=2)
    assert results["mine"] == results["demo_code"]


def test_unknown_task_names_the_near_and_the_local_ones(parts, only_local_tasks):
    with refused(UsageError, "'demo_cod'", "'demo_code'"):
        results_of(*parts, tasks=["demo_cod"])


def test_a_task_file_that_is_no_yaml_is_named(parts, tmp_path, only_local_tasks):
    (tmp_path / "mine.yaml").write_text("task: [broken\n", encoding="utf-8")
    with refused(UsageError, "'mine'", tmp_path / "mine.yaml", "line 2"):
        results_of(*parts, tasks=["mine"], include_path=tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"doc_to_target": 9}, "IndexError"),
        ({"doc_to_text": "{{ nope.value }}"}, "nope"),
        ({"dataset_kwargs": {"data_files": {"test": "absent.jsonl"}}}, "absent.jsonl"),
    ],
    ids=["target", "text", "data"],
)
def test_a_task_that_fails_is_named_with_its_reason(parts, tmp_path, changes, named):
    data = tmp_path / "items.jsonl"
    item = {"context": "a", "choices": ["b", "c"], "answer": 1}
    data.write_text(f"{json.dumps(item)}\n", encoding="utf-8")
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    task |= changes
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    with refused(UsageError, "mine", named):
        results_of(*parts, tasks=["mine"], include_path=tmp_path, limit=2)


def test_windows_that_hold_no_item(parts):
    with refused(UsageError, "demo_code", "--max-length"):
        results_of(*parts, tasks=["demo_code"], limit=2, max_length=8)


def test_no_task_and_no_folder(parts, tmp_path):
    with refused(UsageError, "task"):
        results_of(*parts, tasks=[])
    with refused(UsageError, tmp_path / "absent"):
        results_of(*parts, tasks=["demo_code"], include_path=tmp_path / "absent")


def test_missing_harness_names_the_extra(parts, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with refused(UsageError, "pip install 'lm-eval"):
        results_of(*parts, tasks=["demo_code"])


def test_metric_names():
    raw = {
        "alias": "x",
        "name": "x",
        "sample_len": 4,
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
        "exact_match,strict": 0.25,
        "exact_match_stderr,strict": 0.1,
        "exact_match,flexible": 0.5,
        "exact_match_stderr,flexible": 0.2,
    }
    assert clean_metrics(raw) == {
        "acc": 0.5,
        "acc_stderr": None,
        "exact_match[strict]": 0.25,
        "exact_match[strict]_stderr": 0.1,
        "exact_match[flexible]": 0.5,
        "exact_match[flexible]_stderr": 0.2,
    }
