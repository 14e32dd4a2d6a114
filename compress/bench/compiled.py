"""`modelpress bench compiled`: what the compiler makes of the GPU kernels, without a GPU.

What is counted, and how: compress.kernels.gpu.compiled.

    console.print(bench_compiled(CompiledBench("9.0", bits=(4,))).table())
"""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from rich.table import Table

from compress.bench.kernels import check_scheme
from compress.bench.report import Report, table_of
from compress.bench.settings import CompiledBench
from compress.errors import UsageError


def bench_compiled(bench: CompiledBench) -> Report:
    """The table's entries for a compute capability: registers, bytes, instructions for each weight.

    Raises UsageError for a capability that is not known, and under TRITON_INTERPRET.
    """
    check_scheme(bench.bits, bench.group_size, bench.dtype)
    try:
        from compress.kernels.gpu.compiled import SHARED_MEMORY, compiled_products  # needs triton
        from compress.kernels.gpu.matmul import interpreted  # needs triton
    except ImportError as error:
        raise UsageError(f"GPU kernels need triton: {error}") from None
    if interpreted():
        raise UsageError("TRITON_INTERPRET is set: the interpreter compiles nothing")
    known = {f"{major}.{minor}": (major, minor) for major, minor in SHARED_MEMORY}
    if bench.capability not in known:
        raise UsageError(f"--capability: expected {', '.join(known)}, found {bench.capability!r}")
    capability = known[bench.capability]
    products = compiled_products(capability, bench.bits, bench.dtype, bench.group_size)
    values = {
        "capability": bench.capability,
        "dtype": bench.dtype,
        "group_size": bench.group_size,
        "versions": {name: version(name) for name in ("torch", "triton")},
        "python": platform.python_version(),
        "products": [asdict(product) for product in products],
    }
    return Report(values, compiled_table)


def compiled_table(result: Mapping[str, Any]) -> Table:
    """One line for each width and entry of the table."""
    group = result["group_size"] or "channel"
    caption = (
        f"compute capability {result['capability']}, {result['dtype']}, groups of {group}, triton "
        f"{result['versions']['triton']}; instructions of a thread's loop for each of its weights"
    )
    columns = ("bits", "rows", "tile", "warps", "stages", "registers", "spilled", "KiB")
    table = table_of(caption, (*columns, "programs", "instructions"))
    for product in result["products"]:
        tiles = product["tiles"]
        table.add_row(
            str(product["bits"]),
            f"to {tiles['rows']}",
            f"{tiles['block_m']} x {tiles['block_n']}",
            str(tiles["warps"]),
            str(product["stages"]),
            str(product["registers"]),
            str(product["spilled"]),
            f"{product['shared'] / 1024:.0f}",
            str(product["programs"]),
            f"{product['instructions']:.2f}",
        )
    return table
