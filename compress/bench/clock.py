"""Times short operations honestly: caches cold, launches amortised, contenders in turns.

On a GPU, one CUDA graph holds a call for each copy of the operands and is replayed between two
events: no launch is timed, and no copy is still in the cache when its turn comes again. On a CPU
the same calls run one after another. A sample is the time of one such pass, per call.

    clock = Clock("cuda", rounds=15)
    samples = clock.take_turns({"mine": [call for each copy], "theirs": [...]})
    samples["mine"].median, samples["mine"].spread           # seconds, share of the median

What takes long by itself, a prefill or a whole run, is timed once by a `Stopwatch`.
"""

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from compress.errors import UsageError

CACHES = 2  # times the last-level cache that all copies together fill
MOST_COPIES = 64
MOST_BYTES = 1 << 30  # of copies, where an operand is larger than that: two
CPU_CACHE = 32 << 20  # where the system does not say
PASS_SECONDS = 0.002  # a pass shorter than that is repeated within a sample
COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
PRODUCT_SIZE = {"cpu": 1536, "cuda": 8192}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SMALLER = 6  # times, the product that says which dtypes are emulated: 256


@dataclass(frozen=True)
class Samples:
    """Seconds per call, one number for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The fastest sample."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the samples lie within this share of the median: the interquartile range."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (third - first) / self.median


class Clock:
    """Times calls on one device."""

    def __init__(self, device: str = "cpu", rounds: int = 15):
        self.device = torch.device(device)
        self.rounds = rounds
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.cache = last_level_cache(self.device)

    def copies(self, size: int) -> int:
        """How many operands of `size` bytes no cache holds together: at least two."""
        wanted = -(-CACHES * self.cache // max(size, 1))
        return max(2, min(wanted, MOST_COPIES, MOST_BYTES // max(size, 1)))

    def take_turns(self, calls: Mapping[str, Sequence[Callable[[], object]]]) -> dict[str, Samples]:
        """Samples of each contender, which is a list of calls that differ in their operands.

        Every round times one pass over each contender's calls; what runs first changes.
        """
        passes = {name: self._prepare(each) for name, each in calls.items()}
        taken: dict[str, list[float]] = {name: [] for name in calls}
        names = list(passes)
        for turn in range(self.rounds):
            for i in range(len(names)):
                name = names[(i + turn) % len(names)]
                taken[name].append(passes[name]())
        return {name: Samples(tuple(seconds)) for name, seconds in taken.items()}

    def _prepare(self, calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
        """What times one pass, in seconds per call; kernels are compiled and warm."""
        run = self._graph(calls) if self.device.type == "cuda" else lambda: _run(calls)
        self._time(run)
        repeats = max(1, round(PASS_SECONDS / max(self._time(run), 1e-9)))

        def sample() -> float:
            def several() -> None:
                for _ in range(repeats):
                    run()

            return self._time(several) / (repeats * len(calls))

        return sample

    def _time(self, run: Callable[[], None]) -> float:
        if self.device.type != "cuda":
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        with torch.cuda.device(self.device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            last.synchronize()
            return first.elapsed_time(last) / 1000

    def _graph(self, calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
        """A graph of the calls. torch's own context also empties caches, a quarter of a second."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        torch.cuda.synchronize(self.device)
        collects = gc.isenabled()
        gc.disable()  # what it frees during capture would be captured
        try:
            with torch.cuda.stream(stream):
                _run(calls)  # compiles and allocates before it is captured
                stream.synchronize()
                graph.capture_begin()
                try:
                    _run(calls)
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        return graph.replay


def _run(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """{"median", "minimum", "maximum"} of samples."""
    return {"median": statistics.median(seconds), "minimum": min(seconds), "maximum": max(seconds)}


class Stopwatch:
    """Seconds of a block of code that is long enough to be timed once: `with` it, ask `seconds`.

    The device has done all that it was given before the block begins and before it counts as over.
    """

    seconds: float

    def __init__(self, device: str = "cpu"):
        self._gpu = device.startswith("cuda")

    def __enter__(self) -> "Stopwatch":
        self._wait()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._started

    def _wait(self) -> None:
        if self._gpu:
            torch.cuda.synchronize()


def check_dtype(name: str) -> None:
    """UsageError for a name that is not one of DTYPES."""
    if name not in DTYPES:
        raise UsageError(f"dtype: expected {', '.join(DTYPES)}, found {name!r}")


# ---- what the device can do ---------------------------------------------------------------------


def last_level_cache(device: torch.device) -> int:
    """Bytes of the L2 cache of a GPU, or of a CPU's largest."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes, default=CPU_CACHE)


def copy_bandwidth(clock: Clock) -> float:
    """Bytes a second that a copy reads and writes, the best of all rounds."""
    size = COPY_BYTES[clock.device.type]
    source = torch.ones(size // 4, device=clock.device)
    target = torch.empty_like(source)
    # by a kernel: a graph gives a plain copy to the copy engine, which is slower
    samples = clock.take_turns({"copy": [lambda: torch.neg(source, out=target)]})
    return 2 * source.nbytes / samples["copy"].best


def product_rate(clock: Clock, *dtypes: str) -> dict[str, float]:
    """Operations a second of square products by dtype, the best of all rounds each.

    dtypes: of DTYPES; none given: those in which this device may be fastest. On a CPU bf16 is then
    left out where a small product of it is slower than one in fp32: it is emulated, as fp16 is
    everywhere, takes seconds for a large one, and is no bound to anything.
    """
    n = PRODUCT_SIZE[clock.device.type]
    if not dtypes and clock.device.type == "cpu":
        small = _product_rates(clock, -(-n // SMALLER), ("fp32", "bf16"))
        dtypes = ("fp32", "bf16") if small["bf16"] >= small["fp32"] else ("fp32",)
    return _product_rates(clock, n, dtypes or ("fp16", "bf16"))


def _product_rates(clock: Clock, n: int, dtypes: Sequence[str]) -> dict[str, float]:
    calls = {}
    for name in dtypes:
        a = torch.randn(n, n, device=clock.device).to(DTYPES[name])
        calls[name] = [lambda a=a: a @ a]
    samples = clock.take_turns(calls)
    return {name: 2 * n**3 / taken.best for name, taken in samples.items()}


def conditions(clock: Clock) -> dict[str, Any]:
    """What figures were taken on and with: device, versions, threads, load, clocks as found."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "cache_bytes": clock.cache,
        "rounds": clock.rounds,
    }
    if clock.device.type == "cuda":
        properties = torch.cuda.get_device_properties(clock.device)
        return found | {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "clocks": _clocks(clock.device.index or 0),
        }
    return found | {
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def _clocks(index: int) -> dict[str, str] | None:
    """Clocks, power limit and driver as nvidia-smi gives them; None where it does not."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "driver_version")
    query = f"--query-gpu={','.join(fields)}"
    command = ["nvidia-smi", f"--id={index}", query, "--format=csv,noheader"]
    try:
        run = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (part.strip() for part in run.stdout.split(",")), strict=False))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
