"""Measuring a checkpoint: what `modelpress eval` and a recipe's `evaluate` section do.

Loads the model, and the 16-bit baseline beside it, tokenises the text once, and hands all of it to
`compress.eval`, which knows nothing of checkpoints. On a CPU both models compute in fp32 whatever
they are stored in: bf16 products are slower there, and their rounding would be noise in the
comparison; on a GPU they compute in the checkpoint's dtype, as they are served. Quantised linears
run packed or dense, whichever is faster here, and the conditions say which. A model that prunes
visual tokens is measured pruning, its baseline never does.

    evaluate("out", tasks=["demo_code"], perplexity="python-stdlib", baseline="recipes/demo/lm")
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.data.text import (
    BLANK_LINE,
    Corpus,
    content_digests,
    load_documents,
    locate,
    measured_text,
)
from compress.data.windows import encode, token_stream
from compress.errors import UsageError
from compress.eval.evaluate import Baseline, evaluate_model
from compress.eval.harness import shared_requests
from compress.eval.settings import CacheRequests, EvaluationSettings, batch_problem, limit_problem
from compress.eval.task_names import find_tasks
from compress.eval.windows import Text
from compress.kernels.linear import QuantLinear
from compress.loading.load import fastest_packing, load
from compress.memory import chosen_device
from compress.pipeline.notebook import measured_here
from compress.pruning.pictures import watching
from compress.ranks import together
from compress.recipe.sections import Evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate(
    model: str | Path,
    *,
    tasks: Sequence[str] = (),
    include_path: str | Path | Sequence[str | Path] | None = None,
    limit: int | float | None = None,
    batch_size: int | str = 8,
    num_fewshot: int | None = None,
    apply_chat_template: bool | str | None = None,
    system_instruction: str | None = None,
    fewshot_as_multiturn: bool | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    add_bos_token: bool | None = None,
    cache_requests: CacheRequests = False,
    log_samples: bool = False,
    metadata: Mapping[str, Any] | None = None,
    confirm_run_unsafe_code: bool = False,
    perplexity: str | None = None,
    text_field: str = "text",
    length: int | None = None,
    stride: int | None = None,
    bos: bool = False,
    tokens: int | None = None,
    per_document: bool = False,
    by_position: bool = False,
    seed: int = 0,
    baseline: str | Path | None = None,
    device: str = "cpu",
    dense: bool | None = None,
    activation_bits: int | None = None,
    pictures: str | Path | None = None,
    output_path: str | Path | None = None,
) -> dict[str, Any]:
    """Tasks, perplexity and divergence of a checkpoint: the dict of `compress.eval.evaluate`.

    If the model prunes visual tokens, `pruning` says what that saved. Started by torchrun or
    accelerate, the ranks share the requests of tasks, as lm-eval does it; the first one measures
    the text and what pruning saves in its own share. The others get {}.

    Args:
        model, baseline: folders or hub ids; the baseline is measured in the same call.
        tasks, include_path, limit, num_fewshot, gen_kwargs, max_length, add_bos_token,
        cache_requests, metadata, confirm_run_unsafe_code, seed: of lm-eval, as
        `EvaluationSettings` says.
        apply_chat_template: put prompts into the model's chat template, or the one of this name;
            with system_instruction and fewshot_as_multiturn.
        batch_size: windows, documents or requests in a forward pass, or auto for requests.
        perplexity: a dataset's name, FILE.txt, FILE.jsonl or hub id; its held-out part is read.
        text_field: key of a FILE.jsonl's text.
        length: tokens of a window; None: 2048, or the model's context where that is shorter.
        stride: tokens from one window to the next; None: no overlap.
        bos: put the tokenizer's BOS in front of each window.
        tokens: only the first so many tokens of the text.
        per_document: each document on its own, cut to `length`, instead of one stream.
        by_position: the text's figures also by the tokens that stand in front of a prediction.
        dense: whether the model's quantised linears are expanded instead of running packed; None:
            whichever is faster on this device.
        activation_bits: to which packed linears round what they read, token by token.
        pictures: a folder for pictures of kept, pruned and recycled patches.
        output_path: a folder for lm-eval's own files: results_*.json, and with `log_samples`
            samples_*.jsonl.

    Raises:
        UsageError: nothing to evaluate, no such model, task or dataset, or no BOS token.
        CheckpointError: a damaged checkpoint.
    """
    settings = EvaluationSettings.among(locals())
    problems = {"limit": limit_problem(limit), "batch_size": batch_problem(batch_size)}
    for name, problem in problems.items():
        if problem:
            raise UsageError(f"{name}: {problem}")
    for name in ("length", "stride", "bos", "tokens", "per_document", "by_position"):
        if perplexity is None and getattr(settings, name):
            raise UsageError(f"{name} is of the text: give perplexity, a dataset")
    device = chosen_device(device)
    drawn = None if pictures is None else Path(pictures)
    with measured_here(), together(device) as ranks, shared_requests(ranks.size):
        if not ranks.first:
            settings, drawn = replace(settings, perplexity=None), None
            if not settings.tasks:
                return {}
        scores = Evaluator(settings, baseline, device).measure(
            model,
            dense=dense,
            activation_bits=activation_bits,
            pictures=drawn,
            files=None if output_path is None else Path(output_path),
        )
        if ranks.size > 1:
            scores["conditions"]["ranks"] = ranks.size
    return scores if ranks.first else {}


class Evaluator:
    """`evaluate` for several models: the text and the baseline are read and measured once."""

    def __init__(
        self,
        settings: EvaluationSettings,
        baseline: str | Path | None = None,
        device: str = "cpu",
        keep: Path | None = None,
    ):
        """Raises UsageError for settings that measure nothing, or name an unknown task.

        keep: as for `Baseline`, where several models are measured.
        """
        if not settings.tasks and settings.perplexity is None:
            raise UsageError("nothing to evaluate: give tasks, a perplexity dataset, or both")
        check_tasks(settings)
        self.settings, self.baseline_path, self.device = settings, baseline, device
        self.keep = keep
        self._baseline: Baseline | None = None
        self._baseline_linears: str | None = None
        self._text: Text | None = None

    @classmethod
    def of_section(
        cls,
        section: Evaluate,
        resolve: Callable[[str], str],
        baseline: str | Path,
        device: str,
        keep: Path | None = None,
    ) -> "Evaluator":
        """As the section says; `resolve` finds the files that it names, as `locate` takes it."""
        settings = settings_of(section, resolve)
        return cls(settings, baseline if section.baseline else None, device, keep)

    def measure(
        self,
        model: str | Path,
        *,
        dense: bool | None = None,
        activation_bits: int | None = None,
        seed: int | None = None,
        pictures: Path | None = None,
        files: Path | None = None,
        items: bool = False,
    ) -> dict[str, Any]:
        """The figures of one checkpoint, beside the baseline's.

        Args:
            dense: whether its quantised linears are expanded; None: if that is faster here.
            activation_bits: to which packed linears round what they read.
            seed: instead of the evaluator's.
            pictures: a folder for pictures of what was pruned, if the model prunes visual tokens.
            files: a folder for lm-eval's own files.
            items: whether answers to single items are kept, for pairing with another checkpoint.
        """
        loaded, processor = load_measured(
            model, self.device, dense=dense, activation_bits=activation_bits
        )
        scores = self.measure_loaded(
            loaded, processor, str(model), seed=seed, pictures=pictures, files=files, items=items
        )
        if activation_bits is not None:
            scores["conditions"]["activation_bits"] = activation_bits
        return scores

    def measure_loaded(
        self,
        model: "PreTrainedModel",
        processor: Any,
        name: str,
        *,
        seed: int | None = None,
        pictures: Path | None = None,
        files: Path | None = None,
        items: bool = False,
    ) -> dict[str, Any]:
        """The figures of a model that `compress.load` gave; `name` says in the conditions which.

        If it prunes visual tokens, `pruning` has what that saved in this very measurement.
        """
        if self._text is None and self.settings.perplexity is not None:
            tokenizer = getattr(processor, "tokenizer", processor)
            self._text = read_text(self.settings, tokenizer, context_of(model))
        if self._baseline is None and self.baseline_path is not None:
            reference, _ = load_measured(self.baseline_path, self.device, prune=False)
            self._baseline = Baseline(reference, self.keep)
            self._baseline_linears = linears_of(reference)
        settings = self.settings if seed is None else replace(self.settings, seed=seed)
        with watching(model) as watched:
            scores = evaluate_model(
                model, processor, settings, self._text, self._baseline, files, items
            )
        if watched is not None:
            scores["pruning"] = watched.figures()
            if pictures is not None:
                scores["pruning"]["pictures"] = watched.draw(pictures, processor)
        conditions = {
            "model": name,
            "baseline": None if self.baseline_path is None else str(self.baseline_path),
            "device": self.device,
            "dtype": str(model.dtype).removeprefix("torch."),
            "linears": linears_of(model),
        }
        if self._baseline_linears is not None:
            conditions["baseline_linears"] = self._baseline_linears
        if self.settings.perplexity is not None:
            conditions["perplexity_dataset"] = measured_text(self.settings.perplexity)
        if self._text is not None and self._text.length > (context_of(model) or math.inf):
            conditions["beyond_context"] = (
                f"{self._text.length} tokens, and the model says that it takes {context_of(model)}"
            )
        scores["conditions"] = conditions | scores.get("conditions", {})
        scores["local"] = self._local_names(name)
        return scores

    def _local_names(self, model: str) -> list[str]:
        """What was measured, on what, and from where, as far as it is a file or folder here."""
        more = self.settings.include_path
        folders = [more] if isinstance(more, str | Path) else list(more or [])
        named = [model, self.baseline_path, self.settings.perplexity, *folders]
        found = (str(name) for name in named if name is not None)
        return [name for name in dict.fromkeys(found) if Path(name).expanduser().exists()]


def load_measured(
    path: str | Path,
    device: str,
    *,
    dense: bool | None = None,
    activation_bits: int | None = None,
    prune: bool = True,
) -> "tuple[PreTrainedModel, Any]":
    """`load` in the dtype that is measured; `dense` None: quantised linears as is faster here."""
    packed = fastest_packing(path, device, activation_bits) if dense is None else not dense
    dtype = None if device.startswith("cuda") else torch.float32
    return load(path, device, dtype, prune=prune, packed=packed, activation_bits=activation_bits)


def context_of(model: "PreTrainedModel") -> int | None:
    """How many tokens the model takes, as its config says it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def read_text(settings: EvaluationSettings, tokenizer: Any, context: int | None) -> Text:
    """The held-out text as ids, for a model of this context: one stream, or a list a document.

    Raises UsageError for a dataset that cannot be read, and for a BOS that the tokenizer lacks.
    """
    assert settings.perplexity is not None
    if settings.bos and tokenizer.bos_token_id is None:
        raise UsageError("bos was asked for, but this model's tokenizer has no BOS token")
    bos = tokenizer.bos_token_id if settings.bos else None
    cut = partial(Text, length=settings.window(context), stride=settings.stride, bos=bos)
    corpus = load_documents(settings.perplexity, "held_out", settings.text_field)
    if not settings.per_document:
        return cut(token_stream(corpus, tokenizer, settings.tokens))
    documents: list[list[int]] = []
    total = 0
    for ids in encode(tokenizer, list(corpus.texts)):
        if settings.tokens is not None and total >= settings.tokens:
            break
        documents.append(ids)
        total += len(ids)
    return cut(documents=documents)


def linears_of(model: torch.nn.Module) -> str:
    """`packed` where linears of a loaded model are, else `dense`."""
    return "packed" if any(isinstance(m, QuantLinear) for m in model.modules()) else "dense"


def settings_of(section: Evaluate, resolve: Callable[[str], str]) -> EvaluationSettings:
    """The section as `compress.eval` takes it, its text found by `resolve`."""
    text = section.perplexity
    return section.settings(None if text is None else locate(text.dataset, resolve))


def evaluate_section(
    section: Evaluate,
    resolve: Callable[[str], str],
    model: str | Path,
    baseline: str | Path,
    device: str = "cpu",
) -> dict[str, Any]:
    """The figures that the section asks for; {} where it asks for nothing."""
    if not (section.tasks or section.perplexity):
        return {}
    evaluator = Evaluator.of_section(section, resolve, baseline, device)
    folder = Path(model) / "eval"
    return evaluator.measure(model, pictures=folder, files=folder if section.tasks else None)


def evaluated_texts(section: Evaluate, resolve: Callable[[str], str]) -> dict[str, str]:
    """The files that the evaluation reads, each with a hash of what it holds now."""
    text = section.perplexity
    return content_digests([locate(text.dataset, resolve)] if text else [])


def check_tasks(settings: EvaluationSettings) -> None:
    """UsageError if lm-eval is not there or does not know one of the tasks."""
    if settings.tasks:
        find_tasks(settings)


def check_evaluation(section: Evaluate, resolve: Callable[[str], str]) -> None:
    """UsageError for what an evaluation would trip over: before a long run, not after it."""
    settings = settings_of(section, resolve)
    check_tasks(settings)
    if settings.perplexity is not None:
        corpus = load_documents(settings.perplexity, "held_out", settings.text_field)
        if settings.length is not None and not settings.per_document:
            _check_window(corpus, settings.length)


def _check_window(corpus: Corpus, length: int) -> None:
    """UsageError for a text of fewer bytes than a window has tokens: none would be whole."""
    left = length
    for text in corpus.texts:
        left -= len(text.encode(errors="replace")) + len(BLANK_LINE)
        if left <= 0:
            return
    raise UsageError(
        f"evaluate.perplexity.length: {corpus.name} has fewer than {length} tokens: give more text "
        "or a smaller length"
    )
