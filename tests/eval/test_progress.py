"""What a measurement tells while it goes on, and what is not told."""

import torch

from compress.eval.evaluate import evaluate_model
from compress.eval.progress import tell, telling
from compress.eval.settings import EvaluationSettings
from compress.eval.windows import Text
from support.tiny_lm import byte_tokenizer, random_bigram, random_ids, tiny_llama


def heard(measure) -> list[tuple[str, int, int]]:
    steps: list[tuple[str, int, int]] = []
    with telling(lambda *step: steps.append(step)):
        measure()
    tell("windows", 1, 1)  # nobody listens any more
    return steps


def test_windows_are_told_as_they_are_done():
    text = Text(random_ids(40), length=8)
    settings = EvaluationSettings(perplexity="it", batch_size=2)
    steps = heard(lambda: evaluate_model(random_bigram(), None, settings, text))
    assert steps == [("windows", 2, 5), ("windows", 4, 5), ("windows", 5, 5)]


def test_documents_are_told():
    text = Text(documents=[[1, 2, 3], [4], [5, 6]], length=8)
    settings = EvaluationSettings(perplexity="it", batch_size=1)
    steps = heard(lambda: evaluate_model(random_bigram(), None, settings, text))
    assert steps == [("documents", 1, 2), ("documents", 2, 2)]


def test_requests_of_lm_eval_are_told():
    settings = EvaluationSettings(tasks=["demo_code"], limit=2)
    steps = heard(lambda: evaluate_model(tiny_llama().eval(), byte_tokenizer(), settings))
    assert {what for what, _, _ in steps} == {"loglikelihood requests"}
    assert steps[-1][1] == steps[-1][2] >= 4
    assert torch.is_grad_enabled()
