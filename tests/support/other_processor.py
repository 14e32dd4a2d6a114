"""The compiled CPU kernels built for ARM, called in a process that an emulator runs.

    kernels = arm_kernels(folder, "armv8.2-a+dotprod")      # a Kernels like that of this machine
    y = kernels.tiles_matmul(x, packed, scale, zero, bits=4, group_size=64)

Needs `aarch64-linux-gnu-g++` and `qemu-aarch64` (Debian: g++-aarch64-linux-gnu, qemu-user).
"""

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

from compress.kernels.cpu import native

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FOUND = all(shutil.which(program) for program in (COMPILER, EMULATOR))
SERVER = Path(__file__).with_name("other_processor.cpp")
BYTES = {0: 4, 1: 2, 2: 2}  # of a number of each kind in vectors.h


class Emulated:
    """What a loaded library offers, by a process that reads arrays and writes a product."""

    def __init__(self, program: Path):
        self.process = subprocess.Popen(
            [EMULATOR, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.takes_bf16, self.takes_quads = self._read("ii")

    def modelpress_takes_bf16(self) -> int:
        return self.takes_bf16

    def modelpress_takes_quads(self) -> int:
        return self.takes_quads

    def modelpress_tiles_matmul(
        self, x, kind, _, packed, scale, scale_kind, zero, y, M, N, K, group, bits, middle, threads
    ):
        groups, tiles = -(-K // group), -(-N // 64)
        arrays = [
            (x, M * K * BYTES[kind]),
            (packed, tiles * -(-K // 2) * 16 * bits),
            (scale, groups * N * BYTES[scale_kind]),
            (zero, groups * N if zero else 0),
        ]
        self._call((0, kind, scale_kind, M, N, K, group, bits, middle), arrays, y, M * N * 4)

    def modelpress_quads_matmul(
        self,
        x,
        tokens,
        _,
        packed,
        scale,
        scale_kind,
        zero,
        y,
        M,
        N,
        K,
        group,
        bits,
        middle,
        threads,
    ):
        groups, tiles = -(-K // group), -(-N // 64)
        arrays = [
            (x, M * K),
            (packed, tiles * -(-K // 4) * 32 * bits),
            (scale, groups * N * BYTES[scale_kind]),
            (zero, groups * N if zero else 0),
            (tokens, M * 4),
        ]
        self._call((1, 0, scale_kind, M, N, K, group, bits, middle), arrays, y, M * N * 4)

    def modelpress_best_scale(
        self, W, scale, zero, importance, best, K, N, S, low, high, magnitude, threads
    ):
        arrays = [
            (W, K * N * 4),
            (scale, S * N * 4),
            (zero, S * N * 4 if zero else 0),
            (importance, K * 4 if importance else 0),
        ]
        self._call((2, K, N, S, int(low), int(high), magnitude), arrays, best, N * 8)

    def modelpress_round_in_order(self, base, coupling, low, high, scale, B, N, step, threads):
        bounds = (B if step else 1) * N * 4
        arrays = [
            (base, B * N * 4),
            (coupling, B * B * 4),
            (low, bounds),
            (high, bounds),
            (scale, B * N * 4 if scale else 0),
        ]
        self._call((3, B, N, step), arrays, base, B * N * 4)

    def _call(self, numbers, arrays, result, size):
        pipe = self.process.stdin
        pipe.write(struct.pack("<9q", *numbers, *[0] * (9 - len(numbers))))
        for address, length in arrays:
            pipe.write(struct.pack("<q", length))
            pipe.write(ctypes.string_at(address, length) if length else b"")
        pipe.flush()
        ctypes.memmove(result, self.process.stdout.read(size), size)

    def _read(self, layout):
        return struct.unpack("<" + layout, self.process.stdout.read(struct.calcsize(layout)))


def arm_kernels(folder: Path, architecture: str) -> native.Kernels:
    """The kernels for an ARM processor, compiled into `folder`."""
    program = folder / architecture
    flags = [flag for flag in native.FLAGS if flag not in ("-O3", "-shared", "-fPIC")]
    command = [COMPILER, f"-march={architecture}", "-O1", "-static", *flags]
    sources = [*map(str, native.SOURCES), str(SERVER)]
    subprocess.run([*command, "-o", str(program), *sources], check=True, timeout=120)
    return native.Kernels(Emulated(program))
