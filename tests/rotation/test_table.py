"""Tables of the vocabulary that are read, fused and rotated some rows at a time."""

import pytest
import torch
from safetensors.torch import save_file

from compress.errors import CheckpointError
from compress.pipeline.head_products import products
from compress.quantization.hessian import Hessian
from compress.quantization.layer import solve_group
from compress.quantization.solvers import SOLVERS, SolverSettings
from compress.quantization.tables import solve_table
from compress.rotation import table as tables
from compress.rotation.rotate import fuse_and_rotate_head, make_rotation
from compress.rotation.table import Table
from compress.scheme import Scheme
from compress.storage.safetensors import CheckpointReader

V, D = 300, 64


@pytest.fixture
def written(tmp_path):
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"lm_head.weight": weight}, tmp_path / "model.safetensors")
    return weight, CheckpointReader(tmp_path)


@pytest.mark.parametrize("kind", ["none", "hadamard", "random"])
def test_rows_are_those_of_the_whole(written, kind, monkeypatch):
    monkeypatch.setattr(tables, "VALUES_AT_ONCE", 70 * D)  # pieces that end inside the table
    weight, reader = written
    residual, factor = make_rotation(kind, D, 0), torch.rand(D) + 0.5
    table = Table(reader, "lm_head.weight", factor if residual else None, residual)
    expected = fuse_and_rotate_head(weight, factor, residual) if residual else weight
    assert table.shape == (V, D) and len(table) == V
    torch.testing.assert_close(table[10:250], expected[10:250])
    torch.testing.assert_close(table.dense(torch.float32), expected.float())
    x = torch.randn(2, 3, D)
    found = products(table, x, torch.bfloat16)
    torch.testing.assert_close(found, x @ expected.bfloat16().float().T, rtol=1e-5, atol=1e-4)


def test_a_damaged_row_is_refused_where_it_is_read(tmp_path):
    weight = torch.ones(V, D)
    weight[200, 3] = float("nan")
    save_file({"w": weight}, tmp_path / "model.safetensors")
    table = Table(CheckpointReader(tmp_path), "w")
    assert table[:200].shape == (200, D)
    with pytest.raises(CheckpointError, match="NaN"):
        table[200:201]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("drift", [False, True])
def test_a_table_is_solved_as_a_linear_is(written, method, drift):
    weight, _ = written
    x = torch.randn(4, 50, D, generator=torch.Generator().manual_seed(1))
    twin = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    solver, scheme = SOLVERS[method](SolverSettings(refine_sweeps=2)), Scheme(4, 32)

    def hessian():
        if method == "rtn":
            return None
        H = Hessian(D, drift=drift)
        H.add_batch(x, None, twin if drift else None)
        return H

    alone = torch.nn.Linear(D, V, bias=False)
    alone.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    layer = torch.nn.Module()
    layer.add_module("head", alone)
    expected = solve_group(layer, {"head": scheme}, solver, hessian(), torch.bfloat16)["head"]
    found = solve_table(weight, scheme, solver, hessian(), torch.bfloat16)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert found.relative_error() == pytest.approx(expected.relative_error())
