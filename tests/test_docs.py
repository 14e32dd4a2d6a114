"""README and docs: each command runs, each recipe is one, and Python asks for what is there.

A document's commands run in its order in one folder, since later ones read what earlier ones write.
Models and tasks that a hub holds have stand-ins, shipped recipes are cut down to a few tokens.
"""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import compress
from compress.cli.main import main
from compress.recipe.recipe import Recipe
from support import documents
from support.local_tasks import TEMPLATE

NAMES = [str(document.relative_to(documents.ROOT)) for document in documents.DOCUMENTS]
# What is not run here, and why.
ELSEWHERE = {
    "make": "its targets install and run these very tests",
    "pip": "needs a network",
    "python": "but for scripts that need no other program",
    "lm_eval": "the same as `modelpress lm-eval`, with the module imported before",
    "vllm": "not installed here",
    "torchrun": "starts ranks: tests/pipeline/test_distributed.py",
    "accelerate": "the same",
}
HERE = ("tests/interop/board/blimp.py", "recipes/demo/make_chats.py")  # scripts that need none
STAND_INS = {
    **dict.fromkeys(["meta-llama/Llama-3.2-1B", "HuggingFaceTB/SmolLM2-135M-Instruct"], "tiny"),
    **dict.fromkeys(["recipes/demo/lm", "stories260k", "PATH", "MODEL", "outputs/random"], "tiny"),
    **dict.fromkeys(["wikitext2", "python-stdlib"], "TEXT.txt"),
    **dict.fromkeys(["hellaswag", "arc_easy", "mmlu", "gsm8k_cot_llama"], "demo_code"),
    "chartqa": "demo_vqa",
    "VLM": "recipes/demo/vlm",
    "2.6MB": "1300KB",
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Path:
    """A folder with what the documents presuppose: a model, texts, a result, the recipes."""
    folder = tmp_path_factory.mktemp("docs")
    lm = documents.ROOT / "recipes/demo/lm"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(lm)
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    text = "\n\n".join(document.read_text() for document in documents.DOCUMENTS)
    for name in ("TEXT.txt", "OTHER.txt"):
        (folder / name).write_text(text)
    for name in ("sampled.jsonl", "validation.jsonl"):
        rows = [json.dumps({"text": part}) for part in text.split("\n\n")]
        (folder / name).write_text("\n".join(rows))
    turns = [{"role": "user", "content": "The capital of France?"}]
    (folder / "turns.jsonl").write_text(json.dumps(turns[0]))
    (folder / "DATA").mkdir()
    pair = {"sentence_good": "the cats sleep", "sentence_bad": "the cats sleeps"}
    (folder / "DATA/agreement.jsonl").write_text(f"{json.dumps(pair)}\n" * 4)
    documents.write_small_recipes(
        folder / "recipes", str(folder / "tiny"), str(folder / "TEXT.txt")
    )
    recipe = Recipe.load(folder / "recipes/rtn-w8.yaml", overrides=["evaluate=null"])
    compress.run(recipe, output=folder / "OUT", self_check=False)
    (folder / "recipes/demo").mkdir(exist_ok=True)
    (folder / "recipes/demo/vlm").symlink_to(documents.ROOT / "recipes/demo/vlm")
    return folder


@pytest.fixture
def on_stage(stage, tmp_path, monkeypatch) -> Path:
    """A copy of the stage as the working folder, its recipes as those that are shipped."""
    for part in stage.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("compress.recipe.recipe.shipped_folder", lambda: stage / "recipes")
    # A process a run, whose tests are elsewhere.
    monkeypatch.setattr("compress.pipeline.run.reload_and_compare", lambda *_: {})
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_commands_run(name, on_stage, capsys):
    for command in documents.commands(documents.ROOT / name):
        program, *rest = command.words
        if program == "python" and rest[0] in HERE:
            script = [sys.executable, documents.ROOT / rest[0], *rest[1:]]
            subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
        if program in ELSEWHERE:
            continue
        words = documents.small(documents.replaced(command.words, STAND_INS))
        if "cuda" in words and not torch.cuda.is_available():
            continue
        code = main(words[1:])
        assert code == 0, f"{name}, {command}\n{capsys.readouterr().err}"


def _recipes():
    for name in NAMES:
        for block in documents.code(documents.ROOT / name, "yaml"):
            yield pytest.param(block.text, id=f"{name}:{block.line}")


@pytest.mark.parametrize("text", list(_recipes()))
def test_recipes_are_recipes(text):
    Recipe.from_dict({"model": "a", "quantize": {"bits": 4}} | yaml.safe_load(text))


def _python():
    for name in NAMES:
        for block in documents.code(documents.ROOT / name, "python"):
            yield pytest.param(block.text, id=f"{name}:{block.line}")


@pytest.mark.parametrize("text", list(_python()))
def test_python_asks_for_what_is_there(text):
    """It compiles, and what it imports from compress, or takes from it, exists."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("compress"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "compress":
            assert hasattr(compress, node.attr), f"compress.{node.attr}"
