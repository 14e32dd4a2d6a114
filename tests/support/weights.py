"""Random quantised weights for the tests of this folder."""

import torch

from compress.kernels.codes import Codes


def random_weight(
    N: int = 48,
    K: int = 200,
    bits: int = 4,
    group_size: int | None = 64,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Codes:
    """Codes over the whole range; scales of both signs and about the size of real ones."""
    generator = torch.Generator().manual_seed(seed)
    G = 1 if group_size is None else -(-K // group_size)
    codes = torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8)
    sign = torch.randint(0, 2, (N, G), generator=generator) * 2 - 1
    scale = ((torch.rand(N, G, generator=generator) + 0.5) * sign / 2**bits).to(dtype)
    zero = torch.randint(0, 2**bits, (N, G), generator=generator, dtype=torch.uint8)
    return Codes(codes, scale, None if symmetric else zero, bits, group_size)


def assert_same(left: Codes, right: Codes) -> None:
    """Every field equal, tensors bit by bit."""
    for name in ("codes", "scale", "zero", "order"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name
    assert (left.bits, left.group_size) == (right.bits, right.group_size)


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over norm of what is expected."""
    return float((y.double() - expected).norm() / expected.norm())
