"""One call that measures a model and its 16-bit baseline on the same data, with all conditions.

    evaluate_model(model, tokenizer, tasks=["demo_code"], text_ids=ids, length=512, baseline=fp)

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
from pathlib import Path
from typing import Any

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
from compress.eval.statistics import paired_difference

# What is compared by value in the key of a kept measurement; texts are compared by identity.
KEYS = (str, int, float, tuple, Path, type(None))


class Baseline:
    """The 16-bit model that others are compared with; what was measured of it is kept."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self._kept: list[tuple[tuple, Any]] = []

    def scores(self, tokenizer: Any, arguments: tuple) -> TaskScores:
        """Its `score_tasks`, item by item."""

        def measure() -> TaskScores:
            return score_tasks(self.model, tokenizer, *arguments, per_item=True)

        return self._once(("tasks", tokenizer.__class__, *arguments), measure)

    def perplexity(self, text: tuple) -> PerplexityResult:
        """Its perplexity on a text and with conditions as `_perplexity` takes them."""
        return self._once(("text", *text), lambda: _perplexity(self.model, *text))

    def _once(self, key: tuple, measure: Callable[[], Any]) -> Any:
        """The kept result of an equal key: texts are the same object, the rest is equal."""
        for known, result in self._kept:
            if len(known) == len(key) and all(
                a is b or (isinstance(a, KEYS) and a == b) for a, b in zip(known, key, strict=True)
            ):
                return result
        result = measure()
        self._kept.append((key, result))
        return result


def evaluate_model(
    model: torch.nn.Module,
    tokenizer: Any,
    *,
    tasks: Sequence[str] = (),
    include_path: str | Path | Sequence[str | Path] | None = None,
    text_ids: Tensor | Sequence[int] | None = None,
    documents: Sequence[Sequence[int]] | None = None,
    length: int = 512,
    stride: int | None = None,
    bos: int | None = None,
    limit: int | float | None = None,
    batch_size: int = 8,
    seed: int = 0,
    num_fewshot: int | None = None,
    baseline: "torch.nn.Module | Baseline | None" = None,
) -> dict[str, Any]:
    """Tasks, perplexity and divergence of a model, as one JSON object (keys at the file's head).

    Args:
        model, tokenizer: as loaded; the tokenizer, or a multimodal model's processor, is only
            used by the tasks.
        tasks, include_path, limit, num_fewshot, seed: see `harness.score_tasks`.
        text_ids: [tokens], one stream, scored in windows; or
        documents: lists of ids, each scored on its own, cut to `length`. One of the two at most.
        length, stride, bos: see `perplexity`. Documents take no stride.
        batch_size: windows, documents or requests in a forward pass.
        baseline: the 16-bit model, loaded: measured on the same data in this same call, and the
            reference of KL and of the paired differences. Wrapped in `Baseline`, its own figures
            are kept for the next model that is compared with it.

    Raises:
        UsageError: nothing to evaluate, both texts at once, or what the parts raise.
    """
    if not tasks and text_ids is None and documents is None:
        raise UsageError("nothing to evaluate: give tasks, a text, or both")
    if text_ids is not None and documents is not None:
        raise UsageError("text_ids and documents were both given: expected one stream or the other")
    if documents is not None and stride is not None:
        raise UsageError(f"stride {stride} was given with documents, which are not cut in windows")
    report: dict[str, Any] = {}
    if isinstance(baseline, torch.nn.Module):
        baseline = Baseline(baseline)
    if baseline is not None:
        report["baseline"], report["difference"] = {}, {}
    if tasks:
        arguments = (tasks, include_path, limit, batch_size, seed, num_fewshot)
        scores = score_tasks(model, tokenizer, *arguments, per_item=baseline is not None)
        report["results"] = scores.results
        report["conditions"] = _conditions(scores, limit, seed, num_fewshot)
        if baseline is not None:
            reference = baseline.scores(tokenizer, arguments)
            report["baseline"]["results"] = reference.results
            report["difference"]["results"] = task_differences(scores, reference)
    if text_ids is not None or documents is not None:
        text = (text_ids, documents, length, stride, bos, batch_size)
        measured = _perplexity(model, *text)
        report["perplexity"] = measured.to_dict() | {"line": measured.line()}
        if baseline is not None:
            reference = baseline.perplexity(text)
            report["baseline"]["perplexity"] = reference.to_dict() | {"line": reference.line()}
            difference = perplexity_difference(measured, reference)
            report["difference"]["mean_nll"] = difference.to_dict()
            divergence = _divergence(model, baseline.model, *text)
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


def _conditions(
    scores: TaskScores, limit: float | None, seed: int, num_fewshot: int | None
) -> dict[str, Any]:
    return {
        "limit": limit,
        "seed": seed,
        "num_fewshot": num_fewshot,
        "samples": scores.samples,
        "shots": scores.shots,
        "task_versions": scores.versions,
        "lm_eval": scores.harness_version,
        "chat_template": scores.chat_template,
        "warnings": scores.warnings,
    }


def _perplexity(
    model: torch.nn.Module,
    text_ids: Tensor | Sequence[int] | None,
    documents: Sequence[Sequence[int]] | None,
    length: int,
    stride: int | None,
    bos: int | None,
    batch_size: int,
) -> PerplexityResult:
    if documents is not None:
        return perplexity_per_document(model, documents, length, bos, batch_size)
    return perplexity(model, text_ids, length, stride, bos, batch_size)


def _divergence(
    model: torch.nn.Module,
    baseline: torch.nn.Module,
    text_ids: Tensor | Sequence[int] | None,
    documents: Sequence[Sequence[int]] | None,
    length: int,
    stride: int | None,
    bos: int | None,
    batch_size: int,
) -> DivergenceResult:
    if documents is not None:
        return kl_divergence_per_document(model, baseline, documents, length, bos, batch_size)
    return kl_divergence(model, baseline, text_ids, length, stride, bos, batch_size)
