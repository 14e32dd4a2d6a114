"""Pushing to a real HTTP server that speaks the hub's protocol, and reading back what it holds."""

import shutil

import pytest
import torch
import yaml
from huggingface_hub import HfApi, constants, snapshot_download

import compress
from compress.errors import CompressError
from compress.pipeline.publishing import export, push
from support.hub_server import hub_server
from support.refusals import refused
from support.tiny_checkpoints import WINDOWS

TOKEN = "hf_secretsecretsecret"


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


def test_what_was_pushed_loads_from_the_hub_with_the_same_logits(hub, result, tmp_path):
    report = pushed(hub, result, license="mit", base_model="maker/tiny", language="en")
    files = hub.repos["me/tiny-w4"]["main"]
    assert {file["path"] for file in report["files"]} == set(files)
    for name, data in files.items():
        assert data == (result / name).read_bytes(), name
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
    for name, data in hub.repos["me/tiny-w4"]["main"].items():
        assert data == (result / name).read_bytes(), name


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
