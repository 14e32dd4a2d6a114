"""`modelpress bench kernels`: packed products beside dense ones, in the same run on one device.

For each shape [N, K], width and number of rows M: the packed product, torch's dense product in the
activations' dtype (on a GPU in fp16 and bf16), torch's own int4 operator where it takes the shape,
gemlite where it is installed. Each reads another copy of its weight every time, together more than
the last-level cache holds, as the layers of a model do. Contenders take turns, so that whatever
else the machine does meets all of them. How one product is timed: clock.py.

    floor = max(bytes / bandwidth, operations / rate)       copy bandwidth and the best product rate
                                                            that this device shows in the same call

    result = bench_kernels(KernelBench(shapes=((4096, 4096),), bits=(4,)))
"""

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from compress.bench.clock import (
    DTYPES,
    Clock,
    check_dtype,
    conditions,
    copy_bandwidth,
    product_rate,
)
from compress.bench.kernels_view import kernels_table, tuning_table
from compress.bench.report import Report
from compress.bench.settings import KernelBench
from compress.errors import UsageError
from compress.kernels.activations import integer_matmul, quantize_tokens
from compress.kernels.codes import (
    LEAST_GROUP,
    WIDTHS,
    Codes,
    TensorRecord,
    group_count,
    tensors_of,
)
from compress.kernels.cpu import native
from compress.kernels.cpu.products import cpu_matmul, pack_cpu, pack_integers
from compress.kernels.gpu import tuning
from compress.kernels.gpu.layout import KernelWeight, pack_kernel
from compress.kernels.reference import dequantize, reference_matmul

GPU_SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (5120, 27648))
GPU_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
CPU_SHAPES = ((2048, 8192), (4096, 4096))
CPU_ROWS = (1, 2, 4, 8, 16, 64, 256)
CHECKED_OUTPUTS = 256  # of each weight, against 64-bit floats

Product = Callable[[], Tensor]
Progress = Callable[[str], None]
T = TypeVar("T")
Weight = TypeVar("Weight", bound=TensorRecord)


@dataclass(frozen=True)
class ResolvedBench(KernelBench):
    """A benchmark with the device's defaults in place of None; here those of a CPU."""

    shapes: tuple[tuple[int, int], ...] = CPU_SHAPES
    rows: tuple[int, ...] = CPU_ROWS
    dtype: str = "bf16"


def resolved(bench: KernelBench) -> ResolvedBench:
    """With the device's defaults. Raises UsageError for what cannot be measured."""
    gpu = bench.device.startswith("cuda")
    if gpu and not torch.cuda.is_available():
        raise UsageError(f"device {bench.device}: torch finds no CUDA device")
    dtype = bench.dtype or ("fp16" if gpu else "bf16")
    check_scheme(bench.bits, bench.group_size, dtype)
    if bench.activation_bits is not None and bench.activation_bits not in range(2, 9):
        raise UsageError(f"activation bits: expected 2 to 8, found {bench.activation_bits}")
    if bench.activation_bits is not None and (bench.group_size or 32) % 32:
        raise UsageError(
            f"group size: with activation bits a multiple of 32, found {bench.group_size}"
        )
    given = {
        "shapes": bench.shapes or (GPU_SHAPES if gpu else CPU_SHAPES),
        "rows": bench.rows or (GPU_ROWS if gpu else CPU_ROWS),
        "dtype": dtype,
    }
    return ResolvedBench(**vars(bench) | given)


def check_scheme(bits: Sequence[int], group_size: int | None, dtype: str) -> None:
    """UsageError for weights or activations that no kernel takes."""
    check_dtype(dtype)
    if wrong := [b for b in bits if b not in WIDTHS]:
        raise UsageError(f"bits: kernels take 2, 3, 4 and 8, found {wrong[0]}")
    if group_size is not None and (group_size < 1 or group_size % LEAST_GROUP):
        raise UsageError(
            f"group size: expected a multiple of {LEAST_GROUP} or channel, found {group_size}"
        )


def bench_kernels(bench: KernelBench, progress: Progress = lambda line: None) -> Report:
    """Runs the benchmark; reports its figures and conditions (seconds, bytes, operations).

    progress is told what is measured next. Raises UsageError for what cannot be measured.
    """
    bench = resolved(bench)
    clock = Clock(bench.device, bench.rounds)
    bandwidth, rates = copy_bandwidth(clock), product_rate(clock)
    rows = []
    for N, K in bench.shapes:
        progress(f"{N} x {K}")
        measured = _measure_shape(bench, clock, N, K)
        rows += sorted(measured, key=lambda row: bench.bits.index(row["bits"]))
    for row in rows:
        row |= against_floor(row, bandwidth, max(rates.values()))
    found = {
        "bench": asdict(bench),
        "copy_bandwidth": bandwidth,
        "copy_bandwidth_after": copy_bandwidth(clock),
        "product_rates": rates,
        "cpu_kernels": native.reason() if clock.device.type == "cpu" else None,
        "platform": platform.platform(),
    }
    return Report({"conditions": conditions(clock) | found, "rows": rows}, kernels_table)


def against_floor(row: dict[str, Any], bandwidth: float, rate: float) -> dict[str, Any]:
    """What follows from a row's times: ratios, bandwidth reached, and the floor (seconds)."""
    N, K, M = row["shape"][0], row["shape"][1], row["rows"]
    seconds = row["seconds"]["packed"]
    moved = row["bytes"]["packed"] + row["bytes"]["activations"]
    floor = max(moved / bandwidth, 2 * M * N * K / rate)
    return {
        "bytes_per_second": moved / seconds,
        "share_of_bandwidth": moved / seconds / bandwidth,
        "floor": floor,
        "times_floor": seconds / floor,
        "ratio": {name: other / seconds for name, other in row["seconds"].items()},
        "memory_ratio": row["bytes"]["packed"] / row["bytes"]["bf16"],
    }


def random_codes(
    N: int, K: int, bits: int, group_size: int | None, dtype: torch.dtype, device: torch.device
) -> Codes:
    """A symmetric weight of random codes, whose entries are about 1 / sqrt(K) in size."""
    generator = torch.Generator(device).manual_seed(N * 31 + K * 7 + bits)
    shape = (N, group_count(K, group_size))
    codes = torch.randint(2**bits, (N, K), generator=generator, dtype=torch.uint8, device=device)
    spread = torch.rand(shape, generator=generator, device=device) + 0.5
    scale = (spread * 2 ** (1 - bits) / math.sqrt(K)).to(dtype)
    return Codes(codes, scale, None, bits, group_size)


# ---- one shape ----------------------------------------------------------------------------------


def _measure_shape(bench: ResolvedBench, clock: Clock, N: int, K: int) -> Iterator[dict[str, Any]]:
    """A row of figures for each width and M; the dense products of an M stand in all its rows."""
    dtype = DTYPES[bench.dtype]
    drawn = {
        bits: random_codes(N, K, bits, bench.group_size, dtype, clock.device) for bits in bench.bits
    }
    widths = {bits: _contenders(codes, dtype, bench, clock) for bits, codes in drawn.items()}
    shown = drawn[bench.bits[0]]  # what the dense weight holds
    dense = _dense(shown, dtype, clock)
    for M in bench.rows:
        x = torch.randn(M, K, device=clock.device).to(dtype)
        every = dict(dense)
        held = dict.fromkeys(dense, shown)
        for bits, contenders in widths.items():
            every |= {f"{bits} bits, {name}": entry for name, entry in contenders.items()}
            held |= {f"{bits} bits, {name}": drawn[bits] for name in contenders}
        calls = {
            name: entry.bind(x)
            for name, entry in every.items()
            if entry.rows is None or entry.rows >= M
        }
        samples = clock.take_turns(calls)
        errors = {name: relative_error(each[0](), x, held[name]) for name, each in calls.items()}
        for bits, contenders in widths.items():
            mine = {name: f"{bits} bits, {name}" for name in contenders}
            mine = {name: key for name, key in mine.items() if key in calls}
            mine |= {name: name for name in dense}
            yield {
                "shape": [N, K],
                "bits": bits,
                "group_size": bench.group_size,
                "dtype": bench.dtype,
                "rows": M,
                "seconds": {name: samples[key].median for name, key in mine.items()},
                "best": {name: samples[key].best for name, key in mine.items()},
                "spread": {name: samples[key].spread for name, key in mine.items()},
                "error": {name: errors[key] for name, key in mine.items()},
                "bytes": {
                    "packed": contenders["packed"].bytes,
                    "bf16": 2 * N * K,
                    "activations": (M * K + M * N) * x.element_size(),
                },
            }


def relative_error(y: Tensor, x: Tensor, codes: Codes) -> float:
    """Of the first outputs, against 64-bit floats: a fast wrong product is no figure."""
    first = replace(codes, codes=codes.codes[:CHECKED_OUTPUTS], scale=codes.scale[:CHECKED_OUTPUTS])
    expected = reference_matmul(x, first)
    return float((y[:, :CHECKED_OUTPUTS].double() - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Contender:
    """A way to multiply: what binds every copy of its weight to x, and a copy's bytes.

    rows: at most, if any.
    """

    bind: Callable[[Tensor], list[Product]]
    bytes: int
    rows: int | None = None


def _each(
    copies: Sequence[T], bind: Callable[[Tensor, T], Product]
) -> Callable[..., list[Product]]:
    return lambda x: [bind(x, copy) for copy in copies]


def _contenders(
    codes: Codes, dtype: torch.dtype, bench: ResolvedBench, clock: Clock
) -> dict[str, Contender]:
    """Every way that this device has for a width, `packed` first."""
    found = {"packed": _packed(codes, dtype, clock)} | _int4_operator(codes, clock)
    if clock.device.type == "cuda":
        found |= _gemlite(codes, dtype, clock)
    if bench.activation_bits is not None:
        found[f"packed A{bench.activation_bits}"] = _integers(codes, bench.activation_bits, clock)
    return found


def _dense(codes: Codes, dtype: torch.dtype, clock: Clock) -> dict[str, Contender]:
    """torch's product of the dense weight; on a GPU in both 16-bit dtypes."""
    weight, found = dequantize(codes).float(), {}
    others = (torch.float16, torch.bfloat16) if clock.device.type == "cuda" else (dtype,)
    for other in dict.fromkeys((dtype, *others)):
        name = next(name for name, value in DTYPES.items() if value == other)
        copies = [weight.to(other) for _ in range(clock.copies(weight.numel() * other.itemsize))]
        found[f"dense {name}"] = Contender(_each(copies, _bind_dense), copies[0].nbytes)
    return found


def _bind_dense(x: Tensor, weight: Tensor) -> Product:
    same = x.to(weight.dtype)
    return lambda: torch.nn.functional.linear(same, weight)


def _packed(codes: Codes, dtype: torch.dtype, clock: Clock) -> Contender:
    if clock.device.type == "cuda":
        from compress.kernels.gpu.matmul import quantized_matmul  # needs triton

        tiled = pack_kernel(codes)
        bind = _each(_copies(tiled, clock), lambda x, copy: lambda: quantized_matmul(x, copy))
        return Contender(bind, tiled.nbytes)
    weight = pack_cpu(codes, dtype)
    bind = _each(_copies(weight, clock), lambda x, copy: lambda: cpu_matmul(x, copy))
    return Contender(bind, weight.nbytes)


def _copies(weight: Weight, clock: Clock) -> list[Weight]:
    """A packed weight as often as the cache asks for."""
    tensors = tensors_of(weight)
    return [
        replace(weight, **{name: t.clone() for name, t in tensors.items()})
        for _ in range(clock.copies(weight.nbytes))
    ]


def _integers(codes: Codes, bits: int, clock: Clock) -> Contender:
    """Each token of x rounded to `bits` bits, and a product of integers."""
    weight = (pack_kernel if clock.device.type == "cuda" else pack_integers)(codes)
    bind = _each(
        _copies(weight, clock),
        lambda x, copy: lambda: integer_matmul(*quantize_tokens(x, bits), copy, None, x.dtype),
    )
    return Contender(bind, weight.nbytes)


def _int4_operator(codes: Codes, clock: Clock) -> dict[str, Contender]:
    """torch's weight-only int4 operator (on CUDA known as tinygemm): 4 bits, bf16."""
    N, K = codes.codes.shape
    size = codes.group_size
    fits = codes.bits == 4 and size in (32, 64, 128, 256) and K % 128 == 0 and N % 16 == 0
    if not fits:
        return {}
    aten = torch.ops.aten
    scale = codes.scale.T.bfloat16()
    both = torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous()
    if clock.device.type == "cuda":
        pairs = (codes.codes[:, ::2] << 4) | codes.codes[:, 1::2]
        packed = aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
        name, operator = "tinygemm int4", aten._weight_int4pack_mm
    else:
        packed = aten._convert_weight_to_int4pack_for_cpu(codes.codes.to(torch.int32), 1)
        name, operator = "torch int4", aten._weight_int4pack_mm_for_cpu
    copies = [packed.clone() for _ in range(clock.copies(packed.nbytes))]

    def bind(x: Tensor, copy: Tensor) -> Product:
        same = x.bfloat16()
        return lambda: operator(same, copy, size, both)

    return {name: Contender(_each(copies, bind), packed.nbytes + both.nbytes, rows=256)}


def _gemlite(codes: Codes, dtype: torch.dtype, clock: Clock) -> dict[str, Contender]:
    """gemlite, where it is installed and takes the weight; it is no dependency."""
    try:
        from gemlite import DType, GemLiteLinear  # no dependency
    except ImportError:
        return {}
    kinds = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16}
    if codes.bits == 3 or dtype not in kinds:
        return {}
    N, K = codes.codes.shape
    zero = torch.full_like(codes.scale, 2 ** (codes.bits - 1))

    def make() -> torch.nn.Module:
        layer = GemLiteLinear(
            codes.bits,
            group_size=codes.group_size or K,
            in_features=K,
            out_features=N,
            input_dtype=kinds[dtype],
            output_dtype=kinds[dtype],
        )
        layer.pack(codes.codes, codes.scale, zero, None)
        return layer

    stored = codes.bits * N * K // 8 + codes.scale.nbytes
    copies = [make() for _ in range(clock.copies(stored))]
    return {"gemlite": Contender(_each(copies, lambda x, layer: lambda: layer(x)), stored)}


# ---- tuning -------------------------------------------------------------------------------------


def tune_kernels(bench: KernelBench, progress: Progress = lambda line: None) -> Report:
    """Measures tiles for each shape, width and rows, and writes the fastest to the user's cache.

    Reports {"path", "entries": [{key, tiles, seconds, before, tried}]}. Raises UsageError on a CPU,
    where nothing is tuned, and for fp32 activations, which have tiles of their own.
    """
    bench = resolved(bench)
    if not bench.device.startswith("cuda"):
        raise UsageError("--tune measures GPU tiles: give --device cuda; a CPU has none to choose")
    if bench.dtype == "fp32":
        raise UsageError("--tune measures 16-bit activations, found fp32: give --dtype fp16")
    from compress.kernels.gpu.matmul import device_name, table_of  # needs triton

    clock, entries, tuned = Clock(bench.device, bench.rounds), [], {}
    most = table_of(DTYPES[bench.dtype], clock.device, bench.group_size)[-1].rows
    buckets = sorted({tuning.bucket(M) for M in bench.rows if most >= M})
    dtype, name = DTYPES[bench.dtype], device_name(clock.device)
    for N, K in bench.shapes:
        for bits in bench.bits:
            codes = random_codes(N, K, bits, bench.group_size, dtype, clock.device)
            copies = _copies(pack_kernel(codes), clock)
            for rows in buckets:
                key = tuning.key(name, N, K, bits, bench.group_size, rows)
                progress(key)
                found = _tune(copies, rows, dtype, clock)
                entries.append({"key": key} | found)
                tuned[key] = tuning.Tiles(**found["tiles"])
    return Report({"path": str(tuning.save(tuned)), "entries": entries}, tuning_table)


def _tune(
    copies: Sequence[KernelWeight], rows: int, dtype: torch.dtype, clock: Clock
) -> dict[str, Any]:
    """The fastest tiles for one bucket, and the time of the table's."""
    from triton.runtime.errors import TritonError  # CPUs do without triton

    from compress.kernels.gpu import matmul  # needs triton

    x = torch.randn(rows, copies[0].columns, device=clock.device).to(dtype)
    table = matmul.table_of(dtype, clock.device, copies[0].group_size)
    start = next(tiles for tiles in table if tiles.rows >= rows)
    seconds: dict[tuning.Tiles, float] = {}
    for tiles in dict.fromkeys(replace(t, rows=rows) for t in (start, *tuning.candidates(rows))):
        calls = [partial(matmul.tiled_matmul, x, copy, None, tiles) for copy in copies]
        try:
            seconds[tiles] = clock.take_turns({"tiles": calls})["tiles"].median
        except TritonError:
            continue  # tiles that do not fit this device
        except RuntimeError as error:
            if "PassManager" not in str(error):  # what Triton raises where one of its passes fails
                raise
    best = min(seconds, key=seconds.__getitem__)
    before = seconds.get(replace(start, rows=rows), math.inf)
    return {
        "tiles": asdict(best),
        "seconds": seconds[best],
        "before": before,
        "tried": len(seconds),
    }
