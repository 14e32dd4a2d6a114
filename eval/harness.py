"""Tasks of the lm-evaluation-harness on a model that is already loaded.

The tasks folder beside this file is always known, `include_path` adds others, and the harness's
own tasks are looked up only where a name is in neither (its index takes ten seconds to read).
Metrics keep the harness's names without its filter suffix: `acc,none` is `acc`, with `acc_stderr`.

    settings = EvaluationSettings(tasks=["demo_code"], limit=100)
    score_tasks(model, tokenizer, settings).results
    # {"demo_code": {"acc": 0.52, "acc_stderr": 0.0502, "acc_norm": 0.55, "acc_norm_stderr": ...}}

A multimodal model comes with its processor in the tokenizer's place; tasks with images then get
them, in the processor's chat template if it has one.

Policy: an unknown task or a missing lm-eval is an error before anything runs. A standard error that
the harness cannot give (a single item) is None. Its warnings are counted and kept in the result.
"""

import contextlib
import copy
import logging
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TextIO

from compress.errors import UsageError, did_you_mean, import_extra
from compress.eval.multimodal import is_multimodal, multimodal_model
from compress.eval.settings import EvaluationSettings
from compress.eval.windows import measuring

if TYPE_CHECKING:  # an extra
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

LOCAL_TASKS = Path(__file__).with_name("tasks")
# What the harness does beside measuring, and what stands in for it while it runs: nothing of it is
# kept. Outside a repository git prints `fatal: ...` past sys.stderr; the environment is asked of
# pip, which takes seconds; pictures would be written as PNG, twice each, to be hashed.
UNUSED: dict[str, Any] = {
    "get_git_commit_hash": lambda: None,
    "add_env_info": lambda storage: None,
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
)
# Local tasks whose items are drawn from the evaluation's seed.
DRAWN_TASKS = ("demo_vqa",)

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class TaskScores:
    """What the harness measured, by task.

    `items` holds each metric per item, in item order; `warnings` what the harness warned of, with
    numbers replaced by #, and how often.
    """

    results: dict[str, Metrics]
    samples: dict[str, int]  # items scored
    shots: dict[str, int]  # examples in front of each item
    versions: dict[str, Any]  # of the task definitions
    harness_version: str
    chat_template: bool  # whether prompts were put into the processor's
    warnings: dict[str, int]
    items: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def score_tasks(
    model: Any, tokenizer: Any, settings: EvaluationSettings, per_item: bool = False
) -> TaskScores:
    """Scores of a loaded model, with how they were taken and, on request, each item's own.

    Args:
        model: a transformers model, on its device.
        tokenizer: its tokenizer, of a multimodal model its processor; left as it is (the harness
            gives a copy its padding token).
        settings: all but those of the text.
        per_item: keep each item's metrics, for paired differences.

    Raises:
        UsageError: lm-eval is not installed, no task is given, one does not exist, or one has
            images and the model is not multimodal.
    """
    lm_eval = import_harness()
    with _quiet() as warnings, measuring(model):
        names, manager = find_tasks(settings, _drawing(settings.seed, settings.limit))
        chat = is_multimodal(tokenizer) and bool(tokenizer.chat_template)
        with _images_need_a_multimodal_model(names):
            output = lm_eval.simple_evaluate(
                model=_harness_model(model, tokenizer, settings.batch_size),
                tasks=names,
                task_manager=manager,
                apply_chat_template=chat,
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
                log_samples=per_item,
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
    figures = output["results"] | output.get("groups", {})
    return TaskScores(
        results={task: clean_metrics(raw) for task, raw in figures.items()},
        samples={task: counts["effective"] for task, counts in output["n-samples"].items()},
        shots=dict(output["n-shot"]),
        versions=dict(output["versions"]),
        harness_version=output.get("lm_eval_version", lm_eval.__version__),
        chat_template=chat,
        warnings=dict(warnings),
        items={task: _items(samples) for task, samples in output.get("samples", {}).items()},
    )


def import_harness() -> ModuleType:
    """lm-eval, or a UsageError that names the extra it comes with."""
    return import_extra("lm_eval", "eval", "evaluating tasks")


def _harness_model(model: Any, tokenizer: Any, batch_size: int | str) -> "LM":
    if is_multimodal(tokenizer):
        return multimodal_model(model, tokenizer, batch_size)
    from lm_eval.models.huggingface import HFLM  # an optional extra

    return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)


@contextlib.contextmanager
def _images_need_a_multimodal_model(names: Sequence[str]) -> Iterator[None]:
    """The harness finds out after loading the tasks, and raises a ValueError."""
    try:
        yield
    except ValueError as error:
        if "multimodal" not in str(error):
            raise
        raise UsageError(
            f"of {', '.join(names)}, one has images or audio, which this model does not take: "
            "evaluate a multimodal model, or other tasks"
        ) from error


def _drawing(seed: int, limit: int | float | None) -> dict[str, int]:
    """What tasks are told that draw their items: the seed, and how many if that is a number."""
    return {"seed": seed} | ({"items": limit} if isinstance(limit, int) else {})


def find_tasks(
    settings: EvaluationSettings, metadata: dict[str, Any] | None = None
) -> tuple[list[str], "TaskManager"]:
    """The names the harness will run, patterns expanded, and a TaskManager that knows them.

    `metadata` is handed to all tasks, in place of what their definitions say.

    Raises:
        UsageError: no task, a folder that is not there, or an unknown task.
    """
    from lm_eval.tasks import TaskManager  # an optional extra

    include_path = settings.include_path
    tasks = [settings.tasks] if isinstance(settings.tasks, str) else settings.tasks
    if not tasks:
        raise UsageError("no task to evaluate: name at least one, for example demo_code")
    given = [include_path] if isinstance(include_path, str | Path) else (include_path or [])
    folders = [LOCAL_TASKS, *map(Path, given)]
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"task folder {folder} does not exist (include_path)")

    local = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    manager = local
    if not all(_expand(task, local) for task in tasks):
        manager = TaskManager(include_path=folders, metadata=metadata)
    names: list[str] = []
    for task in tasks:
        expanded = _expand(task, manager)
        if not expanded:
            raise UsageError(
                f"unknown task {task!r}{did_you_mean(task, manager.all_tasks)}: local tasks are "
                f"{', '.join(local.all_tasks)}; `lm_eval ls tasks` lists the harness's own"
            )
        names += [name for name in expanded if name not in names]
    return names, manager


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


def _expand(task: str, manager: "TaskManager") -> list[str]:
    """Names a pattern stands for; a path to a task file stands for itself."""
    if task.endswith((".yaml", ".yml")) and Path(task).is_file():
        return [task]
    return manager.match_tasks([task])


def _items(samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Each metric of each item, in item order; metrics that are not one number are left out."""
    columns: dict[str, list[float]] = defaultdict(list)
    several = len({sample["filter"] for sample in samples}) > 1
    for sample in sorted(samples, key=lambda sample: (sample["filter"], sample["doc_id"])):
        for metric in sample["metrics"]:
            shown = f"{metric}[{sample['filter']}]" if several else metric
            if _is_number(sample[metric]):
                columns[shown].append(float(sample[metric]))
    return dict(columns)


def _is_number(value: object) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, str)


class _WarningCounter(logging.Handler):
    """Counts the harness's warnings, numbers replaced by #, instead of printing each."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        if not any(part in message for part in EXPECTED_WARNINGS):
            self.counts[re.sub(r"\d+", "#", message)] += 1


class _NoProgressBars:
    """A text stream that drops tqdm's bars, which begin with a carriage return, and blank lines."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        if not text.startswith("\r") and text.strip():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


@contextlib.contextmanager
def _quiet() -> Iterator[Counter[str]]:
    """Warnings are counted, not printed; progress bars show only where a terminal is watched."""
    from lm_eval import evaluator  # an optional extra

    logger, counter = logging.getLogger("lm_eval"), _WarningCounter()
    before = logger.level, logger.propagate, logger.handlers
    logger.level, logger.propagate, logger.handlers = logging.WARNING, False, [counter]
    known = {name: getattr(evaluator, name) for name in UNUSED if hasattr(evaluator, name)}
    for name in known:
        setattr(evaluator, name, UNUSED[name])
    stream: Any = sys.stderr if sys.stderr.isatty() else _NoProgressBars(sys.stderr)
    try:
        with contextlib.redirect_stderr(stream):
            yield counter.counts
    finally:
        logger.level, logger.propagate, logger.handlers = before
        for name, value in known.items():
            setattr(evaluator, name, value)
