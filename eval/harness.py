"""Tasks of the lm-evaluation-harness on a model that is already loaded.

Metrics keep the harness's names without its filter suffix: `acc,none` is `acc`, with `acc_stderr`.

    settings = EvaluationSettings(tasks=["demo_code"], limit=100)
    score_tasks(model, tokenizer, settings).results
    # {"demo_code": {"acc": 0.52, "acc_stderr": 0.0502, "acc_norm": 0.55, "acc_norm_stderr": ...}}

A multimodal model comes with its processor in the tokenizer's place; tasks with images then get
them, in the processor's chat template if it has one. `apply_chat_template` puts prompts into a text
model's.

Inside `shared_requests`, each process that a launcher has started answers some of the requests, as
lm-eval does it under accelerate; the first one gets the scores, the others empty ones.

Policy: an unknown task or a missing lm-eval is an error before anything runs. A standard error that
the harness cannot give (a single item) is None. Its warnings are counted and kept in the result.
"""

import contextlib
import copy
import logging
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TextIO

from jinja2 import TemplateError

from compress.errors import UsageError, import_package, unknown
from compress.eval.harness_files import HarnessFiles, request_cache
from compress.eval.items import TOLERANCE, Items, group_weights
from compress.eval.multimodal import is_multimodal, multimodal_model
from compress.eval.progress import requests_told
from compress.eval.settings import EvaluationSettings
from compress.eval.task_names import check_names, find_tasks
from compress.eval.windows import measuring

if TYPE_CHECKING:  # slow to import
    from lm_eval.api.model import LM

# What the harness does beside measuring, and what stands in for it while it runs: nothing of it is
# kept. Outside a repository git prints `fatal: ...` past sys.stderr; the environment is asked of
# pip, which takes seconds; pictures would be written as PNG, twice each, to be hashed.
UNUSED: dict[str, Any] = {
    "get_git_commit_hash": lambda: None,
    "add_env_info": lambda storage: storage.update(
        transformers_version=version("transformers"), lm_eval_version=version("lm_eval")
    ),
    "LMEVAL_HASHMM": False,
}
# Resamples behind the standard error of metrics that are not means (those have a closed form).
BOOTSTRAP_ITERATIONS = 1000

# What the harness always says of a model that was loaded by its caller, of a multimodal one, and of
# a task with its own reader or with metrics that only some items have; every other warning (a
# context cut to fit, above all) goes into the result.
EXPECTED_WARNINGS = (
    "`pretrained` model kwarg is not of type",
    "Passed an already-initialized model",
    "Custom kwargs can be passed",
    "HF model type is neither marked as CausalLM or Seq2SeqLM",
    "[demo_vqa] Metrics were not scored on the same number",
    "[demo_vqa] No aggregation function defined",  # then it is the mean, as meant
    "[demo_passkey] Metrics were not scored on the same number",
    "[demo_passkey] No aggregation function defined",
    # Of tasks that leave to the harness what it knows of a metric.
    "is defined, but aggregation is not. using default",
    "is defined, but higher_is_better is not. using default",
    # What was asked for.
    "Overwriting default num_fewshot of",
    "generation_kwargs:",
)
# Local tasks whose items are drawn from the evaluation's seed.
DRAWN_TASKS = ("demo_vqa",)
# What it prints where batch sizes are found out.
EXPECTED_LINES = ("Passed argument batch_size = auto", "Determined ")

Metrics = dict[str, float | None]

_shared: ContextVar[bool] = ContextVar("shared", default=False)


@contextlib.contextmanager
def shared_requests(among: int) -> Iterator[None]:
    """Within it, so many processes, which torch.distributed knows, share lm-eval's requests."""
    token = _shared.set(among > 1)
    try:
        yield
    finally:
        _shared.reset(token)


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    """Within it, lm-eval tells a process that shares no requests what it has measured.

    It tells none whose LOCAL_RANK is not 0.
    """
    before = os.environ.get("LOCAL_RANK")
    if _shared.get() or before is None:
        yield
        return
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = before


@dataclass(frozen=True)
class TaskScores:
    """What the harness measured, by task.

    `items` holds each metric whose figure is the mean of its items, and `groups` the weights of
    tasks in the figures of groups; `warnings` what the harness warned of, and how often: of those
    that differ in numbers alone the first.
    """

    results: dict[str, Metrics]
    samples: dict[str, int]  # items scored
    shots: dict[str, int]  # examples in front of each item
    versions: dict[str, Any]  # of the task definitions
    harness_version: str
    chat_template: bool  # whether prompts were put into one
    multiturn: bool  # whether examples were turns of their own
    warnings: dict[str, int]
    items: dict[str, dict[str, Items]] = field(default_factory=dict)
    groups: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)  # of lm-eval's own layout


def score_tasks(
    model: Any,
    tokenizer: Any,
    settings: EvaluationSettings,
    per_item: bool = False,
    files: Path | None = None,
) -> TaskScores:
    """Scores of a loaded model, with how they were taken and, on request, each item's own.

    Args:
        model: a transformers model, on its device.
        tokenizer: its tokenizer, of a multimodal model its processor; left as it is (the harness
            gives a copy its padding token).
        settings: all but those of the text.
        per_item: keep each item's metrics, for paired differences.
        files: a folder for lm-eval's own files: results, and samples if they are asked for.

    Raises:
        UsageError: lm-eval is not installed, no task is given, one does not exist, is there twice
            or runs code, one has images and the model is not multimodal, or the settings ask for a
            chat template that the tokenizer has not.
    """
    check_names(settings)
    lm_eval = import_harness()
    template = chosen_template(tokenizer, settings)
    if settings.fewshot_as_multiturn and template is None:
        raise UsageError(
            "fewshot_as_multiturn makes turns of a conversation: give apply_chat_template "
            "(--apply-chat-template) as well"
        )
    multiturn = settings.fewshot_as_multiturn
    multiturn = template is not None if multiturn is None else multiturn
    metadata = _metadata(model, settings)
    with _quiet(settings.log_samples) as warnings, measuring(model):
        names, manager = find_tasks(settings, metadata)
        lm = harness_model(model, tokenizer, settings)
        tracker = None if files is None or lm.rank else HarnessFiles(files)
        with _refusals(names), request_cache(settings, metadata), requests_told(), _answered():
            output = lm_eval.simple_evaluate(
                model=lm,
                model_args={"pretrained": str(getattr(model, "name_or_path", "") or "model")},
                tasks=names,
                task_manager=manager,
                batch_size=settings.batch_size,
                device=str(model.device),
                apply_chat_template=template is not None,
                system_instruction=settings.system_instruction,
                fewshot_as_multiturn=multiturn,
                num_fewshot=settings.num_fewshot,
                gen_kwargs=dict(settings.gen_kwargs or {}) or None,
                limit=settings.limit,
                cache_requests=settings.cache_requests in (True, "refresh"),
                rewrite_requests_cache=settings.cache_requests == "refresh",
                delete_requests_cache=settings.cache_requests == "delete",
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
                log_samples=per_item or settings.log_samples,
                evaluation_tracker=None if tracker is None else tracker.tracker,
                confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
        if output is None:  # not the first of several
            return TaskScores(
                {}, {}, {}, {}, version("lm_eval"), template is not None, multiturn, {}
            )
        samples = output.pop("samples", {})
        written = (
            []
            if tracker is None
            else tracker.write(output, samples if settings.log_samples else {})
        )
    raw = output["results"] | output.get("groups", {})
    results = {task: clean_metrics(figures) for task, figures in raw.items()}
    counts = {task: counts["effective"] for task, counts in output["n-samples"].items()}
    rising = output.get("higher_is_better", {})
    return TaskScores(
        results=results,
        samples=counts,
        shots=dict(output["n-shot"]),
        versions=dict(output["versions"]),
        harness_version=output.get("lm_eval_version", lm_eval.__version__),
        chat_template=template is not None,
        multiturn=multiturn,
        warnings=dict(warnings),
        items={
            task: _items(found, results.get(task, {}), rising.get(task, {}))
            for task, found in samples.items()
        }
        if per_item
        else {},
        groups=group_weights(output.get("group_subtasks", {}), counts, results),
        files=[str(file) for file in written],
    )


def import_harness() -> ModuleType:
    """lm-eval, or a UsageError that names the extra it comes with."""
    return import_package("lm_eval", "evaluating tasks")


def harness_model(model: Any, tokenizer: Any, settings: EvaluationSettings) -> "LM":
    """A loaded model as lm-eval asks it; the tokenizer, or processor, is copied.

    Raises UsageError for a chat template that is not there, and what `multimodal_model` raises.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if (template := chosen_template(tokenizer, settings)) is not None:
        # lm-eval notes the name that it is given and goes on with the default one.
        tokenizer.chat_template = template
    if is_multimodal(tokenizer):
        lm = multimodal_model(model, tokenizer, settings)
    else:
        from lm_eval.models.huggingface import HFLM  # slow to import

        lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            add_bos_token=settings.add_bos_token,
        )
    return share(lm) if _shared.get() else lm


def share(lm: Any) -> Any:
    """lm-eval's model as one of several that share its requests, which it is not where it is handed
    a loaded one."""
    from accelerate import Accelerator  # slow to import

    accelerator = Accelerator(cpu=lm.device.type == "cpu")
    lm.accelerator = accelerator
    lm._rank, lm._world_size = accelerator.process_index, accelerator.num_processes
    return lm


def chosen_template(tokenizer: Any, settings: EvaluationSettings) -> str | None:
    """The chat template that prompts are put into; None: they are not.

    Raises UsageError if the settings ask for one that the tokenizer, or processor, has not.
    """
    wanted, templates = settings.apply_chat_template, getattr(tokenizer, "chat_template", None)
    if wanted is None:
        wanted = is_multimodal(tokenizer) and bool(templates)
    if wanted is False:
        return None
    if not templates:
        raise UsageError(
            "apply_chat_template: this model's tokenizer has no chat template: leave it out"
        )
    named: dict[str, str] = templates if isinstance(templates, dict) else {"default": templates}
    name = "default" if wanted is True else wanted
    if name not in named:
        raise UsageError("apply_chat_template: " + unknown("chat template", name, named))
    return named[name]


@contextlib.contextmanager
def _refusals(names: Sequence[str]) -> Iterator[None]:
    """What the harness finds out once the tasks are loaded, and raises as it comes."""
    try:
        yield
    except ValueError as error:
        said = str(error)
        if "multimodal" in said:
            raise UsageError(
                f"of {', '.join(names)}, one has images or audio, which this model does not take: "
                "evaluate a multimodal model, or other tasks"
            ) from error
        if found := re.search(r"Duplicate task '(.+?)'.*both '(.+?)' and '(.+?)'", said):
            task, first, second = found.groups()
            remedy = f"leave {task} out" if task in (first, second) else "name one of the two"
            raise UsageError(
                f"task {task!r} is asked for twice, by {first!r} and by {second!r}: {remedy}, "
                "or evaluate them in two calls"
            ) from error
        if found := re.search(r"run task: (\S+) which is marked as unsafe", said):
            raise UsageError(
                f"task {found[1]!r} executes what the model writes: give "
                "--confirm-run-unsafe-code (confirm_run_unsafe_code=True) if this machine may"
            ) from error
        raise UsageError(_stopped(names, error)) from error
    except AssertionError as error:
        if "max tokens to generate" not in str(error):
            raise UsageError(_stopped(names, error)) from error
        raise UsageError(
            f"{str(error).partition(': ')[2] or error} Set --gen-kwargs max_gen_toks=N, or a "
            "larger --max-length"
        ) from error
    except (LookupError, TypeError, AttributeError, OSError, TemplateError) as error:
        raise UsageError(_stopped(names, error)) from error


def _stopped(names: Sequence[str], error: Exception) -> str:
    """What a task's own definition, or a setting that the model does not take, sets off."""
    said = " ".join(str(error).split())[:300]
    reason = f"{type(error).__name__}: {said}" if said else f"a failed {type(error).__name__}"
    return (
        f"lm-eval cannot evaluate {', '.join(names)} like this: {reason} (a task's files, "
        "--gen-kwargs or --max-length; --debug shows where)"
    )


def _metadata(model: Any, settings: EvaluationSettings) -> dict[str, Any]:
    """What tasks are told that draw their items, or make them for a model: the seed, how many
    items if that is a number, and where the tokenizer is."""
    items = {"items": settings.limit} if isinstance(settings.limit, int) else {}
    place = {"pretrained": name} if (name := getattr(model, "name_or_path", "")) else {}
    return {"seed": settings.seed} | items | place | dict(settings.metadata or {})


def clean_metrics(raw: dict[str, Any]) -> Metrics:
    """`{"acc,none": a, "acc_stderr,none": b}` -> `{"acc": a, "acc_stderr": b}`.

    A metric that a task reports under several filters keeps the filter: `exact_match[strict]`.
    """
    filters: dict[str, set[str]] = defaultdict(set)
    for key in raw:
        metric, comma, name = key.partition(",")
        if comma:
            filters[metric].add(name)
    metrics: Metrics = {}
    for key, value in raw.items():
        metric, comma, name = key.partition(",")
        if not comma:
            continue  # alias, name and count, not metrics
        base, error = metric.removesuffix("_stderr"), metric.endswith("_stderr")
        shown = f"{base}[{name}]" if len(filters[metric]) > 1 else base
        metrics[shown + "_stderr" * error] = float(value) if _is_number(value) else None
    return metrics


def _items(
    samples: list[dict[str, Any]], figures: Metrics, rising: dict[str, bool | None]
) -> dict[str, Items]:
    """Each metric of each item, in item order; those whose figure is not their mean are left out.

    `figures`: of the task; `rising`: whether more of a metric is better, where that is known.
    """
    columns: dict[str, list[Any]] = defaultdict(list)
    several = len({sample["filter"] for sample in samples}) > 1
    for sample in sorted(samples, key=lambda sample: (sample["filter"], sample["doc_id"])):
        for metric in sample["metrics"]:
            shown = f"{metric}[{sample['filter']}]" if several else metric
            columns[shown].append(sample[metric])
    found = {}
    for metric, values in columns.items():
        if all(map(_is_number, values)):
            numbers = tuple(map(float, values))
            right = {*numbers} <= {0.0, 1.0} and rising.get(metric.partition("[")[0]) is not False
            items = Items(numbers, right=right)
        elif metric == "bits_per_byte":  # log-likelihoods, in nats, and bytes
            totals, sizes = zip(*values, strict=True)
            items = Items(tuple(-t / math.log(2) for t in totals), tuple(map(float, sizes)))
        else:
            continue
        figure = figures.get(metric)
        if figure is not None and math.isclose(items.figure(), figure, rel_tol=TOLERANCE):
            found[metric] = items
    return found


def _is_number(value: object) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, str)


class _WarningCounter(logging.Handler):
    """Counts the harness's warnings instead of printing each.

    Those that differ in numbers alone count as the first of them, which stays as it was said: a
    number may be part of a path.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}  # by the message without its numbers

    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        if not any(part in message for part in EXPECTED_WARNINGS):
            self.counts[self._first.setdefault(re.sub(r"\d+", "#", message), message)] += 1


class _NoProgressBars:
    """A text stream that drops tqdm's bars, which begin with a carriage return, and blank lines."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        if not text.startswith(("\r", *EXPECTED_LINES)) and text.strip():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


@contextlib.contextmanager
def _quiet(pictures: bool) -> Iterator[Counter[str]]:
    """Warnings are counted, not printed; progress bars show only where a terminal is watched.

    `pictures`: whether those of the items are written, and so are to be hashed.
    """
    from lm_eval import evaluator  # slow to import

    logger, counter = logging.getLogger("lm_eval"), _WarningCounter()
    before = logger.level, logger.propagate, logger.handlers
    logger.level, logger.propagate, logger.handlers = logging.WARNING, False, [counter]
    unused = {name: value for name, value in UNUSED.items() if not pictures or callable(value)}
    known = {name: getattr(evaluator, name) for name in unused if hasattr(evaluator, name)}
    for name in known:
        setattr(evaluator, name, unused[name])
    stream: Any = sys.stderr if sys.stderr.isatty() else _NoProgressBars(sys.stderr)
    try:
        with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
            yield counter.counts
    finally:
        logger.level, logger.propagate, logger.handlers = before
        for name, value in known.items():
            setattr(evaluator, name, value)
