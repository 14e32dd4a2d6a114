"""`modelpress bench`: time and memory beside the least that the method needs.

A benchmark's options are the fields of its settings (`compress.bench.settings`). Every import that
needs torch is inside a command.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from compress.bench.kernels_view import plot_kernels
from compress.bench.report import Report
from compress.bench.settings import (
    CompiledBench,
    KernelBench,
    ModelBench,
    PruningBench,
    QuantizeBench,
)
from compress.cli.common import Answer, add_command, expanded
from compress.cli.console import console
from compress.cli.options import (
    ActivationBitsOption,
    DenseOption,
    ModelArgument,
    OutputFileOption,
    SeedOption,
)
from compress.errors import UsageError
from compress.memory import check_device

# Figures are of the device that was named, and not of whatever there is.
BENCH_DEVICE = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")]
# What fields without an option of their own are on the command line; others are no option.
SHARED = {
    "model": ModelArgument,
    "dense": DenseOption,
    "activation_bits": ActivationBitsOption,
    "seed": SeedOption,
    "device": BENCH_DEVICE,
}

bench = typer.Typer(no_args_is_help=True, help="Time and memory, beside what the method needs.")


def _answer(
    report: Report, file: Path | None, afterwards: Callable[[], object] = lambda: None
) -> Answer:
    return Answer(report.values, lambda out: out.print(report.table()), file, afterwards=afterwards)


def bench_quantize(
    *,
    settings: QuantizeBench,
    repeats: Annotated[int, typer.Option(min=1, help="Runs, one after the other.")] = 1,
    output: OutputFileOption = None,
) -> Answer:
    """Quantise a synthetic model: seconds and memory, beside the least that the method needs."""
    from compress.bench.quantize import bench_quantize as measure

    return _answer(measure(settings, repeats), output)


def bench_kernels(
    *,
    settings: KernelBench,
    tune: Annotated[
        bool, typer.Option("--tune", help="Find the fastest tiles, and keep them for this user.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="A picture: .svg, .png, .pdf.")] = None,
    output: OutputFileOption = None,
) -> Answer:
    """Time packed products beside dense ones, and what either takes of memory's speed."""
    from compress.bench.kernels import bench_kernels as measure
    from compress.bench.kernels import tune_kernels

    run = tune_kernels if tune else measure
    report = run(settings, console(stderr=True).print)
    if plot is None or tune:
        return _answer(report, output)
    return _answer(report, output, lambda: plot_kernels(report.values, plot))


def bench_compiled(*, settings: CompiledBench, output: OutputFileOption = None) -> Answer:
    """Registers, memory and instructions of the GPU kernels, as compiled; needs no GPU."""
    from compress.bench.compiled import bench_compiled as measure

    return _answer(measure(settings), output)


def bench_pruning(
    *,
    random: Annotated[
        bool, typer.Option("--random", help="A random LLaVA of the sizes below; the default.")
    ] = False,
    settings: PruningBench,
    output: OutputFileOption = None,
) -> Answer:
    """Time prefill and decoding with fewer visual tokens, beside what is predicted."""
    if settings.model is not None and random:
        raise UsageError("--model and --random: expected one of them")
    from compress.bench.pruning import bench_pruning as measure

    check_device(settings.device)
    return _answer(measure(settings), output)


def bench_model(*, settings: ModelBench, output: OutputFileOption = None) -> Answer:
    """Time a model's prefill and decoding, and its memory, beside another one."""
    from compress.bench.model import bench_model as measure

    return _answer(measure(settings), output)


for _name, _command in (
    ("quantize", bench_quantize),
    ("kernels", bench_kernels),
    ("compiled", bench_compiled),
    ("pruning", bench_pruning),
    ("model", bench_model),
):
    add_command(bench, expanded(_command, SHARED), _name)
