"""`--dense`, `--packed` or neither: the same model, its quantised linears expanded or not."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compress.kernels.cpu import native
from compress.kernels.linear import QuantLinear
from compress.loading.load import fastest_packing
from compress.pipeline.run import run
from support.calling import call, refuses
from support.tiny_checkpoints import recipe_for

FOREIGN = Path(__file__).parents[1] / "interop" / "foreign"

# transformers says so of every argument beside a quantised checkpoint's own config.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@pytest.fixture
def kinds(monkeypatch):
    """The classes of linears that every model loaded from here on has, in turn."""
    from compress.loading import load as loading
    from compress.pipeline import evaluation

    found, load = [], loading.load

    def watched(*args, **options):
        model, processor = load(*args, **options)
        found.append({type(m) for n, m in model.named_modules() if n.endswith("_proj")})
        return model, processor

    for place in (loading, evaluation):
        monkeypatch.setattr(place, "load", watched)
    return found


@pytest.fixture(params=[True, False], ids=["wide", "narrow"])
def packs(request, monkeypatch):
    """Whether packed linears are the faster ones on this processor: both are gone through."""
    monkeypatch.setattr(native, "packed_is_faster", lambda device: request.param)
    return request.param


def test_generate(finished, kinds, packs, capsys):
    texts, said = [], []
    for options in ([], ["--dense"], ["--packed"]):
        assert call("generate", finished, "--prompt", "ab", "--max-tokens", 4, *options) == 0
        output = capsys.readouterr()
        texts.append(output.out)
        said.append(" linears " in output.err)
        if not options:
            assert (" packed" in output.err, " dense" in output.err) == (packs, not packs)
    fastest = QuantLinear if packs else torch.nn.Linear
    assert kinds == [{fastest}, {torch.nn.Linear}, {QuantLinear}]
    assert texts[0] == texts[1] == texts[2]
    assert said == [True, False, False]


def test_eval_says_so_in_its_conditions(finished, checkpoint, kinds, packs, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 40)
    scores = []
    reference = ["--baseline", checkpoint(dtype=torch.bfloat16)]
    for options in ([], ["--dense", *reference], ["--packed", "--baseline", finished]):
        options = ["--perplexity", text, "--length", 32, *options]
        assert call("eval", finished, *options, "--json") == 0
        scores.append(json.loads(capsys.readouterr().out))
    fastest = QuantLinear if packs else torch.nn.Linear
    plain = torch.nn.Linear
    assert kinds == [{fastest}, {plain}, {plain}, {QuantLinear}, {fastest}]
    figures = [score["perplexity"]["value"] for score in scores]
    assert figures == pytest.approx([figures[0]] * 3, rel=1e-4)
    word = "packed" if packs else "dense"
    assert [score["conditions"]["linears"] for score in scores] == [word, "dense", "packed"]
    of_baseline = [score["conditions"].get("baseline_linears") for score in scores]
    assert of_baseline == [None, "dense", word]


def test_a_recipe_measures_what_is_faster(checkpoint, text, kinds, packs, tmp_path):
    recipe = recipe_for(
        checkpoint(), quantize={"method": "rtn"},
        evaluate={"perplexity": {"dataset": str(text), "length": 16, "tokens": 64}},
    )  # fmt: skip
    scores = run(recipe, tmp_path / "out", self_check=False).metrics
    assert scores["conditions"]["linears"] == ("packed" if packs else "dense")
    assert kinds[0] == {QuantLinear if packs else torch.nn.Linear}


def test_rounded_activations_need_packed_linears(finished, kinds, packs, capsys):
    options = ["--prompt", "ab", "--max-tokens", 1, "--activation-bits", 8]
    assert call("generate", finished, *options) == 0
    assert " packed" in capsys.readouterr().err
    assert call("generate", finished, *options, "--dense") == 2
    assert kinds == [{QuantLinear}]
    rounding = FOREIGN / "llmcompressor-w8a8"
    assert fastest_packing(rounding) is True
    assert fastest_packing(finished) is packs


def test_packed_is_faster_unless_compiled_for_the_first_x86_processors(monkeypatch):
    for library, expected in (
        (None, True),
        (SimpleNamespace(instructions=lambda: "AVX2"), True),
        (SimpleNamespace(instructions=lambda: native.BASELINE), False),
    ):
        monkeypatch.setattr(native, "kernels", lambda library=library: library)
        assert native.packed_is_faster("cpu") is expected
        assert native.packed_is_faster("cuda:1")


def test_a_model_without_quantised_linears_is_what_is_asked_for(checkpoint, kinds):
    assert call("generate", checkpoint(), "--prompt", "a", "--max-tokens", 1, "--dense") == 0
    assert kinds == [{torch.nn.Linear}]


def test_a_random_model_has_none(capsys):
    refuses(capsys, ["bench", "pruning", "--dense"], "--dense")
