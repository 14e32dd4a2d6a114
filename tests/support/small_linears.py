"""Small linears with correlated inputs, and what quantising them costs: plain formulas in fp64.

x = correlated_inputs(2, 48, 64)          # [B, T, K]
H = second_moment(x)                      # [K, K]
error = layer_error(W, Q, H)              # [N]
"""

import torch
from torch import Tensor


def correlated_inputs(windows: int, tokens: int, columns: int, seed: int = 0) -> Tensor:
    """x [B, T, K] in fp64: a few shared directions, noise, and columns of very unlike sizes."""
    draw = torch.Generator().manual_seed(seed)
    rank = max(1, columns // 8)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    x = randn(windows, tokens, rank) @ randn(rank, columns) / rank**0.5
    return (x + 0.3 * randn(windows, tokens, columns)) * (0.7 * randn(columns)).exp()


def random_weight(outputs: int, columns: int, seed: int = 0) -> Tensor:
    """W [N, K] in fp64, heavier in its tails than a Gaussian."""
    draw = torch.Generator().manual_seed(1000 + seed)
    W = torch.randn(outputs, columns, generator=draw, dtype=torch.float64)
    return 0.02 * W * W.abs().sqrt()


def second_moment(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """(2/N) sum_j sum_t w_jt x_jt x_jt^T of x [B, T, K], token by token: [K, K] fp64."""
    H = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
    for j, window in enumerate(x.double()):
        for t, token in enumerate(window):
            w = 1.0 if weights is None else float(weights[j, t])
            H += w * torch.outer(token, token)
    return 2 * H / len(x)


def layer_error(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    """The diagonal of (W-Q) H (W-Q)^T for W, Q [N, K]: [N] fp64."""
    E = W.double() - Q.double()
    return ((E @ H.double()) * E).sum(1)


def in_range(codes: Tensor, bits: int) -> bool:
    """Whether all codes are whole numbers that fit `bits` bits, signed."""
    codes = codes.double()
    whole = bool((codes == codes.round()).all())
    return whole and codes.min() >= -(2 ** (bits - 1)) and codes.max() < 2 ** (bits - 1)
