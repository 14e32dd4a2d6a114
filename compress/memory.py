"""The machine under a run: its device and what that computes in, its memory, and giving that back.

release_memory(); peak_memory("cpu")["host"]
"""

import ctypes
import gc
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.ranks import launched, local_rank

if TYPE_CHECKING:
    from torch import Tensor

# A tensor up to that goes to a GPU from pinned memory, which torch keeps for the next one.
PINNED_BYTES = 1 << 28


def peak_memory(device: str) -> dict[str, int]:
    """The most memory this process has held so far, in bytes: {"host", "device"}."""
    on_device = 0
    if device.startswith("cuda"):
        import torch  # here: a process that only reads its own peak needs no torch

        on_device = torch.cuda.max_memory_allocated()
    return {"host": _peak_resident(), "device": on_device}


def check_device(device: str) -> None:
    """UsageError for a device that torch does not know or does not see."""
    import torch  # as above

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used here: {reason}") from error


def multiplies_16_bits(device: str) -> bool:
    """Whether products in bf16 are fast there: on a GPU, on a CPU that has instructions for them.

    A CPU without them (AVX2, AVX-512 without its bf16) takes up to ten times as long as in fp32.
    """
    import torch  # as above

    if torch.device(device).type != "cpu":
        return True
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and bool(torch.cpu._is_avx512_bf16_supported())


def chosen_device(device: str) -> str:
    """The device that `auto` stands for: a GPU where there is one, else the CPU.

    Each of several ranks gets a GPU of its own. UsageError for a device that cannot be used.
    """
    import torch  # as above

    rank, ranks = launched()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device.startswith("cuda") and ranks > 1:
        if device != "cuda":
            raise UsageError(
                f"device {device!r}: {ranks} ranks would share one GPU: give cuda, or auto, and "
                "each gets its own"
            )
        device = f"cuda:{local_rank()}"
        if local_rank() >= gpus:
            raise UsageError(
                f"rank {rank}: {gpus} GPUs on this machine, one for each rank: start no more "
                "ranks than that, or give --device cpu"
            )
    check_device(device)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    return device


@contextmanager
def fp32_products() -> Iterator[None]:
    """Products and convolutions of fp32 in fp32 on a GPU, whatever the process has set: no TF32.

    Its ten bits of mantissa would be noise in a Hessian that damping of a hundredth does not cover.
    """
    import torch  # as above

    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # missing in its types
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, convolutions)
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def moved(tensor: "Tensor", device: str) -> "Tensor":
    """The tensor in fp32 on the device.

    To a GPU it goes in 16 bits if it has no more, and from pinned memory while the host goes on.
    """
    import torch  # as above

    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.float() if tensor.itemsize > 4 else tensor
        tensor = tensor.pin_memory() if tensor.nbytes <= PINNED_BYTES else tensor
        tensor = tensor.to(device, non_blocking=True)
    return tensor.to(device, torch.float32)


def idle_gpus(device: str) -> str | None:
    """How to use the GPUs that one process leaves idle, in a line; None where none are."""
    import torch  # as above

    if not device.startswith("cuda") or launched()[1] > 1 or torch.cuda.device_count() < 2:
        return None
    gpus = torch.cuda.device_count()
    return f"{gpus} GPUs are here, and one is used: torchrun --nproc-per-node {gpus} -m compress"


def _peak_resident() -> int:
    if sys.platform == "linux":
        # Not ru_maxrss: a child process starts with its parent's there.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim, or None under another C library."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_memory() -> None:
    """Gives freed heap pages back to the system.

    glibc keeps tensors of up to 32 MB on its heap, where one small block above them holds hundreds
    of freed megabytes; a walk over layers of several sizes would never shrink.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@contextmanager
def uncollected() -> Iterator[None]:
    """Makes many objects that stay, without looking among them for rings that nobody holds.

    Python looks again whenever there are a quarter more: of 60,000 modules, as many seconds as it
    takes to make them. Around a function: `@uncollected()`.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
