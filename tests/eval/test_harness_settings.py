"""Everything that lm-eval can be told, through `EvaluationSettings`."""

import json
import subprocess
import sys

import pytest

from compress.errors import UsageError
from compress.eval.harness import chosen_template, score_tasks
from compress.eval.harness_files import cache_folder
from compress.eval.settings import EvaluationSettings, batch_problem, limit_problem
from compress.eval.task_names import check_names, find_tasks
from support.local_tasks import KINDS, ROWS, TEMPLATE, write_tasks
from support.refusals import refused
from support.tiny_lm import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def parts():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tiny_llama(), tokenizer


@pytest.fixture
def score(parts, tasks):
    def score(names, files=None, **settings):
        settings = {"batch_size": 2, "include_path": tasks} | settings
        return score_tasks(*parts, EvaluationSettings(tasks=names, **settings), files=files)

    return score


def prompts(folder, task="local_choice"):
    """The first argument of each request that the samples' files hold."""
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [line["arguments"]["gen_args_0"]["arg_0"] for line in lines]


# ---- what is asked, and how much of it ----------------------------------------------------------


def test_a_share_of_the_items(score):
    assert score(["local_choice"], limit=0.5).samples == {"local_choice": 2}
    assert score(["local_choice"], limit=0.51).samples == {"local_choice": 3}
    assert score(["local_choice"], limit=1).samples == {"local_choice": 1}


@pytest.mark.parametrize("limit", [0, -1, 1.0, 2.5, 0.0])
def test_limits_that_lm_eval_would_read_otherwise(limit):
    assert "share" in limit_problem(limit)


def test_batch_sizes():
    assert [batch_problem(size) for size in (1, "auto", "auto:4")] == [None] * 3
    assert all(batch_problem(size) for size in (0, "automatic", "auto:0", "4 "))


def test_the_batch_size_is_found_out_without_a_word(score, capsys):
    found = score(["local_choice", "local_text"], batch_size="auto", max_length=64)
    assert found.results == score(["local_choice", "local_text"], max_length=64).results
    assert capsys.readouterr() == ("", "")


def test_a_group_a_tag_and_a_pattern(score, tasks, tmp_path):
    whole = score(["local_all"]).results
    assert {task for task in whole if task in KINDS} == {*KINDS}
    assert {*score(["local_c*"]).results} == {"local_choice"}
    tagged = write_tasks(tmp_path)
    file = tagged / "local_choice.yaml"
    file.write_text(file.read_text() + "tag:\n  - local_tag\n", encoding="utf-8")
    assert {*score(["local_tag"], include_path=tagged).results} == {"local_choice"}


def test_generation_is_told_more_than_the_task_says(score, tmp_path):
    score(
        ["local_answer"], gen_kwargs={"max_gen_toks": 2}, log_samples=True, files=tmp_path / "out"
    )
    (file,) = (tmp_path / "out").rglob("samples_*.jsonl")
    line = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    assert line["arguments"]["gen_args_0"]["arg_1"]["max_gen_toks"] == 2
    assert line["arguments"]["gen_args_0"]["arg_1"]["until"] == ["\n"]
    with refused(UsageError, "--max-length", "max_gen_toks", 8):
        score(["local_answer"], max_length=8)


# ---- chat ---------------------------------------------------------------------------------------


def test_prompts_in_the_chat_template(score, tmp_path):
    options = {"num_fewshot": 1, "system_instruction": "Be brief.", "log_samples": True}
    found = score(["local_choice"], files=tmp_path / "turns", apply_chat_template=True, **options)
    assert (found.chat_template, found.multiturn) == (True, True)
    first = prompts(tmp_path / "turns")[0]
    assert first == (
        "<end>[system]Be brief.\n[user]Q: Which is a colour?\nA:\n[assistant]red\n"
        "[user]Q: What is 1 + 1?\nA:\n[assistant]"
    )
    score(
        ["local_choice"], files=tmp_path / "one", apply_chat_template=True,
        fewshot_as_multiturn=False, **options,
    )  # fmt: skip
    assert prompts(tmp_path / "one")[0].count("[user]") == 1
    score(["local_choice"], files=tmp_path / "plain", **options)
    assert prompts(tmp_path / "plain")[0].startswith("Be brief.Q: Which")


def test_one_of_several_templates(score, parts, tmp_path):
    """lm-eval notes the name and applies the default one."""
    tokenizer = parts[1]
    several = {"default": TEMPLATE, "other": TEMPLATE.replace("]", "] ")}
    tokenizer.chat_template = several
    try:
        score(
            ["local_choice"], apply_chat_template="other", log_samples=True,
            files=tmp_path / "out", limit=1,
        )  # fmt: skip
        assert "[user] Q" in prompts(tmp_path / "out")[0]
        (file,) = (tmp_path / "out").rglob("results_*.json")
        assert json.loads(file.read_text(encoding="utf-8"))["chat_template"] == several["other"]
        with refused(UsageError, "apply_chat_template", "'othr'", "'other'"):
            score(["local_choice"], apply_chat_template="othr")
        assert tokenizer.chat_template == several
    finally:
        tokenizer.chat_template = TEMPLATE


def test_templates_that_are_not_there(score, parts):
    bare = byte_tokenizer()
    assert chosen_template(bare, EvaluationSettings()) is None
    with refused(UsageError, "apply_chat_template"):
        chosen_template(bare, EvaluationSettings(apply_chat_template=True))
    with refused(UsageError, "fewshot_as_multiturn", "--apply-chat-template"):
        score(["local_choice"], fewshot_as_multiturn=True)


# ---- names --------------------------------------------------------------------------------------


def test_unknown_names_are_told_before_lm_eval_or_torch_is_read():
    program = """
import sys
from compress.errors import UsageError
from compress.eval.settings import EvaluationSettings
from compress.eval.task_names import check_names
try:
    check_names(EvaluationSettings(tasks=["arc_easy", "hellaswg"]))
except UsageError as error:
    print(error)
print([name for name in ("lm_eval", "torch", "transformers", "datasets") if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    line, imported = found.stdout.splitlines()
    assert "'hellaswg'" in line and "'hellaswag'" in line
    assert imported == "[]"


@pytest.mark.parametrize(
    ("task", "local"),
    [("demo_code", True), ("demo_*", True), ("arc_easy", False), ("mmlu", False),
     ("rsq_paper", False), ("vflowopt_paper", False), ("ai2_arc", False), ("blimp_*", False)],
)  # fmt: skip
def test_the_whole_index_is_read_only_where_it_is_needed(task, local):
    assert check_names(EvaluationSettings(tasks=[task])) is local


def test_ones_own_group_of_local_tasks_needs_no_index(tasks):
    settings = EvaluationSettings(tasks=["local_all", "demo_code"], include_path=tasks)
    assert find_tasks(settings)[0] == ["local_all", "demo_code"]
    assert check_names(settings)


def test_a_task_that_is_asked_for_twice_gets_a_remedy(score, tasks, tmp_path):
    with refused(UsageError, "'local_choice'", "'local_all'", "leave local_choice out"):
        score(["local_all", "local_choice"])
    folder = write_tasks(tmp_path)
    (folder / "again.yaml").write_text("group: again\ntask: [local_text]\n", encoding="utf-8")
    with refused(UsageError, "'local_text'", "'local_all'", "'again'", "two calls"):
        score(["local_all", "again"], include_path=folder)


def test_two_files_of_one_task_are_warned_of(score, tmp_path):
    folder = write_tasks(tmp_path)
    text = (folder / "local_choice.yaml").read_text(encoding="utf-8")
    (folder / "twin.yaml").write_text(text, encoding="utf-8")
    assert any(
        "Duplicate" in said for said in score(["local_choice"], include_path=folder).warnings
    )


def test_a_task_that_runs_what_the_model_writes(score, tmp_path):
    folder = write_tasks(tmp_path)
    file = folder / "local_answer.yaml"
    file.write_text(file.read_text() + "unsafe_code: true\n", encoding="utf-8")
    with refused(UsageError, "'local_answer'", "--confirm-run-unsafe-code"):
        score(["local_answer"], include_path=folder)
    assert score(["local_answer"], include_path=folder, confirm_run_unsafe_code=True).results


def test_nothing_that_was_asked_for_is_warned_of(score):
    options = {"num_fewshot": 1, "gen_kwargs": {"max_gen_toks": 2}, "apply_chat_template": True}
    assert score(["local_all"], **options).warnings == {}


# ---- files --------------------------------------------------------------------------------------


def test_prompts_are_kept_and_not_taken_for_others(score, tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("LM_HARNESS_CACHE_PATH", str(tmp_path / "cache"))
    built = []
    from lm_eval.api.task import ConfigurableTask

    whole = ConfigurableTask.fewshot_context

    def counted(self, doc, *arguments, **options):
        built.append(doc)
        return whole(self, doc, *arguments, **options)

    monkeypatch.setattr(ConfigurableTask, "fewshot_context", counted)
    first = score(["local_choice"], cache_requests=True, limit=2)
    assert len(built) == len(ROWS)  # all, for a later call that asks more
    assert score(["local_choice"], cache_requests=True, limit=2).results == first.results
    assert len(built) == len(ROWS)
    score(["local_choice"], cache_requests="refresh")
    assert len(built) == 2 * len(ROWS)
    score(["local_choice"], cache_requests=True, seed=1)
    assert len(built) == 3 * len(ROWS)
    score(["local_choice"], cache_requests="delete")
    assert len(built) == 4 * len(ROWS)
    folder = write_tasks(tmp_path / "changed")
    settings = EvaluationSettings(include_path=folder)
    before = cache_folder(settings, {})
    (folder / "utils.py").write_text("def rows(**_): ...", encoding="utf-8")
    assert cache_folder(settings, {}) != before


def test_samples_are_written_only_where_asked(score, tmp_path):
    found = score(["local_choice"], files=tmp_path / "out")
    assert [file.split("/")[-1].split("_")[0] for file in found.files] == ["results"]
    found = score(["local_all"], files=tmp_path / "more", log_samples=True)
    kinds = sorted(file.split("/")[-1].split("_")[0] for file in found.files)
    assert kinds == ["results", *["samples"] * len(KINDS)]
