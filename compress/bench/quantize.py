"""`modelpress bench quantize`: time and memory of a run on a synthetic checkpoint, and its floor.

The floor is what no implementation of the method can avoid, at the fp32 matmul rate that this
machine shows in the same call:

    one forward of the calibration tokens      2 N K tokens for each linear, 2 T^2 d for attention
    one symmetric Hessian for each input       K^2 tokens
    the solves                                 K^3 / 3 for each Cholesky, N K^2 for each column loop

and the bytes of one layer for memory. Refinement sweeps, rotation and token importance are extra
work that the floor does not count. The run is a process of its own, so that its peak memory is its
own; importing libraries, the check against transformers and the self-check are not timed.

Beside the run: what rounding in order takes by the kernel and by torch's operators
(`rounding_seconds`).

    bench_quantize(QuantizeBench(bits=4, group_size=128))
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (imports are not timed)
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from compress.bench.alone import alone
from compress.bench.clock import Clock, Stopwatch, product_rate
from compress.bench.report import Report, table_of
from compress.bench.settings import QuantizeBench
from compress.data.windows import CalibrationWindows
from compress.errors import naming
from compress.eval.report import format_bytes, format_memory, format_number
from compress.pipeline.run import run
from compress.quantization.rounding import round_eagerly, round_in_order
from compress.recipe.recipe import Recipe

ROUNDED = 4096, 128  # inputs and outputs of the linear that is rounded in order, its groups


def linears(bench: QuantizeBench) -> list[tuple[int, int]]:
    """(out, in) of a decoder layer's linears, grouped by input: stacked outputs."""
    kv = bench.hidden // bench.heads * bench.kv_heads
    return [
        (bench.hidden + 2 * kv, bench.hidden),
        (bench.hidden, bench.hidden),
        (2 * bench.mlp, bench.hidden),
        (bench.hidden, bench.mlp),
    ]


def floor_operations(bench: QuantizeBench) -> dict[str, float]:
    """Floating-point operations of the whole run, by part."""
    tokens = bench.samples * bench.length
    shapes = linears(bench)
    attention = 2 * bench.length * bench.hidden * tokens
    parts = {
        "forward": sum(2 * N * K * tokens for N, K in shapes) + attention,
        "hessians": sum(K * K * tokens for _, K in shapes),
        "solves": sum(K**3 / 3 + N * K * K for N, K in shapes),
    }
    return {name: float(bench.layers * value) for name, value in parts.items()}


def layer_bytes(bench: QuantizeBench) -> int:
    """One layer in fp32."""
    return sum(N * K for N, K in linears(bench)) * 4


def recipe_of(bench: QuantizeBench, model: Path) -> Recipe:
    """The recipe of the run; RecipeError where a value is not one that recipes know."""
    calibration = {"samples": bench.samples, "length": bench.length, "offload": bench.offload}
    quantize = {
        "bits": bench.bits,
        "group_size": bench.group_size,
        "refine_sweeps": bench.refine_sweeps,
        "token_importance": bench.token_importance,
    }
    return Recipe.from_dict(
        {
            "name": "bench",
            "model": str(model),
            "calibration": calibration,
            "rotate": bench.rotate,
            "quantize": quantize,
        }
    )


def write_synthetic_model(folder: Path, bench: QuantizeBench, seed: int = 0) -> None:
    """A random Llama of the given shape, bf16, with no tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=bench.hidden,
        intermediate_size=bench.mlp,
        num_hidden_layers=bench.layers,
        num_attention_heads=bench.heads,
        num_key_value_heads=bench.kv_heads,
        vocab_size=bench.vocabulary,
        max_position_embeddings=bench.length,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def bench_quantize(bench: QuantizeBench, repeats: int = 1) -> Report:
    """Runs the benchmark, one run after the other; reports each (times in seconds, sizes in bytes).

    Raises RecipeError where a value is none that recipes know, CompressError if a run fails.
    """
    return Report({"runs": [_one_run(bench) for _ in range(repeats)]}, quantize_bench_table)


def _one_run(bench: QuantizeBench) -> dict[str, Any]:
    clock = Clock(bench.device)
    with tempfile.TemporaryDirectory(prefix="modelpress-bench-") as temporary:
        folder = Path(temporary)
        recipe_of(bench, folder / "model")  # a wrong value shows here, not in another process
        write_synthetic_model(folder / "model", bench)
        before = product_rate(clock, "fp32")["fp32"]
        with naming("the benchmark's run failed"):
            measured = alone(measure, folder, bench)
        after = product_rate(clock, "fp32")["fp32"]
    rate = max(before, after)
    operations = floor_operations(bench)
    floor = sum(operations.values()) / rate
    conditions = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matmul_rate": rate,
        "matmul_rates": [before, after],
    }
    return {
        "conditions": asdict(bench) | conditions,
        "floor": {
            "seconds": floor,
            "parts": {name: value / rate for name, value in operations.items()},
            "layer_bytes": layer_bytes(bench),
        },
        "seconds": measured["seconds"],
        "layers_seconds": measured["layers_seconds"],
        "ratio": measured["seconds"] / floor,
        "peak_memory": measured["peak_memory"],
        "mean_error": measured["mean_error"],
        "rounding": rounding_seconds(bench.device),
    }


def rounding_seconds(
    device: str, size: int = ROUNDED[0], group: int = ROUNDED[1]
) -> dict[str, Any]:
    """Seconds in which a linear of size x size is rounded in order, one group after the other.

    {"size", "group_size", "eager", "kernel"}: by torch's operators, and as a run does it on this
    device. As a run meets them, with the launches; compiled and warm.
    """
    generator = torch.Generator().manual_seed(0)
    base = 3 * torch.randn(size // group, group, size, generator=generator)
    coupling = torch.randn(group, group, generator=generator).to(device) / group
    ways = {"eager": round_eagerly, "kernel": round_in_order}
    seconds = {}
    for name, rounded in ways.items():
        levels = base.to(device, copy=True)
        rounded(levels[0].clone(), coupling, -4, 3)
        with Stopwatch(device) as watch:
            for block in levels:
                rounded(block, coupling, -4, 3)
        seconds[name] = watch.seconds
    return {"size": size, "group_size": group, **seconds}


def measure(folder: Path, bench: QuantizeBench) -> dict[str, Any]:
    """One run in this process: random tokens, nothing evaluated or checked."""
    recipe = recipe_of(bench, folder / "model")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(bench.vocabulary, (bench.samples, bench.length), generator=generator)
    windows = CalibrationWindows(ids, torch.ones_like(ids, dtype=torch.bool))
    with Stopwatch() as watch:
        result = run(
            recipe,
            folder / "out",
            windows=windows,
            self_check=False,
            check_source=False,
            device=bench.device,
        )
    modules = [module for layer in result.layers for module in layer["modules"]]
    errors = [module["error"] for module in modules if module["error"] is not None]
    return {
        "seconds": watch.seconds,
        "layers_seconds": result.seconds["layers"],
        "peak_memory": result.peak_memory,
        "mean_error": sum(errors) / len(errors),
    }


def quantize_bench_table(result: Mapping[str, Any]) -> Table:
    """A column for each run."""
    runs = result["runs"]
    conditions = runs[-1]["conditions"]
    caption = (
        f"{conditions['threads']} threads, torch {conditions['torch']}, {conditions['device']}"
    )
    table = table_of(caption, (f"run {i + 1}" for i in range(len(runs))), names="")

    def line(name: str, cell: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *map(cell, runs))

    line("seconds", lambda run: f"{run['seconds']:.2f}")
    line("of which layers", lambda run: f"{run['layers_seconds']:.2f}")
    line("floor seconds", lambda run: f"{run['floor']['seconds']:.2f}")
    for part in runs[0]["floor"]["parts"]:
        table.add_row(f"floor, {part}", *(f"{run['floor']['parts'][part]:.2f}" for run in runs))
    line("ratio to the floor", lambda run: f"{run['ratio']:.2f}")
    line("peak memory", lambda run: format_memory(run["peak_memory"]))
    line("one layer in fp32", lambda run: format_bytes(run["floor"]["layer_bytes"]))
    line("rounding a linear in order", lambda run: f"{run['rounding']['kernel']:.4f}")
    line("the same by torch's operators", lambda run: f"{run['rounding']['eager']:.4f}")
    line("mean relative error", lambda run: format_number(run["mean_error"]))
    line("fp32 matmul rate", lambda run: f"{run['conditions']['matmul_rate'] / 1e9:.1f} GFLOP/s")
    return table
