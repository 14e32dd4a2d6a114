"""The options of `eval` that lm-eval has, from the command line to EvaluationSettings."""

import pytest

from compress.errors import RecipeError
from compress.recipe.recipe import Recipe
from support.calling import call, pretend, refuses
from support.refusals import refused
from support.tiny_lm import byte_tokenizer, tiny_llama

ARGUMENTS = ["eval", "m", "--tasks", "demo_code"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--limit", "0.25"], {"limit": 0.25}),
        (["--limit", "100"], {"limit": 100}),
        (["--batch-size", "auto:4"], {"batch_size": "auto:4"}),
        (["--apply-chat-template"], {"apply_chat_template": True}),
        (["--apply-chat-template=tool_use"], {"apply_chat_template": "tool_use"}),
        (["--apply-chat-template=false"], {"apply_chat_template": False}),
        (["--system-instruction", "Be brief."], {"system_instruction": "Be brief."}),
        (["--fewshot-as-multiturn"], {"fewshot_as_multiturn": True}),
        (["--fewshot-in-one-turn"], {"fewshot_as_multiturn": False}),
        (
            ["--gen-kwargs", "temperature=0.5,do_sample=true,until=[a, 'b,c']"],
            {"gen_kwargs": {"temperature": 0.5, "do_sample": True, "until": ["a", "b,c"]}},
        ),
        (["--gen-kwargs", '{"max_gen_toks": 3}'], {"gen_kwargs": {"max_gen_toks": 3}}),
        (["--max-length", "512"], {"max_length": 512}),
        (["--add-bos-token"], {"add_bos_token": True}),
        (["--no-bos-token"], {"add_bos_token": False}),
        (["--cache-requests"], {"cache_requests": True}),
        (["--cache-requests=refresh"], {"cache_requests": "refresh"}),
        (["--log-samples", "--output-path", "o"], {"log_samples": True}),
        (["--metadata", "max_seq_lengths=[4096]"], {"metadata": {"max_seq_lengths": [4096]}}),
        (["--confirm-run-unsafe-code"], {"confirm_run_unsafe_code": True}),
        ([], {"apply_chat_template": None, "gen_kwargs": None, "cache_requests": False}),
    ],
)
def test_options(monkeypatch, options, expected, capsys):
    calls = pretend(monkeypatch, "compress.pipeline.evaluation", "evaluate", {"results": {}})
    assert call(*ARGUMENTS, *options) == 0
    assert calls[0] | expected == calls[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--limit", "1.5"], ["--limit", 1.5]),
        (["--limit", "some"], ["--limit", "'some'"]),
        (["--batch-size", "lots"], ["--batch-size", "'lots'"]),
        (["--gen-kwargs", "temperature"], ["--gen-kwargs", "'temperature'"]),
        (["--gen-kwargs", "{"], ["--gen-kwargs"]),
        (["--cache-requests=refesh"], ["--cache-requests", "'refesh'", "'refresh'"]),
        (["--log-samples"], ["--log-samples", "--output-path"]),
        (["--tasks", "demo_cod"], ["'demo_cod'", "'demo_code'"]),
    ],
)
def test_what_is_refused_before_a_model_is_looked_for(options, named, capsys):
    refuses(capsys, [*ARGUMENTS, *options], *named)


def test_warnings_stand_on_lines_of_their_own(monkeypatch, capsys):
    scores = {"results": {"t": {"acc": 0.5}}, "files": ["o/results_1.json"],
              "conditions": {"limit": 2, "num_fewshot": None,
                             "shots": {}, "warnings": {"cut to 64 tokens": 3}}}  # fmt: skip
    pretend(monkeypatch, "compress.pipeline.evaluation", "evaluate", scores)
    assert call(*ARGUMENTS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "warning of lm-eval: cut to 64 tokens (3 times)" in lines
    assert "written: o/results_1.json" in lines
    assert [line for line in lines if line.startswith("conditions")] == ["conditions: limit 2"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("limit", "0.5", 0.5), ("batch_size", "auto", "auto"), ("num_fewshot", "2", 2),
        ("apply_chat_template", "true", True), ("apply_chat_template", "rag", "rag"),
        ("system_instruction", "Be brief.", "Be brief."), ("max_length", "64", 64),
        ("gen_kwargs", "{until: [a]}", {"until": ["a"]}), ("add_bos_token", "false", False),
        ("cache_requests", "true", True), ("log_samples", "true", True),
        ("metadata", "{max_seq_lengths: [64]}", {"max_seq_lengths": [64]}),
    ],
)  # fmt: skip
def test_all_of_it_stands_under_a_recipes_evaluate(tmp_path, key, value, expected):
    file = tmp_path / "r.yaml"
    file.write_text(f"model: m\nevaluate:\n  tasks: [demo_code]\n  {key}: {value}\n")
    recipe = Recipe.load(file)
    assert getattr(recipe.evaluate.settings(None), key) == expected
    again = tmp_path / "again.yaml"
    again.write_text(recipe.dump())
    assert Recipe.load(again).evaluate == recipe.evaluate


@pytest.mark.parametrize(
    ("key", "value"),
    [("limit", "1.5"), ("limit", "0"), ("batch_size", "lots"), ("cache_requests", "maybe"),
     ("fewshot_as_multiturn", "true"), ("gen_kwargs", "[a]"), ("max_length", "1")],
)  # fmt: skip
def test_a_recipe_that_says_it_wrongly(tmp_path, key, value):
    file = tmp_path / "r.yaml"
    file.write_text(f"model: m\nevaluate:\n  tasks: [demo_code]\n  {key}: {value}\n")
    with refused(RecipeError, file, f"evaluate.{key}"):
        Recipe.load(file)


def test_a_run_leaves_lm_evals_files_in_its_folder(tmp_path):
    from compress.pipeline.evaluation import evaluate_section

    model = tmp_path / "model"
    tiny_llama().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    recipe = Recipe.from_dict(
        {"model": str(model), "evaluate": {
            "tasks": ["demo_code"], "limit": 0.01, "log_samples": True, "baseline": False}}
    )  # fmt: skip
    found = evaluate_section(recipe.evaluate, recipe.resolve_path, model, model)
    assert {file.name.split("_")[0] for file in (model / "eval").rglob("*.json*")} == {
        "results", "samples",
    }  # fmt: skip
    assert len(found["files"]) == 2
