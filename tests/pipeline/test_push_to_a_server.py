"""Pushing to a real HTTP server that speaks the hub's protocol, and reading back what it holds."""

import json
import shutil

import pytest
import torch
import yaml
from huggingface_hub import HfApi, constants, snapshot_download

import compress
from compress.cli.main import main
from compress.errors import CompressError
from compress.pipeline.description import record_evaluation
from compress.pipeline.publishing import export, push
from compress.storage.files import read_json, write_json
from compress.storage.output_folder import files_below
from support.hub_server import hub_server
from support.refusals import refused
from support.tiny_checkpoints import WINDOWS

TOKEN = "hf_secretsecretsecret"
DOCUMENTS = {"README.md", "report.html", "modelpress.json", "recipe.yaml"}


@pytest.fixture(autouse=True)
def plain_lfs(monkeypatch):
    """The protocol of the server, which knows no Xet."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def hub():
    with hub_server(TOKEN) as server:
        yield server


@pytest.fixture
def result(packed, tmp_path):
    """A finished result that may be changed."""
    return shutil.copytree(packed().folder, tmp_path / "result")


def pushed(hub, folder, repo="me/tiny-w4", **options):
    return push(folder, repo, api=HfApi(endpoint=hub.url, token=TOKEN), **options)


def assert_same_files(files, folder):
    """All but what speaks of them, whose local paths stay at home."""
    assert set(files) == {file for file in files_below(folder) if not file.startswith(".")}
    for name, data in files.items():
        assert (data == (folder / name).read_bytes()) or name in DOCUMENTS, name


def contents(folder) -> dict[str, bytes]:
    return {file: (folder / file).read_bytes() for file in files_below(folder)}


def test_what_was_pushed_loads_from_the_hub_with_the_same_logits(hub, result, tmp_path):
    report = pushed(hub, result, license="mit", base_model="maker/tiny", language="en")
    files = hub.repos["me/tiny-w4"]["main"]
    assert {file["path"] for file in report["files"]} == set(files)
    assert_same_files(files, result)
    back = snapshot_download("me/tiny-w4", endpoint=hub.url, token=TOKEN, cache_dir=tmp_path / "c")
    ids = WINDOWS.input_ids
    with torch.no_grad():
        first, second = (compress.load(f)[0](input_ids=ids).logits for f in (result, back))
    assert torch.equal(first, second)


def test_the_card_speaks_of_the_repository(hub, result):
    pushed(hub, result, license="mit", base_model="maker/tiny", language="en")
    card = hub.repos["me/tiny-w4"]["main"]["README.md"].decode()
    fields = yaml.safe_load(card.split("---\n")[1])
    assert (fields["license"], fields["language"]) == ("mit", "en")
    assert (fields["base_model"], fields["base_model_relation"]) == ("maker/tiny", "quantized")
    assert 'compress.load("me/tiny-w4")' in card
    assert str(result) not in card
    # What was said once is known the next time.
    pushed(hub, result, "me/other")
    again = hub.repos["me/other"]["main"]["README.md"].decode()
    assert "maker/tiny" in again and 'compress.load("me/other")' in again


def test_a_card_that_was_edited_is_pushed_as_it_is(hub, result):
    (result / "README.md").write_text("# Mine\n")
    assert pushed(hub, result)["card_edited"]
    assert hub.repos["me/tiny-w4"]["main"]["README.md"] == b"# Mine\n"


def test_an_upload_that_was_cut_is_finished_by_repeating_it(hub, result, monkeypatch):
    """What has arrived is not sent again."""
    weights = (result / "model.safetensors").stat().st_size
    (result / "extra.gguf").write_bytes(b"x" * 1000)  # a second large file
    hub.cut[weights] = 1000
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with refused(CompressError, "me/tiny-w4") as raised:
        pushed(hub, result)
    assert TOKEN not in str(raised.value)
    assert hub.repos["me/tiny-w4"]["main"] == {}  # nothing half
    hub.cut.clear()
    sent = list(hub.uploads)
    pushed(hub, result)
    assert len(hub.uploads) == len(set(hub.uploads))  # each once over both
    assert set(sent) < set(hub.uploads)
    assert_same_files(hub.repos["me/tiny-w4"]["main"], result)


def test_branches_and_pull_requests(hub, result):
    pushed(hub, result)
    pushed(hub, result, revision="w4")
    assert hub.repos["me/tiny-w4"]["w4"].keys() == hub.repos["me/tiny-w4"]["main"].keys()
    url = pushed(hub, result, create_pr=True)["url"]
    assert "/discussions/" in url
    assert any(name.startswith("refs/pr/") for name in hub.repos["me/tiny-w4"])


def test_a_wrong_token_is_one_line(hub, result):
    hub.token = "hf_another"
    with refused(CompressError, "401", "hf auth login") as raised:
        pushed(hub, result)
    assert TOKEN not in str(raised.value)


def test_exports_have_a_card_and_the_names_that_their_users_expect(hub, packed, tmp_path):
    pytest.importorskip("gguf")
    source = packed().folder
    export(source, "gguf", tmp_path / "gguf", round_scales=True, requantise=True)
    pushed(hub, tmp_path / "gguf", "me/tiny-GGUF")
    files = hub.repos["me/tiny-GGUF"]["main"]
    (weights,) = [name for name in files if name.endswith(".gguf")]
    assert weights.startswith("tiny-Q") and weights != "model.gguf"
    card = files["README.md"].decode()
    assert "llama-cli -hf me/tiny-GGUF" in card and "ollama run hf.co/me/tiny-GGUF" in card
    assert "vllm" not in card and "transformers import" not in card
    export(source, "gptq", tmp_path / "gptq", round_scales=True)
    pushed(hub, tmp_path / "gptq", "me/tiny-gptq")
    card = hub.repos["me/tiny-gptq"]["main"]["README.md"].decode()
    assert 'GPTQModel.load("me/tiny-gptq")' in card
    assert yaml.safe_load(card.split("---\n")[1])["tags"][:2] == ["modelpress", "gptq"]


# ---- what stays at home -------------------------------------------------------------------------


def measured(folder, source, places):
    """Notes an evaluation with local paths in every place where a run or lm-eval writes some."""
    text, theirs = places / "our texts" / "eval.txt", places / "other-model"
    name = str(source).replace("/", "__")
    scores = {
        "results": {"demo": {"acc": 0.5}},
        "perplexity": {"value": 9.0, "mean_nll": 2.0, "line": "perplexity 9"},
        "baseline": {"results": {"demo": {"acc": 0.5}}},
        "files": [f"{folder}/eval/{name}/results_1.json"],
        "conditions": {
            "model": str(folder), "baseline": str(source), "limit": 3,
            "perplexity_dataset": f"{text} (held out)",
            "warnings": {f"pretrained={folder} appears to be odd, see {theirs}/a.json.": 2},
        },
    }  # fmt: skip
    record_evaluation(folder, scores)
    (folder / "eval" / name).mkdir()
    figures = {"model_name": str(source), "model_name_sanitized": name, "limit": None}
    figures |= {"config": {"model_args": {"pretrained": str(source)}}, "chat_template": "</s>/a"}
    write_json(folder / "eval" / name / "results_1.json", figures)
    tokens = {"name_or_path": str(theirs), "chat_template": "{{ '/etc/hosts is a file' }}"}
    config = read_json(folder / "config.json") | {"_name_or_path": str(source)}
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer_config.json", tokens)


def sent_text(hub, repo: str) -> dict[str, str]:
    return {
        name: data.decode()
        for name, data in hub.repos[repo]["main"].items()
        if not name.endswith((".safetensors", ".gguf"))
    }


@pytest.mark.parametrize("base", ["maker/tiny", None])
def test_local_paths_stay_at_home(hub, result, tmp_path, base):
    source = yaml.safe_load((result / "recipe.yaml").read_text())["model"]["path"]
    assert source.startswith("/")
    measured(result, source, tmp_path)
    before = contents(result)
    dry = pushed(hub, result, dry_run=True, base_model=base)
    assert contents(result) == before and not hub.repos
    report = pushed(hub, result, base_model=base)
    assert report["rewritten"] == dry["rewritten"]
    texts = sent_text(hub, "me/tiny-w4")
    for name, text in texts.items():
        assert str(tmp_path) not in text and source not in text, name
        assert "our texts" not in text and source.replace("/", "__") not in name + text, name
    called = base or "model"
    assert yaml.safe_load(texts["recipe.yaml"])["model"]["path"] == called
    assert json.loads(texts["modelpress.json"])["model"]["path"] == called
    assert json.loads(texts["config.json"])["_name_or_path"] == called
    assert json.loads(texts["tokenizer_config.json"]) == {
        "name_or_path": "other-model",
        "chat_template": "{{ '/etc/hosts is a file' }}",
    }
    conditions = json.loads(texts["eval/results.json"])["conditions"]
    assert (conditions["model"], conditions["baseline"]) == ("result", called)
    assert conditions["perplexity_dataset"] == "eval.txt (held out)"
    assert list(conditions["warnings"]) == ["pretrained=result appears to be odd, see a.json."]
    lm_eval = f"eval/{called.replace('/', '__')}/results_1.json"
    assert json.loads(texts[lm_eval])["model_name"] == called
    assert json.loads(texts[lm_eval])["chat_template"] == "</s>/a"
    assert set(report["rewritten"]["files"]) == set(texts) & (
        {*DOCUMENTS, "config.json", "tokenizer_config.json", "eval/results.json"}
    ) | {f"eval/{source.replace('/', '__')}/results_1.json"}
    # The folder here keeps its paths; what was said about the model is noted, as the card's name.
    after = contents(result)
    changed = {name for name in before if after[name] != before[name]}
    assert changed <= {"README.md", "report.html", "modelpress.json"}
    assert read_json(result / "modelpress.json")["model"]["path"] == source


def test_relative_paths_stay_at_home(hub, result):
    recipe = yaml.safe_load((result / "recipe.yaml").read_text())
    recipe["calibration"]["dataset"] = "priv/acme/chats.jsonl"
    (result / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    conditions = {"model": "priv/out", "baseline": "priv/lm"}
    conditions["perplexity_dataset"] = "priv/acme/held.txt (held out)"
    text = {"value": 9.0, "mean_nll": 2.0, "line": "perplexity 9"}
    noted = ["priv/out", "priv/lm", "priv/acme/held.txt"]
    record_evaluation(result, {"perplexity": text, "conditions": conditions, "local": noted})
    report = pushed(hub, result, base_model="maker/tiny")
    texts = sent_text(hub, "me/tiny-w4")
    assert not [name for name, sent in texts.items() if "priv" in sent]
    assert {*DOCUMENTS, "eval/results.json"} <= set(report["rewritten"]["files"])
    assert yaml.safe_load(texts["recipe.yaml"])["calibration"]["dataset"] == "chats.jsonl"


def test_a_card_of_ones_own_loses_the_paths_that_are_known(hub, result):
    source = yaml.safe_load((result / "recipe.yaml").read_text())["model"]["path"]
    text = f"# Mine\n\nMade of `{source}`, kept in /etc/hosts.\n"
    (result / "README.md").write_text(text)
    assert pushed(hub, result, base_model="maker/tiny")["card_edited"]
    card = hub.repos["me/tiny-w4"]["main"]["README.md"].decode()
    assert card == "# Mine\n\nMade of `maker/tiny`, kept in /etc/hosts.\n"
    assert (result / "README.md").read_text() == text


def test_a_push_that_fails_leaves_the_folder_as_it_was(hub, result):
    before = contents(result)
    hub.token = "hf_another"
    with refused(CompressError, "401"):
        pushed(hub, result, license="mit", base_model="maker/tiny")
    assert contents(result) == before


def test_a_folder_that_nobody_may_write_to_is_pushed(hub, result, monkeypatch):
    before = contents(result)
    monkeypatch.setattr("os.access", lambda *_: False)
    pushed(hub, result, base_model="maker/tiny")
    assert "maker/tiny" in hub.repos["me/tiny-w4"]["main"]["README.md"].decode()
    assert contents(result) == before


def test_the_command_says_how_many_paths_were_rewritten(result, capsys):
    assert main(["push", str(result), "me/tiny-w4", "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "local paths are sent as names alone, in README.md" in said
    assert "recipe.yaml" in said


def test_the_command_names_files_that_no_result_has(result, capsys):
    assert main(["push", str(result), "me/tiny-w4", "--dry-run"]) == 0
    assert "warning" not in capsys.readouterr().out
    (result / "token").write_text("x")
    assert main(["push", str(result), "me/tiny-w4", "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: sent too, though no result has such files: token" in said


def test_inspect_of_a_gguf_file_names_the_recipe_beside_it(packed, tmp_path, capsys):
    pytest.importorskip("gguf")
    made = export(packed().folder, "gguf", tmp_path / "g", round_scales=True, requantise=True)
    assert main(["inspect", str(made.path / "model.gguf")]) == 0
    said = "".join(capsys.readouterr().out.split())
    assert "recipe.yaml" in said and "model.gguf/recipe.yaml" not in said
