"""`modelpress bench`: time and memory beside the least that the method needs.

Every import that needs torch is inside a command.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.console import bench_table, console, stdout_for, write_json
from compress.cli.options import (
    ActivationBitsOption,
    DebugOption,
    DenseOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    OutputFileOption,
    SeedOption,
)
from compress.errors import UsageError

bench = typer.Typer(no_args_is_help=True, help="Time and memory, beside what the method needs.")


def _report(
    measure: Callable[[], dict[str, Any]],
    table: Callable[[dict[str, Any]], Any],
    output: Path | None,
    json: bool,
) -> dict[str, Any]:
    """Measures, and shows the result as a table or as JSON; also in `output`, if there is one."""
    with stdout_for(json) as emit:
        result = measure()
        if emit:
            emit(result)
        else:
            console().print(table(result))
        write_json(output, result)
    return result


@bench.command("quantize")
def bench_quantize(
    hidden: Annotated[int, typer.Option(min=1)] = 1024,
    mlp: Annotated[int, typer.Option(min=1, help="Width between up and down.")] = 2816,
    layers: Annotated[int, typer.Option(min=1)] = 8,
    heads: Annotated[int, typer.Option(min=1)] = 16,
    kv_heads: Annotated[int, typer.Option(min=1)] = 8,
    vocabulary: Annotated[int, typer.Option(min=2)] = 512,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    bits: int = 4,
    group_size: Annotated[str, typer.Option(help="A number, or channel.")] = "128",
    refine_sweeps: Annotated[int, typer.Option(min=0)] = 5,
    rotate: Annotated[str, typer.Option(help="none, hadamard or random.")] = "none",
    token_importance: Annotated[str, typer.Option(help="As in a recipe.")] = "uniform",  # noqa: S107
    offload: Annotated[str, typer.Option(help="Activations: disk, ram or auto.")] = "disk",
    device: DeviceOption = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Runs, one after the other.")] = 1,
    output: OutputFileOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Quantise a synthetic model: seconds and memory, beside the least that the method needs."""
    shape = {
        "hidden": hidden, "mlp": mlp, "layers": layers, "heads": heads, "kv_heads": kv_heads,
        "vocabulary": vocabulary, "samples": samples, "length": length, "bits": bits,
        "group_size": int(group_size) if group_size.isdecimal() else group_size,
        "refine_sweeps": refine_sweeps, "rotate": rotate, "token_importance": token_importance,
        "offload": offload, "device": device,
    }  # fmt: skip
    from compress.bench.quantize import QuantizeBench
    from compress.bench.quantize import bench_quantize as measure

    def several() -> dict[str, Any]:
        return {"runs": [measure(QuantizeBench(**shape)) for _ in range(repeats)]}

    _report(several, lambda result: bench_table(result["runs"]), output, json)


@bench.command("kernels")
def bench_kernels(
    shapes: Annotated[str | None, typer.Option(metavar="NxK,...", help="Outputs x inputs.")] = None,
    m: Annotated[str | None, typer.Option("--m", metavar="1,2,...", help="Rows of x.")] = None,
    bits: Annotated[str, typer.Option(metavar="2,3,...", help="Widths.")] = "2,3,4,8",
    group_size: Annotated[str, typer.Option(help="A number, or channel.")] = "128",
    dtype: Annotated[
        str | None, typer.Option(help="Of activations: fp16, bf16, fp32; default by device.")
    ] = None,
    activation_bits: Annotated[
        int | None,
        typer.Option(help="Time products of integers too, tokens rounded so."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each figure.")] = 15,
    device: DeviceOption = "cpu",
    tune: Annotated[
        bool, typer.Option("--tune", help="Find the fastest tiles, and keep them for this user.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="A picture: .svg, .png, .pdf.")] = None,
    output: OutputFileOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time packed products beside dense ones, and what either takes of memory's speed."""
    from compress.bench.kernels import (
        KernelBench,
        parse_group_size,
        parse_numbers,
        parse_shapes,
        tune_kernels,
    )
    from compress.bench.kernels import bench_kernels as measure
    from compress.bench.kernels_view import kernels_table, plot_kernels, tuning_table

    settings = KernelBench(
        shapes=parse_shapes(shapes) if shapes else None,
        rows=parse_numbers(m, "--m") if m else None,
        bits=parse_numbers(bits, "--bits"),
        group_size=parse_group_size(group_size),
        dtype=dtype,
        device=device,
        rounds=rounds,
        activation_bits=activation_bits,
    )
    errors = console(stderr=True)
    run = tune_kernels if tune else measure
    table = tuning_table if tune else kernels_table
    result = _report(lambda: run(settings, errors.print), table, output, json)
    if plot is not None and not tune:
        plot_kernels(result, plot)


@bench.command("compiled")
def bench_compiled(
    capability: Annotated[
        str, typer.Option(metavar="X.Y", help="Compute capability: 9.0 is an H100.")
    ] = "9.0",
    bits: Annotated[str, typer.Option(metavar="2,3,...", help="Widths.")] = "2,3,4,8",
    group_size: Annotated[str, typer.Option(help="A number, or channel.")] = "128",
    dtype: Annotated[str, typer.Option(help="Of activations: fp16, bf16, fp32.")] = "fp16",
    output: OutputFileOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Registers, memory and instructions of the GPU kernels, as compiled; needs no GPU."""
    from compress.bench.compiled import compiled_table
    from compress.bench.compiled import inspect_kernels as inspect
    from compress.bench.kernels import KernelBench, parse_group_size, parse_numbers

    settings = KernelBench(
        bits=parse_numbers(bits, "--bits"),
        group_size=parse_group_size(group_size),
        dtype=dtype,
    )
    _report(lambda: inspect(settings, capability), compiled_table, output, json)


@bench.command("pruning")
def bench_pruning(
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A multimodal checkpoint.")
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="A random LLaVA of the sizes below; the default.")
    ] = False,
    width: Annotated[int, typer.Option(min=64, help="Of its language model.")] = 1024,
    layers: Annotated[int, typer.Option(min=1, help="Of its language model.")] = 8,
    visual_tokens: Annotated[int, typer.Option(min=4, help="A square number.")] = 1024,
    text_tokens: Annotated[int, typer.Option(min=1, help="Of its prompt.")] = 32,
    image: Annotated[int, typer.Option(min=16, help="Side in pixels, for a checkpoint.")] = 336,
    method: Annotated[str, typer.Option(help="As in a recipe.")] = "vflowopt",
    keep: Annotated[str, typer.Option(metavar="A,B,C", help="Shares kept.")] = "1,0.5,0.25,0.1",
    new_tokens: Annotated[int, typer.Option(min=1, help="Decoded after each prefill.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each figure.")] = 5,
    dense: DenseOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    output: OutputFileOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time prefill and decoding with fewer visual tokens, beside what is predicted."""
    if model is not None and random:
        raise UsageError("--model and --random: expected one of them")
    from compress.bench.pruning import PruningBench, parse_shares, pruning_bench_table
    from compress.bench.pruning import bench_pruning as measure
    from compress.memory import check_device

    check_device(device)
    settings = PruningBench(
        model=model, width=width, layers=layers, visual_tokens=visual_tokens,
        text_tokens=text_tokens, image=image, method=method, keep=parse_shares(keep),
        new_tokens=new_tokens, repeats=repeats, dense=dense, seed=seed, device=device,
    )  # fmt: skip
    _report(lambda: measure(settings), pruning_bench_table, output, json)


@bench.command("model")
def bench_model(
    model: ModelArgument,
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Measured beside it: the 16-bit model.")
    ] = None,
    prompts: Annotated[
        str, typer.Option(metavar="A,B,C", help="Tokens of the prompts.")
    ] = "1,16,64,256",
    new_tokens: Annotated[int, typer.Option(min=1, help="Decoded behind the longest.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each figure.")] = 7,
    dtype: Annotated[str, typer.Option(help="Of activations: bf16, fp16, fp32.")] = "bf16",
    dense: DenseOption = False,
    activation_bits: ActivationBitsOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    output: OutputFileOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time a model's prefill and decoding, and its memory, beside another one."""
    from compress.bench.kernels import parse_numbers
    from compress.bench.model import ModelBench, model_bench_table
    from compress.bench.model import bench_model as measure

    settings = ModelBench(
        model=model, baseline=baseline, prompts=tuple(parse_numbers(prompts, "--prompts")),
        new_tokens=new_tokens, repeats=repeats, dtype=dtype, dense=dense,
        activation_bits=activation_bits, seed=seed, device=device,
    )  # fmt: skip
    _report(lambda: measure(settings), model_bench_table, output, json)
