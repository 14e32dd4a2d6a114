"""The kernels compile for the GPUs they are meant for, and fit their memory. Needs no GPU."""

import math

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from compress.kernels import triton_activations as activations  # noqa: E402
from compress.kernels import triton_kernels as kernels  # noqa: E402
from compress.kernels.layout import block_columns  # noqa: E402
from compress.kernels.matmul import (  # noqa: E402
    DECODE,
    FP32_ENTRIES,
    LARGEST_CHUNK,
    TABLE,
    interpreted,
    stages,
)

pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing")

# Compute capability -> bytes of shared memory that one program may take (CUDA C++ Programming
# Guide, technical specifications per compute capability).
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
POINTERS = {
    "words": "*i32",
    "high": "*i32",
    "zero": "*u8",
    "workspace": "*fp32",
    "values": "*i8",
    "token_scale": "*fp32",
}


def compile_kernel(kernel, capability, dtype, warps=4, stages=3, **constants):
    """Compiles with `constants` fixed; other names are pointers if listed or floats, else int32."""
    floats = {"x", "scale", "bias", "out", "factor"}
    signature = {}
    for name in kernel.arg_names:
        kind = POINTERS.get(name, "*" + dtype if name in floats else "i32")
        kind = "fp32" if name == "norm" else kind
        signature[name] = "constexpr" if name in constants else kind
    places = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(places[name],): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for n, i in places.items() if n not in constants},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False},
    )


def constants(bits, group=128, **more):
    absent = {"zero": None} if group else {}
    if bits != 3:
        absent["high"] = None
    return {
        "BITS": bits,
        "GROUP": group,
        "CHUNK": math.gcd(block_columns(bits), group, LARGEST_CHUNK),
        "HAS_ZERO": not group,
        **absent,
        **more,
    }


@pytest.mark.parametrize(
    ("bits", "group", "dtype", "size", "entry", "capability"),
    [
        (3, 128, "bf16", 2, len(TABLE) - 1, 90),
        (2, 0, "fp16", 2, len(TABLE) - 1, 80),
        (3, 0, "fp32", 4, FP32_ENTRIES - 1, 89),
        (4, 128, "bf16", 2, len(TABLE) - 1, 89),
    ],
)
def test_tiles_fit_shared_memory(bits, group, dtype, size, entry, capability):
    memory, tiles = SHARED_MEMORY[capability], TABLE[entry]
    compiled = compile_kernel(
        kernels.matmul_kernel,
        capability,
        dtype,
        tiles.warps,
        stages(tiles, bits, size, memory),
        **constants(bits, group, bias=None, HAS_BIAS=False, SPLIT=1),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
    )
    assert compiled.metadata.shared <= memory


@pytest.mark.parametrize("bits", [3, 4])
def test_decode_converts_no_code(bits):
    """Its point: an AND-OR, a subtraction and an fma per code; 3 bits add half an OR to join."""
    fixed = constants(bits, bias=None, HAS_BIAS=False, SPLIT=2, BLOCK_N=DECODE.block_n)
    ptx = compile_kernel(kernels.decode_kernel, 90, "fp16", DECODE.warps, **fixed).asm["ptx"]
    codes = block_columns(bits) * DECODE.block_n // (32 * DECODE.warps)  # of a thread and block
    assert ptx.count("cvt.rn.f32.s32") == 0
    assert ptx.count("fma.rn.f32") >= codes
    assert ptx.count("or.b32") < 1.5 * codes


def test_the_other_kernels_compile():
    fixed = constants(3, BLOCK_N=128)
    compile_kernel(kernels.dequantize_kernel, 90, "bf16", **fixed)
    compile_kernel(kernels.reduce_kernel, 90, "bf16", SPLIT=4, HAS_BIAS=True, BLOCK=1024)
    compile_kernel(activations.butterfly_kernel, 90, "bf16", SIZE=4096, LOG=12)
    compile_kernel(activations.factor_kernel, 90, "bf16", ORDER=28, PADDED=32, BLOCK=64)


def test_the_largest_token_fits_shared_memory():
    """28 * 512 = 14336 inputs, padded to 16384: exchanges between threads go through it."""
    compiled = compile_kernel(
        activations.quantize_kernel, 80, "fp32", 16, LARGEST=7, SIZE=16384, LOG=9
    )
    assert compiled.metadata.shared <= SHARED_MEMORY[89]  # the smallest there is


@pytest.mark.parametrize(
    ("bits", "group", "entry", "capability"),
    [(4, 128, -1, 80), (4, 0, -1, 90), (8, 128, -1, 89), (3, 64, 0, 90)],
)
def test_integers_meet_int8_tensor_cores(bits, group, entry, capability):
    memory, tiles = SHARED_MEMORY[capability], TABLE[entry]
    absent = {"zero": None, "HAS_ZERO": False}
    compiled = compile_kernel(
        activations.integer_matmul_kernel,
        capability,
        "fp16",
        tiles.warps,
        stages(tiles, bits, 1, memory),
        **constants(bits, group, bias=None, HAS_BIAS=False, SPLIT=1) | absent,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
    )
    assert compiled.metadata.shared <= memory
    ptx = compiled.asm["ptx"]
    assert "s32.s8.s8" in ptx
    assert "f32.f16.f16" not in ptx
