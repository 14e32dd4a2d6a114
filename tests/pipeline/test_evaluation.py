"""Measuring checkpoints: the figures of plain models on the text's own tokens, each read once."""

import json
from dataclasses import fields
from inspect import signature

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from compress.data.text import load_documents
from compress.data.windows import encode, token_stream
from compress.errors import UsageError
from compress.eval import evaluate as measuring
from compress.eval.divergence import kl_divergence
from compress.eval.perplexity import perplexity
from compress.eval.settings import WINDOW, EvaluationSettings
from compress.eval.windows import Text
from compress.kernels.cpu.native import packed_is_faster
from compress.pipeline import evaluation
from compress.pipeline.evaluation import Evaluator, check_evaluation, evaluate, evaluate_section
from compress.recipe.recipe import Recipe
from compress.recipe.sections import Evaluate
from support.calling import Counts, pretend
from support.refusals import refused
from support.tiny_checkpoints import load_whole, recipe_for, write_checkpoint

LENGTH, TOKENS = 32, 400


def held_out(text, model, tokens=TOKENS) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return token_stream(load_documents(str(text), "held_out"), tokenizer, tokens)


@pytest.fixture
def quantised(checkpoint, press):
    """Two results of one model: 4 bits and 2."""
    return [press(recipe_for(checkpoint(), quantize={"bits": bits})) for bits in (4, 2)]


# ---- figures ------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_models_on_the_tokens_of_the_text(checkpoint, text, quantised):
    found = evaluate(
        quantised[1], perplexity=str(text), length=LENGTH, stride=16, tokens=TOKENS,
        baseline=checkpoint(),
    )  # fmt: skip
    ids = held_out(text, checkpoint())
    model, baseline = load_whole(quantised[1]), load_whole(checkpoint())
    expected = perplexity(model, Text(ids, length=LENGTH, stride=16))
    assert found["perplexity"]["value"] == pytest.approx(expected.value, rel=1e-6)
    assert found["perplexity"]["tokens"] == expected.tokens
    reference = perplexity(baseline, Text(ids, length=LENGTH, stride=16)).value
    assert found["baseline"]["perplexity"]["value"] == pytest.approx(reference, rel=1e-6)
    divergence = kl_divergence(model, baseline, Text(ids, length=LENGTH, stride=16)).mean
    assert found["kl"]["mean"] == pytest.approx(divergence, rel=1e-5)
    assert found["conditions"] == {
        "model": str(quantised[1]),
        "baseline": str(checkpoint()),
        "device": "cpu",
        "dtype": "float32",
        "linears": "packed" if packed_is_faster("cpu") else "dense",
        "baseline_linears": "dense",
        "perplexity_dataset": str(text),
    }


def test_windows_beyond_the_models_context_are_told(checkpoint, text):
    context = json.loads((checkpoint() / "config.json").read_text())["max_position_embeddings"]
    within, beyond = (
        evaluate(checkpoint(), perplexity=str(text), length=length)["conditions"]
        for length in (context, context + 1)
    )
    assert "beyond_context" not in within
    assert beyond["beyond_context"] == (
        f"{context + 1} tokens, and the model says that it takes {context}"
    )


def test_documents_are_read_one_by_one_until_there_are_enough_tokens(checkpoint, text):
    """The last one is whole: a document is cut by `length` alone."""
    model = checkpoint()
    found = evaluate(
        model, perplexity=str(text), length=LENGTH, per_document=True, tokens=TOKENS, bos=True
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = encode(tokenizer, list(load_documents(str(text), "held_out").texts))
    counts = torch.tensor([len(ids) for ids in documents]).cumsum(0)
    needed = int((counts < TOKENS).sum()) + 1
    assert 1 < needed < len(documents)
    bos = tokenizer.bos_token_id
    expected = perplexity(
        load_whole(model), Text(documents=documents[:needed], length=LENGTH, bos=bos)
    )
    assert found["perplexity"]["value"] == pytest.approx(expected.value, rel=1e-6)
    assert found["perplexity"]["bos"]
    assert "kl" not in found and "baseline" not in found
    assert found["conditions"]["baseline"] is None


def test_half_precision_is_measured_in_single_on_a_cpu(tmp_path, text):
    model = write_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    found = evaluate(model, perplexity=str(text), length=LENGTH, tokens=TOKENS)
    assert found["conditions"]["dtype"] == "float32"
    expected = perplexity(load_whole(model), Text(held_out(text, model), length=LENGTH))
    assert found["perplexity"]["value"] == pytest.approx(expected.value, rel=1e-6)


def test_arguments_have_the_defaults_of_the_settings():
    arguments = signature(evaluate).parameters
    for field in fields(EvaluationSettings):
        assert arguments[field.name].default == field.default, field.name


def test_windows_are_as_long_as_the_model_takes_where_nothing_is_said(checkpoint, text):
    """The recipe, the command line and Python have the same defaults."""
    model = checkpoint()
    context = AutoConfig.from_pretrained(model).max_position_embeddings
    found = evaluate(model, perplexity=str(text))["perplexity"]
    assert found["length"] == context < WINDOW
    recipe = recipe_with(checkpoint, {"perplexity": str(text), "baseline": False})
    by_recipe = evaluate_section(recipe.evaluate, recipe.resolve_path, model, model)
    assert by_recipe["perplexity"] == found
    settings = EvaluationSettings()
    assert settings.window(None) == settings.window(10 * WINDOW) == WINDOW
    assert EvaluationSettings(length=WINDOW + 1).window(context) == WINDOW + 1
    assert Evaluate(perplexity=str(text)).settings(str(text)) == EvaluationSettings(
        tasks=[], perplexity=str(text)
    )


# ---- once ---------------------------------------------------------------------------------------


def test_text_and_baseline_are_read_and_measured_once(checkpoint, text, quantised, monkeypatch):
    settings = {"perplexity": str(text), "length": LENGTH, "tokens": TOKENS}
    apart = [evaluate(folder, baseline=checkpoint(), **settings) for folder in quantised]
    loads = Counts(monkeypatch, evaluation, "load")
    streams = Counts(monkeypatch, evaluation, "token_stream")
    passes = Counts(monkeypatch, measuring, "kl_divergence")
    evaluator = Evaluator(EvaluationSettings(**settings), checkpoint())
    assert loads.first == streams.first == []  # nothing is read before it is needed
    assert [evaluator.measure(folder) for folder in quantised] == apart
    assert loads.first == [quantised[0], checkpoint(), quantised[1]]
    assert len(streams.first) == 1
    assert len(passes.first) == 2  # one for each result, which gives its perplexity as well


# ---- what a recipe asks for ---------------------------------------------------------------------


def recipe_with(checkpoint, evaluate):
    return recipe_for(checkpoint(), evaluate=evaluate)


@pytest.mark.parametrize("section", [{}, {"tasks": [], "limit": 3}])
def test_a_section_that_asks_for_nothing_gets_nothing(checkpoint, section, monkeypatch):
    loads = Counts(monkeypatch, evaluation, "load")
    recipe = recipe_with(checkpoint, section)
    check_evaluation(recipe.evaluate, recipe.resolve_path)
    assert evaluate_section(recipe.evaluate, recipe.resolve_path, checkpoint(), checkpoint()) == {}
    assert loads.first == []


@pytest.mark.parametrize("baseline", [True, False])
def test_a_recipe_is_measured_as_its_section_says(checkpoint, text, quantised, baseline):
    section = {
        "perplexity": {"dataset": str(text), "length": LENGTH, "stride": 8, "bos": True}
        | {"tokens": 200},
        "baseline": baseline,
        "batch_size": 3,
    }
    recipe = recipe_with(checkpoint, section)
    found = evaluate_section(recipe.evaluate, recipe.resolve_path, quantised[0], checkpoint())
    expected = evaluate(
        quantised[0], perplexity=str(text), length=LENGTH, stride=8, bos=True, tokens=200,
        batch_size=3, baseline=checkpoint() if baseline else None,
    )  # fmt: skip
    assert found == expected
    assert ("kl" in found) == baseline


def test_a_recipes_text_is_looked_up_beside_the_recipe(checkpoint, text, tmp_path, monkeypatch):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "recipe" / "mine.jsonl").write_bytes(text.read_bytes())
    section = {"perplexity": {"dataset": "mine.jsonl", "length": LENGTH, "tokens": 100}}
    file = tmp_path / "recipe" / "recipe.yaml"
    file.write_text(recipe_with(checkpoint, section).dump())
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = Recipe.load(file)
    check_evaluation(recipe.evaluate, recipe.resolve_path)
    found = evaluate_section(recipe.evaluate, recipe.resolve_path, checkpoint(), checkpoint())
    expected = evaluate(checkpoint(), perplexity=str(text), length=LENGTH, tokens=100)
    assert found["perplexity"] == expected["perplexity"]


# ---- what cannot be measured --------------------------------------------------------------------


def test_what_cannot_be_measured_is_said_before_a_model_is_loaded(checkpoint, monkeypatch):
    loads = Counts(monkeypatch, evaluation, "load")
    unknown = UsageError("no such task")
    asked = pretend(monkeypatch, "compress.pipeline.evaluation", "find_tasks", unknown)
    with refused(UsageError, "evaluate"):
        evaluate(checkpoint())
    of_the_text = {"by_position": True, "per_document": True, "bos": True, "stride": 8}
    of_the_text |= {"length": 8, "tokens": 64}
    for name, value in of_the_text.items():
        with refused(UsageError, name, "perplexity"):
            evaluate(checkpoint(), tasks=["demo_code"], **{name: value})
    with refused(UsageError, unknown):
        evaluate(checkpoint(), tasks=["demo_cod"], include_path="mine")
    assert asked[0]["settings"] == EvaluationSettings(tasks=["demo_cod"], include_path="mine")
    cases = ({"tasks": ["demo_cod"]}, unknown), ({"perplexity": "no.txt"}, "no.txt")
    for section, said in cases:
        recipe = recipe_with(checkpoint, section)
        with refused(UsageError, said):
            check_evaluation(recipe.evaluate, recipe.resolve_path)
    assert loads.first == []


def test_bos_needs_a_bos_token(text, tmp_path):
    model = write_checkpoint(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(model)
    with refused(UsageError, "BOS"):
        evaluate(model, perplexity=str(text), length=LENGTH, bos=True)
