"""One call that measures a model and its 16-bit baseline on the same data, with all conditions.

    settings = EvaluationSettings(tasks=["demo_code"])
    evaluate_model(model, tokenizer, settings, Text(ids, length=512), baseline=Baseline(fp))

gives (parts that were not asked for are absent)

    {"results":    {task: {metric: value, metric_stderr: value}},
     "perplexity": {"value", "value_stderr", "mean_nll", "stderr", "tokens", "windows", "length",
                    "stride", "bos", "unit", "basis", ..., "line"},
     "kl":         {"mean", "stderr", "token_stderr", "maximum", "top1_agreement", ..., "line"},
     "baseline":   {"results", "perplexity"},
     "difference": {"results": {task: {metric: {"value", "stderr", "count"}}},
                    "mean_nll": {"value", "stderr", "count"}},
     "conditions": {"limit", "seed", "num_fewshot", "samples", "shots", "task_versions",
                    "lm_eval", "chat_template", "warnings"}}

`difference` is model minus baseline, paired item by item and window by window: its error is the
one that says whether the model is worse, and it is far smaller than either figure's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.eval.divergence import DivergenceResult, kl_divergence, kl_divergence_per_document
from compress.eval.harness import TaskScores, score_tasks
from compress.eval.perplexity import (
    PerplexityResult,
    perplexity,
    perplexity_difference,
    perplexity_per_document,
)
from compress.eval.settings import EvaluationSettings
from compress.eval.statistics import paired_difference

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Text:
    """Token ids and how they are cut: one stream in windows, or documents on their own.

    Attributes:
        ids: [tokens], one stream; or
        documents: lists of ids, each scored on its own, cut to `length`.
        length, stride: see `perplexity`. Documents take no stride.
        bos: id put in front of each window or document; None for none.

    Raises UsageError for a stream and documents at once, and for documents with a stride.
    """

    ids: Tensor | Sequence[int] = ()
    documents: Sequence[Sequence[int]] | None = None
    length: int = 512
    stride: int | None = None
    bos: int | None = None

    def __post_init__(self) -> None:
        if self.documents is None:
            return
        if len(self.ids):
            raise UsageError("ids and documents were both given: expected one stream or the other")
        if self.stride is not None:
            raise UsageError(f"stride {self.stride}: documents are not cut in windows")

    def perplexity(self, model: torch.nn.Module, batch_size: int) -> PerplexityResult:
        if self.documents is not None:
            return perplexity_per_document(model, self.documents, self.length, self.bos, batch_size)
        return perplexity(model, self.ids, self.length, self.stride, self.bos, batch_size)

    def divergence(
        self, model: torch.nn.Module, baseline: torch.nn.Module, batch_size: int
    ) -> DivergenceResult:
        if self.documents is not None:
            return kl_divergence_per_document(
                model, baseline, self.documents, self.length, self.bos, batch_size
            )
        return kl_divergence(
            model, baseline, self.ids, self.length, self.stride, self.bos, batch_size
        )


class Baseline:
    """The 16-bit model that others are compared with; what was measured of it is kept."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self._kept: list[tuple[tuple[object, ...], Any]] = []

    def scores(self, tokenizer: Any, settings: EvaluationSettings) -> TaskScores:
        """Its `score_tasks`, item by item."""
        return self._once(
            (tokenizer.__class__, settings),
            lambda: score_tasks(self.model, tokenizer, settings, per_item=True),
        )

    def perplexity(self, text: Text, batch_size: int) -> PerplexityResult:
        """Its perplexity on this very text."""
        return self._once((text, batch_size), lambda: text.perplexity(self.model, batch_size))

    def _once(self, key: tuple[object, ...], measure: Callable[[], Result]) -> Result:
        """The kept result of an equal key, or a new one."""
        for known, result in self._kept:
            if known == key:
                return result
        result = measure()
        self._kept.append((key, result))
        return result


def evaluate_model(
    model: torch.nn.Module,
    tokenizer: Any,
    settings: EvaluationSettings,
    text: Text | None = None,
    baseline: Baseline | None = None,
) -> dict[str, Any]:
    """Tasks, perplexity and divergence of a model, as one JSON object (keys at the file's head).

    Args:
        model, tokenizer: as loaded; the tokenizer, or a multimodal model's processor, is only
            used by the tasks.
        settings: tasks and how they are put; of the text, only `batch_size`.
        text: what `settings.perplexity` names, read and tokenised.
        baseline: the 16-bit model: measured on the same data in this same call, and the reference
            of KL and of the paired differences. Its figures are kept for the next model.

    Raises:
        UsageError: nothing to evaluate, or what the parts raise.
    """
    if not settings.tasks and text is None:
        raise UsageError("nothing to evaluate: give tasks, a text, or both")
    report: dict[str, Any] = {}
    if baseline is not None:
        report["baseline"], report["difference"] = {}, {}
    if settings.tasks:
        scores = score_tasks(model, tokenizer, settings, per_item=baseline is not None)
        report["results"] = scores.results
        report["conditions"] = _conditions(scores, settings)
        if baseline is not None:
            reference = baseline.scores(tokenizer, settings)
            report["baseline"]["results"] = reference.results
            report["difference"]["results"] = task_differences(scores, reference)
    if text is not None:
        measured = text.perplexity(model, settings.batch_size)
        report["perplexity"] = measured.to_dict() | {"line": measured.line()}
        if baseline is not None:
            before = baseline.perplexity(text, settings.batch_size)
            report["baseline"]["perplexity"] = before.to_dict() | {"line": before.line()}
            report["difference"]["mean_nll"] = perplexity_difference(measured, before).to_dict()
            divergence = text.divergence(model, baseline.model, settings.batch_size)
            report["kl"] = divergence.to_dict() | {"line": divergence.line()}
    return report


def task_differences(
    scores: TaskScores, reference: TaskScores
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Model minus baseline for each metric that both have per item: task -> metric -> estimate."""
    return {
        task: {
            metric: paired_difference(values, reference.items[task][metric]).to_dict()
            for metric, values in columns.items()
            if metric in reference.items.get(task, {})
        }
        for task, columns in scores.items.items()
    }


def _conditions(scores: TaskScores, settings: EvaluationSettings) -> dict[str, Any]:
    return {
        "limit": settings.limit,
        "seed": settings.seed,
        "num_fewshot": settings.num_fewshot,
        "samples": scores.samples,
        "shots": scores.shots,
        "task_versions": scores.versions,
        "lm_eval": scores.harness_version,
        "chat_template": scores.chat_template,
        "warnings": scores.warnings,
    }
