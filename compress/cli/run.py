"""What `modelpress` can do: each command parses, calls the library, prints. It decides nothing.

Every import that needs torch is inside a command, so that `--help` answers at once. With --json,
stdout holds one JSON object and all else is on stderr; progress and warnings are there always.
"""

import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.bench import bench
from compress.cli.checkpoints import export, generate, inspect, push, recipes
from compress.cli.common import integers, interruptible
from compress.cli.console import (
    allocation_rows,
    allocation_table,
    console,
    memory_row,
    module_table,
    pairs_table,
    print_lines,
    print_scores,
    run_table,
    size_rows,
    stdout_for,
    write_json,
)
from compress.cli.options import (
    ActivationBitsOption,
    AverageBitsOption,
    BudgetOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    ModelOption,
    OutputFileOption,
    PackingOption,
    RecipeArgument,
    RecipesArgument,
    SeedOption,
    SetOption,
    VersionOption,
    WidthsOption,
)
from compress.cli.progress import RunProgress
from compress.cli.search_pruning import search_pruning
from compress.errors import UsageError
from compress.eval.report import format_bytes, quality_table

if TYPE_CHECKING:
    from compress.recipe.recipe import Recipe

app = typer.Typer(
    name="modelpress",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Makes language models smaller and faster, and measures what that cost.",
)


@app.callback()
def _top(version: VersionOption = False, debug: DebugOption = False) -> None:
    pass  # the options' callbacks do it; the help is that of `app`


# ---- commands -----------------------------------------------------------------------------------


@app.command()
def run(
    recipe: RecipeArgument,
    model: ModelOption = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the result; outputs/NAME of the recipe if absent."),
    ] = None,
    set_: SetOption = None,
    budget: BudgetOption = None,
    average_bits: AverageBitsOption = None,
    widths: WidthsOption = None,
    device: DeviceOption = "cpu",
    resume: Annotated[bool, typer.Option(help="Continue a run that was interrupted.")] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished result.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compress a model as a recipe says."""
    loaded = _load_recipe(recipe, set_, model, _allocation(budget, average_bits, widths))
    from compress.pipeline.run import run as run_recipe  # slow: a typo in the recipe is told before

    with stdout_for(json) as emit:
        output = output or _default_output(loaded.name)
        err = console(stderr=True)
        print_lines(err, f"{loaded.name}: the result goes to {output}")
        with (
            RunProgress(err) as progress,
            interruptible(lambda: _what_is_left(progress, output, resume)),
        ):
            result = run_recipe(
                loaded, output, device=device, resume=resume, overwrite=overwrite, observer=progress
            )
        if emit:
            emit(result.as_dict())
            return
        out = console()
        if result.plan.allocation:
            out.print(allocation_table(result.plan.allocation))
        out.print(run_table(result))
        if result.metrics:
            print_scores(out, loaded.name, result.metrics)


@app.command()
def plan(
    recipe: RecipeArgument,
    model: ModelOption = None,
    set_: SetOption = None,
    budget: BudgetOption = None,
    average_bits: AverageBitsOption = None,
    widths: WidthsOption = None,
    device: DeviceOption = "cpu",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what a run would do: bits, bytes and memory.

    Reads no weights, but for the scores of a recipe that gives layers different widths.
    """
    loaded = _load_recipe(recipe, set_, model, _allocation(budget, average_bits, widths))
    from compress import plan as plan_of

    with stdout_for(json) as emit:
        if loaded.allocate is None:
            planned = plan_of(loaded)
        else:
            with RunProgress(console(stderr=True)) as progress:
                planned = plan_of(loaded, device=device, observer=progress)
        if emit:
            emit(planned.as_dict())
        else:
            out = console()
            out.print(module_table([module.as_dict() for module in planned.modules]))
            average = ("average bits", f"{planned.average_bits:.2f} over the quantised weights")
            memory = memory_row("peak memory", planned.peak_memory)
            notes = [("note", note) for note in planned.notes]
            chosen = []
            if planned.allocation:
                out.print(allocation_table(planned.allocation))
                chosen = allocation_rows(planned.allocation)
            sizes = [*size_rows(planned.bytes), ("file", format_bytes(planned.file_bytes))]
            out.print(pairs_table([average, *chosen, *sizes, memory, *notes]))
    for problem in planned.problems:
        print(f"error: {problem}", file=sys.stderr)
    if planned.problems:
        raise typer.Exit(2)


@app.command("eval")
def evaluate(
    model: ModelArgument,
    baseline: Annotated[
        str | None, typer.Option(help="The 16-bit model, measured on the same data.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval or shipped, with commas.")] = "",
    include_path: Annotated[Path | None, typer.Option(help="A folder of more tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples per task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Instead of the task's.")] = None,
    perplexity: Annotated[
        str | None, typer.Option(metavar="DATASET", help="wikitext2, FILE.txt, FILE.jsonl, hub id.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Key of a FILE.jsonl's text.")] = "text",
    length: Annotated[int, typer.Option(min=2, help="Tokens of context.")] = 512,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Between windows; length if absent.")
    ] = None,
    bos: Annotated[bool, typer.Option(help="Put BOS at each window's start.")] = False,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Only the text's first so many.")
    ] = None,
    per_document: Annotated[
        bool, typer.Option("--per-document", help="Each document on its own, not one stream.")
    ] = False,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for pictures of pruned patches.")
    ] = None,
    dense: PackingOption = None,
    activation_bits: ActivationBitsOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    output: OutputFileOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a model: tasks, perplexity, and the distance to its baseline."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names and not perplexity:
        raise UsageError("nothing to measure: give --tasks, --perplexity, or both")
    from compress.pipeline.evaluation import evaluate as evaluate_model

    with stdout_for(json) as emit:
        scores = evaluate_model(
            model, tasks=names, include_path=include_path, perplexity=perplexity, length=length,
            stride=stride, bos=bos, tokens=tokens, per_document=per_document,
            text_field=text_field, baseline=baseline, limit=limit, batch_size=batch_size,
            num_fewshot=num_fewshot, dense=dense, activation_bits=activation_bits, seed=seed,
            device=device, pictures=pictures,
        )  # fmt: skip
        if emit:
            emit(scores)
        else:
            print_scores(console(), model, scores, baseline or "")
        write_json(output, scores)


@app.command()
def compare(
    recipes: RecipesArgument,
    seeds: Annotated[str, typer.Option(help="Calibration seeds, with commas.")] = "0",
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="KEY=A,B,C", help="Each recipe with each of these values."),
    ] = None,
    model: ModelOption = None,
    set_: SetOption = None,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("outputs/compare"),
    device: DeviceOption = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Run what is finished again.")
    ] = False,
    self_check: Annotated[
        bool, typer.Option(help="Reload each result in a fresh process and compare logits.")
    ] = True,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run recipes on the same model, data and seeds: one table, one plot."""
    varied = _variations(vary or [])
    if len(recipes) * len(varied) < 2:
        raise UsageError("compare needs two recipes or more; for one there is `run`")
    numbers = integers("--seeds", seeds)
    loaded = []
    for recipe in recipes:
        for assignments in varied:
            changed = _load_recipe(recipe, set_, model, assignments)
            loaded.append(changed.with_changes(name=_label(changed.name, assignments)))
    from compress.comparison.compare import compare as compare_recipes

    with stdout_for(json) as emit:
        kept = "run the same command again; what is finished is kept"
        with RunProgress(console(stderr=True)) as progress, interruptible(lambda: kept):
            compared = compare_recipes(
                loaded, output, numbers, device=device, overwrite=overwrite,
                self_check=self_check, observer=progress,
            )  # fmt: skip
        if emit:
            emit(compared.as_dict())
        else:
            out = console()
            out.print(quality_table(compared.rows))
            plot = [f"plot: {compared.plot}"] if compared.plot else []
            print_lines(out, compared.conditions, *plot)


# ---- what commands share ------------------------------------------------------------------------


def _load_recipe(
    path: str, assignments: list[str] | None, model: str | None, more: Sequence[str] = ()
) -> "Recipe":
    from compress.recipe.recipe import Recipe

    return Recipe.load(path, overrides=[*(assignments or ()), *more], model=model)


def _allocation(budget: str | None, average_bits: float | None, widths: str | None) -> list[str]:
    """--budget, --average-bits and --widths as assignments; a budget replaces the recipe's."""
    assignments = []
    if budget is not None or average_bits is not None:
        others = ("budget", "average_bits", "maximum_kl", "narrow")
        assignments = [f"allocate.{name}=null" for name in others]
    if budget is not None:
        assignments.append(f"allocate.budget={budget}")
    if average_bits is not None:
        assignments.append(f"allocate.average_bits={average_bits}")
    if widths is not None:
        chosen = integers("--widths", widths)
        assignments.append(f"allocate.widths=[{', '.join(map(str, chosen))}]")
    return assignments


def _variations(vary: list[str]) -> list[list[str]]:
    """Every combination of the values of --vary, as assignments; commas inside brackets stay."""
    choices = []
    for text in vary:
        key, equals, values = text.partition("=")
        parts = re.findall(r"(?:[^,\[{]|\[[^\]]*\]|\{[^}]*\})+", values)
        if not equals or not values or ",".join(parts) != values:
            raise UsageError(f"--vary: expected KEY=A,B,C, found {text!r}")
        choices.append([f"{key}={value.strip()}" for value in parts])
    return [list(combination) for combination in itertools.product(*choices)]


def _label(name: str, assignments: list[str]) -> str:
    """A recipe's name with its varied keys, as something that can name a folder."""
    parts = [name]
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        parts.append(f"{key.rpartition('.')[2]}={value}".replace("/", "_"))
    return " ".join(parts)


def _default_output(name: str) -> Path:
    """outputs/NAME, where a recipe's name may be any text."""
    from compress.comparison.study import folder_name

    return Path("outputs") / folder_name(name)


def _what_is_left(progress: RunProgress, output: Path, resume: bool) -> str:
    """What to do about a run that was interrupted."""
    if progress.current == "evaluation":  # the last stage: all else is in its place
        return f"the checkpoint in {output} is whole; `modelpress eval` measures it"
    again = "run the same command again" + ("" if resume else " without --no-resume")
    return f"to continue after the last whole layer, {again}"


for command in (export, inspect, generate, recipes, push, search_pruning):
    app.command()(command)
app.add_typer(bench, name="bench")  # last in the help
