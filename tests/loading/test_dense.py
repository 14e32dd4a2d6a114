"""`--dense`: the same model, its quantised linears expanded; a line where there are none."""

import json

import pytest
import torch

from compress.kernels.linear import QuantLinear
from support.calling import call

# transformers says so of every argument beside a quantised checkpoint's own config.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@pytest.fixture
def kinds(monkeypatch):
    """The classes of linears that every model loaded from here on has, in turn."""
    from compress.loading import load as loading

    found, load = [], loading.load

    def watched(*args, **options):
        model, processor = load(*args, **options)
        found.append({type(m) for n, m in model.named_modules() if n.endswith("_proj")})
        return model, processor

    monkeypatch.setattr(loading, "load", watched)
    return found


def test_generate(finished, kinds, capsys):
    texts = []
    for options in ([], ["--dense"]):
        assert call("generate", finished, "--prompt", "ab", "--max-tokens", 4, *options) == 0
        texts.append(capsys.readouterr().out)
    assert kinds == [{QuantLinear}, {torch.nn.Linear}]
    assert texts[0] == texts[1]


def test_eval_says_so_in_its_conditions(finished, checkpoint, kinds, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 40)
    scores = []
    for options in ([], ["--dense", "--baseline", checkpoint(dtype=torch.bfloat16)]):
        options = ["--perplexity", text, "--length", 32, *options]
        assert call("eval", finished, *options, "--json") == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert kinds == [{QuantLinear}, {torch.nn.Linear}, {torch.nn.Linear}]
    figures = [score["perplexity"]["value"] for score in scores]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    assert [score["conditions"].get("dense") for score in scores] == [None, True]


def test_a_model_without_quantised_linears_is_what_is_asked_for(checkpoint, kinds):
    assert call("generate", checkpoint(), "--prompt", "a", "--max-tokens", 1, "--dense") == 0
    assert kinds == [{torch.nn.Linear}]


def test_a_random_model_has_none(capsys):
    assert call("bench", "pruning", "--dense") == 2
    assert "leave out --dense" in capsys.readouterr().err
