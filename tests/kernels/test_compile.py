"""The kernels compile for the GPUs they are meant for, and fit their memory. Needs no GPU."""

import re
from collections import Counter
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from compress.kernels import triton_activations as activations  # noqa: E402
from compress.kernels import triton_kernels as kernels  # noqa: E402
from compress.kernels.integer_launch import TILES  # noqa: E402
from compress.kernels.layout import block_columns  # noqa: E402
from compress.kernels.matmul import (  # noqa: E402
    EXACT_ROWS,
    FP32_TABLE,
    MMA_TABLE,
    TABLE,
    interpreted,
    stages,
    tile_constants,
    weight_constants,
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
    plain = {*constants, "M", "split"}
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(places[name],): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for n, i in places.items() if n not in plain},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False},
    )


def constants(bits, group=128, symmetric=True, scaled=False, **more):
    zero = None if symmetric else True
    weight = SimpleNamespace(bits=bits, group_size=group, zero=zero)
    absent = ({} if bits == 3 else {"high": None}) | ({"zero": None} if symmetric else {})
    return weight_constants(weight, scaled) | absent | more


def compile_matmul(bits, group, dtype, tiles, capability, symmetric=True, even=True):
    memory, size = SHARED_MEMORY[capability], 4 if dtype == "fp32" else 2
    scaled = tiles.block_m > EXACT_ROWS and group is not None
    fixed = constants(bits, group, symmetric, scaled, bias=None, HAS_BIAS=False, SCALED=scaled)
    return compile_kernel(
        kernels.matmul_kernel,
        capability,
        dtype,
        tiles.warps,
        stages(tiles, bits, size, memory),
        **fixed,
        **tile_constants(tiles),
        EVEN=even,
    )


@pytest.mark.parametrize(
    ("bits", "group", "dtype", "tiles", "capability"),
    [
        (3, 128, "bf16", TABLE[-1], 90),
        (2, None, "fp16", MMA_TABLE[-1], 80),
        (3, None, "fp32", FP32_TABLE[-1], 89),
        (3, 128, "bf16", MMA_TABLE[-2], 89),
        (8, 32, "fp16", TABLE[0], 80),
    ],
)
def test_tiles_fit_shared_memory(bits, group, dtype, tiles, capability):
    compiled = compile_matmul(bits, group, dtype, tiles, capability, symmetric=False, even=False)
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]


def innermost_loop(ptx):
    """The longest stretch of PTX between a label and a branch back to it."""
    labels = {m[1]: m.start() for m in re.finditer(r"^(\$L\w+):", ptx, re.MULTILINE)}
    back = [m for m in re.finditer(r"\bbra\S*\s+(\$L\w+);", ptx) if labels[m[1]] < m.start()]
    return max((ptx[labels[m[1]] : m.start()] for m in back), key=len)


@pytest.mark.parametrize("tiles", TABLE, ids=lambda tiles: f"{tiles.rows} rows")
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (4, False), (8, True)])
def test_codes_stay_with_their_thread(bits, symmetric, tiles):
    """On Hopper: from the word to the product in registers, two codes to an instruction.

    The loop takes one block of inputs. Of each pair of codes there is one subtraction of the magic
    number, a scale on weights is one product; no code is stored, shuffled or converted.
    """
    body = innermost_loop(compile_matmul(bits, 128, "fp16", tiles, 90, symmetric).asm["ptx"])
    instructions = Counter(re.findall(r"^\s+(?:@\S+ )?([a-z][\w.:]+)", body, re.MULTILINE))
    pairs = block_columns(bits) * tiles.block_n // (32 * tiles.warps) // 2
    # registers as left operand of wgmma, or of mma (triton 3.6 takes it for 8 rows)
    assert re.search(r"wgmma\.mma_async\.\S+ \{[^}]*\}, \{|\bmma\.sync", body)
    assert instructions["add.rn.f16x2"] + instructions["sub.rn.f16x2"] == pairs
    assert instructions["mul.rn.f16x2"] == (pairs if tiles.block_m > EXACT_ROWS else 0)
    assert not any(name.startswith(("st.shared", "shfl", "cvt.rn")) for name in instructions)
    assert not any(name.startswith(("ld.local", "st.local")) for name in instructions)


def test_the_other_kernels_compile():
    fixed = constants(3, BLOCK_N=64, WARPS=4)
    compile_kernel(kernels.dequantize_kernel, 90, "bf16", **fixed)
    compile_kernel(kernels.reduce_kernel, 90, "bf16", HAS_BIAS=True, BLOCK=1024)
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
    [(4, 128, -1, 80), (4, None, -1, 90), (8, 128, -1, 89), (3, 64, 0, 90)],
)
def test_integers_meet_int8_tensor_cores(bits, group, entry, capability):
    memory, tiles = SHARED_MEMORY[capability], TILES[entry]
    compiled = compile_kernel(
        activations.integer_matmul_kernel,
        capability,
        "fp16",
        tiles.warps,
        stages(tiles, bits, 1, memory),
        **constants(bits, group, bias=None, HAS_BIAS=False, EVEN=True),
        **tile_constants(tiles),
    )
    assert compiled.metadata.shared <= memory
    ptx = compiled.asm["ptx"]
    assert "s32.s8.s8" in ptx
    assert "f32.f16.f16" not in ptx
