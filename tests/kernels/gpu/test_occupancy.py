"""How many programs a multiprocessor holds, and stages, against numbers worked out by hand."""

from types import SimpleNamespace

import pytest

from compress.kernels.gpu.occupancy import SharedMemory, programs_beside, stages
from compress.kernels.gpu.tuning import Tiles

HOPPER = SharedMemory(227 * 1024, 228 * 1024)
REGISTERS = 1 << 16


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "columns", "programs"),
    [
        (128, 4, 0, 0, 4),  # 16 warps are all that is asked for
        (129, 4, 0, 0, 3),  # 136 of them: 3 warps fit each of the four partitions
        (255, 8, 0, 0, 1),  # 2 warps a partition
        (200, 1, 0, 0, 8),  # 2 warps a partition, where all registers together would hold 10
        (32, 4, 57 * 1024, 0, 3),  # 57 + 1 KiB: four would take 232
        (32, 4, 56 * 1024, 0, 4),  # 228 of 228
        (32, 4, 0, 256, 2),  # of 512 columns of tensor memory
        (255, 16, 0, 0, 1),
    ],
)
def test_programs_of_a_multiprocessor(registers, warps, shared, columns, programs):
    kernel = SimpleNamespace(shared=shared, tmem_size=columns)
    assert programs_beside(registers, kernel, warps, REGISTERS, HOPPER) == programs


@pytest.mark.parametrize(
    ("tiles", "bits", "expected"),
    [
        (Tiles(8, 8, 128, 4, 4), 4, 4),  # 2 + 8 KiB a block, 56 KiB for each of four programs
        (Tiles(16, 16, 128, 4, 4), 3, 3),  # 8 + 12 KiB: 4 would take 80 - 12
        (Tiles(128, 128, 128, 8, 3), 2, 2),  # 64 + 8 KiB: 113 hold one, two fit a program alone
        (Tiles(512, 128, 256, 8, 3), 4, 3),  # 128 sums to a thread: one program, 32 + 16 KiB
    ],
)
def test_stages_leave_room_for_other_programs(tiles, bits, expected):
    assert stages(tiles, bits, 2, HOPPER) == expected
