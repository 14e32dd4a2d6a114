import json
import math
import weakref
from pathlib import Path

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.eval import windows
from compress.eval.perplexity import perplexity, perplexity_difference
from compress.eval.windows import Text
from support.refusals import refused
from support.tiny_lm import Bigram, random_bigram, random_ids, tiny_llama

SHARED = Path(__file__).parents[2] / ".." / "shared"


def next_token_nll(model, context: list[int], token: int) -> float:
    """-log p(token | context), from a forward pass over that context and nothing else."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context])).logits[0, -1]
    return -logits.double().log_softmax(-1)[token].item()


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    result = perplexity(
        Bigram(torch.zeros(256, 256)), Text(random_ids(100, 256), length=10), bytes=100
    )
    assert result.value == pytest.approx(256, rel=1e-6)
    assert result.value_stderr == pytest.approx(0, abs=1e-4)
    assert result.bits_per_byte == pytest.approx(8)  # one token a byte


def test_bigram_closed_form_and_tail_dropped():
    model, ids = random_bigram(), random_ids(47)
    result = perplexity(model, Text(ids, length=10), batch_size=3)
    kept = ids[:40].view(4, 10)
    nll = -model.log_p()[kept[:, :-1], kept[:, 1:]]  # [4, 9]
    assert (result.windows, result.tokens) == (4, 36)
    assert result.mean_nll == pytest.approx(nll.mean().item(), abs=1e-6)
    assert result.value == pytest.approx(nll.mean().exp().item(), rel=1e-6)
    # Windows of one size: the error of the mean is that of four independent window means.
    assert result.stderr == pytest.approx((nll.mean(1).std() / 2).item(), rel=1e-5)
    assert result.window_nll == pytest.approx(nll.sum(1).tolist(), rel=1e-6)


@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize("stride", [None, 1, 3, 5])
def test_every_token_is_scored_once_with_the_context_its_window_gives(stride, bos):
    model, ids, length = tiny_llama(vocabulary=11), random_ids(26).tolist(), 6
    text = length - (bos is not None)
    step = stride or text
    if step > text:
        pytest.skip("the stride is longer than the text in a window")
    expected, scored = 0.0, set()
    for start in range(0, len(ids) - text + 1, step):
        window = ([] if bos is None else [bos]) + ids[start : start + text]
        for i in range(1, length):
            token = start + i - (bos is not None)
            if token not in scored:
                scored.add(token)
                expected += next_token_nll(model, window[:i], window[i])
    result = perplexity(model, Text(ids, length=length, stride=stride, bos=bos), batch_size=2)
    assert result.tokens == len(scored)
    assert result.mean_nll == pytest.approx(expected / len(scored), rel=1e-5)


def test_sliding_scores_all_but_the_first_token():
    result = perplexity(random_bigram(), Text(random_ids(30), length=6, stride=3))
    assert result.tokens == 29


def test_bos_is_seen_but_not_scored():
    table = torch.zeros(4, 4)
    table[3, 0] = 50.0  # behind the BOS, 0 is certain; everything else is uniform
    ids = [0, 1, 2] * 5
    result = perplexity(Bigram(table), Text(ids, length=4, bos=3))
    assert (result.windows, result.tokens) == (5, 15)
    assert result.mean_nll == pytest.approx(2 / 3 * math.log(4), rel=1e-6)
    assert result.bos
    assert " BOS added" in result.line()
    assert "no BOS" not in result.line()


def test_documents_are_weighted_by_length_and_padding_changes_nothing():
    model = tiny_llama(vocabulary=11)
    documents = [random_ids(n, seed=n).tolist() for n in (2, 9, 5, 1, 14)]
    result = perplexity(model, Text(documents=documents, length=10, bos=4), batch_size=5)
    alone = perplexity(model, Text(documents=documents, length=10, bos=4), batch_size=1)
    assert result.mean_nll == pytest.approx(alone.mean_nll, rel=1e-6)
    total, tokens = 0.0, 0
    for ids in documents:
        row = [4, *ids][:10]
        total += sum(next_token_nll(model, row[:i], row[i]) for i in range(1, len(row)))
        tokens += len(row) - 1
    assert (result.tokens, result.windows, result.unit) == (tokens, 5, "document")
    assert result.value == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_documents_without_bos_start_at_their_second_token():
    model = random_bigram()
    result = perplexity(model, Text(documents=[[1, 2, 3], [5], [6, 7]], length=8))
    nll = -model.log_p()
    expected = (nll[1, 2] + nll[2, 3] + nll[6, 7]).item() / 3
    assert (result.tokens, result.windows) == (3, 2)  # one token alone predicts nothing
    assert result.mean_nll == pytest.approx(expected, rel=1e-6)


def test_cross_entropy_is_fp32_whatever_the_logits_and_chunks(monkeypatch):
    table = torch.randn(11, 11, generator=torch.manual_seed(5)).bfloat16()
    ids = random_ids(40)
    exact = perplexity(Bigram(table.double()), Text(ids, length=8)).mean_nll
    monkeypatch.setattr(windows, "CHUNK_ELEMENTS", 25)  # two positions at a time
    result = perplexity(Bigram(table), Text(ids, length=8))
    assert result.mean_nll == pytest.approx(exact, rel=1e-6)


def test_logits_of_one_batch_at_a_time():
    class Watched(Bigram):
        before = None

        def forward(self, **inputs):
            assert self.before is None or self.before() is None, "two batches of logits are held"
            output = super().forward(**inputs)
            self.before = weakref.ref(output.logits)
            return output

    assert (
        perplexity(
            Watched(torch.zeros(5, 5)), Text(random_ids(40, 5), length=4), batch_size=2
        ).windows
        == 10
    )


def test_paired_difference_of_two_models_on_the_same_windows():
    first, second, ids = random_bigram(seed=1), random_bigram(seed=2), random_ids(60)
    a, b = (perplexity(model, Text(ids, length=12)) for model in (first, second))
    difference = perplexity_difference(a, b)
    assert math.exp(difference.mean) == pytest.approx(a.value / b.value)
    assert perplexity_difference(a, a).stderr == 0
    with refused(UsageError, "length", "stride", "BOS"):
        perplexity_difference(a, perplexity(second, Text(ids, length=10)))


def test_the_line_states_every_condition():
    result = perplexity(random_bigram(), Text(random_ids(60), length=12, stride=6), words=20)
    line = result.line()
    for part in (f"{result.value:.4f}", "12 tokens", "stride 6", "no BOS", "per token", "per word"):
        assert part in line
    assert result.per_word == pytest.approx(math.exp(result.mean_nll * 60 / 20))
    json.dumps(result.to_dict())


def test_one_window_has_no_standard_error():
    result = perplexity(random_bigram(), Text(random_ids(12), length=12))
    assert result.stderr is None
    assert "n/a" in result.line()


def test_modes_are_restored():
    model = tiny_llama(vocabulary=11)
    model.train()
    model.lm_head.eval()
    perplexity(model, Text(random_ids(12), length=6))
    assert model.training
    assert not model.lm_head.training


def test_errors_say_what_to_do():
    model, ids = random_bigram(), random_ids(20)
    with refused(UsageError, "20 tokens", 21):
        perplexity(model, Text(ids, length=21))
    with refused(UsageError, "stride 10", "windows of 9"):
        perplexity(model, Text(ids, length=10, stride=10, bos=0))
    with refused(UsageError, "length", 1):
        perplexity(model, Text(ids, length=1))
    with refused(UsageError, "document", "tokens"):
        perplexity(model, Text(documents=[[1], []], length=4))
    with refused(CompressError, "NaN", "logits"):
        perplexity(Bigram(torch.full((11, 11), math.nan)), Text(ids, length=10))


@pytest.mark.skipif(
    not (SHARED / "models/stories260k").is_dir(), reason="../shared is not beside the project"
)
def test_stories_have_their_published_perplexity():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(SHARED / "models/stories260k")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/stories260k")
    lines = (SHARED / "data/stories/validation.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]
    assert all(ids[0] == tokenizer.bos_token_id for ids in documents)  # added by the tokenizer
    result = perplexity(
        model, Text(documents=documents, length=model.config.max_position_embeddings)
    )
    assert result.windows == 96
    assert result.value == pytest.approx(3.697, abs=5e-4)
