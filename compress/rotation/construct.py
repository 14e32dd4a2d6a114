"""Hadamard matrices that are not products of smaller ones: Paley's two and Goethals-Seidel's.

A Hadamard matrix of order n has entries +-1 and H H^T = n I. Every n above 2 is a multiple of 4.

    Paley I    n = q + 1, q = 3 mod 4 a prime power:
               H = I + [[0, 1], [-1, Q]]
    Paley II   n = 2 (q + 1), q = 1 mod 4 a prime power, C = [[0, 1], [1, Q]]:
               H = C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]
    Goethals-Seidel  n = 4 k: four circulants A, B, C, D of order k with
               A A^T + B B^T + C C^T + D D^T = 4 k I, set in a 4 x 4 array of blocks

Q[i, j] = chi(x_i - x_j) over the elements of the field GF(q), chi the quadratic character: +1 on
squares, -1 on the others, 0 at zero.

Orders 92, 116, 156, 172 and a few more are out of Paley's reach and are built from four circulants.
Their first rows were found by search: a row that is constant on the orbits of a multiplier t
(row[t i mod k] = row[i]) has few free signs, so all of them can be tried.

Sources: Paley, "On orthogonal matrices" (1933); Goethals and Seidel, "A skew Hadamard matrix of
order 36" (1970); multipliers as in the literature on supplementary difference sets.

    paley(28)                 # [28, 28], from GF(27)
    goethals_seidel(92)       # [92, 92], from four circulants of order 23
"""

import itertools

import torch
from torch import Tensor

# k: (multiplier t, four rows). Bit i of a row is set where orbit i of {0 .. k-1} under t holds -1,
# orbits in the order of their least element. `tests/support/circulants.py` finds each line again.
CIRCULANTS: dict[int, tuple[int, tuple[int, int, int, int]]] = {
    23: (22, (334, 3110, 1598, 1192)),
    29: (28, (1510, 3446, 24908, 5666)),
    39: (29, (314, 234, 488, 396)),
    43: (4, (14, 14, 112, 58)),
    65: (9, (2426, 14742, 25390, 32616)),
    73: (2, (30, 86, 226, 334)),
    93: (2, (702, 2968, 7740, 7858)),
    119: (2, (106, 454, 206, 248)),
}


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    exponent, rest = 0, q
    while rest % p == 0:
        exponent, rest = exponent + 1, rest // p
    return (p, exponent) if rest == 1 else None


def _field(q: int) -> tuple[int, int]:
    """Characteristic and degree of GF(q)."""
    power = prime_power(q)
    assert power is not None, f"there is no field of {q} elements"
    return power


def _powers_of_x(modulus: tuple[int, ...], p: int, q: int) -> list[int] | None:
    """x^0 .. x^(q-2) in GF(p)[x] / (x^e - modulus), or None if x does not generate all q - 1 units.

    An element is an integer whose base-p digits are its coefficients. When the powers of x reach
    every non-zero element, each of them is invertible, so the quotient is the field GF(q).
    """
    if modulus[0] == 0:  # x is then a zero divisor, and its powers never return to 1
        return None
    element = [1] + [0] * (len(modulus) - 1)
    powers = []
    for step in range(q - 1):
        code = sum(c * p**i for i, c in enumerate(element))
        if code == 0 or (code == 1 and step > 0):
            return None
        powers.append(code)
        top = element[-1]
        shifted = [0, *element[:-1]]
        element = [(s + top * m) % p for s, m in zip(shifted, modulus, strict=True)]
    return powers


def quadratic_character(q: int) -> Tensor:
    """chi on GF(q), q an odd prime power: int8 [q], indexed by an element's base-p digits.

    The squares are the even powers of a generator of the multiplicative group.
    """
    p, exponent = _field(q)
    for modulus in itertools.product(range(p), repeat=exponent):
        powers = _powers_of_x(modulus, p, q)
        if powers is not None:
            chi = torch.zeros(q, dtype=torch.int8)
            chi[powers[0::2]] = 1
            chi[powers[1::2]] = -1
            return chi
    raise AssertionError(f"every finite field has a generator, none found for GF({q})")


def jacobsthal(q: int) -> Tensor:
    """Q[i, j] = chi(x_i - x_j) over GF(q): int8 [q, q], zero on the diagonal."""
    p, exponent = _field(q)
    elements = torch.arange(q)
    difference = torch.zeros(q, q, dtype=torch.int64)
    for power in (p**i for i in range(exponent)):
        digit = elements // power % p
        difference += (digit[:, None] - digit[None, :]) % p * power
    return quadratic_character(q)[difference]


def paley_field(order: int) -> int | None:
    """The q of Paley's first or second construction of this order, or None if neither applies."""
    if order % 4:
        return None
    if prime_power(order - 1):  # order - 1 = 3 mod 4
        return order - 1
    q = order // 2 - 1
    return q if q % 4 == 1 and prime_power(q) else None


def paley(order: int) -> Tensor:
    """Paley's Hadamard matrix, int8 [order, order]; `paley_field(order)` must not be None."""
    q = paley_field(order)
    assert q is not None, f"Paley's constructions give no matrix of order {order}"
    symmetric = q % 4 == 1  # Q is symmetric for q = 1 mod 4, skew for q = 3 mod 4
    border = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    border[0, 1:] = 1
    border[1:, 0] = 1 if symmetric else -1
    border[1:, 1:] = jacobsthal(q)
    eye = torch.eye(q + 1, dtype=torch.int8)
    if not symmetric:
        return eye + border
    off_diagonal = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    on_diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(border, off_diagonal) + torch.kron(eye, on_diagonal)


def multiplier_orbits(k: int, multiplier: int) -> list[list[int]]:
    """Orbits of {0 .. k-1} under i -> multiplier * i mod k, by least element; the first is {0}."""
    orbits, seen = [], set()
    for start in range(k):
        if start in seen:
            continue
        orbit, i = [start], start * multiplier % k
        while i != start:
            orbit.append(i)
            i = i * multiplier % k
        seen.update(orbit)
        orbits.append(orbit)
    return orbits


def _circulant(row: Tensor) -> Tensor:
    """[k, k] with entry (i, j) = row[j - i mod k]."""
    index = torch.arange(len(row))
    return row[(index[None, :] - index[:, None]) % len(row)]


def goethals_seidel(order: int) -> Tensor:
    """Hadamard matrix int8 [order, order] from the four circulants of order // 4 in `CIRCULANTS`.

    With R the back-identity, X R is symmetric for a circulant X and commutes as the array needs:
    all its off-diagonal blocks cancel, and the diagonal ones are the sum of the four X X^T.
    """
    k = order // 4
    multiplier, codes = CIRCULANTS[k]
    orbits = multiplier_orbits(k, multiplier)
    blocks = []
    for code in codes:
        row = torch.ones(k, dtype=torch.int8)
        for bit, orbit in enumerate(orbits):
            if code >> bit & 1:
                row[orbit] = -1
        blocks.append(_circulant(row))
    A, B, C, D = blocks
    BR, CR, DR = B.flip(1), C.flip(1), D.flip(1)
    BtR, CtR, DtR = B.T.flip(1), C.T.flip(1), D.T.flip(1)
    return torch.cat(
        [
            torch.cat([A, BR, CR, DR], dim=1),
            torch.cat([-BR, A, DtR, -CtR], dim=1),
            torch.cat([-CR, -DtR, A, BtR], dim=1),
            torch.cat([-DR, CtR, -BtR, A], dim=1),
        ]
    )
