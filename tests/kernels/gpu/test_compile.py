"""The kernels compile for the GPUs they are meant for, and fit their memory. Needs no GPU."""

import re
from collections import Counter

import pytest

triton = pytest.importorskip("triton")

from compress.kernels.gpu import triton_activations as activations  # noqa: E402
from compress.kernels.gpu import triton_kernels as kernels  # noqa: E402
from compress.kernels.gpu import triton_rounding as rounding  # noqa: E402
from compress.kernels.gpu.compiled import (  # noqa: E402
    SHARED_MEMORY,
    compile_kernel,
    compile_product,
    compiled_products,
    longest_loop,
    product_constants,
    resources,
)
from compress.kernels.gpu.integer_launch import TILES  # noqa: E402
from compress.kernels.gpu.layout import block_columns  # noqa: E402
from compress.kernels.gpu.matmul import (  # noqa: E402
    EXACT_ROWS,
    FP32_TABLE,
    MMA_TABLE,
    ODD_TABLE,
    TABLE,
    interpreted,
    tile_constants,
)
from compress.kernels.gpu.occupancy import stages  # noqa: E402
from compress.kernels.gpu.rounding import OPTIONS, RUN  # noqa: E402
from compress.kernels.gpu.tuning import CANDIDATES  # noqa: E402

pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing")
HOPPER = (9, 0)
WANTED = {
    2: {8: 4.2, 16: 3.3, 64: 1.7},
    3: {8: 3.2, 16: 2.8, 64: 1.6},
    4: {8: 2.7, 16: 2.5, 64: 1.6},
    8: {8: 1.65, 16: 1.6, 64: 1.4},
}


@pytest.mark.parametrize(
    ("bits", "group", "dtype", "tiles", "capability"),
    [
        (3, 128, "bf16", TABLE[-1], HOPPER),
        (2, None, "fp16", MMA_TABLE[-1], (8, 0)),
        (3, None, "fp32", FP32_TABLE[-1], (8, 9)),
        (3, 128, "bf16", MMA_TABLE[-2], (8, 9)),
        (8, 32, "fp16", TABLE[0], (8, 0)),
    ],
)
def test_tiles_fit_shared_memory(bits, group, dtype, tiles, capability):
    compiled = compile_product(bits, group, dtype, tiles, capability, symmetric=False, even=False)
    assert compiled.metadata.shared <= SHARED_MEMORY[capability].program


def longest_ptx_loop(ptx):
    """The longest stretch of PTX between a label and a branch back to it."""
    labels = {m[1]: m.start() for m in re.finditer(r"^(\$L\w+):", ptx, re.MULTILINE)}
    back = [m for m in re.finditer(r"\bbra\S*\s+(\$L\w+);", ptx) if labels[m[1]] < m.start()]
    return max((ptx[labels[m[1]] : m.start()] for m in back), key=len)


@pytest.mark.parametrize("capability", SHARED_MEMORY, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(2, 48), (3, 48), (4, 24)])
def test_odd_groups_fit(bits, group, capability):
    """Groups of 48: a product, and on Blackwell tensor memory, for every 16 inputs; of 24, 8."""
    for tiles in ODD_TABLE:
        compiled = compile_product(bits, group, "bf16", tiles, capability, symmetric=False)
        assert compiled.metadata.shared <= SHARED_MEMORY[capability].program
        assert (getattr(compiled.metadata, "tmem_size", 0) or 0) <= 512


@pytest.mark.parametrize("tiles", TABLE, ids=lambda tiles: f"{tiles.rows} rows")
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (4, False), (8, True)])
def test_codes_stay_with_their_thread(bits, symmetric, tiles):
    """On Hopper: from the word to the product in registers, two codes to an instruction.

    The loop takes one block of inputs. Of each pair of codes there is one subtraction of the magic
    number, a scale on weights is one product; no code is stored, shuffled or converted.
    """
    body = longest_ptx_loop(compile_product(bits, 128, "fp16", tiles, HOPPER, symmetric).asm["ptx"])
    instructions = Counter(re.findall(r"^\s+(?:@\S+ )?([a-z][\w.:]+)", body, re.MULTILINE))
    pairs = block_columns(bits) * tiles.block_n // (32 * tiles.warps) // 2
    # registers as left operand of wgmma, or of mma (triton 3.6 takes it for 8 rows)
    assert re.search(r"wgmma\.mma_async\.\S+ \{[^}]*\}, \{|\bmma\.sync", body)
    assert instructions["add.rn.f16x2"] + instructions["sub.rn.f16x2"] == pairs
    assert instructions["mul.rn.f16x2"] == (pairs if tiles.rows > EXACT_ROWS else 0)
    assert not any(name.startswith(("st.shared", "shfl", "cvt.rn")) for name in instructions)
    assert not any(name.startswith(("ld.local", "st.local")) for name in instructions)


def test_the_other_kernels_compile():
    fixed = product_constants(3, 128) | {"BLOCK_N": 64, "WARPS": 4}
    compile_kernel(kernels.dequantize_kernel, HOPPER, "bf16", **fixed)
    compile_kernel(
        kernels.reduce_kernel, HOPPER, "bf16", HAS_BIAS=True, BLOCK=512, MOST=8, EARLY=True
    )
    compile_kernel(activations.butterfly_kernel, HOPPER, "bf16", SIZE=4096, LOG=12)
    compile_kernel(activations.factor_kernel, HOPPER, "bf16", ORDER=28, PADDED=32, BLOCK=64)


def test_the_largest_token_fits_shared_memory():
    """28 * 512 = 14336 inputs, padded to 16384: exchanges between threads go through it."""
    compiled = compile_kernel(
        activations.quantize_kernel, (8, 0), "fp32", 16, STEPS=7.0, HALF=8, SIZE=16384, LOG=9
    )
    assert compiled.metadata.shared <= SHARED_MEMORY[8, 9].program  # the smallest there is


@pytest.mark.parametrize("capability", [(8, 0), HOPPER], ids=str)
@pytest.mark.parametrize(("tensors", "scaled"), [(False, False), (True, False), (True, True)])
def test_rounding_in_order_is_one_output_a_thread(tensors, scaled, capability):
    """Registers hold all of a run; no thread waits for another but between runs, and each product
    of a run, and each of four earlier rows, is made once. Division takes some of its own."""
    compiled = compile_kernel(
        rounding.round_kernel,
        capability,
        "fp32",
        OPTIONS["num_warps"],
        OPTIONS["num_stages"],
        RUN=RUN,
        BLOCK_N=OPTIONS["BLOCK_N"],
        TENSORS=tensors,
        SCALED=scaled,
        **({} if scaled else {"scale": None}),
    )
    registers, spilled = resources(compiled)
    assert registers < 255
    assert spilled == 0
    assert compiled.metadata.shared == 0
    loop = longest_loop(compiled)
    names = Counter(re.sub(r"@!?U?P\d+ ", "", line).split()[0].split(".")[0] for line in loop)
    assert names["SHFL"] == 0
    assert names["BAR"] == 1
    if not scaled:
        assert names["FFMA"] == RUN * (RUN - 1) // 2 + 4 * RUN
    assert len(loop) < (1800 if scaled else 1400)


@pytest.mark.parametrize(
    ("bits", "group", "entry", "capability"),
    [(4, 128, -1, (8, 0)), (4, None, -1, HOPPER), (8, 128, -1, (8, 9)), (3, 64, 0, HOPPER)],
)
def test_integers_meet_int8_tensor_cores(bits, group, entry, capability):
    memory, tiles = SHARED_MEMORY[capability], TILES[entry]
    compiled = compile_kernel(
        activations.integer_matmul_kernel,
        capability,
        "fp16",
        tiles.warps,
        stages(tiles, bits, 1, memory),
        **product_constants(bits, group),
        bias=None,
        HAS_BIAS=False,
        EVEN=True,
        **tile_constants(tiles),
    )
    assert compiled.metadata.shared <= memory.program
    ptx = compiled.asm["ptx"]
    assert "s32.s8.s8" in ptx
    assert "f32.f16.f16" not in ptx


def test_table_fits_a_hopper_multiprocessor():
    """Every entry fits, and leaves an H100 time for the speed that is wanted of it.

    WANTED: times as fast as fp16 at rows 8, 16, 64, of which 8192 x 8192 take 40.1 us (their bytes
    at 3.35 TB/s), while one instruction for each of the weights takes 2.17 us.
    """
    for product in compiled_products(HOPPER):
        assert not product.serialized
        assert product.spilled <= 64  # triton 3.6 spills a little of the last entry
        assert product.programs >= 2 or product.tiles.rows > 64  # large tiles may run alone
        assert product.shared <= SHARED_MEMORY[HOPPER].program
        wanted = WANTED[product.bits].get(product.tiles.rows)
        assert wanted is None or product.instructions * 2.17 < 40.1 / wanted


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (8, 128), (4, None)])
@pytest.mark.parametrize("tiles", [tiles for tiles in CANDIDATES if tiles.rows in (64, 512)])
def test_no_weight_is_written_over_while_a_product_may_read_it(bits, group, tiles):
    """wgmma reads its left operand from registers until a wait says that it has ended."""
    loop = longest_loop(compile_product(bits, group, "fp16", tiles, HOPPER))
    assert any("HGMMA" in line for line in loop)
    running: list[set[int]] = []  # left operands of each group that no wait has covered
    group: set[int] = set()
    for line in loop * 2:
        if product := re.search(r"HGMMA\.\S+ R\d+, R(\d+), gdesc", line):
            group |= set(range(int(product[1]), int(product[1]) + 4))
            if "gsb0" in line:
                running.append(group)
                group = set()
        elif wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", line):
            running = running[max(len(running) - int(wait[1]), 0) :]
        elif written := re.match(
            r"(?:@!?P\d+ )?(?:LOP3|HADD2|HMUL2|HFMA2|PRMT|SHF|LDS)\S* R(\d+),", line
        ):
            first = int(written[1])
            registers = set(range(first, first + (4 if ".128" in line.split(",")[0] else 1)))
            assert not registers & group.union(*running), line
