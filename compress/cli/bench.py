"""`modelpress bench`: time and memory beside the least that the method needs.

A benchmark's options are the fields of its settings (`compress.bench.settings`). Every import that
needs torch is inside a command.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import typer

from compress.bench.report import Report
from compress.bench.settings import (
    CompiledBench,
    KernelBench,
    ModelBench,
    PruningBench,
    QuantizeBench,
)
from compress.cli.common import Answer, add_command
from compress.cli.console import console
from compress.cli.options import (
    ActivationBitsOption,
    DenseOption,
    DeviceOption,
    ModelArgument,
    OutputFileOption,
    SeedOption,
)
from compress.errors import UsageError

# What fields without an option of their own are on the command line; others are no option.
SHARED = {
    "model": ModelArgument,
    "dense": DenseOption,
    "activation_bits": ActivationBitsOption,
    "seed": SeedOption,
    "device": DeviceOption,
}

bench = typer.Typer(no_args_is_help=True, help="Time and memory, beside what the method needs.")


def expanded(command: Callable[..., Answer]) -> Callable[..., Answer]:
    """The command with the fields of each parameter whose type is a dataclass in its place."""
    hints = {n: k for n, k in get_type_hints(command).items() if n != "return"}
    kinds = {n: k for n, k in hints.items() if isinstance(k, type) and is_dataclass(k)}
    parameters: list[Parameter] = []
    parsers: dict[str, Callable[[str], object]] = {}
    for given in signature(command).parameters.values():
        if given.name not in kinds:
            parameters.append(given)
            continue
        for name, hint in get_type_hints(kinds[given.name], include_extras=True).items():
            own = hint if get_origin(hint) is Annotated else SHARED.get(name)
            if own is None:
                continue
            kind, option, *parse = get_args(own)
            default = getattr(kinds[given.name], name, Parameter.empty)
            if parse:
                named = isinstance(option.default, str)  # typer keeps the first name there
                called = option.default if named else "--" + name.replace("_", "-")
                parsers[name] = partial(parse[0], option=called)
                kind, default = (str | None, None) if default is None else (str, _text(default))
            annotation = Annotated[kind, option]  # type: ignore[valid-type]  # made at run time
            parameters.append(given.replace(name=name, annotation=annotation, default=default))

    @wraps(command)
    def run(**values: object) -> Answer:
        for name, parse in parsers.items():
            if isinstance(text := values[name], str):
                values[name] = parse(text)
        for name, kind in kinds.items():
            own = [field.name for field in fields(kind) if field.name in values]
            values[name] = kind(**{field: values.pop(field) for field in own})
        return command(**values)

    # What typer reads.
    run.__dict__["__signature__"] = Signature(parameters, return_annotation=Answer)
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _answer(
    report: Report, file: Path | None, afterwards: Callable[[], object] = lambda: None
) -> Answer:
    return Answer(report.values, lambda out: out.print(report.table()), file, afterwards=afterwards)


def _text(value: object) -> str:
    """What one would write on the command line for a value."""
    return ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


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
    from compress.bench.kernels_view import plot_kernels

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
    from compress.memory import check_device

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
    add_command(bench, expanded(_command), _name)
