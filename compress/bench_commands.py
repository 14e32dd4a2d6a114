"""`modelpress bench`: time and memory beside the least that the method needs.

Every import that needs torch is inside a command.
"""

from typing import Annotated

import typer

from compress.console import bench_table, console, stdout_for, write_json
from compress.options import DebugOption, DeviceOption, JsonOption, OutputFileOption

bench = typer.Typer(no_args_is_help=True, help="Time and memory, beside what the method needs.")


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
    from compress.bench import QuantizeBench
    from compress.bench import bench_quantize as measure

    with stdout_for(json) as emit:
        result = {"runs": [measure(QuantizeBench(**shape)) for _ in range(repeats)]}
        if emit:
            emit(result)
        else:
            console().print(bench_table(result["runs"]))
        write_json(output, result)
