"""Modules without numbers: weights on the meta device, what is computed as it would be."""

import torch
from torch import Tensor, nn

from compress.models.meta import WithoutNumbers


class Experts(nn.Module):
    """What is large, and what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(256, 2**20, 2**20))
        self.inner = nn.Linear(2**20, 2**20)
        self.zeros = nn.Parameter(torch.zeros(256, 2**20, 2**20))
        self.same = nn.Parameter(torch.zeros((256, 2**20, 2**20)))
        self.register_buffer("angles", 1 / 10 ** torch.arange(4.0))
        nn.init.normal_(self.weight, std=0.02)
        nn.init.trunc_normal_(tensor=self.weight)
        self.weight.data.zero_().add_(1)


def test_weights_take_no_memory_and_computed_buffers_are_real():
    with WithoutNumbers():
        experts = Experts()
    assert all(parameter.is_meta for parameter in experts.parameters())
    torch.testing.assert_close(experts.angles, torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_a_place_that_is_named_is_kept_and_real_tensors_are_filled():
    with WithoutNumbers():
        real = torch.empty(3, device="cpu")
        filled = nn.init.ones_(real), real.clone().fill_(2), torch.zeros(2)
    assert not any(tensor.is_meta for tensor in filled)
    assert [tensor.sum().item() for tensor in filled] == [3, 6, 0]


def test_outside_all_is_as_before():
    with WithoutNumbers():
        pass
    assert isinstance(torch.empty(2), Tensor) and not torch.empty(2).is_meta
