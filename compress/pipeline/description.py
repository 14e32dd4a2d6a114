"""What describes a finished folder: its card and its report, made of the folder's own files.

A run writes them with the result; a later evaluation, an export and a push make them again, with
its figures, for its format, under its name. The facts are those of modelpress.json, of recipe.yaml
and of the weights' headers, so the documents can be made as often as is needed.

    evaluations   in modelpress.json, the newest first; one that measures what an earlier one has
                  under equal conditions takes its place
    local         in modelpress.json: which names of the recipe were files or folders of the machine
                  that made it; a name as short as `models/tiny` could be one of the hub's
    card          in modelpress.json: what only a person knows, `base_model`, `license`, `language`
    card_digest   in modelpress.json: of the README.md written last. Another one was edited by hand,
                  and stays

    record_evaluation(Path("out"), scores)           # -> the files that were written
"""

import copy
import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.checkpoint.gguf.inspect import gguf_chat_template
from compress.checkpoint.inspect import inspect
from compress.errors import CheckpointError, CompressError
from compress.eval.page import write_report
from compress.pipeline.card import bits_summary, model_card
from compress.pipeline.journal import LayerFacts
from compress.quantization.token_weights import WeightFacts
from compress.storage.files import read_json, write_json, write_text
from compress.storage.lease import WORK_FOLDER, lease
from compress.storage.output_folder import PROVENANCE, replace_documents, tidy, unfinished

CARD, REPORT = "README.md", "report.html"
RESULTS = "eval/results.json"
COMPRESSED_TENSORS = "compressed-tensors"
# What modelpress.json has beside provenance.
APART = (
    "layers",
    "token_sample",
    "files",
    "local",
    "evaluations",
    "card",
    "card_digest",
    "multimodal",
)
# Conditions that say which folder was measured, how fast, and what came of it, and not how.
ASIDE = ("model", "baseline", "batch_size", "cache_requests", "ranks", "warnings")
# Conditions of the model, whatever it was asked; those of the tasks are all others.
OF_THE_MODEL = ("device", "dtype", "linears", "baseline_linears", "activation_bits")
BY_TASK = ("samples", "shots", "task_versions")
# Conditions that are told only where they were asked for: elsewhere they were not.
ASKED_FOR = (
    "activation_bits",
    "add_bos_token",
    "chat_template_name",
    "gen_kwargs",
    "max_length",
    "metadata",
    "system_instruction",
)
# What a text's figures depend on, beside the text.
OF_THE_TEXT = ("tokens", "windows", "length", "stride", "bos", "unit", "basis")


def facts_of(
    folder: Path,
    history: Mapping[str, Any],
    name: str | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `model_card` and `write_report` take, of a folder whose modelpress.json is `history`.

    Args:
        name: how the documents call it; None: as its folder.
        recipe: what it was made by; None: what its recipe.yaml says.
    """
    found = inspect(folder)
    recipe = recipe or found["recipe"] or {}
    said = history.get("card") or {}
    evaluations = list(history.get("evaluations") or [])
    export = history.get("export") or {}
    if export and "differs" not in export:  # before it was noted which figures an export has taken
        evaluations = [of | {"before_export": COMPRESSED_TENSORS} for of in evaluations]
    path = (recipe.get("model") or {}).get("path")
    kind = str((read_json(folder / "config.json") or {}).get("model_type", ""))
    return {
        "name": name or folder.resolve().name,
        "base_model": said.get("base_model") or path,
        "local_model": None if path is None else _lay_here(path, said, history),
        "card": said,
        "recipe": recipe,
        "format": found["format"],
        "files": [file.name for file in sorted(folder.glob("*.gguf"))],
        "modules": found["modules"],
        "bits": bits_summary(found["modules"], found["format"], kind),
        "bytes": (history.get("bytes") or {}) | found["bytes"],
        "evaluation": evaluations[0] if evaluations else {},
        "earlier": evaluations[1:],
        "provenance": {key: value for key, value in history.items() if key not in APART},
        "multimodal": bool(history.get("multimodal")),
        "pruning": history.get("pruning"),
        "layers": module_rows(history.get("layers") or []),
        "token_sample": {
            "tokens": (history.get("token_sample") or {}).get("tokens") or [],
            "weights": {
                layer["layer"]: layer["token_weights"]
                for layer in history.get("layers") or []
                if layer.get("token_weights")
            },
        },
        "notes": export.get("notes") or [],
        "export": {"differs": export.get("differs")} if export else None,
        "chat": has_chat_template(folder),
    }


def _lay_here(path: str, said: Mapping[str, Any], history: Mapping[str, Any]) -> bool | None:
    """Whether the base model is a folder of whoever made the result; None: nobody noted it."""
    if said.get("base_model"):
        return False
    return path in history["local"] if "local" in history else None


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer or the processor of a folder, or of its GGUF file, has one."""
    if any(folder.glob("chat_template*")):
        return True
    files = sorted(folder.glob("*.gguf"))
    if files and not any(folder.glob("*.safetensors")):
        return gguf_chat_template(files[0])
    return bool((read_json(folder / "tokenizer_config.json") or {}).get("chat_template"))


@contextmanager
def said_by(history: Path) -> Iterator[None]:
    """Documents are made of what this file says; CheckpointError for what it cannot mean."""
    try:
        yield
    except CompressError:
        raise
    except Exception as error:  # what a wrong value sets off is of any kind
        raise CheckpointError(
            f"{history} holds what modelpress does not write: take it away, or put it back "
            "as it was"
        ) from error


def describe(
    folder: Path,
    weights: Path,
    history: dict[str, Any],
    name: str | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes card and report to `folder`, about the checkpoint in `weights`.

    Returns `history` with the digest of the card. A card that was edited by hand stays. `name`,
    `recipe`: as for `facts_of`.
    """
    facts = facts_of(weights, history, name, recipe)
    card = model_card(facts)
    write_report(folder / REPORT, facts)
    if not edited(weights, history):
        write_text(folder / CARD, card)
        history = history | {"card_digest": hashlib.sha256(card.encode()).hexdigest()}
    return history


def edited(folder: Path, history: Mapping[str, Any]) -> bool:
    """Whether the folder's card is another than the one that was written last."""
    card = folder / CARD
    digest = history.get("card_digest")
    return card.is_file() and digest != hashlib.sha256(card.read_bytes()).hexdigest()


def record_evaluation(folder: Path, scores: Mapping[str, Any]) -> list[str]:
    """Puts the figures of an evaluation into a finished folder's documents.

    Returns the files that were written, none for a folder that modelpress did not finish.

    Raises UsageError if another process writes to the folder.
    """
    if not (folder / PROVENANCE).is_file():
        return []
    with lease(folder):
        if unfinished(folder):
            return []
        history = read_json(folder / PROVENANCE) or {}
        known = history.get("evaluations") or []
        return rewrite(folder, history | {"evaluations": merged(scores, known)}, scores)


def rewrite(
    folder: Path,
    history: dict[str, Any],
    scores: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> list[str]:
    """Makes the documents of a folder that this process holds again, and moves them in.

    Returns the files that were written, modelpress.json last.
    """
    documents = folder / WORK_FOLDER / "documents"
    shutil.rmtree(documents, ignore_errors=True)
    documents.mkdir(parents=True)
    with said_by(folder / PROVENANCE):
        history = describe(documents, folder, history, name)
    written = [file for file in (CARD, REPORT) if (documents / file).is_file()]
    if scores is not None:
        write_results(documents, scores)
        written.append(RESULTS)
    history["files"] = sorted({*history.get("files", []), *written, PROVENANCE})
    write_json(documents / PROVENANCE, history)
    replace_documents(documents, folder)
    tidy(folder)
    return [*written, PROVENANCE]


def write_results(folder: Path, scores: Mapping[str, Any]) -> None:
    """The figures of an evaluation, as `compress.evaluate` gives them, in a file of their own."""
    (folder / RESULTS).parent.mkdir(exist_ok=True)
    write_json(folder / RESULTS, scores)


def merged(scores: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations with a new one in front, and without what it measures anew.

    Of an earlier one it takes the place of tasks that both have under equal conditions, and of the
    same text cut alike, unless the earlier one has a baseline's figures beside it, or those by
    position, and this one has not. What is left without any figure goes.
    """
    kept = []
    for earlier in known:
        rest = _without(earlier, scores)
        if rest.get("results") or rest.get("perplexity"):
            kept.append(rest)
    return [dict(scores), *kept]


def _without(earlier: Mapping[str, Any], newer: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation less what a newer one measures alike."""
    rest: dict[str, Any] = copy.deepcopy(dict(earlier))
    if rest.get("baseline") and not newer.get("baseline"):
        return rest
    baseline, difference = rest.get("baseline", {}), rest.get("difference", {})
    if _same_text(earlier, newer):
        for key in ("perplexity", "kl", "windows", "by_position"):
            rest.pop(key, None)
        baseline.pop("perplexity", None)
        difference.pop("mean_nll", None)
    for task in newer.get("results") or {}:
        if _same_task(task, earlier, newer):
            for part in (rest, baseline, difference):
                part.get("results", {}).pop(task, None)
    return rest


def _same_text(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether a newer evaluation `b` has all of what `a` has of one text, cut alike."""
    ours, theirs = a.get("perplexity"), b.get("perplexity")
    if not ours or not theirs or ("by_position" in a and "by_position" not in b):
        return False
    return _agree(ours, theirs, OF_THE_TEXT) and _agree(
        a.get("conditions") or {}, b.get("conditions") or {}, (*OF_THE_MODEL, "perplexity_dataset")
    )


def _same_task(task: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two evaluations put a task alike, as far as both say how."""
    ours, theirs = a.get("conditions") or {}, b.get("conditions") or {}
    others = (ours.keys() | theirs.keys()) - {*ASIDE, *BY_TASK, "perplexity_dataset"}
    if not _agree(ours, theirs, others):
        return False
    parts = ((ours.get(key) or {}, theirs.get(key) or {}) for key in BY_TASK)
    return all(_agree(mine, yours, (task,)) for mine, yours in parts)


def _agree(a: Mapping[str, Any], b: Mapping[str, Any], keys: Iterable[str]) -> bool:
    """Whether two say the same of what both say, and of what is said only where it was asked."""
    return all(
        a.get(key) == b.get(key) for key in keys if key in ASKED_FOR or (key in a and key in b)
    )


def module_rows(layers: Sequence[LayerFacts]) -> list[dict[str, Any]]:
    """The modules of all layers, each with what its layer says of token weights: for the report."""
    rows = []
    for layer in layers:
        said = {name: fact for name, fact in layer.items() if name in WeightFacts.__annotations__}
        said["effective_sample_size"] = layer.get("effective_sample_size")
        for module in layer["modules"]:
            # A linear with a sample size of its own is one that the layer's weights are not for.
            rows.append({**module} if "effective_sample_size" in module else {**module, **said})
    return rows
