"""`modelpress eval` and `compare`: one model measured, or several recipes beside each other.

Every import that needs torch is inside a command.
"""

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from compress.cli.common import Answer, integers, interruptible, key_values, load_recipe, names
from compress.cli.console import console, print_lines, print_scores
from compress.cli.options import (
    ActivationBitsOption,
    DeviceOption,
    ModelArgument,
    ModelOption,
    OutputFileOption,
    PackingOption,
    RecipesArgument,
    SeedOption,
    SelfCheckOption,
    SetOption,
)
from compress.cli.progress import RunProgress
from compress.errors import CompressError, UsageError, import_package, unknown
from compress.eval.progress import telling
from compress.eval.settings import (
    EvaluationSettings,
    batch_problem,
    limit_problem,
)
from compress.eval.tables import quality_table
from compress.eval.task_names import check_names


def _tasks(text: str, option: str) -> list[str]:
    return names(text)


def _limit(text: str, option: str) -> int | float:
    value = _number(text)
    if value is None or (problem := limit_problem(value)):
        expected = "expected a whole number of items, or a share of them below 1"
        raise UsageError(
            f"{option}: {problem if value is not None else f'{expected}, found {text!r}'}"
        )
    return value


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return None


def _batch_size(text: str, option: str) -> int | str:
    size = int(text) if text.strip().isdecimal() else text
    if problem := batch_problem(size):
        raise UsageError(f"{option}: {problem}")
    return size


def _template(text: str, option: str) -> bool | str:
    return {"true": True, "false": False}.get(text, text)


def _cache(text: str, option: str) -> bool | str:
    known: dict[str, bool | str] = {"true": True, "false": False}
    known |= {name: name for name in ("refresh", "delete")}
    if text.lower() not in known:
        raise UsageError(f"{option}: {unknown('value', text, known)}")
    return known[text.lower()]


# Options whose value may be left out, and what then stands for it.
BARE = {"--apply-chat-template": "true", "--cache-requests": "true"}

# The options of what is measured and how: of the fields of EvaluationSettings.
MEASURED = {
    "tasks": Annotated[
        Sequence[str], typer.Option(help="Tasks of lm-eval or shipped, with commas."), _tasks
    ],
    "include_path": Annotated[Path | None, typer.Option(help="A folder of more tasks.")],
    "limit": Annotated[
        float | None, typer.Option(help="Examples per task, or a share of them: 100, 0.1."), _limit
    ],
    "batch_size": Annotated[
        int | str, typer.Option(help="A number; of the tasks also auto, auto:N."), _batch_size
    ],
    "num_fewshot": Annotated[int | None, typer.Option(min=0, help="Instead of the task's.")],
    "apply_chat_template": Annotated[
        bool | str | None,
        typer.Option(
            "--apply-chat-template",
            metavar="[=NAME]",
            help="Put prompts into the model's chat template; =false: not even with images.",
        ),
        _template,
    ],
    "system_instruction": Annotated[str | None, typer.Option(help="A system prompt.")],
    "fewshot_as_multiturn": Annotated[
        bool | None,
        typer.Option(
            "--fewshot-as-multiturn/--fewshot-in-one-turn",
            help="Examples as turns of their own; so in a chat template if absent.",
        ),
    ],
    "gen_kwargs": Annotated[
        Mapping[str, Any] | None,
        typer.Option(metavar="KEY=VALUE,...", help="Of generation, as temperature=0,until=[END]."),
        key_values,
    ],
    "max_length": Annotated[
        int | None, typer.Option(min=2, help="Most tokens of a task's prompt; the context.")
    ],
    "add_bos_token": Annotated[
        bool | None,
        typer.Option(
            "--add-bos-token/--no-bos-token",
            help="BOS before the tasks' prompts; as the tokenizer does if absent.",
        ),
    ],
    "cache_requests": Annotated[
        bool | str,
        typer.Option(metavar="[=refresh|=delete]", help="Keep the tasks' prompts once built."),
        _cache,
    ],
    "log_samples": Annotated[
        bool, typer.Option("--log-samples", help="Keep prompts and answers, in --output-path.")
    ],
    "metadata": Annotated[
        Mapping[str, Any] | None,
        typer.Option(metavar="KEY=VALUE,...", help="Of tasks made for a model, as ruler."),
        key_values,
    ],
    "confirm_run_unsafe_code": Annotated[
        bool,
        typer.Option("--confirm-run-unsafe-code", help="Run tasks that execute the answers."),
    ],
    "perplexity": Annotated[
        str | None, typer.Option(metavar="DATASET", help="wikitext2, FILE.txt, FILE.jsonl, hub id.")
    ],
    "text_field": Annotated[str, typer.Option(help="Key of a FILE.jsonl's text.")],
    "length": Annotated[
        int | None, typer.Option(min=2, help="Of a window; the model's context, 2048 at most.")
    ],
    "stride": Annotated[int | None, typer.Option(min=1, help="Between windows; length if absent.")],
    "bos": Annotated[bool, typer.Option(help="Put BOS at each window's start.")],
    "tokens": Annotated[int | None, typer.Option(min=2, help="Only the text's first so many.")],
    "per_document": Annotated[
        bool, typer.Option("--per-document", help="Each document on its own, not one stream.")
    ],
    "by_position": Annotated[
        bool, typer.Option("--by-position", help="The text's figures by tokens in front, too.")
    ],
    "seed": SeedOption,
}


def evaluate(
    model: ModelArgument,
    baseline: Annotated[
        str | None, typer.Option(help="The 16-bit model, measured on the same data.")
    ] = None,
    *,
    settings: EvaluationSettings,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for pictures of pruned patches.")
    ] = None,
    dense: PackingOption = None,
    activation_bits: ActivationBitsOption = None,
    device: DeviceOption = "auto",
    output: OutputFileOption = None,
    output_path: Annotated[
        Path | None, typer.Option(help="A folder for lm-eval's own files: results_*.json.")
    ] = None,
    record: Annotated[
        bool,
        typer.Option(help="Put the figures into a finished result's card and report."),
    ] = True,
) -> Answer:
    """Measure a model: tasks, perplexity, and the distance to its baseline."""
    if not settings.tasks and not settings.perplexity:
        raise UsageError("nothing to measure: give --tasks, --perplexity, or both")
    if settings.log_samples and (output_path is None or not settings.tasks):
        raise UsageError("--log-samples: give --tasks, and --output-path for what they answer")
    if settings.tasks:
        check_names(settings)  # slow: a typo is told before torch is imported
    from compress.pipeline.evaluation import evaluate as evaluate_model

    with RunProgress(console(stderr=True)) as progress, telling(progress.progress):
        scores = evaluate_model(
            model,
            **vars(settings),
            baseline=baseline,
            device=device,
            dense=dense,
            activation_bits=activation_bits,
            pictures=pictures,
            output_path=output_path,
        )
    written = _recorded(Path(model), scores) if record and scores else []

    def draw(out: Console) -> None:
        print_scores(out, model, scores, baseline or "")
        if written:
            print_lines(out, f"recorded in {model}: {', '.join(written)}")

    return Answer(scores, draw, output)


def _recorded(folder: Path, scores: dict[str, Any]) -> list[str]:
    """The documents of a finished result that have the figures now; a line where they cannot."""
    from compress.pipeline.description import record_evaluation

    if not folder.is_dir():
        return []
    try:
        return record_evaluation(folder, scores)
    except (CompressError, OSError) as error:  # the figures are there, whatever becomes of the card
        print_lines(console(stderr=True), f"not recorded in {folder}: {error}")
        return []


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's own command, which then knows --model modelpress and modelpress-multimodal."""
    import_package("lm_eval", "lm-eval's command")
    from compress.pipeline.lm_eval_models import main

    main(context.args)


def compare(
    recipes: RecipesArgument,
    seeds: Annotated[str, typer.Option(help="Calibration seeds, with commas.")] = "0",
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="KEY=A,B,C", help="Each recipe with each of these values."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="The recipe that the others are paired with; the first one if absent."),
    ] = None,
    model: ModelOption = None,
    set_: SetOption = None,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("outputs/compare"),
    device: DeviceOption = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Run what is finished again.")
    ] = False,
    self_check: SelfCheckOption = True,
    check_source: Annotated[
        bool, typer.Option(help="First compare our forward of the model with transformers.")
    ] = True,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Several ranks: the bytes of one process.")
    ] = False,
) -> Answer:
    """Run recipes on the same model, data and seeds: one table, one plot.

    Started by torchrun (torchrun --nproc-per-node 2 -m compress compare RECIPE...), the ranks share
    the runs and what is measured.
    """
    varied = _variations(vary or [])
    if len(recipes) * len(varied) < 2:
        raise UsageError("compare needs two recipes or more; for one there is `run`")
    numbers = integers("--seeds", seeds)
    loaded = []
    for recipe in recipes:
        for assignments in varied:
            changed = load_recipe(recipe, model, set_, assignments)
            loaded.append(changed.with_changes(name=_label(changed.name, assignments)))
    from compress.comparison.compare import compare as compare_recipes

    kept = "run the same command again; what is finished is kept"
    with RunProgress(console(stderr=True)) as progress, interruptible(lambda: kept):
        compared = compare_recipes(
            loaded,
            output,
            numbers,
            against=against,
            device=device,
            overwrite=overwrite,
            self_check=self_check,
            check_source=check_source,
            deterministic=deterministic,
            observer=progress,
        )

    def draw(out: Console) -> None:
        out.print(quality_table(compared.rows))
        plot = [f"plot: {compared.plot}"] if compared.plot else []
        print_lines(out, compared.conditions)
        for rows, line in compared.others:
            out.print(quality_table(rows))
            print_lines(out, line)
        print_lines(out, *plot)

    return Answer(compared.as_dict(), draw)


def _variations(vary: list[str]) -> list[list[str]]:
    """Every combination of the values of --vary, as assignments; commas inside brackets stay."""
    choices = []
    for text in vary:
        key, _, values = text.partition("=")
        choices.append([f"{key}={value}" for value in _values(values, text)])
    return [list(combination) for combination in itertools.product(*choices)]


def _values(text: str, option: str) -> list[str]:
    """The elements of a YAML list without its brackets, each as it was written."""
    listed = f"[{text}]"
    try:
        found = yaml.compose(listed, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        found = None
    parts = found.value if isinstance(found, yaml.SequenceNode) else []
    if not parts or text.rstrip().endswith(","):
        raise UsageError(f"--vary: expected KEY=A,B,C, found {option!r}")
    return [listed[part.start_mark.index : part.end_mark.index].strip() for part in parts]


def _label(name: str, assignments: list[str]) -> str:
    """A recipe's name with its varied keys, as something that can name a folder.

    Of a key no more than tells it from the others: `bits`, or `quantize.bits embedding.bits`.
    """
    keys = [assignment.partition("=")[0].split(".") for assignment in assignments]
    parts = [name]
    for path, assignment in zip(keys, assignments, strict=True):
        lengths = range(1, len(path) + 1)
        others = [key for key in keys if key != path]
        told = (n for n in lengths if all(key[-n:] != path[-n:] for key in others))
        length = next(told, len(path))
        value = assignment.partition("=")[2]
        parts.append(f"{'.'.join(path[-length:])}={value}".replace("/", "_"))
    return " ".join(parts)
