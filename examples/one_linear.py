"""GPTQ alone, on tensors: one weight, what it reads, and what rounding costs each way.

python examples/one_linear.py
"""

import torch

from compress.quantization.grid import UniformGrid
from compress.quantization.hessian import Hessian
from compress.quantization.solvers import SOLVERS, SolverSettings


def main(bits: int = 3, group_size: int = 32) -> dict[str, float]:
    """The relative error ||X (W - Q)^T||^2 / ||X W^T||^2 of each solver."""
    torch.manual_seed(0)
    W = torch.randn(64, 128)  # [N, K]
    X = torch.randn(1024, 128) @ torch.randn(128, 128)  # inputs that resemble each other
    H = Hessian(128)
    H.add_batch(X[None], None)

    errors = {}
    for name in ("rtn", "gptq"):
        solver = SOLVERS[name](SolverSettings(clip_search="none"))
        statistics = solver.prepare(H.matrix()) if solver.needs_hessian else None
        linear = solver.solve(W, statistics, UniformGrid(bits), group_size)
        E = W - linear.weight()
        errors[name] = float((X @ E.T).square().sum() / (X @ W.T).square().sum())
    return errors


if __name__ == "__main__":
    for name, error in main().items():
        print(f"{name:5} {error:.5f}")
