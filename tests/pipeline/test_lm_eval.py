"""The same figures from lm-eval's own model, from ours under its command, and from `evaluate`."""

import json
import shutil
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table, sanitize_list

from compress.cli.main import main
from compress.errors import UsageError
from compress.eval.task_names import LOCAL_TASKS
from compress.pipeline.evaluation import evaluate
from compress.pruning.saved import save_strategy
from compress.recipe.strategy import PruneStrategy
from compress.scheme import Scheme
from support.demo_quantised import quantise_folder
from support.local_tasks import KINDS, TEMPLATE, write_tasks
from support.refusals import refused
from support.tiny_lm import byte_tokenizer, tiny_llama

BATCH = 2
SYSTEM = "Be brief."


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def local_index(monkeypatch):
    """lm-eval's own task index takes ten seconds to read, and what pip knows five."""
    import lm_eval.evaluator
    import lm_eval.tasks

    def manager(include_path=None, include_defaults=False, metadata=None):
        return TaskManager(include_path=include_path, include_defaults=False, metadata=metadata)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)


def asked(samples):
    """What a model was asked and answered: prompts, log-likelihoods or texts, metrics."""
    return [
        (
            sample["arguments"],
            sanitize_list(sample["resps"]),
            [sample[m] for m in sample["metrics"]],
        )
        for sample in sorted(samples, key=lambda sample: sample["doc_id"])
    ]


def of_files(folder):
    """The results of lm-eval's own layout, and the samples by task."""
    (results,) = folder.rglob("results_*.json")
    samples = {}
    for file in folder.rglob("samples_*.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines()
        samples[file.name.split("_2")[0].removeprefix("samples_")] = list(map(json.loads, lines))
    return json.loads(results.read_text(encoding="utf-8")), samples


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_three_ways_to_the_last_digit(folder, tasks, tmp_path, chat, local_index):
    chosen = ["local_choice", "local_answer", "local_text"]
    found = evaluate(
        folder, tasks=chosen, include_path=tasks, batch_size=BATCH, num_fewshot=1,
        apply_chat_template=chat, system_instruction=SYSTEM, log_samples=True,
        output_path=tmp_path / "ours",
    )  # fmt: skip
    written, samples = of_files(tmp_path / "ours")
    for name, more in (("hf", {"dtype": "float32"}), ("modelpress", {})):
        if name == "modelpress":
            import compress.pipeline.lm_eval_models  # noqa: F401  # registers it
        output = simple_evaluate(
            model=name, model_args={"pretrained": str(folder), **more}, tasks=chosen,
            task_manager=TaskManager(include_path=[tasks], include_defaults=False),
            device="cpu", batch_size=BATCH, num_fewshot=1, apply_chat_template=chat,
            system_instruction=SYSTEM, fewshot_as_multiturn=chat, random_seed=0,
            numpy_random_seed=0, torch_random_seed=0, fewshot_random_seed=0,
        )  # fmt: skip
        assert output["results"] == written["results"], name
        for task in chosen:
            theirs = json.loads(json.dumps(output["samples"][task], default=str))
            ours = [
                # The files number the arguments, as data sets want it.
                sample | {"arguments": [list(a.values()) for a in sample["arguments"].values()]}
                for sample in samples[task]
            ]
            assert asked(theirs) == asked(ours), (name, task)
        if chat:
            assert output["config"]["model_args"] == {"pretrained": str(folder), **more}
    for task in chosen:
        for metric, value in found["results"][task].items():
            assert written["results"][task][f"{metric},none"] == ("N/A" if value is None else value)
    assert found["conditions"]["chat_template"] is chat


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_three_ways_to_the_last_digit_of_what_is_shipped(folder, tmp_path, chat, local_index):
    """Rolling, multiple choice and generation."""
    import compress.pipeline.lm_eval_models  # noqa: F401  # registers it

    chosen = ["demo_text", "demo_code", "demo_passkey"]
    found = evaluate(
        folder, tasks=chosen, batch_size=BATCH, limit=1, apply_chat_template=chat,
        metadata={"lengths": [400]}, output_path=tmp_path / "ours",
    )  # fmt: skip
    written, _ = of_files(tmp_path / "ours")
    for name, more in (("hf", {"dtype": "float32"}), ("modelpress", {})):
        manager = TaskManager(
            include_path=[LOCAL_TASKS], include_defaults=False, metadata={"lengths": [400]}
        )
        output = simple_evaluate(
            model=name, model_args={"pretrained": str(folder), **more}, tasks=chosen, limit=1,
            task_manager=manager, device="cpu", batch_size=BATCH, apply_chat_template=chat,
            random_seed=0, numpy_random_seed=0, torch_random_seed=0, fewshot_random_seed=0,
        )  # fmt: skip
        assert output["results"] == written["results"], name
    assert set(found["results"]) == set(chosen)


def test_the_template_writes_bos_and_no_other_is_put_before_it(folder, tasks, tmp_path):
    """`add_bos_token` puts one where there is none."""
    import compress.pipeline.lm_eval_models as models

    for add in (None, True, False):
        lm = models.ModelpressLM(str(folder), device="cpu", add_bos_token=add)
        text = lm.apply_chat_template([{"role": "user", "content": "hi"}])
        assert lm.tok_encode(text).count(256) == 1
        assert lm.tok_batch_encode([text])[0][0].tolist().count(256) == 1


def test_files_that_its_table_printer_reads(folder, tasks, tmp_path):
    found = evaluate(
        folder, tasks=["local_all"], include_path=tasks, batch_size=BATCH,
        output_path=tmp_path / "out",
    )  # fmt: skip
    files = sorted((tmp_path / "out").rglob("*.json*"))
    assert found["files"] == [str(files[0])]
    results = json.loads(files[0].read_text(encoding="utf-8"))
    table = make_table(results)
    assert all(name in table for name in KINDS)
    assert results["config"]["model"] == results["model_source"] == "modelpress"
    assert results["model_name"] == str(folder)
    assert results["group_subtasks"] == {"local_all": list(KINDS)}
    assert not list((tmp_path / "out").rglob("samples_*"))  # not asked for


def test_its_own_command(folder, tasks, tmp_path, capfd, local_index):
    arguments = [
        "lm-eval", "--model", "modelpress", "--model_args", f"pretrained={folder}",
        "--include_path", str(tasks), "--tasks", "local_choice", "--batch_size", str(BATCH),
        "--seed", "0", "--output_path", str(tmp_path / "theirs"),
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "local_choice" in capfd.readouterr().out
    written, _ = of_files(tmp_path / "theirs")
    found = evaluate(folder, tasks=["local_choice"], include_path=tasks, batch_size=BATCH)
    ours = found["results"]["local_choice"]
    assert {m: written["results"]["local_choice"][f"{m},none"] for m in ours} == ours
    assert main(["lm-eval", "--model", "modelpresso", "--tasks", "demo_code"]) == 2
    assert main(["lm-eval", "run", "--nonsense"]) == 2


def test_what_a_checkpoint_cannot_be_loaded_as(folder):
    import compress.pipeline.lm_eval_models as models

    with refused(UsageError, "dtype", "float12"):
        models.ModelpressLM(str(folder), device="cpu", dtype="float12")
    with refused(UsageError, "--model modelpress", folder):
        models.ModelpressMultimodalLM(str(folder), device="cpu")


@pytest.mark.parametrize("kind", ["ModelpressLM", "ModelpressMultimodalLM"])
def test_arguments_that_nobody_reads_are_refused(folder, kind):
    import compress.pipeline.lm_eval_models as models

    with refused(UsageError, "--model_args", "'activation_bit'", "'activation_bits'"):
        getattr(models, kind)(str(folder), device="cpu", activation_bit=8)
    with refused(UsageError, "--model_args", "pretrained=FOLDER"):
        getattr(models, kind)(device="cpu")


def test_named_groups_have_their_tasks(tmp_path):
    """Of the papers' groups: which tasks, and how many examples in front of their items."""
    members = {
        "rsq_paper": dict.fromkeys(
            ["lambada_openai", "lambada_standard", "winogrande", "arc_challenge", "arc_easy",
             "hellaswag", "piqa", "truthfulqa_mc2"], 0,
        ) | {"mmlu": 5, "gsm8k_cot_llama": 8},
        "rsq_long_context": {"scrolls_quality": None},
        "vflowopt_paper": {"chartqa": None},
    }  # fmt: skip
    write_tasks(tmp_path)
    definition = (tmp_path / "local_choice.yaml").read_text(encoding="utf-8")
    for name in (name for group in members.values() for name in group):
        if name == "mmlu":
            inner = definition.replace("local_choice", "mmlu_inner")
            (tmp_path / "mmlu_inner.yaml").write_text(inner, encoding="utf-8")
            text = "group: mmlu\ntask: [mmlu_inner]\n"
        else:
            text = definition.replace("local_choice", name)
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    manager = TaskManager(include_path=[LOCAL_TASKS / "groups", tmp_path], include_defaults=False)
    for group, tasks in members.items():
        loaded = manager.load([group])
        assert set(loaded["group_map"][group]) == set(tasks)
        for name, task in loaded["tasks"].items():
            shots = tasks["mmlu" if name == "mmlu_inner" else name]
            assert shots is None or task.get_config("num_fewshot") == shots, name


def test_packed_weights_run_packed(tmp_path, tasks):
    """And hf, which makes them dense, rounds its sums otherwise."""
    import compress.pipeline.lm_eval_models as models
    from compress.kernels.linear import QuantLinear

    scheme = Scheme(bits=4, group_size=32)
    folder = quantise_folder(Path("recipes/demo/lm"), tmp_path / "packed", [scheme])
    chosen = ["local_choice", "local_answer", "local_text"]
    for packed in (True, False):
        lm = models.ModelpressLM(str(folder), device="cpu", packed=packed, batch_size=BATCH)
        assert any(isinstance(m, QuantLinear) for m in lm.model.modules()) == packed
        output = simple_evaluate(
            model=lm, tasks=chosen, random_seed=0, numpy_random_seed=0, torch_random_seed=0,
            task_manager=TaskManager(include_path=[tasks], include_defaults=False),
            fewshot_random_seed=0,
        )  # fmt: skip
        found = evaluate(
            folder, tasks=chosen, include_path=tasks, batch_size=BATCH, dense=not packed
        )
        for task in chosen:
            for metric, value in found["results"][task].items():
                theirs = output["results"][task][f"{metric},none"]
                assert theirs == ("N/A" if value is None else value), (packed, task, metric)


def test_pruned_visual_tokens_stay_pruned(tmp_path):
    import compress.pipeline.lm_eval_models as models

    folder = shutil.copytree("recipes/demo/vlm", tmp_path / "vlm")
    save_strategy(PruneStrategy(ratios=(0.2,)), folder)
    lm = models.ModelpressMultimodalLM(str(folder), device="cpu", batch_size=4)
    assert lm.model.visual_token_pruning is not None
    output = simple_evaluate(
        model=lm, tasks=["demo_vqa"], limit=8, apply_chat_template=True, random_seed=0,
        numpy_random_seed=0, torch_random_seed=0, fewshot_random_seed=0,
        task_manager=TaskManager(
            include_path=[LOCAL_TASKS], include_defaults=False, metadata={"seed": 0, "items": 8}
        ),
    )  # fmt: skip
    found = evaluate(folder, tasks=["demo_vqa"], limit=8, batch_size=4)
    plain = evaluate("recipes/demo/vlm", tasks=["demo_vqa"], limit=8, batch_size=4)
    assert plain["results"] != found["results"]
    theirs = output["results"]["demo_vqa"]
    assert theirs["exact_match,none"] == found["results"]["demo_vqa"]["exact_match"]
