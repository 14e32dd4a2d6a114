"""A baseline's logits from a file: the same figures, its forward passes made once."""

import io
from types import SimpleNamespace

import pytest
import torch

from compress.eval import kept_logits
from compress.eval.evaluate import Baseline, evaluate_model
from compress.eval.settings import EvaluationSettings
from compress.eval.windows import Text
from support.calling import Counts
from support.tiny_lm import random_ids, tiny_llama

SETTINGS = EvaluationSettings(batch_size=2)
BATCHES = 3  # of 5 windows


@pytest.fixture
def text():
    return Text(random_ids(5 * 16, 257), length=16)


@pytest.fixture
def passes(monkeypatch):
    """The baseline's forward passes."""
    return Counts(monkeypatch, kept_logits, "logits_of").first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_model_costs_the_baseline_nothing(dtype, text, passes, tmp_path):
    baseline = tiny_llama(0).to(dtype)
    anew, keeping = Baseline(baseline), Baseline(baseline, tmp_path)
    for seed in (1, 2):
        model = tiny_llama(seed)
        expected = evaluate_model(model, None, SETTINGS, text, anew)
        assert evaluate_model(model, None, SETTINGS, text, keeping) == expected
    assert len(passes) == BATCHES
    assert not list(tmp_path.iterdir())  # the file has no name


def test_another_text_is_read_anew(text, passes, tmp_path):
    baseline, model = Baseline(tiny_llama(0), tmp_path), tiny_llama(1)
    other = Text(random_ids(5 * 16, 257, seed=7), length=16)
    for given in (text, other, text):
        expected = evaluate_model(model, None, SETTINGS, given, Baseline(baseline.model))
        assert evaluate_model(model, None, SETTINGS, given, baseline) == expected
    assert len(passes) == 3 * BATCHES


def test_what_finds_no_room_is_computed_again(text, passes, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_logits, "MOST", 2 * 2 * 16 * 257 * 4)  # two of three batches
    baseline = Baseline(tiny_llama(0), tmp_path)
    for seed in (1, 2):
        model = tiny_llama(seed)
        expected = evaluate_model(model, None, SETTINGS, text, Baseline(baseline.model))
        assert evaluate_model(model, None, SETTINGS, text, baseline) == expected
    assert len(passes) == BATCHES + 1


def test_half_of_what_the_disk_had_left_stays_free(text, passes, tmp_path, monkeypatch):
    """Whoever takes the other half: here each batch, and as much for somebody else."""
    of_a_batch = 2 * 16 * 257 * 4
    left = iter([4 * of_a_batch, 4 * of_a_batch, 2 * of_a_batch])
    monkeypatch.setattr(
        kept_logits.shutil, "disk_usage", lambda _: SimpleNamespace(free=next(left, 0))
    )
    baseline, model = Baseline(tiny_llama(0), tmp_path), tiny_llama(1)
    expected = evaluate_model(model, None, SETTINGS, text, Baseline(baseline.model))
    for _ in range(2):
        assert evaluate_model(model, None, SETTINGS, text, baseline) == expected
    assert len(passes) == 2 * BATCHES - 1  # one was kept


@pytest.mark.parametrize("taken", [0, 1000, 20_000])  # bytes of a batch of 32,896
def test_a_full_disk_costs_time_and_no_figure(text, passes, tmp_path, monkeypatch, taken):
    """What has been written of a batch until then is given back."""

    class Full(io.FileIO):
        def write(self, data):
            room = 2 * 16 * 257 * 4 + taken - self.tell()
            if room <= 0:
                raise OSError(28, "no space left on device")
            return super().write(bytes(data)[:room])

    file = Full(tmp_path / "file", "w+")
    monkeypatch.setattr(kept_logits.tempfile, "TemporaryFile", lambda **_: file)
    baseline, model = Baseline(tiny_llama(0), tmp_path), tiny_llama(1)
    expected = evaluate_model(model, None, SETTINGS, text, Baseline(baseline.model))
    for _ in range(2):
        assert evaluate_model(model, None, SETTINGS, text, baseline) == expected
    assert len(passes) == 2 * BATCHES - 1
    assert (tmp_path / "file").stat().st_size == 2 * 16 * 257 * 4
