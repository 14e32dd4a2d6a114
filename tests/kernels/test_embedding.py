"""Packed embedding tables: rows as the dense table has them, alone and shared with a head."""

import pytest
import torch

from compress.kernels.cpu.int4 import Int4Weight
from compress.kernels.cpu.integers import GroupsWeight, QuadsWeight
from compress.kernels.cpu.rows import RowsWeight
from compress.kernels.cpu.tiles import TilesWeight
from compress.kernels.embedding import TOKENS, QuantEmbedding
from compress.kernels.gpu.layout import kernel_rows, pack_kernel, unpack_kernel
from compress.kernels.linear import QuantLinear
from compress.kernels.reference import dequantize
from support.weights import random_weight

IDS = torch.tensor([[0, 69, 3], [64, 3, 63]])
LAYOUTS = [TilesWeight, QuadsWeight, GroupsWeight, RowsWeight]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_those_of_the_dense_table(bits, group_size, symmetric):
    weight = random_weight(70, 96, bits, group_size, symmetric, torch.bfloat16)
    table = QuantEmbedding(weight, torch.float32)
    assert torch.equal(table(IDS), dequantize(weight).float()[IDS])
    assert table.packed_bytes() == 70 * 96 * bits // 8 + weight.scale.nbytes + (
        0 if symmetric else weight.zero.nbytes
    )
    found = table.codes()
    assert torch.equal(found.codes, weight.codes) and torch.equal(found.scale, weight.scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_its_rows(layout, bits, symmetric):
    weight = random_weight(70, 96, bits, 32, symmetric, torch.float32)
    rows = layout.pack(weight).rows(IDS.flatten())
    assert torch.equal(dequantize(rows), dequantize(weight)[IDS.flatten()])


def test_the_layouts_of_torch_and_of_a_gpu_give_their_rows():
    weight = random_weight(64, 96, 4, 32, True, torch.bfloat16)
    ids = torch.tensor([63, 0, 5])
    expected = dequantize(weight)[ids]
    assert torch.equal(dequantize(Int4Weight.pack(weight).rows(ids)), expected)
    for bits in (2, 3, 4, 8):
        weight = random_weight(64, 96, bits, 32, False)
        rows = unpack_kernel(kernel_rows(pack_kernel(weight), ids))
        assert torch.equal(dequantize(rows), dequantize(weight)[ids])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_table_that_is_the_head_is_held_once(bits):
    weight = random_weight(70, 96, bits, None, True, torch.bfloat16)
    head = QuantLinear(weight, dtype=torch.bfloat16)
    table = QuantEmbedding.of(head)
    assert table.packed_bytes() == 0 and not table.state_dict()
    assert torch.equal(table(IDS), dequantize(weight).bfloat16()[IDS])
    model = torch.nn.ModuleDict({"table": table, "head": head}).float()
    assert torch.equal(model["table"](IDS), dequantize(weight).float()[IDS])


def test_casting_leaves_scales_as_they_are():
    weight = random_weight(70, 96, 8, None, True, torch.float32)
    table = QuantEmbedding(weight, torch.float32).to(torch.bfloat16)
    assert table.scale.dtype == torch.float32 and table(IDS).dtype == torch.bfloat16
    assert torch.equal(table(IDS), dequantize(weight).bfloat16()[IDS])


def test_many_tokens_and_none():
    weight = random_weight(70, 32, 8, None, True)
    table = QuantEmbedding(weight, torch.float32)
    ids = torch.randint(70, (2, TOKENS))
    assert torch.equal(table(ids), dequantize(weight).float()[ids])
    assert table(ids[:, :0]).shape == (2, 0, 32)


def test_ids_beyond_the_table_are_refused():
    table = QuantEmbedding(random_weight(70, 32, 8, None, True))
    for bad in (70, -1):
        with pytest.raises(IndexError, match=r"\[0, 69\]"):
            table(torch.tensor([0, bad]))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shared", [False, True])
def test_torch_compile_takes_the_table_whole(bits, shared):
    weight = random_weight(70, 96, bits, 32, True, torch.float32)
    head = QuantLinear(weight, dtype=torch.float32)
    table = QuantEmbedding.of(head) if shared else QuantEmbedding(weight, torch.float32)
    whole = torch.compile(table, backend="eager", fullgraph=True)
    assert torch.equal(whole(IDS), table(IDS))
