"""Publishing a finished checkpoint on the Hugging Face hub.

Policy: only what is finished is pushed (a config, whole weights, no journal of a run under way);
hidden and temporary files stay at home; a link that leads out of the folder is refused, and what
no result usually holds is named; and no token is ever part of a message. A dry run lists
what would be sent and reaches for no network.

    check_repo_id("me/model-w4")
    with nobody_writing(folder):
        check_finished(folder)
        check_links(folder)
        foreign_files(folder, ["notes.txt"])     # those that nobody expects there
        upload(folder, "me/model-w4", private=True, dry_run=True)["bytes"]
"""

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import HFValidationError, filter_repo_objects, validate_repo_id

from compress.checkpoint.quantization_config import checked_section, read_config
from compress.errors import CompressError, UsageError
from compress.models.config_values import without_names
from compress.storage.lease import WORK_FOLDER, lease
from compress.storage.output_folder import COMPANIONS, DESCRIPTIONS, WEIGHTS, unfinished
from compress.storage.safetensors import CheckpointReader

# What a model's folder usually holds; and what a result has of its own, at whatever place.
USUAL = (
    *WEIGHTS,
    *COMPANIONS,
    *DESCRIPTIONS,
    "config.json",
    "*_config.json",
    "vocab.*",
    "*.tiktoken",
    "*.jinja",
    "*.md",
    "*.png",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
    "eval/*.json",
    "eval/*.jsonl",
)
STAY_HOME = [".*", "*/.*", "*.tmp", "__pycache__/*", "*/__pycache__/*"]
CARD = "README.md"
CARD_LINES = 12
LARGE = 20_000_000_000  # bytes, of a folder that is sent in several commits
MESSAGE = "Upload a model compressed with modelpress"
# What the hub's answer means for the person, by HTTP status.
REMEDIES = {
    401: "log in with `hf auth login`, or give a token that may write",
    403: "this token may not write there: check its permissions and the owner's name",
    404: "there is no such owner or repository for this token: check the name",
    409: "the repository exists and cannot be changed",
    413: "a file is larger than the hub takes: use a smaller save.shard_size",
    429: "the hub asks for fewer requests: try again in some minutes",
}


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    api: HfApi | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    names: Mapping[str, str] | None = None,
    card: str | None = None,
) -> dict[str, Any]:
    """Uploads a finished folder that this process holds as the model repository `repo_id`.

    An upload that was cut off sends what is missing when it is repeated: files that the hub has are
    told by their hashes. Folders of more than LARGE bytes go in several commits.

    Args:
        token: None takes the one that `hf auth login` stored. api: an HfApi instead of a new one.
        revision: the branch, made if need be. create_pr: as a pull request.
        names: of files that have another name in the repository.
        card: what README.md says; None: what is in the folder.

    Returns {"repo_id", "private", "revision", "files": [{"path", "bytes"}], "bytes", "dry_run"}
    and, of a dry run, "card" (the first lines of README.md), else "url".

    Raises CompressError for what the hub answers.
    """
    names = names or {}
    files = _files(folder, names)
    report: dict[str, Any] = {
        "repo_id": repo_id,
        "private": private,
        "revision": revision,
        "files": files,
        "bytes": sum(file["bytes"] for file in files),
        "dry_run": dry_run,
    }
    if dry_run:
        readme = folder / CARD
        if card is None:
            card = readme.read_text(encoding="utf-8") if readme.is_file() else ""
        return report | {"card": card.splitlines()[:CARD_LINES]}
    if api is None:
        api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        sent = _send(api, folder, repo_id, report["bytes"], revision, create_pr, names)
    except Exception as error:
        # No cause is chained: the trace of a request can hold its headers, and so the token.
        raise CompressError(_explain(error, repo_id, token)) from None
    return report | {"url": sent or str(url)}


def _send(
    api: HfApi,
    folder: Path,
    repo_id: str,
    nbytes: int,
    revision: str | None,
    create_pr: bool,
    names: Mapping[str, str],
) -> str | None:
    """Sends the files; the address of the pull request, if it is one."""
    in_parts: Callable[..., None] | None = getattr(api, "upload_large_folder", None)  # before 2.0
    if in_parts is not None and nbytes > LARGE and not create_pr and not names:
        in_parts(
            repo_id=repo_id,
            folder_path=folder,
            repo_type="model",
            revision=revision,
            ignore_patterns=STAY_HOME,
            print_report=False,
        )
        return None
    if names:
        commit = api.create_commit(
            repo_id,
            [
                CommitOperationAdd(names.get(path, path), str(folder / path))
                for path in _paths(folder)
            ],
            commit_message=MESSAGE,
            repo_type="model",
            revision=revision,
            create_pr=create_pr,
        )
    else:
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            repo_type="model",
            commit_message=MESSAGE,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=STAY_HOME,
        )
    return getattr(commit, "pr_url", None)


@contextmanager
def nobody_writing(folder: Path) -> Iterator[None]:
    """Holds the folder, so that what is sent is one result. UsageError if another process does."""
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}")
    if not os.access(folder, os.W_OK):
        yield
        return
    with lease(folder):
        yield


def check_repo_id(repo_id: str) -> None:
    """UsageError for what is no repository id."""
    try:
        validate_repo_id(repo_id)
        whole = "/" in repo_id
    except HFValidationError:
        whole = False
    if not whole:
        raise UsageError(
            f"{repo_id!r} is not a repository id: expected owner/name, of letters, digits, "
            f"'-', '_' and '.'"
        )


def check_model_id(model: str) -> None:
    """UsageError for what the hub cannot call a model: it takes `owner/name`, and older `name`."""
    try:
        validate_repo_id(model)
    except HFValidationError:
        raise UsageError(
            f"base model {model!r} is no id of the hub: expected owner/name, or one name such as "
            "gpt2, of letters, digits, '-', '_' and '.'"
        ) from None


def check_finished(folder: Path) -> None:
    """UsageError for a folder that is no finished checkpoint, CheckpointError for a damaged one."""
    if unfinished(folder):
        raise UsageError(
            f"{folder} holds an unfinished run ({WORK_FOLDER}): finish it by running the recipe "
            f"again"
        )
    if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        return
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json: it is not a finished checkpoint")
    checked_section(read_config(folder), folder / "config.json")  # nobody could load another
    CheckpointReader(folder)  # a truncated or missing shard is noticed here, not by those who load


def check_links(folder: Path) -> None:
    """UsageError for a file that would be sent and lies elsewhere: a link that leads out of the
    folder. A snapshot in the hub's cache links to the blobs beside it."""
    inside = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        inside.append(folder.resolve().parents[1] / "blobs")
    for path in _paths(folder):
        target = (folder / path).resolve()
        if not any(target.is_relative_to(place) for place in inside):
            raise UsageError(
                f"{folder / path} is a link to {target}, outside the folder: take it away, or put "
                "a copy in its place"
            )


def foreign_files(folder: Path, known: Collection[str] = ()) -> list[str]:
    """What would be sent and is neither known nor among what such folders usually hold."""
    return [
        path
        for path in _paths(folder)
        if path not in known and not any(fnmatch(path, usual) for usual in USUAL)
    ]


def _files(folder: Path, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """What will be sent, by its names in the repository."""
    return [
        {"path": names.get(path, path), "bytes": (folder / path).stat().st_size}
        for path in _paths(folder)
    ]


def _paths(folder: Path) -> list[str]:
    """What upload_folder will take with STAY_HOME: its own filter, so the lists are the same."""
    paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return list(filter_repo_objects(paths, ignore_patterns=STAY_HOME))


def _explain(error: Exception, repo_id: str, token: str | None) -> str:
    """One line without the token: what the hub said, and what to do about it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = " ".join(str(error).split())
    reason = re.sub(r"\bhf_\w+", "<token>", reason.replace(token, "<token>") if token else reason)
    reason = reason[:200]  # cut last, so that no half of a token is left over
    if status is not None:
        remedy = REMEDIES.get(status, "try again later")
        return f"the hub refused {repo_id} (HTTP {status}): {remedy} [{reason}]"
    return (
        f"{repo_id} could not be reached ({without_names(reason)}): check the network, "
        f"and that HF_HUB_OFFLINE is not set"
    )
