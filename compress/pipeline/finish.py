"""The end of a run, behind its weights: what describes them, publishing both, and measuring.

    build: documents -> publish -> the work folder shrinks to a marker
    measure: evaluation -> kept in evaluation.json -> documents again -> nothing is left but OUT

Each step can be killed and gone on with: `left_by` says how far an earlier process came, and
`restored` is that process's result. An evaluation that was finished is not made again.

    if left_by(output, mark): result = restored(...)
    else: result = ...; publish_result(...)
    measure(result, inputs, data, mark, log)
"""

import shutil
import time
from pathlib import Path
from typing import Any

from compress.allocation.allocate import Allocation
from compress.data.prompts import CalibrationData
from compress.eval.progress import telling
from compress.memory import peak_memory
from compress.observer import Observer
from compress.pipeline.evaluation import evaluate_section, evaluated_texts
from compress.pipeline.inputs import RunInputs
from compress.pipeline.output import document
from compress.pipeline.plan import make_plan
from compress.pipeline.provenance import marked, provenance
from compress.pipeline.result import RunResult
from compress.storage.files import read_json, write_json
from compress.storage.lease import WORK_FOLDER
from compress.storage.output_folder import (
    FINAL,
    MARKER,
    PROVENANCE,
    go_on_publishing,
    publish,
    publishing,
    replace_documents,
    tidy,
)

EVALUATION = "evaluation.json"  # in the work folder: figures whose documents are not written yet


class RunLog:
    """What a run notes about itself: seconds by stage, and all that was out of the ordinary."""

    def __init__(self, observer: Observer):
        self.observer = observer
        self.warnings: list[str] = []
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.observer.warning(text)

    def lap(self, name: str) -> None:
        """Counts the time since the last lap to the stage `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._started
        self._started = now


# ---- what an earlier process has left -----------------------------------------------------------


def left_by(output: Path, mark: str) -> bool:
    """Whether an earlier process has begun to publish the result of the run `mark`.

    To be asked only where a work folder was left: a result without one is finished.
    """
    whole = (output / "config.json").is_file()
    return marked(output) == mark if whole else publishing(output) == mark


def restored(output: Path, inputs: RunInputs, mark: str, log: RunLog) -> RunResult:
    """That process's result, its files all in their places."""
    if publishing(output) == mark:
        go_on_publishing(output)
    facts = read_json(output / PROVENANCE)
    assert facts is not None
    chosen = facts["allocation"]
    plan = make_plan(inputs, None if chosen is None else Allocation.of_json(chosen))
    log.seconds |= facts["seconds"]
    for warning in facts["warnings"]:
        log.warn(warning)
    return RunResult(
        path=output,
        plan=plan,
        metrics={},
        layers=facts["layers"],
        seconds=log.seconds,
        peak_memory=facts["peak_memory"],
        self_check=facts["self_check"],
        source_check=facts["source_check"],
        pruning=facts["pruning"],
        warnings=log.warnings,
        report=output / "report.html",
    )


# ---- the steps ----------------------------------------------------------------------------------


def publish_result(result: RunResult, inputs: RunInputs, data: CalibrationData, mark: str) -> None:
    """Moves OUT/.modelpress/final to OUT, with what describes it."""
    final = result.path / WORK_FOLDER / FINAL
    document(final, final, result, inputs.recipe, provenance(result, inputs, data, mark))
    publish(final, result.path, mark)
    result.report = result.path / "report.html"


def measure(
    result: RunResult, inputs: RunInputs, data: CalibrationData, mark: str, log: RunLog
) -> None:
    """The recipe's evaluation of a published result, and the documents with its figures.

    The result stays, described, whatever becomes of its evaluation.
    """
    recipe, output = inputs.recipe, result.path
    work = output / WORK_FOLDER
    tidy(output, keep=(MARKER, EVALUATION))
    if recipe.evaluate is not None:
        log.observer.stage("evaluation")
        try:
            with telling(log.observer.progress):
                measured = _measured(inputs, output, work / EVALUATION)
            result.metrics, result.evaluation_memory = measured["metrics"], measured["memory"]
        except BaseException:  # an interrupt as well
            log.warn(f"the checkpoint in {output} is complete; its evaluation failed")
            raise
        finally:
            log.lap("evaluation")
    written = (output / "recipe.yaml").read_text(encoding="utf-8")
    if result.metrics or written != recipe.dump():  # a name and an evaluation may be others now
        documents = work / "documents"
        shutil.rmtree(documents, ignore_errors=True)
        documents.mkdir()
        facts = provenance(result, inputs, data, mark)
        before: dict[str, Any] = read_json(output / PROVENANCE) or {}
        facts |= {"files": before.get("files", []), "card_digest": before.get("card_digest")}
        document(documents, output, result, recipe, facts)
        replace_documents(documents, output)
    tidy(output)


def _measured(inputs: RunInputs, output: Path, file: Path) -> dict[str, Any]:
    """The evaluation's `metrics`, and the peak of `memory` if there are any.

    Those of an earlier process, if it was asked for the same.
    """
    section, resolve = inputs.recipe.evaluate, inputs.recipe.resolve_path
    assert section is not None
    texts = evaluated_texts(section, resolve)
    asked = {"evaluate": section.model_dump(mode="json"), "texts": texts}
    known = read_json(file) or {}
    if known.get("asked") == asked and "memory" in known:
        return known
    metrics = evaluate_section(section, resolve, output, inputs.skeleton.folder, inputs.device)
    memory = peak_memory(inputs.device) if metrics else {}
    found = {"asked": asked, "metrics": metrics, "memory": memory}
    write_json(file, found)
    return found
