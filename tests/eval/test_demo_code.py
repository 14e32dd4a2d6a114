import json
import platform
from itertools import pairwise

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from compress.data.stdlib import is_held_out
from compress.eval.task_names import LOCAL_TASKS
from compress.recipes.demo.make_demo_code import code_lines, make_items
from support.tiny_lm import tiny_llama

FOLDER = LOCAL_TASKS / "demo_code"
# Of newer tokenizers: line ends stick to the punctuation before them, digits come in threes.
NEWER = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def shipped_items() -> list[dict]:
    lines = (FOLDER / "items.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def rebuilt():
    return make_items(count=400, seed=0)


@pytest.fixture(scope="module", params=["shipped", "rebuilt"])
def items(request, rebuilt):
    return shipped_items() if request.param == "shipped" else rebuilt


def test_four_distinct_choices_of_some_length_and_a_valid_answer(items):
    assert len(items) >= 300
    for item in items:
        bare = [choice.strip() for choice in item["choices"]]
        assert len(set(bare)) == len(bare) == 4
        assert item["answer"] in range(4)
        assert min(map(len, bare)) >= 10
        assert len({len(choice) - len(choice.lstrip()) for choice in item["choices"]}) == 1
        assert not any("\n" in choice for choice in item["choices"])
        assert not any(line in item["context"] for line in bare)


def test_contexts_are_whole_lines_of_limited_length(items):
    for item in items:
        assert item["context"].endswith("\n")
        assert item["context"].split("\n")[0].strip()
        assert 8 <= item["context"].count("\n") <= 15
        assert len(item["context"]) <= 600


def test_no_text_that_a_demo_model_was_trained_on(items):
    assert all(is_held_out(item["module"]) for item in items)


def test_form_does_not_give_the_answer_away(items):
    """Rules that look at the choices alone stay near chance: 25 % of 400, error 2.2 %."""

    def share(key):
        return sum(
            max(range(4), key=lambda i: key(item["choices"][i])) == item["answer"] for item in items
        ) / len(items)

    for longer_or_shorter in (1, -1):
        assert share(lambda line, sign=longer_or_shorter: sign * len(line)) < 0.35
    answers = [item["answer"] for item in items]
    assert all(0.17 < answers.count(i) / len(items) < 0.33 for i in range(4))


def test_no_line_is_the_answer_of_one_item_and_context_of_another(items):
    lines = sorted((item["module"], item["line"]) for item in items)
    for (module, line), (other, following) in pairwise(lines):
        assert module != other or following - line > 15


def test_the_same_sources_and_seed_give_the_shipped_file(rebuilt):
    metadata = (FOLDER / "demo_code.yaml").read_text(encoding="utf-8")
    made_with = metadata.split("python: ")[1].split()[0]
    if platform.python_version() != made_with:
        pytest.skip(f"the items were cut from Python {made_with}")
    assert rebuilt == shipped_items()
    assert make_items(count=400, seed=1) != rebuilt


def test_code_lines_leave_out_strings_comments_and_blanks():
    text = 'x = 1\n\n# note\ndef f():\n    """Two\n    lines."""\n    return x  # x\n'
    assert code_lines(text) == {
        0: "x = 1",
        3: "def f():",
        6: "    return x  # x",
    }


def test_the_harness_finds_it_from_any_folder(tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    manager = TaskManager(include_path=LOCAL_TASKS, include_defaults=False)
    task = manager.load(["demo_code"])["tasks"]["demo_code"]
    assert [dict(doc) for doc in task.test_docs()] == shipped_items()
    doc = task.test_docs()[0]
    assert task.doc_to_text(doc) == doc["context"]
    assert task.doc_to_choice(doc) == doc["choices"]
    assert task.doc_to_target(doc) == doc["answer"]


def byte_pair_tokenizer(split: str, texts: list[str]) -> PreTrainedTokenizerFast:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split == "gpt2")
    newer = [pre_tokenizers.Split(Regex(NEWER), "isolated"), byte_level]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = byte_level if split == "gpt2" else pre_tokenizers.Sequence(newer)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    special = {"eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


@pytest.mark.parametrize("split", ["gpt2", "newer"])
def test_merges_across_the_line_end_favour_no_choice(split):
    """All that tells one choice from another is scored; what is not scored is the same for all."""
    from lm_eval.models.huggingface import HFLM

    items = shipped_items()
    wholes = [item["context"] + choice for item in items for choice in item["choices"]]
    tokenizer = byte_pair_tokenizer(split, wholes)
    harness = HFLM(pretrained=tiny_llama(), tokenizer=tokenizer)
    for item in items:
        before = set()
        for choice in item["choices"]:
            _, scored = harness._encode_pair(item["context"], choice)
            ids = tokenizer.encode(item["context"] + choice)
            before.add(tuple(ids[: len(ids) - len(scored)]))
            assert tokenizer.decode(scored).endswith(choice if split == "gpt2" else choice.strip())
        assert len(before) == 1
