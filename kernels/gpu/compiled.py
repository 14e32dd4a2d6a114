"""What the compiler makes of the product kernel, for a GPU that need not be there.

Of each entry of the table: registers, spilled bytes, shared memory, how many programs run beside
each other, and instructions for each weight. A multiprocessor issues 4 * 32 of a thread's
instructions in a cycle, so a product of N x K weights takes at least

    instructions / weight * N * K * (tiles of rows) / (128 * multiprocessors * clock)     seconds

whatever its memory does. Counted is the loop over blocks of inputs, in the machine code that
Triton's own disassembler shows.

    for row in compiled_products((9, 0), bits=(4,)):
        print(row.tiles, row.registers, row.instructions)
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction

from compress.kernels.gpu import triton_kernels as kernels
from compress.kernels.gpu.layout import block_columns
from compress.kernels.gpu.matmul import EXACT_ROWS, scheme_constants, table_for, tile_constants
from compress.kernels.gpu.occupancy import SharedMemory, programs_beside, stages
from compress.kernels.gpu.tuning import Tiles

# Shared memory by compute capability, and registers (CUDA C++ Programming Guide, "Compute
# Capabilities", technical specifications).
SHARED_MEMORY = {
    (8, 0): SharedMemory(163 * 1024, 164 * 1024),
    (8, 6): SharedMemory(99 * 1024, 100 * 1024),
    (8, 9): SharedMemory(99 * 1024, 100 * 1024),
    (9, 0): SharedMemory(227 * 1024, 228 * 1024),
    (10, 0): SharedMemory(227 * 1024, 228 * 1024),
    (12, 0): SharedMemory(99 * 1024, 100 * 1024),
}
REGISTERS = 1 << 16
DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}
POINTERS = {
    "words": "*i32",
    "high": "*i32",
    "zero": "*u8",
    "workspace": "*fp32",
    "values": "*i8",
    "token_scale": "*fp32",
    "base": "*fp32",
    "links": "*fp32",
}
FLOATS = {"x", "scale", "bias", "out", "factor"}
NUMBERS = {"norm", "least", "most"}  # fp32
Constant = int | float | bool | None  # that a kernel is compiled for; None: a tensor that is absent


@dataclass(frozen=True)
class CompiledProduct:
    """One kernel: bytes of `spilled` are a thread's, of `shared` a program's.

    serialized: the assembler lets no two of Hopper's products overlap, for want of registers.
    """

    bits: int
    tiles: Tiles
    stages: int
    registers: int
    spilled: int
    shared: int
    programs: int
    instructions: float
    serialized: bool


def compiled_products(
    capability: tuple[int, int],
    bits: Sequence[int] = (2, 3, 4, 8),
    dtype: str = "fp16",
    group_size: int | None = 128,
) -> Iterator[CompiledProduct]:
    """The table's entries for a device of this capability, symmetric weights.

    Raises KeyError for a capability that SHARED_MEMORY does not list.
    """
    memory = SHARED_MEMORY[capability]
    for width in bits:
        for tiles in table_for(capability[0], dtype == "fp32", group_size):
            compiled = compile_product(width, group_size, dtype, tiles, capability)
            registers, spilled = resources(compiled)
            weights = block_columns(width) * tiles.block_n // (32 * tiles.warps)
            yield CompiledProduct(
                bits=width,
                tiles=tiles,
                stages=compiled.metadata.num_stages,
                registers=registers,
                spilled=spilled,
                shared=compiled.metadata.shared,
                programs=programs_beside(
                    registers, compiled.metadata, tiles.warps, REGISTERS, memory
                ),
                instructions=len(longest_loop(compiled)) / weights,
                serialized=is_serialized(compiled),
            )


def compile_product(
    bits: int,
    group_size: int | None,
    dtype: str,
    tiles: Tiles,
    capability: tuple[int, int],
    symmetric: bool = True,
    even: bool = True,
) -> CompiledKernel:
    """matmul_kernel as `tiled_matmul` splits it, into a workspace. even: K is whole blocks."""
    many = tiles.rows > EXACT_ROWS
    return compile_kernel(
        kernels.matmul_kernel,
        capability,
        dtype,
        tiles.warps,
        stages(tiles, bits, DTYPES[dtype], SHARED_MEMORY[capability]),
        **product_constants(bits, group_size, symmetric, many),
        **tile_constants(tiles),
        bias=None,
        HAS_BIAS=False,
        SCALED=many and group_size is not None,
        EVEN=even,
        EARLY=capability[0] >= 9,
    )


def product_constants(
    bits: int, group_size: int | None, symmetric: bool = True, many: bool = False
) -> dict[str, Constant]:
    """What a kernel knows of a weight at compile time, and the tensors that it does not have."""
    absent = ({} if bits == 3 else {"high": None}) | ({"zero": None} if symmetric else {})
    return {**scheme_constants(bits, group_size, symmetric, many), **absent}


def compile_kernel(
    kernel: JITFunction,
    capability: tuple[int, int],
    dtype: str,
    warps: int = 4,
    stages: int = 3,
    **constants: Constant,
) -> CompiledKernel:
    """Any kernel with `constants` fixed; other names are pointers, or int32 that 16 divides."""
    signature = {}
    pointers = POINTERS | ({"out": "*fp32"} if kernel is kernels.matmul_kernel else {})
    if constants.get("TENSORS"):
        pointers |= {"least": "*fp32", "most": "*fp32"}
    for name in kernel.arg_names:
        other = "*" + dtype if name in FLOATS else "fp32" if name in NUMBERS else "i32"
        signature[name] = "constexpr" if name in constants else pointers.get(name, other)
    places = {name: i for i, name in enumerate(kernel.arg_names)}
    plain = {*constants, *NUMBERS - pointers.keys()}
    plain |= {param.name for param in kernel.params if param.do_not_specialize}
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(places[name],): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for n, i in places.items() if n not in plain},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32),
        options={"num_warps": warps, "num_stages": stages, **kernels.FIXED_OPTIONS},
    )


def resources(compiled: CompiledKernel) -> tuple[int, int]:
    """Registers of a thread, and the bytes of its stack, which is where registers are spilled."""
    tool = triton.knobs.nvidia.cuobjdump.path
    shown = _shown_by([tool, "--dump-resource-usage"], compiled, "cubin")
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    if found is None:
        raise RuntimeError(f"{tool} says nothing of registers: {shown[-200:]!r}")
    return int(found[1]), int(found[2])


def is_serialized(compiled: CompiledKernel) -> bool:
    """Whether the assembler says so of the kernel's wgmma instructions."""
    arch = compiled.metadata.target.arch
    name = f"sm_{arch}{'a' if arch >= 90 else ''}"  # as Triton assembles it
    command = [get_ptxas(arch).path, "-v", "--gpu-name", name, "-o", os.devnull]
    return "are serialized" in _shown_by(command, compiled, "ptx")


def longest_loop(compiled: CompiledKernel) -> list[str]:
    """The machine instructions from a label to a branch back to it, the longest such stretch."""
    shown = _shown_by([triton.knobs.nvidia.nvdisasm.path, "-c"], compiled, "cubin")
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = [[]]
    for line in shown.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1])
            back = re.search(r"\bBRA.*`\((\.L_x_\d+)\)", found[1])
            if back and back[1] in labels:
                loops.append(instructions[labels[back[1]] :])
    return max(loops, key=len)


def _shown_by(command: Sequence[str], compiled: CompiledKernel, stage: str) -> str:
    """What one of Triton's own tools prints of a stage of the compiled kernel."""
    content = compiled.asm[stage]
    with tempfile.NamedTemporaryFile(suffix=f".{stage}") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        shown = subprocess.run(
            [*command, file.name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
    return shown.stdout + shown.stderr
