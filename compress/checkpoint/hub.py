"""Publishing a finished checkpoint on the Hugging Face hub.

Policy: only what is finished is pushed (a config, whole weights, no journal of a run under way);
hidden and temporary files stay at home; and no token is ever part of a message. A dry run lists
what would be sent and reaches for no network.

    push("out", "me/model-w4", private=True, dry_run=True)["bytes"]
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, filter_repo_objects, validate_repo_id

from compress.checkpoint.quantization_config import checked_section, read_config
from compress.errors import CompressError, UsageError
from compress.models.config_values import without_names
from compress.storage.lease import WORK_FOLDER, lease
from compress.storage.output_folder import FINAL
from compress.storage.safetensors import CheckpointReader

STAY_HOME = [".*", "*/.*", "*.tmp", "__pycache__/*", "*/__pycache__/*"]
CARD = "README.md"
CARD_LINES = 12
# What the hub's answer means for the person, by HTTP status.
REMEDIES = {
    401: "log in with `hf auth login`, or give a token that may write",
    403: "this token may not write there: check its permissions and the owner's name",
    404: "there is no such owner or repository for this token: check the name",
    409: "the repository exists and cannot be changed",
    413: "a file is larger than the hub takes: use a smaller save.shard_size",
    429: "the hub asks for fewer requests: try again in some minutes",
}


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    api: HfApi | None = None,
) -> dict[str, Any]:
    """Uploads a checkpoint folder as the model repository `repo_id`, creating it if need be.

    token: None takes the one that `hf auth login` stored. api: an HfApi to use instead of a new
    one. Returns {"repo_id", "private", "files": [{"path", "bytes"}], "bytes", "dry_run"} and, of a
    dry run, "card" (the first lines of README.md), else "url". Raises UsageError for a folder or an
    id that cannot be pushed, CheckpointError for a config.json that cannot be read, CompressError
    for what the hub answers.
    """
    folder = Path(folder)
    _check_repo_id(repo_id)
    with _nobody_writing(folder):
        return _pushed(folder, repo_id, private, dry_run, token, api)


@contextmanager
def _nobody_writing(folder: Path) -> Iterator[None]:
    """Holds the folder, so that what is sent is one result. UsageError if another process does."""
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}")
    if not os.access(folder, os.W_OK):
        yield
        return
    with lease(folder):
        yield


def _pushed(
    folder: Path, repo_id: str, private: bool, dry_run: bool, token: str | None, api: HfApi | None
) -> dict[str, Any]:
    _check_finished(folder)
    files = _files(folder)
    report: dict[str, Any] = {
        "repo_id": repo_id,
        "private": private,
        "files": files,
        "bytes": sum(file["bytes"] for file in files),
        "dry_run": dry_run,
    }
    if dry_run:
        card = folder / CARD
        lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
        return report | {"card": lines[:CARD_LINES]}
    if api is None:
        api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            repo_type="model",
            commit_message="Upload a model compressed with modelpress",
            ignore_patterns=STAY_HOME,
        )
    except Exception as error:
        # No cause is chained: the trace of a request can hold its headers, and so the token.
        raise CompressError(_explain(error, repo_id, token)) from None
    return report | {"url": str(url)}


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UsageError(
            f"{repo_id!r} is not a repository id: expected owner/name, of letters, digits, "
            f"'-', '_' and '.'"
        ) from None


def _check_finished(folder: Path) -> None:
    # A run that has only its evaluation before it has neither.
    if any((folder / WORK_FOLDER / name).exists() for name in ("journal.jsonl", FINAL)):
        raise UsageError(
            f"{folder} holds an unfinished run ({WORK_FOLDER}): finish it by running the recipe "
            f"again"
        )
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json: it is not a finished checkpoint")
    checked_section(read_config(folder), folder / "config.json")  # nobody could load another
    CheckpointReader(folder)  # a truncated or missing shard is noticed here, not by those who load


def _files(folder: Path) -> list[dict[str, Any]]:
    """What upload_folder will take with STAY_HOME: its own filter, so the lists are the same."""
    paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    kept = filter_repo_objects(paths, ignore_patterns=STAY_HOME)
    return [{"path": path, "bytes": (folder / path).stat().st_size} for path in kept]


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
