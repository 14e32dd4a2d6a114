"""lm-eval's own files: its results and samples as others' scripts read them, and its prompt cache.

    files = HarnessFiles(Path("out"))       # handed to lm-eval, which notes the settings in it
    files.write(output, samples)            # out/MODEL/results_DATE.json, samples_TASK_DATE.jsonl

lm-eval writes them itself, so their layout is that of the installed version.

It keeps the prompts that it has built under the task's name, and would take those of another seed
or of a task's earlier definition for them. Here each of these has a folder of its own, below
LM_HARNESS_CACHE_PATH or ~/.cache/modelpress/requests. lm-eval pickles what it keeps: a folder that
others write to is none for it.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.eval.settings import EvaluationSettings
from compress.eval.task_names import task_folders


class HarnessFiles:
    """Where lm-eval writes what it has measured; `tracker` is its own note of the settings."""

    def __init__(self, folder: Path):
        from lm_eval.loggers import EvaluationTracker  # slow to import

        self.folder = folder
        self.tracker = EvaluationTracker(output_path=str(folder))

    def write(
        self, results: dict[str, Any], samples: dict[str, list[dict[str, Any]]]
    ) -> list[Path]:
        """The files, written; CompressError where they are not: lm-eval only logs that."""
        before = set(self.folder.rglob("*"))
        self.tracker.general_config_tracker.model_source = "modelpress"
        results["config"]["model"] = "modelpress"
        self.tracker.save_results_aggregated(results=dict(results), samples=samples or None)
        for task, found in samples.items():
            self.tracker.save_results_samples(task_name=task, samples=found)
        written = sorted(set(self.folder.rglob("*.json*")) - before)
        if len(written) != 1 + len(samples):
            raise CompressError(
                f"{self.folder}: expected {1 + len(samples)} files of lm-eval's, found "
                f"{len(written)} written: is there place, and may it be written to?"
            )
        return written


@contextlib.contextmanager
def request_cache(settings: EvaluationSettings, metadata: dict[str, Any]) -> Iterator[None]:
    """Lets lm-eval keep prompts in the folder of these tasks and this seed; else nothing is kept.

    `metadata`: what tasks are told that draw their items.
    """
    if not settings.cache_requests:
        yield
        return
    from lm_eval.caching import cache  # slow to import

    before, cache.PATH = cache.PATH, str(cache_folder(settings, metadata))
    Path(cache.PATH).mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        cache.PATH = before


def cache_folder(settings: EvaluationSettings, metadata: dict[str, Any]) -> Path:
    """Another folder for each seed, version of lm-eval, model, template, and state of our tasks."""
    given = os.environ.get("LM_HARNESS_CACHE_PATH")
    root = Path(given) if given else Path.home() / ".cache" / "modelpress" / "requests"
    digest = hashlib.sha256()
    kept = (version("lm_eval"), metadata, settings.apply_chat_template, settings.seed)
    digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    for folder in task_folders(settings):
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            if "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return root / digest.hexdigest()[:16]
