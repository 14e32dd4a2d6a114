"""The products of each processor that this one can run or emulate: all of them right."""

import platform
import subprocess

import pytest
import torch

from compress.kernels.cpu import native
from compress.kernels.cpu.integers import QuadsWeight, int_products
from compress.kernels.cpu.rounding import best_scale, round_in_order
from compress.kernels.cpu.tiles import TilesWeight
from compress.kernels.reference import dequantize, reference_matmul
from compress.quantization.rounding import round_eagerly
from support.other_processor import FOUND, arm_kernels
from support.weights import random_weight, relative_error

# AVX-512 of its first years has neither products of bf16 nor of bytes.
LEVELS = native.LEVELS | {"early": ("-march=native", "-mno-avx512vnni", "-mno-avx512bf16")}
ARM = ("armv8-a", "armv8.2-a+dotprod", "armv8.2-a+dotprod+i8mm")
x86 = pytest.mark.skipif(
    platform.machine() != "x86_64" or native.find_compiler() is None, reason="no x86 compiler"
)
emulator = pytest.mark.skipif(not FOUND, reason="no ARM compiler, or no emulator of one")


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(level, marks=x86) for level in LEVELS),
        *(pytest.param(architecture, marks=emulator) for architecture in ARM),
    ],
)
def kernels(request, tmp_path_factory):
    """The kernels of each, compiled sooner than those that people get."""
    folder = tmp_path_factory.mktemp("kernels")
    if request.param in ARM:
        built = arm_kernels(folder, request.param)
        yield built
        built.library.process.kill()
        return
    library = folder / "kernels.so"
    flags = [*LEVELS[request.param], *native.FLAGS, "-O1", *native.OPENMP]
    command = [native.find_compiler(), *flags, "-o", str(library), *map(str, native.SOURCES)]
    subprocess.run(command, check=True)
    yield native.Kernels(native.load(library))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "symmetric"), [(8, False), (64, True), (200, False), (None, True)]
)
def test_products_of_floats(kernels, bits, group_size, symmetric):
    for dtype in (torch.float32, torch.bfloat16):
        weight = random_weight(
            70, 201 if group_size is None else 400, bits, group_size, symmetric, dtype
        )
        packed = TilesWeight.pack(weight)
        for M in (1, 2, 6, 7, 131):
            x = torch.randn(M, weight.codes.shape[1]).to(dtype)
            y = kernels.tiles_matmul(x, packed.packed, packed.scale, packed.zero, bits, group_size)
            terms = x.abs().double() @ dequantize(weight).abs().T
            error = (y.double() - reference_matmul(x, weight)).norm() / terms.norm()
            assert error < 5e-7


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "symmetric"), [(4, False), (64, True), (200, False), (None, True)]
)
def test_products_of_integers(kernels, bits, group_size, symmetric):
    if not kernels.takes_quads():
        pytest.skip("multiplies no bytes")
    weight = random_weight(70, 401, bits, group_size, symmetric, torch.float32)
    packed = QuadsWeight.pack(weight)
    for M in (1, 2, 6, 7, 31):
        values, scale = torch.randint(-128, 128, (M, 401), dtype=torch.int8), torch.rand(M)
        values[0] = -128
        y = kernels.quads_matmul(
            values,
            scale,
            packed.packed,
            packed.scale,
            packed.zero,
            bits,
            group_size,
            2 ** (bits - 1),
        )
        expected = reference_matmul(values.double() * scale.double()[:, None], weight)
        assert relative_error(y, expected) < 5e-7


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (4, False)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("outputs", [1, 70])
def test_the_best_of_scales(kernels, bits, symmetric, weighted, outputs):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    W, shares = torch.randn(96, outputs), torch.linspace(1.1, 0.3, 17)
    scale = shares[:, None] * (W.abs().amax(0) / high)
    zero = None if symmetric else torch.randint(low, high + 1, scale.shape).float()
    importance = torch.rand(96) + 0.1 if weighted else None
    found = best_scale(kernels, W, scale, zero, low, high, importance)
    s, z = scale.double()[:, None], 0 if zero is None else zero.double()[:, None]
    e = (torch.clamp((W / s).round(), low - z, high - z) * s - W).abs()  # [S, K, N]
    error = e.pow(2.4).sum(1) if importance is None else (importance[:, None] * e.square()).sum(1)
    assert (error.gather(0, found[None])[0] <= error.amin(0) * (1 + 2e-5)).all()


def test_the_first_of_scales_that_are_alike_is_the_best_and_one_that_is_no_number_never(kernels):
    W, scale = torch.ones(5, 20), torch.full((15, 20), 2.0)
    scale[3:5], scale[9] = 1.0, 1.0
    scale[1] = torch.nan
    assert best_scale(kernels, W, scale, None, -4, 3, torch.ones(5)).tolist() == [3] * 20
    assert best_scale(kernels, W * torch.nan, scale, None, -4, 3, None).tolist() == [0] * 20


@pytest.mark.parametrize("size", [1e-30, 1e-17, 1e15])
def test_the_best_of_scales_whose_powers_are_no_floats(kernels, size):
    W, shares = torch.randn(64, 40), torch.linspace(1.1, 0.3, 17)
    scale = shares[:, None] * (W.abs().amax(0) / 3)
    for importance in (None, torch.rand(64)):
        expected = best_scale(kernels, W, scale, None, -4, 3, importance)
        found = best_scale(kernels, W * size, scale * size, None, -4, 3, importance)
        assert (found != expected).sum() <= 2  # whose codes fall on the other side


def test_tensors_lie_on_the_cpu_whatever_the_default_device(kernels):
    W, scale, ones = torch.ones(5, 20), torch.ones(2, 20), torch.ones(5)
    coupling = torch.zeros(5, 5)
    with torch.device("meta"):
        assert best_scale(kernels, W, scale, None, -4, 3, ones).tolist() == [0] * 20
        assert round_in_order(kernels, W.clone(), coupling, -4, 3).equal(W)
    with pytest.raises(ValueError, match="a coupling of columns in fp32"):
        round_in_order(kernels, W.clone(), coupling.to("meta"), -4, 3)
    with pytest.raises(ValueError, match="scales in fp32"):
        best_scale(kernels, W, scale.double(), None, -4, 3, ones)


@pytest.mark.parametrize(("B", "N"), [(1, 1), (3, 70), (64, 33), (70, 130)])
@pytest.mark.parametrize("kind", ["numbers", "outputs", "columns"])
def test_rounding_in_order(kernels, B, N, kind):
    """Of integers, whose sums are exact in any order."""
    base = torch.randint(-40, 40, (B, N)) / 4
    coupling = torch.randint(-4, 5, (B, B)) / 8
    coupling[torch.ones(B, B, dtype=torch.bool).triu()] = torch.nan  # not read
    low = torch.randint(-6, -2, (B, N)).float()
    low = {"numbers": -4.0, "outputs": low[0], "columns": low}[kind]
    high = 3.0 if kind == "numbers" else low + 7
    scale = 2.0 ** torch.randint(-1, 2, (B, N)) if kind == "columns" else None
    expected = round_eagerly(base.double(), coupling.double(), low, high, scale)
    found = round_in_order(kernels, base, coupling, low, high, scale)
    assert torch.equal(found.double(), expected)
    assert found is base


# From before AVX2; with bytes in fours on AVX2, which no emulator has; AVX-512 without them.
OTHERS = ("sandybridge", "haswell", "alderlake", "skylake-avx512", "cascadelake", "sapphirerapids")


@x86
@pytest.mark.parametrize("processor", OTHERS)
def test_the_kernels_compile_for_processors_that_are_not_here(tmp_path, processor):
    flags = [*native.FLAGS, "-O0", f"-march={processor}"]
    command = [native.find_compiler(), *flags, "-o", str(tmp_path / "kernels.so")]
    subprocess.run([*command, *map(str, native.SOURCES)], check=True)


@pytest.mark.parametrize("exact", [True, False])
def test_integer_products_without_a_compiler(monkeypatch, exact):
    """torch's own product saturates on some processors; what takes its place there is exact."""
    if not exact:
        monkeypatch.setattr("compress.kernels.cpu.integers._int_mm_is_exact", lambda: False)
    values = torch.randint(-128, 128, (3, 2100), dtype=torch.int8)
    weight = torch.full((5, 2100), -128, dtype=torch.int8)
    values[0] = -128
    assert torch.equal(int_products(values, weight), (values.long() @ weight.long().T).int())
