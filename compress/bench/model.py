"""`modelpress bench model`: what a checkpoint takes of memory and time, beside another one.

Each model is loaded in a process of its own, as `compress.load` loads it, and asked for two things:
a prefill, a forward pass over a prompt of so many random tokens, and decoding, one token after
another behind the longest prompt, with a cache of keys and values. Beside the times stand floors:
the bytes of all weights that a pass reads (no embedding table), over the bandwidth of a copy, or
the operations of its linears, 2 a weight and token (of the head, for the last token alone), over
the best rate of a square product, or twice that rate where activations are rounded to int8.

    bench_model(ModelBench("outputs/demo-lm", baseline="recipes/demo/lm"))["rows"]
"""

import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from compress.bench import clock as timing
from compress.bench.clock import spread, wait
from compress.errors import CompressError, UsageError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTEGER_SPEED = 2  # products of int8 beside those of 16-bit floats, of the same instruction width
LEAST_TOKEN = 3  # below are, in most vocabularies, tokens that end or pad


@dataclass(frozen=True)
class ModelBench:
    """What is measured.

    model, baseline: folders or hub ids; dense and activation_bits are those of `compress.load`, and
    of `model` alone. prompts: lengths of prompts. new_tokens: decoded behind the longest.
    """

    model: str
    baseline: str | None = None
    prompts: tuple[int, ...] = (1, 16, 64, 256)
    new_tokens: int = 16
    repeats: int = 7
    dtype: str = "bf16"
    dense: bool = False
    activation_bits: int | None = None
    seed: int = 0
    device: str = "cpu"

    def check(self) -> None:
        """UsageError for values that measure nothing."""
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype: expected {', '.join(DTYPES)}, found {self.dtype!r}")
        if not self.prompts or min(self.prompts) < 1:
            raise UsageError(f"prompts: expected lengths from 1 on, found {list(self.prompts)}")


def bench_model(bench: ModelBench) -> dict[str, Any]:
    """Figures (seconds, bytes) and conditions as plain values, a row for each model.

    Raises UsageError and CheckpointError as `compress.load` does, and CompressError if a process
    dies, of too little memory perhaps.
    """
    bench.check()
    rows = [_alone(bench)]
    if bench.baseline is not None:
        plain = replace(bench, model=bench.baseline, dense=False, activation_bits=None)
        rows.append(_alone(plain))
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
    return {"rows": rows, "conditions": asdict(bench) | found[0]}


def _alone(bench: ModelBench) -> dict[str, Any]:
    """One model in a fresh process: what another one left in memory is not counted."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, bench).result()
        except BrokenProcessPool as error:
            raise CompressError(
                f"the process that measured {bench.model} was ended, for want of memory perhaps"
            ) from error


def measure(bench: ModelBench) -> dict[str, Any]:
    """One row, in this process."""
    import compress.loading.transformers_plugin  # noqa: F401  (its share of memory is not the model's)
    from compress.loading.load import load
    from compress.memory import check_device

    check_device(bench.device)
    before = _resident()
    started = time.perf_counter()
    packed = False if bench.dense else None
    model, _ = load(
        bench.model, bench.device, DTYPES[bench.dtype], prune=False, packed=packed,
        activation_bits=bench.activation_bits,
    )  # fmt: skip
    loading = time.perf_counter() - started
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
    clock = timing.Clock(bench.device)
    bandwidth, rates = timing.copy_bandwidth(clock), timing.product_rate(clock)
    weights, read = _bytes(model)
    body, head = _operations(model)
    rate = max(rates.values()) * (INTEGER_SPEED if _rounds(model) else 1)
    return {
        "model": bench.model,
        "dense": bench.dense,
        "activation_bits": bench.activation_bits,
        "weights": weights,
        "resident": resident if bench.device == "cpu" else torch.cuda.max_memory_allocated(),
        "loading": loading,
        "prefill": prefill,
        "prefill_floor": {
            length: max(read / bandwidth, (body * length + head) / rate) for length in prefill
        },
        "decode": spread(steps),
        "decode_floor": read / bandwidth,
        "copy_bandwidth": bandwidth,
        "product_rates": rates,
        "conditions": timing.conditions(clock),
    }


def _prefill(model: Any, ids: Tensor, bench: ModelBench) -> float:
    wait(bench.device)
    started = time.perf_counter()
    model(input_ids=ids, logits_to_keep=1)
    wait(bench.device)
    return time.perf_counter() - started


def _decode(model: Any, ids: Tensor, bench: ModelBench) -> list[float]:
    """Seconds of each new token, greedily."""
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    seconds = []
    for _ in range(bench.new_tokens):
        wait(bench.device)
        started = time.perf_counter()
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        wait(bench.device)
        seconds.append(time.perf_counter() - started)
    return seconds


def _bytes(model: Any) -> tuple[int, int]:
    """Of all weights, and of those that a pass reads."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    weights = sum(t.numel() * t.element_size() for t in tensors.values())
    embedding = model.get_input_embeddings().weight
    tied = embedding is getattr(model.get_output_embeddings(), "weight", None)
    read = weights - (0 if tied else embedding.numel() * embedding.element_size())
    return weights, read


def _operations(model: Any) -> tuple[int, int]:
    """Of the linears for each token, and of the head, which is asked for one token alone."""
    from compress.kernels.linear import QuantLinear

    sizes = {
        id(m): 2 * m.in_features * m.out_features
        for m in model.modules()
        if isinstance(m, torch.nn.Linear | QuantLinear)
    }
    head = sizes.pop(id(model.get_output_embeddings()), 0)
    return sum(sizes.values()), head


def _rounds(model: Any) -> bool:
    """Whether linears multiply integers."""
    return any(getattr(module, "activation_bits", None) for module in model.modules())


def _resident() -> int:
    """Bytes of this process that lie in memory."""
    import psutil

    from compress.memory import release_memory

    release_memory()
    return psutil.Process().memory_info().rss


def model_bench_table(result: dict[str, Any]) -> Any:
    """The result as a table for a terminal: a column for each model."""
    from rich import box
    from rich.table import Table

    from compress.eval.report import format_bytes

    rows, conditions = result["rows"], result["conditions"]
    rates = ", ".join(f"{k} {v / 1e9:.0f}" for k, v in rows[0]["product_rates"].items())
    table = Table(
        box=box.SIMPLE_HEAD,
        caption=f"{conditions['dtype']}; median (minimum to maximum) of {conditions['repeats']}; "
        f"copy {rows[0]['copy_bandwidth'] / 1e9:.1f} GB/s, products {rates} GFLOP/s; "
        f"{conditions.get('threads', 1)} threads, torch {conditions['torch']}, "
        f"{conditions['device']}",
        caption_justify="left",
    )
    table.add_column("")
    for row in rows:
        how = [f"activations {row['activation_bits']} bits"] if row["activation_bits"] else []
        table.add_column(" ".join([row["model"], *how, *(["dense"] if row["dense"] else [])]),
                         justify="right")  # fmt: skip

    def line(name: str, cell: Any, ratio: Any) -> None:
        table.add_row(
            name, *(cell(r) + (f"  {ratio(r['ratio']):.2f}x" if "ratio" in r else "") for r in rows)
        )

    line("weights", lambda r: format_bytes(r["weights"]), lambda r: r["weights"])
    line("resident", lambda r: format_bytes(r["resident"]), lambda r: r["resident"])
    table.add_row("loading, s", *(f"{r['loading']:.1f}" for r in rows))
    for length in rows[0]["prefill"]:
        line(
            f"prefill of {length}, ms",
            lambda r, n=length: _cell(r["prefill"][n]),
            lambda r, n=length: r["prefill"][n],
        )
        floors = (f"{1e3 * r['prefill_floor'][length]:.1f}" for r in rows)
        table.add_row("  floor", *floors)
    line("decode, ms per token", lambda r: _cell(r["decode"]), lambda r: r["decode"])
    table.add_row("  floor", *(f"{1e3 * r['decode_floor']:.1f}" for r in rows))
    return table


def _cell(samples: dict[str, float]) -> str:
    median, low, high = (f"{1e3 * samples[k]:.1f}" for k in ("median", "minimum", "maximum"))
    return f"{median} ({low} to {high})"
