"""How the table of circulants in `compress.rotation.construct` was found."""

import itertools

import torch

from compress.rotation.construct import multiplier_orbits


def odd_square_sums(n: int) -> list[tuple[int, int, int, int]]:
    """All a <= b <= c <= d, odd, with a^2 + b^2 + c^2 + d^2 = n."""
    odd = range(1, int(n**0.5) + 1, 2)
    quadruples = itertools.combinations_with_replacement(odd, 4)
    return [q for q in quadruples if sum(x * x for x in q) == n]


def search_circulants(k: int, multiplier: int) -> tuple[int, int, int, int]:
    """Four rows for `CIRCULANTS[k]`, by trying all +-1 rows constant on the multiplier's orbits.

    The condition is that the periodic autocorrelations of the four rows sum to zero at every shift
    but 0. At shift 0 of the spectrum it says that the squared row sums add to 4 k, which splits the
    rows into small classes; two pairs of rows then meet where one pair's autocorrelation is minus
    the other's. Needs k odd and at most 20 orbits.
    """
    orbits = multiplier_orbits(k, multiplier)
    codes = torch.arange(0, 2 ** len(orbits), 2)  # row[0] = +1: negating a row changes nothing
    rows = torch.ones(len(codes), k, dtype=torch.float64)
    for bit, orbit in enumerate(orbits):
        rows[:, orbit] -= 2.0 * (codes[:, None] >> bit & 1)
    spectrum = torch.fft.fft(rows).abs() ** 2
    possible = (spectrum <= 4 * k + 1e-6).all(dim=1)  # four of them sum to 4 k everywhere
    codes, rows, spectrum = codes[possible], rows[possible], spectrum[possible]
    correlation = torch.fft.ifft(spectrum).real.round().long()
    correlation = correlation[:, [orbit[0] for orbit in orbits[1:]]]
    # One integer per row: equal sums of integers mark the candidates, which are then checked.
    weights = torch.randint(
        -(2**40), 2**40, (len(orbits) - 1,), generator=torch.Generator().manual_seed(0)
    )
    key = correlation @ weights
    row_sum = rows.sum(dim=1).abs().long()

    for sums in odd_square_sums(4 * k):
        a, b, c, d = ((row_sum == s).nonzero().flatten() for s in sums)
        if min(len(a), len(b), len(c), len(d)) == 0:
            continue
        left = (key[a][:, None] + key[b][None, :]).flatten()
        right, order = (-(key[c][:, None] + key[d][None, :])).flatten().sort()
        place = torch.searchsorted(right, left).clamp(max=len(right) - 1)
        for hit in (right[place] == left).nonzero().flatten().tolist():
            other = int(order[place[hit]])
            four = [a[hit // len(b)], b[hit % len(b)], c[other // len(d)], d[other % len(d)]]
            if not correlation[torch.stack(four)].sum(dim=0).any():
                first, second, third, fourth = (int(codes[i]) for i in four)
                return first, second, third, fourth
    raise AssertionError(f"no four circulants are constant on the orbits of {multiplier}")
