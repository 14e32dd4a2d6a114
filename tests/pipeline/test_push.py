"""What is pushed, what is refused, and that no token ever shows. Nothing here uses a network."""

import json
import shutil
import traceback
from functools import partial
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError

from compress.errors import CheckpointError, CompressError, DepthError, UsageError
from compress.pipeline import publishing
from compress.storage.safetensors import save_tensors
from support.refusals import refused

push = partial(publishing.push, any_folder=True)  # most folders here hold no quantised weight
TOKEN = "hf_secretsecretsecret"


class FakeApi:
    def __init__(self, error: Exception | None = None):
        self.calls, self.error = [], error

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        if self.error:
            raise self.error
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options["repo_id"], options))


class NoApi:
    """Any use is a failure."""

    def __getattr__(self, name):
        raise AssertionError(f"the network was used: {name}")


@pytest.fixture
def finished(tmp_path):
    import torch

    folder = tmp_path / "out"
    (folder / "eval").mkdir(parents=True)
    save_tensors(folder / "model.safetensors", {"w": torch.zeros(4)})
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\ntags: [modelpress]\n---\n# Model\n" + "text\n" * 50)
    (folder / "eval/demo.json").write_text("{}")
    return folder


def test_a_push_creates_the_repository_and_sends_the_folder(finished):
    api = FakeApi()
    report = push(finished, "me/model", private=True, token=TOKEN, api=api)
    (create, name, options), (upload, _, sent) = api.calls
    assert (create, name, upload) == ("create_repo", "me/model", "upload_folder")
    assert options["private"] is True
    assert sent["folder_path"] == str(finished)
    assert report["url"] == "https://huggingface.co/me/model"
    assert TOKEN not in repr(report)


def test_a_dry_run_lists_and_touches_no_network(finished):
    report = push(finished, "me/model", dry_run=True, api=NoApi())
    paths = [file["path"] for file in report["files"]]
    assert paths == ["README.md", "config.json", "eval/demo.json", "model.safetensors"]
    assert report["bytes"] == sum((finished / path).stat().st_size for path in paths)
    assert report["card"][:2] == ["---", "tags: [modelpress]"]
    assert 3 < len(report["card"]) < 50
    assert report["dry_run"] is True


def test_hidden_and_temporary_files_stay_at_home(finished):
    before = push(finished, "me/model", dry_run=True)["files"]
    for name in (".env", "eval/.cache", "model.safetensors.tmp", ".git/config"):
        (finished / name).parent.mkdir(exist_ok=True)
        (finished / name).write_text("secret")
    assert push(finished, "me/model", dry_run=True)["files"] == before


def test_a_link_that_leads_out_of_the_folder_is_refused(finished, tmp_path):
    (tmp_path / "secret").write_text("x")
    (finished / "copy.json").symlink_to(finished / "config.json")
    (finished / ".hidden").symlink_to(tmp_path / "secret")  # which stays at home
    push(finished, "me/model", dry_run=True)
    (finished / "eval/passwd.json").symlink_to(tmp_path / "secret")
    for dry_run in (True, False):
        with refused(UsageError, "eval/passwd.json", tmp_path / "secret", "link"):
            push(finished, "me/model", dry_run=dry_run, api=NoApi())


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(finished, tmp_path):
    snapshot, blobs = tmp_path / "m" / "snapshots" / "0a", tmp_path / "m" / "blobs"
    blobs.mkdir(parents=True)
    finished.rename(blobs / "all")
    snapshot.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (snapshot / file).symlink_to(f"../../blobs/all/{file}")
    assert len(push(snapshot, "me/model", dry_run=True)["files"]) == 2


def test_files_that_no_result_has_are_named(finished):
    usual = ["tokenizer.json", "chat_template.jinja", "LICENSE", "eval/lm/r.json", "eval/a.png"]
    for name in (*usual, "model-00001-of-00002.safetensors", "additional_chat_templates/a.jinja"):
        (finished / name).parent.mkdir(exist_ok=True)
        shutil.copy(finished / "model.safetensors", finished / name)
    assert push(finished, "me/model", dry_run=True)["foreign"] == []
    for name in ("token", "notes.txt", "training.json"):
        (finished / name).write_text("x")
    (finished / "modelpress.json").write_text(json.dumps({"files": ["training.json"]}))
    assert push(finished, "me/model", dry_run=True)["foreign"] == ["notes.txt", "token"]


@pytest.mark.parametrize(
    "base_model", ["not an id", "/data/real", "a/b/c", "", "./x", "../x", "~/x", "me/", "x.git"]
)
def test_a_base_model_that_is_no_id_is_refused_first(tmp_path, base_model):
    with refused(UsageError, "base model", repr(base_model)):
        push(tmp_path / "absent", "me/model", base_model=base_model, api=NoApi())


@pytest.mark.parametrize("base_model", ["gpt2", "maker/tiny-1.5B"])
def test_a_base_model_has_an_owner_or_is_an_old_one(finished, base_model):
    push(finished, "me/model", base_model=base_model, dry_run=True)


@pytest.mark.parametrize(
    "repo_id", ["a/b/c", "me/..", "", "model", "me/na me", "-x/y", "me/model.git"]
)
def test_ids_that_are_none_are_refused(finished, repo_id):
    with refused(UsageError, repr(repo_id)):
        push(finished, repo_id, api=NoApi())


def test_a_config_that_nobody_can_read_is_refused(finished):
    (finished / "config.json").write_text("[" * 100_000)
    with refused(DepthError, "config.json"):
        push(finished, "me/model", dry_run=True, api=NoApi())


def test_unfinished_folders_are_refused(finished, tmp_path):
    with refused(UsageError, "absent"):
        push(tmp_path / "absent", "me/model", api=NoApi())
    for begun in ("final", "journal.jsonl"):
        (finished / ".modelpress" / begun).mkdir(parents=True)
        with refused(UsageError, finished, ".modelpress"):
            push(finished, "me/model", api=NoApi())
        (finished / ".modelpress" / begun).rmdir()
    weights = (finished / "model.safetensors").read_bytes()
    (finished / "model.safetensors").write_bytes(weights[:-1])
    with refused(CheckpointError, "model.safetensors", "truncated"):
        push(finished, "me/model", dry_run=True)
    (finished / "model.safetensors").write_bytes(weights)
    (finished / "config.json").unlink()
    with refused(UsageError, "config.json"):
        push(finished, "me/model", dry_run=True)


def http_error(status: int) -> HfHubHTTPError:
    headers = {"authorization": f"Bearer {TOKEN}"}
    request = SimpleNamespace(method="POST", url="https://x", headers=headers)
    response = SimpleNamespace(status_code=status, headers={}, request=request)
    return HfHubHTTPError(f"{status} Client Error\nfor {TOKEN}\n(Request ID: 1)", response=response)


@pytest.mark.parametrize("token", [TOKEN, None])  # None: the stored one
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (http_error(401), "hf auth login"),
        (http_error(403), "permissions"),
        (http_error(404), "owner"),
        (http_error(500), "again"),
        (ConnectionError(f"Name or service not known for {TOKEN}"), "network"),
    ],
)
def test_answers_of_the_hub_are_one_line_without_the_token(finished, error, expected, token):
    with refused(CompressError, "me/model", expected) as raised:
        push(finished, "me/model", token=token, api=FakeApi(error))
    shown = traceback.format_exception(raised.value, chain=True)
    assert not any(TOKEN in line for line in shown)
