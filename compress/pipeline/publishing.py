"""Handing a result on: exports with a card of their own, and pushing to a hub under a name.

    export("out", "gguf", "out-gguf")
    push("out-gguf", "me/model-GGUF", license="apache-2.0", base_model="maker/model")

A push sends card and report under the repository's name, without local paths (`outgoing`) and
without the excerpt of a calibration text that is somebody's own. What it says about the model goes
into the folder's own documents once all has arrived: a push that fails leaves the folder as it was.
A card that was edited by hand is sent as it is, but for local paths.
"""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from compress.checkpoint import export as exporting
from compress.checkpoint import hub
from compress.checkpoint.export import ExportResult
from compress.checkpoint.inspect import inspect
from compress.errors import UsageError
from compress.pipeline.description import COMPRESSED_TENSORS, describe, edited, rewrite, said_by
from compress.pipeline.outgoing import Outgoing
from compress.storage.files import read_json, write_json
from compress.storage.output_folder import PROVENANCE, files_below


def export(
    folder: str | Path,
    format: str,
    output: str | Path,
    *,
    overwrite: bool = False,
    round_scales: bool = False,
    requantise: bool = False,
    keep_embeddings: bool = False,
    shard_size: str = "5GB",
) -> ExportResult:
    """`compress.checkpoint.export.export`, with a card and a report beside the weights.

    The figures of the exported checkpoint are in them where the export holds the same numbers:
    those of one that had to change some (`requantise`, `round_scales`) were not measured.
    """
    return exporting.export(
        folder,
        format,
        output,
        overwrite=overwrite,
        round_scales=round_scales,
        requantise=requantise,
        keep_embeddings=keep_embeddings,
        shard_size=shard_size,
        document=lambda final: _describe_export(final, Path(folder), Path(output), requantise),
    )


def _describe_export(final: Path, source: Path, output: Path, requantise: bool) -> None:
    history = read_json(final / PROVENANCE) or {}
    changed = requantise or history["export"]["scales"]["changed"]
    taken = [] if changed else history.get("evaluations") or []
    history |= {"evaluations": [of | {"before_export": COMPRESSED_TENSORS} for of in taken]}
    history.pop("card_digest", None)  # of the card of the checkpoint that was exported
    with said_by(source / PROVENANCE):
        history = describe(final, final, history, output.resolve().name)
    write_json(final / PROVENANCE, history | {"files": sorted({*files_below(final), PROVENANCE})})


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    api: HfApi | None = None,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    language: str | None = None,
    any_folder: bool = False,
) -> dict[str, Any]:
    """Uploads a checkpoint folder as the model repository `repo_id`, creating it if need be.

    Args:
        revision: the branch; None: main.
        create_pr: as a pull request instead of a commit.
        base_model, license, language: for the card, of a model whose folder does not say them.
        any_folder: also one that holds no compressed checkpoint.
        token, api: as for `compress.checkpoint.hub.push`.

    Returns what that gives, and "card_edited": whether README.md was left as somebody edited it;
    "unquoted": whether an excerpt of the calibration text is left out; "rewritten": {"paths",
    "files"}, how many local paths have other names in what is sent, and in which files; "foreign":
    the files that are sent and are no part of what modelpress writes, or models usually have.

    Raises:
        UsageError: a folder or an id that cannot be pushed, a base model that is no id, a link that
            leads out of the folder.
        CheckpointError: a config.json that cannot be read.
        CompressError: what the hub answers.
    """
    folder = Path(folder)
    hub.check_repo_id(repo_id)
    if base_model is not None:
        hub.check_model_id(base_model)
    with hub.nobody_writing(folder):
        hub.check_finished(folder)
        hub.check_links(folder)
        found = inspect(folder)
        if not any_folder and not _compressed(found, folder):
            raise UsageError(
                f"{folder} is no compressed checkpoint: it is not quantised and prunes nothing; "
                "push it all the same with --any"
            )
        given = {"base_model": base_model, "license": license, "language": language}
        history = read_json(folder / PROVENANCE) or {}
        known = history.get("card")
        said = known if isinstance(known, dict) else {}
        said = said | {key: value for key, value in given.items() if value is not None}
        history["card"] = said
        by_hand = edited(folder, history)
        listed = history.get("files")
        foreign = hub.foreign_files(folder, listed if isinstance(listed, list) else ())
        outgoing = Outgoing(folder, history, found["recipe"] or {}, repo_id)
        with outgoing.folder() as place:
            report = hub.upload(
                place,
                repo_id,
                private=private,
                dry_run=dry_run,
                token=token,
                api=api,
                revision=revision,
                create_pr=create_pr,
                names=_gguf_names(folder, repo_id, found),
            )
        told = not by_hand or said != (known or {})
        if told and not dry_run and (folder / PROVENANCE).is_file() and os.access(folder, os.W_OK):
            rewrite(folder, history, name=repo_id)
    return report | {
        "card_edited": by_hand,
        "foreign": foreign,
        "unquoted": outgoing.unquoted,
        "rewritten": {"paths": outgoing.names.count, "files": sorted(outgoing.files)},
    }


def _compressed(found: dict[str, Any], folder: Path) -> bool:
    """Whether a folder's weights are quantised, or it prunes visual tokens."""
    quantised = any(module["symmetric"] is not None for module in found["modules"])
    return quantised or (folder / "pruning.json").is_file()


def _gguf_names(folder: Path, repo_id: str, found: dict[str, Any]) -> dict[str, str]:
    """`NAME-Q4_0.gguf` for the one model of a GGUF export: how its users expect it."""
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if found["format"] != "gguf" or not files:
        return {}
    name, kind = repo_id.rpartition("/")[2].removesuffix("-GGUF"), _main_type(found)
    return {file: file.replace("model", f"{name}-{kind}", 1) for file in files}


def _main_type(found: dict[str, Any]) -> str:
    """llama.cpp's name of the type that most weights inside the layers have."""
    weights: dict[str, int] = {}
    for module in found["modules"]:
        if module["name"].startswith("blk."):
            size = module["shape"][0] * module["shape"][1]
            weights[module["type"]] = weights.get(module["type"], 0) + size
    return max(weights, key=lambda kind: weights[kind])
