import math

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.eval import windows
from compress.eval.divergence import kl_divergence, token_divergence
from compress.eval.perplexity import perplexity
from compress.eval.windows import Text
from support.refusals import refused
from support.tiny_lm import Bigram, random_bigram, random_ids, tiny_llama


def test_a_model_does_not_diverge_from_itself():
    model = tiny_llama(vocabulary=11)
    result = kl_divergence(model, model, Text(random_ids(60), length=12, stride=4, bos=2))
    assert (result.mean, result.maximum, result.stderr, result.token_stderr) == (0, 0, 0, 0)
    assert result.top1_agreement == 1


def test_by_hand():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    # 1/2 log 2 + 0 + 1/4 log 1/2
    assert token_divergence(p.log(), q.log()).item() == pytest.approx(math.log(2) / 4)
    # logits are known up to a constant
    assert token_divergence(p.log() + 5, q.log() - 7).item() == pytest.approx(math.log(2) / 4)


def test_a_token_the_baseline_rules_out_adds_nothing():
    p = torch.tensor([0.0, 0.0, -math.inf])
    q = torch.tensor([0.0, 0.0, 0.0])
    assert token_divergence(p, q).item() == pytest.approx(math.log(3 / 2))
    assert token_divergence(p, p).item() == 0


def test_mean_maximum_agreement_and_errors(monkeypatch):
    monkeypatch.setattr(windows, "CHUNK_ELEMENTS", 25)
    model, baseline, ids = random_bigram(seed=1), random_bigram(seed=2), random_ids(50)
    result = kl_divergence(model, baseline, Text(ids, length=10), batch_size=2)
    log_p, log_q = baseline.log_p(), model.log_p()
    per_context = (log_p.exp() * (log_p - log_q)).sum(-1)  # [V]
    contexts = ids.view(5, 10)[:, :-1]
    kl = per_context[contexts]  # [5, 9]
    same = (log_p.argmax(-1) == log_q.argmax(-1))[contexts].double()
    assert result.mean == pytest.approx(kl.mean().item(), rel=1e-5)
    assert result.maximum == pytest.approx(kl.max().item(), rel=1e-5)
    assert result.top1_agreement == pytest.approx(same.mean().item())
    assert result.token_stderr == pytest.approx(kl.std().item() / math.sqrt(45), rel=1e-4)
    assert result.stderr == pytest.approx(kl.mean(1).std().item() / math.sqrt(5), rel=1e-4)
    assert (result.tokens, result.windows) == (45, 5)
    assert "stride 10" in result.line()


def test_the_same_positions_as_perplexity():
    model, ids = random_bigram(), random_ids(31)
    for conditions in ({}, {"stride": 3}, {"stride": 2, "bos": 1}):
        kl = kl_divergence(model, random_bigram(seed=3), Text(ids, length=7, **conditions))
        text = perplexity(model, Text(ids, length=7, **conditions))
        assert (kl.tokens, kl.windows, kl.stride) == (text.tokens, text.windows, text.stride)


def test_documents_padded_or_alone():
    model, baseline = tiny_llama(1, 11), tiny_llama(2, 11)
    documents = [random_ids(n, seed=n).tolist() for n in (3, 9, 6)]
    together = kl_divergence(model, baseline, Text(documents=documents, length=8, bos=1))
    alone = kl_divergence(model, baseline, Text(documents=documents, length=8, bos=1), batch_size=1)
    assert together.mean == pytest.approx(alone.mean, rel=1e-5)
    assert together.tokens == 3 + 7 + 6
    assert together.mean > 0


def test_errors():
    ids = random_ids(20)
    with refused(UsageError, 11, 13):
        kl_divergence(random_bigram(11), random_bigram(13), Text(ids, length=10))
    broken = Bigram(torch.full((11, 11), math.nan))
    with refused(CompressError, "baseline", "NaN"):
        kl_divergence(random_bigram(), broken, Text(ids, length=10))
