"""Inputs of a linear that earlier layers have damaged, beside those of the 16-bit model.

x0, x = drifted_inputs(4, 60, 128)             # [B, T, K] each, in fp64
error = output_error(W, Q, x0, x)              # [N]: sum w (W x0 - Q x)^2
"""

import torch
from torch import Tensor

from compress.quantization.hessian import Hessian
from support.small_linears import correlated_inputs


def drifted_inputs(
    windows: int, tokens: int, columns: int, seed: int = 0, drift: float = 0.1
) -> tuple[Tensor, Tensor]:
    """x0 and x [B, T, K] in fp64; x is x0 with some of it mixed, and some noise."""
    draw = torch.Generator().manual_seed(2000 + seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    x0 = correlated_inputs(windows, tokens, columns, seed)
    mixed = x0 @ randn(columns, columns) / columns**0.5
    noise = 0.3 * x0.std((0, 1)) * randn(*x0.shape)
    return x0, x0 + drift * (mixed + noise)


def output_error(
    W: Tensor, Q: Tensor, x0: Tensor, x: Tensor, weights: Tensor | None = None
) -> Tensor:
    """(2/N) sum_j sum_t w_jt (W x0_jt - Q x_jt)^2 of each output: [N] fp64."""
    squares = (x0.double() @ W.double().T - x.double() @ Q.double().T).square()
    if weights is not None:
        squares *= weights.double().unsqueeze(-1)
    return 2 / len(x) * squares.sum((0, 1))


def drifted_hessian(x0: Tensor, x: Tensor, weights: Tensor | None = None) -> Hessian:
    """Of fp32 copies, with its drift."""
    H = Hessian(x.shape[-1], drift=True)
    H.add_batch(x.float(), weights, x0.float())
    return H
