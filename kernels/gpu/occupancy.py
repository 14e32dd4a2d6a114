"""How many programs of a kernel a GPU runs at once, and what follows: stages, and splits of inputs.

A multiprocessor runs as many programs beside each other as its registers and its shared memory
hold. More than one hides what each waits for; more than are held at once would wait for a second
round, in which most of the device idles.
"""

from functools import cache
from typing import NamedTuple, Protocol

import torch

from compress.kernels.gpu.layout import WORDS, KernelWeight, block_columns
from compress.kernels.gpu.tuning import Tiles

# Warps for each multiprocessor that splitting aims at: enough loads in flight to hide latency.
WARPS_PER_SM = 16
LARGE = 64  # fp32 sums of a thread, above which registers hold one program alone
PARTITIONS = 4  # of a multiprocessor, with registers of their own
TENSOR_COLUMNS = 512
SYSTEM_MEMORY = 1024  # bytes of shared memory that CUDA keeps of each program
LARGEST_CHUNK = 128  # inputs of one tensor-core product
INTERPRETER_MEMORY = 64 * 1024


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes a microsecond or two from Python, at every launch."""
    return -(-a // b)


class SharedMemory(NamedTuple):
    """Bytes: what one program may take, and what the programs of a multiprocessor share."""

    program: int
    multiprocessor: int


class KernelMetadata(Protocol):
    """What Triton says of a compiled kernel: bytes of shared memory, among other things."""

    shared: int


def stages(tiles: Tiles, bits: int, size: int, memory: SharedMemory) -> int:
    """Blocks in flight: what `tiles` asks for, or as many as leave room for other programs.

    But two, if a program has room for them alone: with one, nothing is in flight. size: bytes of an
    activation. Only weights as 16-bit floats go to the product in registers. A block of words waits
    in registers for its product, so one place fewer is needed for them (as Triton 3.6 to 3.9 has
    it; on Ampere and Ada one fewer for activations too).
    """
    block = block_columns(bits)
    words = (WORDS + 8 * (bits == 3)) * tiles.block_n * 4
    unpacked = 0 if size == 2 else min(block, LARGEST_CHUNK) * tiles.block_n * size
    each = tiles.block_m * block * size + words
    large = tiles.block_m * tiles.block_n > LARGE * 32 * tiles.warps
    programs = 1 if large else max(1, WARPS_PER_SM // tiles.warps)
    share = memory.multiprocessor // programs - SYSTEM_MEMORY
    alone, beside = ((room - unpacked + words) // each for room in (memory.program, share))
    return max(1, min(tiles.stages, alone, max(2, beside)))


def split_of(tiles: Tiles, grid: int, weight: KernelWeight, held: int) -> int:
    """Programs that share the inputs of each of `grid` tiles: what `tiles` says, or `held` in all.

    No more of them than give each program the same number of blocks, but for the last.
    """
    blocks = ceil_div(weight.columns, block_columns(weight.bits))
    wanted = min(blocks, tiles.split or max(1, held // grid))
    return ceil_div(blocks, ceil_div(blocks, wanted))


def most_held(tiles: Tiles, device: torch.device) -> int:
    """Programs that a device is asked to run at once, whatever it has room for."""
    return max(1, WARPS_PER_SM // tiles.warps) * multiprocessors(device)


def programs_beside(
    registers: int,
    metadata: KernelMetadata,
    warps: int,
    all_registers: int,
    memory: SharedMemory,
) -> int:
    """Programs that one multiprocessor holds, of so many registers a thread.

    metadata: of the compiled kernel, with its bytes of shared memory and, on Blackwell, columns of
    tensor memory.
    """
    of_a_warp = 32 * 8 * ceil_div(registers, 8)  # handed out by 8 for each thread
    all_warps = PARTITIONS * (all_registers // PARTITIONS // of_a_warp)
    columns = getattr(metadata, "tmem_size", 0) or 1
    held = (
        all_warps // warps,
        memory.multiprocessor // (metadata.shared + SYSTEM_MEMORY),
        TENSOR_COLUMNS // columns,
        WARPS_PER_SM // warps,
    )
    return max(1, min(held))


@cache
def shared_memory(device: torch.device) -> SharedMemory:
    """The shared memory of a device; INTERPRETER_MEMORY where there is none."""
    if device.type != "cuda":
        return SharedMemory(INTERPRETER_MEMORY, INTERPRETER_MEMORY)
    has = torch.cuda.get_device_properties(device)
    program = has.shared_memory_per_block_optin  # type: ignore[attr-defined]  # missing in its types
    return SharedMemory(program, has.shared_memory_per_multiprocessor)


@cache
def multiprocessors(device: torch.device) -> int:
    """The multiprocessors of a device; the interpreter runs programs one after another."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
