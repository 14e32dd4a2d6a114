"""The Hadamard transform as a product with the whole matrix: what the fast one is compared with.

expected = reference_hadamard(x, factors)        # x [..., n] -> fp64 [..., n]
"""

import torch
from torch import Tensor


def reference_hadamard(x: Tensor, factors: tuple[Tensor, ...] = ()) -> Tensor:
    """x [..., n] times the transpose of F_1 (x) F_2 (x) ... (x) Sylvester / sqrt(n), in fp64."""
    H = torch.ones(1, 1, dtype=torch.float64, device=x.device)
    for factor in factors:
        H = torch.kron(H, factor.to(H))
    while len(H) < x.shape[-1]:
        H = torch.kron(H, torch.tensor([[1.0, 1.0], [1.0, -1.0]]).to(H))
    return x.double() @ H.T / x.shape[-1] ** 0.5
