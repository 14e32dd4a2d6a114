"""Hadamard matrices of every even size, and the fast transform that multiplies by them.

A Hadamard matrix H of order n has entries +-1 and H H^T = n I, so H / sqrt(n) is orthogonal and
spreads one large entry evenly over n. Sylvester gives n = 2^m, Paley and Goethals-Seidel give other
multiples of 4 (`construct.py`), and a Kronecker product of two is a third. A size is therefore
split as n = K_1 K_2 ... 2^m over all divisors with a construction, and the split with the smallest
sum of factors is kept: that sum is the cost of the transform per entry. 4864 = 76 * 64 and
29568 = 12 * 28 * 44 * 2 are examples whose odd part no power of two divides away.

Where no split exists (n = 2 * odd, or an odd part without a known matrix) the transform is
block-diagonal, with the largest block that has one: still orthogonal, but mixing inside blocks
only. `HadamardTransform.blocks` says so; 1 is a full transform.

    M = I_blocks (x) (F_1 (x) F_2 (x) ...) / sqrt(block)       M M^T = I

Sources: Sylvester (1867); use in rotations: QuaRot (arXiv 2404.00456); RSQ (arXiv
2503.01820).

    transform = HadamardTransform(9728)
    y = transform.apply(x)                 # x @ M.T, x: [..., 9728]
    x = transform.apply_transposed(y)      # y @ M
"""

import math
from functools import cache

import torch
from torch import Tensor

from compress.errors import CompressError, UsageError
from compress.rotation.construct import CIRCULANTS, goethals_seidel, paley, paley_field

# 2^m is applied as dense factors of at most this size: a few matrix products that a BLAS runs at
# full speed, where m butterfly passes would each cross memory.
LARGEST_SYLVESTER_FACTOR = 64


def _power_of_two_factors(n: int) -> tuple[int, ...]:
    """2^m as the fewest nearly equal powers of two up to LARGEST_SYLVESTER_FACTOR; 1 is empty."""
    m = n.bit_length() - 1
    count = math.ceil(m / (LARGEST_SYLVESTER_FACTOR.bit_length() - 1))
    return tuple(2 ** (m // count + (i < m % count)) for i in range(count))


def _has_construction(order: int) -> bool:
    return paley_field(order) is not None or (order % 4 == 0 and order // 4 in CIRCULANTS)


@cache
def hadamard_factors(n: int) -> tuple[int, ...] | None:
    """Orders whose product is n and whose Hadamard matrices are known, of smallest sum; or None."""
    if n & (n - 1) == 0:
        return _power_of_two_factors(n)
    candidates = []
    for order in range(12, n + 1, 4):
        if n % order == 0 and order & (order - 1) and _has_construction(order):
            rest = hadamard_factors(n // order)
            if rest is not None:
                candidates.append((order, *rest))
    return min(candidates, key=sum, default=None)


def hadamard_block(size: int) -> int:
    """The largest divisor of an even `size` that has a known Hadamard matrix; `size` if it has.

    Raises UsageError for an odd size: beyond order 1 every Hadamard matrix has even order.
    """
    if size < 2 or size % 2:
        raise UsageError(
            f"a Hadamard rotation needs an even size, found {size}: "
            "use rotate.kind random, or none, for this model"
        )
    divisors = (size // d for d in range(1, size // 2 + 1) if size % d == 0)
    return next(d for d in divisors if hadamard_factors(d) is not None)


@cache
def _dense_factor(order: int) -> Tensor:
    """One factor that is no product: int8 [order, order], with H H^T = order * I checked."""
    if order & (order - 1) == 0:
        H = torch.ones(1, 1, dtype=torch.int8)
        while len(H) < order:
            H = torch.cat([torch.cat([H, H], dim=1), torch.cat([H, -H], dim=1)])
    else:
        H = paley(order) if paley_field(order) else goethals_seidel(order)
    # fp32 holds these integers exactly up to 2^24, far above any order built here.
    gram = H.float() @ H.float().T
    assert bool((H.abs() == 1).all()) and torch.equal(gram, order * torch.eye(order)), order
    return H


def hadamard_matrix(order: int) -> Tensor:
    """A Hadamard matrix: int8 [order, order], entries +-1, H H^T = order * I.

    Raises UsageError where none is known: odd orders above 1, 2 * odd, and a few multiples of 4.
    """
    factors = hadamard_factors(order) if order > 0 else None
    if factors is None:
        raise UsageError(
            f"no Hadamard matrix of order {order} is known here: "
            "HadamardTransform covers every even size with a block-diagonal one"
        )
    H = torch.ones(1, 1, dtype=torch.int8)
    for factor in factors:
        H = torch.kron(H, _dense_factor(factor))
    return H


class HadamardTransform:
    """The orthogonal matrix M = I_blocks (x) H_block / sqrt(block), of an even size, as factors.

    Costs size * sum(factors) multiplications per vector and never holds M itself. Works in the
    dtype and on the device of its argument. Raises UsageError for an odd size, and CompressError
    for an argument whose last axis is not `size`.
    """

    def __init__(self, size: int):
        self.size = size
        self.block = hadamard_block(size)
        self.blocks = size // self.block
        factors = hadamard_factors(self.block)
        assert factors is not None, "hadamard_block finds a size that has them"
        self.factors = factors

    def __repr__(self) -> str:
        return (
            f"HadamardTransform({self.size}: {self.blocks} x {' * '.join(map(str, self.factors))})"
        )

    def apply(self, x: Tensor) -> Tensor:
        """x @ M.T along the last axis, that is M applied to each vector: [..., size] -> same."""
        return self._multiply(x, transposed=False)

    def apply_transposed(self, x: Tensor) -> Tensor:
        """x @ M along the last axis, the inverse of `apply`: [..., size] -> same."""
        return self._multiply(x, transposed=True)

    def matrix(self) -> Tensor:
        """M itself: fp64 [size, size]."""
        H = hadamard_matrix(self.block).double() / math.sqrt(self.block)
        return torch.block_diag(*[H] * self.blocks)

    def _multiply(self, x: Tensor, transposed: bool) -> Tensor:
        if x.shape[-1] != self.size:
            raise CompressError(
                f"a Hadamard transform of size {self.size} expected [..., {self.size}], "
                f"found {list(x.shape)}"
            )
        y, right = x, self.size // self.blocks
        for factor in self.factors:
            right //= factor
            F = _dense_factor(factor).to(device=x.device, dtype=x.dtype)
            # Scaling after each product, not in F: 1/sqrt(factor) is not exact in 16 bits, and
            # 16-bit sums must not grow by sqrt(size).
            y = torch.matmul(F.T if transposed else F, y.reshape(-1, factor, right))
            y = y * factor**-0.5
        return y.reshape(x.shape)
