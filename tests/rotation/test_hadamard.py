"""Hadamard matrices and their transform: +-1 entries, H H^T = n I, and the fast form agrees."""

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.rotation.construct import CIRCULANTS, paley, paley_field, quadratic_character
from compress.rotation.hadamard import HadamardTransform, hadamard_factors, hadamard_matrix
from support.circulants import search_circulants
from support.refusals import refused

BASE_ORDERS = [12, 20, 28, 36, 40, 44, 52, 60, 76, 92, 108, 116, 140, 148, 156, 172]
MLP_WIDTHS = [4864, 5632, 9728, 29568, 11008, 14336, 18944, 27648, 8960]
HIDDEN_SIZES = [192, 896, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 8192]
HEAD_DIMS = [8, 32, 64, 80, 96, 128]


def assert_hadamard(H: torch.Tensor, order: int) -> None:
    assert H.shape == (order, order)
    assert bool((H.abs() == 1).all())
    H = H.double()
    assert torch.equal(H @ H.T, order * torch.eye(order, dtype=torch.float64))


def test_matrix_of_every_multiple_of_four_up_to_184():
    for order in (1, 2, *range(4, 188, 4)):
        assert_hadamard(hadamard_matrix(order), order)


@pytest.mark.parametrize("order", [*BASE_ORDERS, 260, 292, 372, 476])
def test_base_orders(order):
    assert_hadamard(hadamard_matrix(order), order)


@pytest.mark.parametrize("order", [28, 52, 100, 244, 344])  # q = 27, 25, 49, 243 and 121, 343
def test_paley_over_prime_power_fields(order):
    assert_hadamard(paley(order), order)


@pytest.mark.parametrize("q", [7, 13, 25, 27])
def test_quadratic_character_is_balanced_and_knows_minus_one(q):
    chi = quadratic_character(q)
    assert chi[0] == 0 and int(chi.sum()) == 0 and int(chi.abs().sum()) == q - 1
    assert chi[1] == 1  # 1 is a square


def test_paley_field_refuses_what_is_no_prime_power():
    assert paley_field(92) is None and paley_field(172) is None and paley_field(30) is None


@pytest.mark.parametrize("k", sorted(CIRCULANTS))
def test_search_finds_the_tabled_circulants_again(k):
    multiplier, rows = CIRCULANTS[k]
    assert search_circulants(k, multiplier) == rows
    assert_hadamard(hadamard_matrix(4 * k), 4 * k)


@pytest.mark.parametrize("size", [*MLP_WIDTHS, *HIDDEN_SIZES, *HEAD_DIMS])
def test_sizes_in_use_need_no_blocks_and_are_orthonormal(size):
    transform = HadamardTransform(size)
    assert transform.blocks == 1
    assert torch.tensor(transform.factors).prod() == size
    assert sum(transform.factors) <= 240  # far from the `size` of a dense product

    x = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = transform.apply(x)
    assert torch.allclose(y @ y.T, x @ x.T, rtol=0, atol=1e-10 * size)
    assert torch.allclose(transform.apply_transposed(y), x, rtol=0, atol=1e-12)

    columns = [0, 1, size // 3, size - 1]
    units = torch.zeros(len(columns), size, dtype=torch.float64)
    units[range(len(columns)), columns] = 1
    for image in (transform.apply(units), transform.apply_transposed(units)):
        assert torch.allclose(image.abs(), torch.full_like(image, size**-0.5), rtol=1e-12)
        eye = torch.eye(len(columns), dtype=torch.float64)
        assert torch.allclose(image @ image.T, eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 6, 12, 80, 96, 98, 188, 192, 344, 528])
def test_transform_is_the_product_with_its_matrix(size):
    transform = HadamardTransform(size)
    M = transform.matrix()
    assert torch.allclose(M @ M.T, torch.eye(size, dtype=M.dtype), rtol=0, atol=1e-12)
    x = torch.randn(2, 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(transform.apply(x), x @ M.T, rtol=0, atol=1e-12)
    assert torch.allclose(transform.apply_transposed(x), x @ M, rtol=0, atol=1e-12)


def test_sizes_without_a_known_matrix_use_the_largest_known_block():
    for size, block in ((98, 2), (6, 2), (188, 4), (2 * 188, 8), (107 * 128, 128)):
        transform = HadamardTransform(size)
        assert (transform.block, transform.blocks) == (block, size // block)
        larger = (d for d in range(block + 1, size + 1) if size % d == 0)
        assert all(hadamard_factors(d) is None for d in larger)


def test_every_even_size_has_an_orthogonal_transform():
    for size in range(2, 600, 2):
        transform = HadamardTransform(size)
        x = torch.randn(1, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
        y = transform.apply(x)
        assert not torch.allclose(y, x, atol=1e-3)
        assert torch.allclose(transform.apply_transposed(y), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transform_works_in_the_dtype_it_is_given(dtype):
    transform = HadamardTransform(896)
    x = torch.randn(4, 896, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = transform.apply(x)
    assert y.dtype == dtype
    exact = transform.apply(x.double())
    # Each of the two factors rounds twice (sum, scale); 4 eps bounds the relative error.
    error = (y.double() - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("size", [-2, 0, 1, 7, 4095])
def test_odd_and_empty_sizes_are_one_clear_line(size):
    with refused(UsageError, size, "rotate.kind"):
        HadamardTransform(size)


@pytest.mark.parametrize("order", [0, 3, 6, 98, 188])
def test_orders_without_a_known_matrix_are_refused(order):
    with refused(UsageError, order):
        hadamard_matrix(order)


def test_wrong_width_is_refused():
    with refused(CompressError, 12, [2, 24]):
        HadamardTransform(12).apply(torch.zeros(2, 24))
