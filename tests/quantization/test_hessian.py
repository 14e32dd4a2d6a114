"""The Hessian against its formula, token by token, and its triangular factor against it."""

import pytest
import torch

from compress.errors import CompressError
from compress.importance.weighting import mean_one
from compress.quantization import hessian
from compress.quantization.hessian import Hessian, factor
from support.refusals import refused
from support.small_linears import correlated_inputs, second_moment

K = 40


def accumulated(*batches, weights=None):
    """H [K, K] of batches [B, T, K] with weights [B, T] for each, or none."""
    statistics = Hessian(batches[0].shape[-1])
    for i, x in enumerate(batches):
        statistics.add_batch(x, None if weights is None else weights[i])
    return statistics.matrix()


def drawn_inputs(windows=4, tokens=24, columns=K, seed=0):
    return correlated_inputs(windows, tokens, columns, seed).float()


def drawn_weights(windows=4, tokens=24):
    """Far from uniform, mean one in each window."""
    draw = torch.Generator().manual_seed(1)
    r = torch.randn(windows, tokens, generator=draw).mul(1.5).exp()
    return mean_one(r, torch.ones(windows, tokens, dtype=torch.bool))


def assert_close(found, expected):
    """To fp32 rounding, measured by the diagonal: an entry may cancel to next to nothing."""
    size = expected.double().diagonal().abs().sqrt()
    difference = (found.double() - expected.double()).abs()
    assert (difference <= 2e-6 * torch.outer(size, size) + 1e-30).all()


# ---- accumulation -------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 16, 20, 128])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_formula_whatever_the_block(block, weighted, monkeypatch):
    monkeypatch.setitem(hessian.BLOCK, "cpu", block)
    x, weights = drawn_inputs(), drawn_weights() if weighted else None
    H = accumulated(x, weights=None if weights is None else [weights])
    assert_close(H, second_moment(x, weights))


@pytest.mark.parametrize("block", [16, 128])
def test_it_is_symmetric_to_the_bit(block, monkeypatch):
    monkeypatch.setitem(hessian.BLOCK, "cpu", block)
    H = accumulated(drawn_inputs(), drawn_inputs(seed=1))
    assert torch.equal(H, H.T)


def test_batches_can_be_cut_and_ordered_at_will():
    x, weights = drawn_inputs(6), drawn_weights(6)
    whole = accumulated(x, weights=[weights])
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 4, 1, 3]):
        x_cut, weights_cut = x[order].split([1, 3, 2]), weights[order].split([1, 3, 2])
        assert_close(accumulated(*x_cut, weights=weights_cut), whole)


def test_weights_of_one_change_no_bit():
    x = drawn_inputs()
    assert torch.equal(accumulated(x, weights=[torch.ones(4, 24)]), accumulated(x))


def test_any_constant_importance_changes_no_bit():
    x, mask = drawn_inputs(), torch.ones(4, 24, dtype=torch.bool)
    for constant in (0.1, 3.0, 1e-3):
        weights = mean_one(torch.full((4, 24), constant), mask)
        assert torch.equal(accumulated(x, weights=[weights]), accumulated(x))


def test_a_weight_of_zero_removes_its_token():
    """The same number kept in each window: GPTQ on what is kept, times T / kept."""
    x, kept = drawn_inputs(), torch.zeros(4, 24, dtype=torch.bool)
    for j in range(4):
        kept[j, j : j + 6] = True
    weights = mean_one(kept.float(), torch.ones_like(kept))
    H = accumulated(x, weights=[weights])
    assert_close(H, accumulated(x[kept].view(4, 6, K)) * 24 / 6)
    x[~kept] = 1e3  # whatever they are
    assert torch.equal(accumulated(x, weights=[weights]), H)


def test_whole_weights_repeat_their_tokens():
    x, repeats = drawn_inputs(1), torch.arange(24) % 3
    repeated = x[0].repeat_interleave(repeats, dim=0)[None]
    assert_close(accumulated(x, weights=[repeats[None].float()]), accumulated(repeated))


def test_its_trace_is_the_weighted_sum_of_squared_norms():
    x, weights = drawn_inputs(), drawn_weights()
    expected = 2 / 4 * (weights.double() * x.double().square().sum(-1)).sum()
    trace = accumulated(x, weights=[weights]).double().trace()
    torch.testing.assert_close(trace, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tokens", [2, 24])
def test_it_has_no_negative_eigenvalue(weighted, tokens):
    """But for rounding, even where most of them are zero."""
    x, weights = drawn_inputs(tokens=tokens), [drawn_weights(tokens=tokens)]
    eigenvalues = torch.linalg.eigvalsh(accumulated(x, weights=weights if weighted else None))
    assert eigenvalues.min() > -1e-6 * eigenvalues.max()
    assert (eigenvalues > 1e-5 * eigenvalues.max()).sum() == min(4 * tokens, K)


def test_tokens_that_lie_strided_or_in_half_precision_are_read_right():
    x = drawn_inputs()
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(accumulated(strided), accumulated(x))
    half = x.bfloat16()
    assert torch.equal(accumulated(half), accumulated(half.float()))


def test_without_tokens_it_is_zero():
    assert torch.equal(Hessian(3).matrix(), torch.zeros(3, 3))


# ---- factor -------------------------------------------------------------------------------------


def damped(H, damping):
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_the_factor_is_upper_triangular_and_gives_the_damped_hessian(dtype, damping):
    H = second_moment(drawn_inputs()).to(dtype)
    before = H.clone()
    R, used = factor(H, damping)
    assert used == damping
    assert torch.equal(R, R.triu())
    assert (R.diagonal() > 0).all()
    found, expected = R.double() @ R.double().T, damped(before, damping).double()
    tolerance = 10 * torch.finfo(dtype).eps * expected.diagonal().max()
    torch.testing.assert_close(found, expected, rtol=0, atol=float(tolerance))
    assert torch.equal(H, before)


def test_the_errors_of_columns_add_up_as_the_factor_says():
    """tr(E H E^T) = sum_j (E_j R_jj + sum_{i<j} E_i R_ij)^2."""
    H = damped(second_moment(drawn_inputs()), 0.1)
    R, _ = factor(H, 0.0)
    E = torch.randn(K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns = [(E[: j + 1] * R[: j + 1, j]).sum() ** 2 for j in range(K)]
    torch.testing.assert_close(sum(columns), E @ H @ E, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("lowest", "expected"), [(-0.005, 0.01), (-0.015, 0.02), (-0.15, 0.16), (-0.7, 1.0)]
)
def test_damping_doubles_until_the_matrix_is_positive_definite(lowest, expected):
    """A matrix of mean diagonal one whose least eigenvalue is known."""
    draw = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(K, K, generator=draw, dtype=torch.float64))
    eigenvalues = torch.full((K,), (K - lowest) / (K - 1), dtype=torch.float64)
    eigenvalues[0] = lowest
    H = Q @ eigenvalues.diag() @ Q.T
    R, used = factor(H, 0.01)
    assert used == pytest.approx(expected)
    torch.testing.assert_close(R @ R.T, damped(H, used), rtol=0, atol=1e-12)


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_an_indefinite_matrix_that_no_damping_saves_is_an_error(damping):
    H = torch.ones(4, 4) + torch.tensor([0.0, 0, 0, -0.9]).diag()
    H[0, 1] = H[1, 0] = 5
    with refused(CompressError, "4 columns", "quantize.damping"):
        factor(H, damping)


@pytest.mark.parametrize("columns", [2, 40, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_matrix_needs_damping(columns, dtype):
    """Fewer tokens than columns. Rounding may leave its pivots a little above zero."""
    for seed in range(5):
        x = correlated_inputs(1, columns // 2, columns, seed).to(dtype)
        H = second_moment(x).to(dtype)
        with refused(CompressError, f"{columns} columns", "quantize.damping"):
            factor(H, 0.0)
        R, used = factor(H, 0.01)
        assert used == 0.01
        assert R.isfinite().all()


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_no_number_is_an_error_and_not_a_factor(damping):
    H = second_moment(drawn_inputs()).float()
    H[3, 5] = H[5, 3] = torch.nan
    with pytest.raises(CompressError):
        factor(H, damping)
