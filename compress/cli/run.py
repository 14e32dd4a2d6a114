"""`modelpress run` and `plan`: a recipe, done or foretold.

Every import that needs torch is inside a command.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from compress.cli.common import Answer, integers, interruptible, load_recipe
from compress.cli.console import (
    allocation_rows,
    allocation_table,
    calibration_rows,
    console,
    module_table,
    pairs_table,
    print_lines,
    print_scores,
    run_table,
    size_rows,
    source_rows,
    time_rows,
)
from compress.cli.options import (
    AverageBitsOption,
    BudgetOption,
    DeviceOption,
    ModelOption,
    RecipeArgument,
    SelfCheckOption,
    SetOption,
    WidthsOption,
)
from compress.cli.progress import RunProgress
from compress.eval.report import format_bytes, format_memory
from compress.memory import chosen_device, idle_gpus
from compress.storage.files import folder_name


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
    device: DeviceOption = "auto",
    resume: Annotated[bool, typer.Option(help="Continue a run that was interrupted.")] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished result.")
    ] = False,
    check_source: Annotated[
        bool, typer.Option(help="First compare our forward of the model with transformers.")
    ] = True,
    self_check: SelfCheckOption = True,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Several ranks: the bytes of one process.")
    ] = False,
) -> Answer:
    """Compress a model as a recipe says.

    Started by torchrun (torchrun --nproc-per-node 2 -m compress run RECIPE), the ranks share it.
    """
    loaded = load_recipe(recipe, model, set_, _allocation(budget, average_bits, widths))
    output = output or Path("outputs") / folder_name(loaded.name)  # which may be any text
    err = console(stderr=True)
    print_lines(err, f"{loaded.name}: the result goes to {output}")
    from compress.pipeline.run import run as run_recipe  # some seconds: something is said before

    device = chosen_device(device)
    if idle := idle_gpus(device):
        print_lines(err, f"{idle} run {recipe}")
    with (
        RunProgress(err) as progress,
        interruptible(lambda: _what_is_left(progress, output, resume)),
    ):
        result = run_recipe(
            loaded,
            output,
            device=device,
            resume=resume,
            overwrite=overwrite,
            check_source=check_source,
            self_check=self_check,
            deterministic=deterministic,
            observer=progress,
        )

    def draw(out: Console) -> None:
        if result.plan.allocation:
            out.print(allocation_table(result.plan.allocation))
        out.print(run_table(result))
        if result.metrics:
            print_scores(out, loaded.name, result.metrics)

    return Answer(result.as_dict(), draw)


def plan(
    recipe: RecipeArgument,
    model: ModelOption = None,
    set_: SetOption = None,
    budget: BudgetOption = None,
    average_bits: AverageBitsOption = None,
    widths: WidthsOption = None,
    device: DeviceOption = "auto",
    check_source: Annotated[
        bool,
        typer.Option("--check-source", help="Compare our forward of the model with transformers."),
    ] = False,
    time: Annotated[
        bool,
        typer.Option("--time", help="Do pieces of the work, and tell how long all of it takes."),
    ] = False,
) -> Answer:
    """Show what a run would do: bits, bytes and memory; --time: how long it takes here.

    Reads no weights, but for the scores of a recipe that gives layers different widths, and for
    --check-source. A folder of config.json alone will do, and of a hub model no more is needed.
    """
    loaded = load_recipe(recipe, model, set_, _allocation(budget, average_bits, widths))
    from compress import plan as plan_of

    device = chosen_device(device)
    if loaded.allocate is None:
        planned = plan_of(loaded, device=device, check_source=check_source, time=time)
    else:
        with RunProgress(console(stderr=True)) as progress:
            planned = plan_of(
                loaded, device=device, observer=progress, check_source=check_source, time=time
            )

    def draw(out: Console) -> None:
        out.print(module_table([module.as_dict() for module in planned.modules]))
        average = ("average bits", f"{planned.average_bits:.2f} over the quantised weights")
        memory = ("peak memory", format_memory(planned.peak_memory))
        notes = [("note", note) for note in planned.notes]
        chosen = []
        if planned.allocation:
            out.print(allocation_table(planned.allocation))
            chosen = allocation_rows(planned.allocation)
        before, after = planned.source_bytes, planned.bytes["total"]
        sizes = [*size_rows(planned.bytes), ("file", format_bytes(planned.file_bytes))]
        if before and after:
            sizes.append(("source", f"{format_bytes(before)}, {before / after:.2f} x the total"))
        checked = source_rows(planned.source_check)
        read = calibration_rows(planned.calibration)
        taken = time_rows(planned.time)
        rows = [average, *chosen, *sizes, memory, *taken, *read, *checked, *notes]
        out.print(pairs_table(rows))

    return Answer(planned.as_dict(), draw, problems=planned.problems)


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


def _what_is_left(progress: RunProgress, output: Path, resume: bool) -> str:
    """What to do about a run that was interrupted."""
    again = "run the same command again" + ("" if resume else " without --no-resume")
    if progress.current == "evaluation":  # the last stage: all else is in its place
        return f"the checkpoint in {output} is whole and described; to measure it, {again}"
    return f"to continue after the last whole layer, {again}"
