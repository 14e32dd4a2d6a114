"""One call that measures a model and its 16-bit baseline on the same data, with all conditions.

    settings = EvaluationSettings(tasks=["demo_code"])
    evaluate_model(model, tokenizer, settings, Text(ids, length=512), baseline=Baseline(fp))

gives (parts that were not asked for are absent)

    {"results":    {task: {metric: value, metric_stderr: value}},
     "perplexity": {"value", "value_stderr", "mean_nll", "stderr", "tokens", "windows", "length",
                    "stride", "bos", "unit", "basis", ..., "line"},
     "kl":         {"mean", "stderr", "token_stderr", "maximum", "top1_agreement", ..., "line"},
     "windows":    {"tokens", "nll", "kl"}: totals of each window, for pairing with other models,
     "by_position": [{"first", "last", "tokens", "perplexity", "mean_nll", "baseline", "difference",
                    "kl"}]: by tokens in front (`compress.eval.positions`), on request,
     "baseline":   {"results", "perplexity"},
     "items":      {task: {metric: {"right": "0110..."} or {"values"}}}, "groups": weights of tasks
                   in them: on request, for pairing with other models,
     "difference": {"results": {task or group: {metric: {"value", "stderr", "count",
                    "right_to_wrong", "wrong_to_right", "mcnemar_p"}}},
                    "mean_nll": {"value", "stderr", "count"}},
     "files":      of lm-eval's own layout,
     "conditions": {"limit", "seed", "num_fewshot", "samples", "shots", "task_versions",
                    "lm_eval", "chat_template", "warnings", ...: what else was asked for}}

`difference` is model minus baseline, paired item by item and window by window: its error is the
one that says whether the model is worse, and it is far smaller than either figure's own
(`compress.eval.items`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from compress.errors import UsageError
from compress.eval.divergence import DivergenceResult, kl_divergence
from compress.eval.harness import TaskScores, score_tasks
from compress.eval.items import paired_changes
from compress.eval.kept_logits import KeptLogits
from compress.eval.perplexity import (
    PerplexityResult,
    nll_of,
    perplexity,
    perplexity_difference,
    perplexity_of,
)
from compress.eval.positions import Stretches, rows_by_position
from compress.eval.settings import EvaluationSettings
from compress.eval.windows import Batch, Text

Result = TypeVar("Result")


class Baseline:
    """The 16-bit model that others are compared with; what was measured of it is kept.

    keep: a folder for a file without a name that keeps its logits of a text too, where several
        models follow (`compress.eval.kept_logits`).
    """

    def __init__(self, model: torch.nn.Module, keep: Path | None = None):
        self.model = model
        self._logits = None if keep is None else KeptLogits(model, keep)
        self._kept: list[tuple[tuple[object, ...], Any]] = []

    def scores(
        self, tokenizer: Any, settings: EvaluationSettings, files: Path | None = None
    ) -> TaskScores:
        """Its `score_tasks`, item by item; `files` as there, written once."""
        return self._once(
            (tokenizer.__class__, settings),
            lambda: score_tasks(self.model, tokenizer, settings, per_item=True, files=files),
        )

    def logits(
        self, text: Text, batch_size: int
    ) -> torch.nn.Module | Callable[[Batch], torch.Tensor]:
        """What gives its logits of the text, as `kl_divergence` takes it."""
        return self.model if self._logits is None else self._logits.of(text, batch_size)

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
    files: Path | None = None,
    items: bool = False,
) -> dict[str, Any]:
    """Tasks, perplexity and divergence of a model, as one JSON object (keys at the file's head).

    Args:
        model, tokenizer: as loaded; the tokenizer, or a multimodal model's processor, is only
            used by the tasks.
        settings: tasks and how they are put; of the text, only `batch_size`.
        text: what `settings.perplexity` names, read and tokenised.
        baseline: the 16-bit model: measured on the same data in this same call, and the reference
            of KL and of the paired differences. Its figures are kept for the next model.
        files: a folder for lm-eval's own files of what the tasks gave.
        items: whether the answers to single items are in the report as well.

    Raises:
        UsageError: nothing to evaluate, or what the parts raise.
    """
    if not settings.tasks and text is None:
        raise UsageError("nothing to evaluate: give tasks, a text, or both")
    report: dict[str, Any] = {}
    if baseline is not None:
        report["baseline"], report["difference"] = {}, {}
    if settings.tasks:
        per_item = items or baseline is not None
        scores = score_tasks(model, tokenizer, settings, per_item=per_item, files=files)
        report["results"] = scores.results
        report["conditions"] = _conditions(scores, settings)
        if files is not None:
            report["files"] = scores.files
        if items:
            report["items"] = {
                task: {metric: found.as_json() for metric, found in metrics.items()}
                for task, metrics in scores.items.items()
            }
            report["groups"] = scores.groups
        if baseline is not None:
            reference = baseline.scores(tokenizer, settings, files)
            report["baseline"]["results"] = reference.results
            report["difference"]["results"] = task_differences(scores, reference)
    if text is not None:
        told = [Stretches(text.length) for _ in range(3)] if settings.by_position else None
        if baseline is None:
            nll = None if told is None else told[0].add
            measured = perplexity(model, text, settings.text_batch_size, each=nll)
        else:
            measured, before, divergence = _beside(
                model, baseline, text, settings.text_batch_size, told
            )
        report["perplexity"] = measured.to_dict() | {"line": measured.line()}
        report["windows"] = {
            "tokens": list(measured.window_tokens),
            "nll": list(measured.window_nll),
        }
        if baseline is not None:
            report["baseline"]["perplexity"] = before.to_dict() | {"line": before.line()}
            report["difference"]["mean_nll"] = perplexity_difference(measured, before).to_dict()
            report["kl"] = divergence.to_dict() | {"line": divergence.line()}
            report["windows"]["kl"] = list(divergence.window_kl)
        if told is not None:
            report["by_position"] = rows_by_position(*(told if baseline is not None else told[:1]))
    return report


def _beside(
    model: torch.nn.Module,
    baseline: Baseline,
    text: Text,
    batch_size: int,
    told: Sequence[Stretches] | None,
) -> tuple[PerplexityResult, PerplexityResult, DivergenceResult]:
    """The model's perplexity, the baseline's, and the divergence, of one pass of both.

    `told`: gets every prediction's NLL of the model, of the baseline, and KL.
    """
    nll, nll_before, kl = (None, None, None) if told is None else (of.add for of in told)
    totals: tuple[list[float], list[float]] = ([], [])
    counts: list[int] = []

    def seen(batch: Batch, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        totals[0].extend(nll_of(ours, batch, "the model", nll))
        totals[1].extend(nll_of(theirs, batch, "the baseline", nll_before))
        counts.extend(batch.scored.sum(dim=1).tolist())

    theirs = baseline.logits(text, batch_size)
    divergence = kl_divergence(model, theirs, text, batch_size, seen, kl)
    measured, before = (perplexity_of(of, counts, text) for of in totals)
    return measured, before, divergence


def task_differences(
    scores: TaskScores, reference: TaskScores
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Model minus baseline for each metric that both have per item: task or group -> metric."""
    changes = paired_changes([(scores.items, reference.items)], scores.groups)
    return {
        task: {metric: change.to_dict() for metric, change in metrics.items()}
        for task, metrics in changes.items()
    }


# Conditions that are told only where they were asked for.
ASKED = (
    "system_instruction",
    "gen_kwargs",
    "max_length",
    "add_bos_token",
    "cache_requests",
    "metadata",
)


def _conditions(scores: TaskScores, settings: EvaluationSettings) -> dict[str, Any]:
    told = {name: getattr(settings, name) for name in ASKED if getattr(settings, name)}
    if settings.add_bos_token is not None:
        told["add_bos_token"] = settings.add_bos_token
    if isinstance(settings.batch_size, str):
        told["batch_size"] = settings.batch_size
    if isinstance(settings.apply_chat_template, str):
        told["chat_template_name"] = settings.apply_chat_template
    if scores.chat_template and any(scores.shots.values()):
        told["fewshot_as_multiturn"] = scores.multiturn
    return told | {
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
