"""Rolling perplexity of source text: the documents, and the figure."""

import json
import math
import platform

import pytest
import torch

from compress.data.stdlib import is_held_out
from compress.eval.harness import score_tasks
from compress.eval.settings import EvaluationSettings
from compress.eval.task_names import LOCAL_TASKS
from compress.recipes.demo.make_demo_text import LONGEST, SHORTEST, make_documents
from support.tiny_lm import byte_tokenizer, tiny_llama

FOLDER = LOCAL_TASKS / "demo_text"


def shipped() -> list[dict]:
    lines = (FOLDER / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("documents", [shipped(), make_documents(48, 0)], ids=["shipped", "made"])
def test_documents_are_different_whole_lines_that_no_demo_model_was_trained_on(documents):
    assert len({document["text"] for document in documents}) == len(documents) == 48
    for document in documents:
        assert SHORTEST <= len(document["text"]) <= LONGEST
        assert is_held_out(document["module"])
        assert document["text"].endswith("\n")


def test_the_same_sources_and_seed_give_the_shipped_file():
    metadata = (FOLDER / "demo_text.yaml").read_text(encoding="utf-8")
    made_with = metadata.split("python: ")[1].split()[0]
    if platform.python_version() != made_with:
        pytest.skip(f"the documents were cut from Python {made_with}")
    assert make_documents(48, 0) == shipped()
    assert make_documents(48, 1) != shipped()


def test_the_figure_is_bits_a_byte_of_windows_that_follow_one_another():
    """A window begins with the last token of the one before, the first with the prefix token."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    length, limit = model.config.max_position_embeddings, 1
    settings = EvaluationSettings(tasks=["demo_text"], limit=limit)
    scores = score_tasks(model, tokenizer, settings, per_item=True)
    total = size = 0.0
    for document in shipped()[:limit]:
        ids = [
            tokenizer.bos_token_id,
            *tokenizer.encode(document["text"], add_special_tokens=False),
        ]
        size += len(document["text"].encode())
        for start in range(0, len(ids) - 1, length):
            window = ids[start : start + length + 1]
            more = length + 1 - len(window)  # the last one has its whole context
            context = ids[max(0, start - more) : start] + window
            with torch.no_grad():
                log_p = model(torch.tensor([context[:-1]])).logits[0].double().log_softmax(-1)
            scored = log_p.gather(1, torch.tensor(context[1:])[:, None])[-(len(window) - 1) :]
            total -= scored.sum().item()
    found = scores.results["demo_text"]
    assert found["bits_per_byte"] == pytest.approx(total / size / math.log(2), rel=1e-5)
    assert found["byte_perplexity"] == pytest.approx(2 ** found["bits_per_byte"])
    assert scores.items["demo_text"]["bits_per_byte"].figure() == pytest.approx(
        found["bits_per_byte"]
    )
