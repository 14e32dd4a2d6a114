"""Launches on a Hopper GPU that is not there: arguments bind, kernels compile, grids fill it.

Everything up to the driver is real; what it would load and run is noted instead.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from support.weights import random_weight

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from compress.kernels.gpu import matmul, occupancy, rounding  # noqa: E402
from compress.kernels.gpu.layout import pack_kernel  # noqa: E402
from compress.kernels.gpu.matmul import Tiles, programs_held, tiled_matmul, tiles_for  # noqa: E402

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or matmul.interpreted(), reason="nothing to stand in for"
)
MULTIPROCESSORS = 132
FEW = Tiles(rows=8, block_m=8, block_n=128, warps=4, stages=4)
MORE = Tiles(rows=32, block_m=32, block_n=128, warps=8, stages=3)
H100 = SimpleNamespace(
    regs_per_multiprocessor=1 << 16,
    shared_memory_per_multiprocessor=228 * 1024,
    shared_memory_per_block_optin=227 * 1024,
    multi_processor_count=MULTIPROCESSORS,
)


@pytest.fixture
def hopper(monkeypatch):
    """The launches, as (grid, kernel, warps); `registers` is what a kernel will be said to take."""
    device = SimpleNamespace(launches=[], registers=100, made_current=[], compiled=0, shared=[])

    class Launcher:
        def __init__(self, source, metadata):
            self.metadata = metadata

        def __call__(self, x, y, z, *rest):
            device.launches.append(((x, y), self.metadata.name, self.metadata.num_warps))
            device.shared.append(self.metadata.shared)

    def load(*_):
        device.compiled += 1
        return 1, 1, device.registers, 0, 1024

    class MadeCurrent(contextlib.nullcontext):
        def __init__(self, tensor):
            super().__init__()
            device.made_current.append(tensor.device)

    properties = {"max_shared_mem": H100.shared_memory_per_block_optin}
    stand_in = SimpleNamespace(
        launcher_cls=Launcher,
        utils=SimpleNamespace(
            load_binary=load,
            get_device_properties=lambda _: properties,
            unload_module=lambda _: None,
        ),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    monkeypatch.setattr(driver, "_active", stand_in)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: H100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device_of", MadeCurrent)
    caches = [
        matmul.programs_held,
        occupancy.multiprocessors,
        occupancy.shared_memory,
        matmul.table_of,
    ]
    for cached in caches:
        cached.cache_clear()
    yield device
    for cached in caches:
        cached.cache_clear()
    for kernel in (
        matmul.kernels.matmul_kernel,
        matmul.kernels.reduce_kernel,
        rounding.kernels.round_kernel,
    ):
        kernel.device_caches.clear()


@pytest.mark.parametrize(("M", "warps"), [(1, 2), (16, 4), (33, 4), (100, 8), (200, 8)])
@pytest.mark.parametrize(("bits", "symmetric"), [(3, False), (4, True)])
def test_every_entry_launches(M, warps, bits, symmetric, hopper):
    weight = pack_kernel(random_weight(300, 512, bits, 128, symmetric))
    x, bias = torch.zeros(M, 512).half(), torch.zeros(300).half()
    tiles = tiles_for(x, weight)
    assert tiled_matmul(x, weight, bias, tiles).shape == (M, 300)
    grid = (-(-M // tiles.block_m) * -(-300 // tiles.block_n), 1)
    assert hopper.launches == [(grid, "matmul_kernel", warps)]


def options_of(tiles, weight):
    constants = matmul.weight_constants(weight) | matmul.tile_constants(tiles)
    more = {
        "EVEN": True,
        "SCALED": False,
        "EARLY": True,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    return tuple((constants | more | matmul.kernels.FIXED_OPTIONS).items())


@pytest.mark.parametrize(("registers", "held"), [(64, 4), (128, 4), (129, 3), (168, 3), (255, 2)])
def test_no_more_programs_than_fit_are_started(registers, held, hopper):
    """Registers are handed out by 8; four programs of four warps are all that is asked for."""
    hopper.registers = registers
    weight = pack_kernel(random_weight(256, 4096, 4, 128))
    options = options_of(FEW, weight)
    found = programs_held(
        torch.float16, torch.float16, (256, 4096, 4096), options, torch.device("cuda")
    )
    assert found == held * MULTIPROCESSORS


def test_shared_memory_counts_too(hopper):
    hopper.registers = 32
    weight = pack_kernel(random_weight(256, 4096, 3, 128))
    device, sizes = torch.device("cuda"), (256, 4096, 4096)
    options = options_of(MORE, weight)  # 100 KiB: of four programs that its warps allow, two
    found = programs_held(torch.float16, torch.float16, sizes, options, device)
    assert found == 2 * MULTIPROCESSORS


@pytest.fixture
def held(hopper, monkeypatch):
    """As on the device: programs_held and multiprocessors are asked of a GPU."""
    device = torch.device("cuda")
    ask = matmul.programs_held
    monkeypatch.setattr(matmul, "programs_held", lambda *a: ask(*a[:-1], device))
    most = occupancy.most_held
    monkeypatch.setattr(matmul, "most_held", lambda tiles, _: most(tiles, device))
    return hopper


def test_a_split_product_fills_the_device_and_is_added_up(held):
    """2 tiles of 32 blocks each: 16 programs for each would leave most of the device idle."""
    weight = pack_kernel(random_weight(256, 4096, 4, 128))
    tiled_matmul(torch.zeros(1, 4096).half(), weight, torch.zeros(256).half(), FEW)
    assert [launch[:2] for launch in held.launches] == [
        ((2, 32), "matmul_kernel"),
        ((1, 1), "reduce_kernel"),
    ]
    held.launches.clear()
    wide = pack_kernel(random_weight(128 * 100, 1024, 4, 128))  # 100 tiles, room for 528 programs
    tiled_matmul(torch.zeros(1, 1024).half(), wide, None, FEW)
    assert held.launches[0][0] == (100, 4)  # 5 would give one program no block


def test_a_product_with_tiles_enough_compiles_nothing_to_ask(held):
    weight = pack_kernel(random_weight(128 * 300, 256, 4, 128))
    tiled_matmul(torch.zeros(1, 256).half(), weight, None, FEW)
    assert held.launches == [((300, 1), "matmul_kernel", 4)]
    assert held.compiled == 1


def test_rows_and_splits_share_compiled_code(held):
    weight = pack_kernel(random_weight(256, 4096, 4, 128))
    for M in (1, 2, 5, 8):
        tiled_matmul(torch.zeros(M, 4096).half(), weight, None, FEW)
    assert len(held.launches) == 8
    assert held.compiled == 2  # matmul_kernel and reduce_kernel


def test_the_device_of_the_tensors_is_made_current(hopper):
    weight = pack_kernel(random_weight(32, 256, 4, 128))
    x = torch.zeros(1, 256).half()
    tiled_matmul(x, weight, None, FEW)
    matmul.dequantize_weight(weight, torch.float16)
    assert hopper.made_current == [x.device] * 2


@pytest.mark.parametrize(
    ("capability", "table"),
    [((8, 0), "MMA"), ((8, 9), "MMA"), ((9, 0), ""), ((10, 0), ""), ((12, 0), "MMA")],
)
def test_the_table_of_a_device(capability, table, hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device = torch.device("cuda")
    assert matmul.table_of(torch.bfloat16, device, 128) == (
        matmul.MMA_TABLE if table else matmul.TABLE
    )
    assert matmul.table_of(torch.bfloat16, device, None) == (
        matmul.MMA_TABLE if table else matmul.TABLE
    )
    assert matmul.table_of(torch.bfloat16, device, 48) == matmul.ODD_TABLE
    assert matmul.table_of(torch.float32, device, 128) == matmul.FP32_TABLE


@pytest.mark.parametrize("bounds", ["numbers", "outputs", "columns"])
@pytest.mark.parametrize("N", [33, 4096])
def test_a_block_of_columns_is_one_launch(bounds, N, hopper, monkeypatch):
    """Whatever N and the strides divide by, each output stays with its thread: no shared memory."""
    monkeypatch.setattr(rounding, "check_launch", lambda *_: None)
    low = {"numbers": -4.0, "outputs": torch.zeros(N), "columns": torch.zeros(128, N)}[bounds]
    for rows in (128, 120):
        part = low[:rows] if bounds == "columns" else low
        rounding.round_rows_(torch.zeros(rows, N), torch.zeros(rows, rows), part, part)
    assert hopper.launches == [((-(-N // 32), 1), "round_kernel", 1)] * 2
    assert hopper.compiled == 1
    assert hopper.shared == [0, 0]
    assert hopper.made_current == [torch.device("cpu")] * 2
