"""Products of the last hidden states with the head, some of whose rows are in fp32 at a time.

products(table, x, torch.bfloat16)      # x [..., d] -> [..., V]
"""

from dataclasses import replace

import torch
from torch import Tensor

from compress.kernels.codes import Codes
from compress.kernels.reference import dense
from compress.rotation.rotate import VALUES_AT_ONCE
from compress.rotation.table import Table


def products(head: Table | Codes | Tensor, x: Tensor, stored: torch.dtype) -> Tensor:
    """x [..., d] in fp32 times the transpose of the head [V, d], as it is stored: fp32 [..., V].

    `stored`: the dtype of a table in the result.
    """
    V, d = head.codes.shape if isinstance(head, Codes) else head.shape
    found = x.new_empty(*x.shape[:-1], V)
    step = max(1, VALUES_AT_ONCE // d)
    for start in range(0, V, step):
        rows = slice(start, min(start + step, V))
        found[..., rows] = x @ _some(head, rows, stored).to(x.device).T
    return found


def _some(head: Table | Codes | Tensor, rows: slice, stored: torch.dtype) -> Tensor:
    """Some rows of the head in fp32, [n, d]."""
    if isinstance(head, Codes):
        zero = None if head.zero is None else head.zero[rows]
        part = replace(head, codes=head.codes[rows], scale=head.scale[rows], zero=zero)
        return dense(part, torch.float32)
    return head[rows].to(stored).float()
