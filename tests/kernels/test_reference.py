"""The reference that kernels are held to, against its formula in Python numbers."""

import pytest
import torch

from compress.kernels.reference import reference_matmul
from support.weights import random_weight


def test_reference_is_the_formula():
    weight = random_weight(5, 40, 3, 16, symmetric=False)
    x, bias = torch.randn(2, 40), torch.randn(5)
    y = reference_matmul(x, weight, bias)
    for m in range(2):
        for n in range(5):
            total = float(bias[n])
            for k in range(40):
                offset = int(weight.codes[n, k]) - int(weight.zero[n, k // 16])
                total += float(x[m, k]) * offset * float(weight.scale[n, k // 16])
            assert float(y[m, n]) == pytest.approx(total, rel=1e-12, abs=1e-12)
