"""The layout of GPU kernels: exact both ways, each code where the formula says, no bit to spare."""

import pytest

from compress.kernels.gpu.layout import block_columns, pack_kernel, unpack_kernel
from support.weights import assert_same, random_weight

WIDTHS = [2, 3, 4, 8]
GROUPS = [32, 64, 128, 256, None]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("K", [64, 200, 512, 777])
@pytest.mark.parametrize("symmetric", [True, False])
def test_kernel_layout_is_exact_both_ways(bits, group_size, K, symmetric):
    weight = random_weight(33, K, bits, group_size, symmetric)
    assert_same(unpack_kernel(pack_kernel(weight)), weight)


@pytest.mark.parametrize("bits", WIDTHS)
def test_each_code_lies_where_the_layout_says(bits):
    """Oracle: the formula of the file's head, one code at a time, in Python integers."""
    weight = random_weight(3, 530, bits, 32)
    packed = pack_kernel(weight)
    part, size = (2 if bits == 3 else bits), block_columns(bits)
    words = (packed.words.long() & 0xFFFFFFFF).tolist()
    high = (packed.high.long() & 0xFFFFFFFF).tolist() if bits == 3 else None
    for n, row in enumerate(weight.codes.tolist()):
        for k, code in enumerate(row):
            i, inner = divmod(k, size)
            t, h, j, q, e = inner // 32, inner // 16 % 2, inner // 8 % 2, inner // 2 % 4, inner % 2
            found = words[i][n][4 * q + 2 * h + j] >> (part * t + 16 * e) & (2**part - 1)
            if bits == 3:
                bit = 4 * (t // 2) + 2 * j + t % 2 + 16 * e
                found |= (high[i][n][2 * q + h] >> bit & 1) << 2
            assert found == code, (n, k)


@pytest.mark.parametrize("bits", WIDTHS)
def test_whole_blocks_take_exactly_their_bits(bits):
    packed = pack_kernel(random_weight(8, 512, bits, None))
    assert packed.zero is None
    assert packed.nbytes == 512 * bits // 8 * 8 + 8 * 2
