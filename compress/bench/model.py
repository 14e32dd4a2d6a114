"""`modelpress bench model`: what a checkpoint takes of memory and time, beside another one.

Each model is loaded in a process of its own, as `compress.load` loads it, and asked for two things:
a prefill, a forward pass over a prompt of so many random tokens, and decoding, one token after
another behind the longest prompt, with a cache of keys and values. Beside the times stand floors:
the bytes of all weights that a pass reads (no embedding table), over the bandwidth of a copy, or
the operations of its linears, 2 a weight and token (of the head, for the last token alone), over
the best rate of a square product, or twice that rate where activations are rounded to int8.

    bench_model(ModelBench("outputs/demo-lm", baseline="recipes/demo/lm"))["rows"]
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import psutil
import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import compress.loading.transformers_plugin  # noqa: F401  (its share of memory is not the model's)
from compress.bench.alone import alone
from compress.bench.clock import (
    DTYPES,
    Clock,
    Stopwatch,
    check_dtype,
    conditions,
    copy_bandwidth,
    product_rate,
    spread,
)
from compress.bench.report import Report, spread_cell, table_of
from compress.bench.settings import ModelBench
from compress.errors import UsageError
from compress.eval.report import format_bytes
from compress.kernels.linear import QuantLinear
from compress.loading.load import load
from compress.memory import check_device, release_memory

INTEGER_SPEED = 2  # products of int8 beside those of 16-bit floats, of the same instruction width
LEAST_TOKEN = 3  # below are, in most vocabularies, tokens that end or pad
MILLI = 1e3


def bench_model(bench: ModelBench) -> Report:
    """Figures (seconds, bytes) and conditions as plain values, a row for each model.

    Raises UsageError and CheckpointError as `compress.load` does, UsageError for values that
    measure nothing, and CompressError if a process dies, of too little memory perhaps.
    """
    check_dtype(bench.dtype)
    if not bench.prompts or min(bench.prompts) < 1:
        raise UsageError(f"prompts: expected lengths from 1 on, found {list(bench.prompts)}")
    rows = [alone(measure, bench)]
    if bench.baseline is not None:
        plain = replace(bench, model=bench.baseline, dense=False, activation_bits=None)
        rows.append(alone(measure, plain))
    last = rows[-1]
    for row in rows if bench.baseline is not None else ():
        row["ratio"] = {
            "weights": last["weights"] / row["weights"],
            "resident": last["resident"] / max(row["resident"], 1),
            "decode": last["decode"]["median"] / row["decode"]["median"],
            "prefill": {
                length: last["prefill"][length]["median"] / row["prefill"][length]["median"]
                for length in row["prefill"]
            },
        }
    found = [row.pop("conditions") for row in rows]
    values = {"rows": rows, "conditions": asdict(bench) | found[0]}
    return Report(values, model_bench_table)


def measure(bench: ModelBench) -> dict[str, Any]:
    """One row, in this process."""
    check_device(bench.device)
    before = _resident()
    with Stopwatch() as loading:
        model, _ = load(
            bench.model,
            bench.device,
            DTYPES[bench.dtype],
            prune=False,
            packed=False if bench.dense else None,
            activation_bits=bench.activation_bits,
        )
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(bench.seed)
    least = min(LEAST_TOKEN, vocabulary - 1)
    ids = torch.randint(least, vocabulary, (1, max(bench.prompts)), generator=generator)
    ids = ids.to(bench.device)
    prefill = {}
    with torch.no_grad():
        for length in sorted(bench.prompts):
            taken = [_prefill(model, ids[:, :length], bench) for _ in range(bench.repeats + 1)]
            prefill[length] = spread(taken[1:])  # the first warms up
        steps = [step for _ in range(bench.repeats) for step in _decode(model, ids, bench)]
    resident = _resident() - before
    clock = Clock(bench.device)
    bandwidth, rates = copy_bandwidth(clock), product_rate(clock)
    weights, read = _bytes(model)
    body, head = _operations(model)
    rate = max(rates.values()) * (INTEGER_SPEED if _rounds(model) else 1)
    return {
        "model": bench.model,
        "dense": bench.dense,
        "activation_bits": bench.activation_bits,
        "weights": weights,
        "resident": resident if bench.device == "cpu" else torch.cuda.max_memory_allocated(),
        "loading": loading.seconds,
        "prefill": prefill,
        "prefill_floor": {
            length: max(read / bandwidth, (body * length + head) / rate) for length in prefill
        },
        "decode": spread(steps),
        "decode_floor": read / bandwidth,
        "copy_bandwidth": bandwidth,
        "product_rates": rates,
        "conditions": conditions(clock),
    }


def _prefill(model: PreTrainedModel, ids: Tensor, bench: ModelBench) -> float:
    with Stopwatch(bench.device) as watch:
        model(input_ids=ids, logits_to_keep=1)
    return watch.seconds


def _decode(model: PreTrainedModel, ids: Tensor, bench: ModelBench) -> list[float]:
    """Seconds of each new token, greedily."""
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    seconds = []
    for _ in range(bench.new_tokens):
        with Stopwatch(bench.device) as watch:
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        seconds.append(watch.seconds)
    return seconds


def _bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Of all weights, and of those that a pass reads: not an embedding that no head shares."""
    table, head = (
        {id(t): t.nbytes for t in (*module.parameters(), *module.buffers())}
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    weights = sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    return weights, weights - sum(table[tensor] for tensor in table.keys() - head.keys())


def _operations(model: PreTrainedModel) -> tuple[int, int]:
    """Of the linears for each token, and of the head, which is asked for one token alone."""
    sizes = {
        id(m): 2 * m.in_features * m.out_features
        for m in model.modules()
        if isinstance(m, torch.nn.Linear | QuantLinear)
    }
    head = sizes.pop(id(model.get_output_embeddings()), 0)
    return sum(sizes.values()), head


def _rounds(model: PreTrainedModel) -> bool:
    """Whether linears multiply integers."""
    return any(getattr(module, "activation_bits", None) for module in model.modules())


def _resident() -> int:
    """Bytes of this process that lie in memory."""
    release_memory()
    return psutil.Process().memory_info().rss


def model_bench_table(result: Mapping[str, Any]) -> Table:
    """A column for each model."""
    rows, conditions = result["rows"], result["conditions"]
    rates = ", ".join(f"{k} {v / 1e9:.0f}" for k, v in rows[0]["product_rates"].items())
    caption = (
        f"{conditions['dtype']}; median (minimum to maximum) of {conditions['repeats']}; "
        f"copy {rows[0]['copy_bandwidth'] / 1e9:.1f} GB/s, products {rates} GFLOP/s; "
        f"{conditions.get('threads', 1)} threads, torch {conditions['torch']}, "
        f"{conditions['device']}"
    )
    table = table_of(caption, map(_heading, rows), names="")

    def line(name: str, cell: Callable[[Any], str], ratio: Callable[[Any], float]) -> None:
        table.add_row(
            name, *(cell(r) + (f"  {ratio(r['ratio']):.2f}x" if "ratio" in r else "") for r in rows)
        )

    def prefill(length: int) -> None:
        line(
            f"prefill of {length}, ms",
            lambda r: spread_cell(r["prefill"][length], MILLI),
            lambda r: r["prefill"][length],
        )
        table.add_row("  floor", *(f"{MILLI * r['prefill_floor'][length]:.1f}" for r in rows))

    line("weights", lambda r: format_bytes(r["weights"]), lambda r: r["weights"])
    line("resident", lambda r: format_bytes(r["resident"]), lambda r: r["resident"])
    table.add_row("loading, s", *(f"{r['loading']:.1f}" for r in rows))
    for length in rows[0]["prefill"]:
        prefill(length)
    line(
        "decode, ms per token",
        lambda r: spread_cell(r["decode"], MILLI),
        lambda r: r["decode"],
    )
    table.add_row("  floor", *(f"{MILLI * r['decode_floor']:.1f}" for r in rows))
    return table


def _heading(row: Mapping[str, Any]) -> str:
    how = [f"activations {row['activation_bits']} bits"] if row["activation_bits"] else []
    return " ".join([row["model"], *how, *(["dense"] if row["dense"] else [])])
