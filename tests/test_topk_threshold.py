"""`topk_threshold` on every backend against a sort."""

import numpy as np
import pytest
import torch
from _larger import larger
from _operators import (
    DTYPES,
    INTERPRETED,
    LONG_KINDS,
    LONG_ROW,
    ON_HOST,
    ROW,
    backend,
    examples,
    make_row,
    rows,
    sampled_places,
    short_rows,
    strided,
)
from hypothesis import given
from hypothesis import strategies as st

import robattr_fast as rf

__all__ = ["backend"]


def by_sorting(row: np.ndarray, k: int):
    nan = np.isnan(row).sum()
    if k <= nan:
        return np.nan
    return np.sort(row[~np.isnan(row)])[::-1][k - nan - 1] + row.dtype.type(0)


def assert_same(actual: torch.Tensor, expected):
    """Equal, NaN equals NaN, and a zero is +0."""
    np.testing.assert_array_equal(actual.numpy(), expected)
    assert not torch.signbit(actual[actual == 0]).any()


@given(row=st.one_of(rows, short_rows), share=st.floats(0, 1), step=st.integers(1, 3))
@examples(150)
def test_against_sort(backend, row, share, step):
    k = max(1, round(share * row.size))
    assert_same(rf.topk_threshold(strided(row, step), k), by_sorting(row, k))


@pytest.mark.parametrize("kind", LONG_KINDS)
@pytest.mark.parametrize("n", [LONG_ROW] if INTERPRETED else [LONG_ROW, *larger(200_000)])
def test_long_rows(backend, kind, n):
    if backend == ON_HOST:  # blocks, threads and bins of the first are those of any longer row, of the other fewer
        n = 70_000 if n == LONG_ROW else 20_000
    row = make_row(kind, n, seed=n)
    for k in (1, n // 100, n // 10, n // 2, n):
        assert_same(rf.topk_threshold(torch.from_numpy(row), k), by_sorting(row, k))


def test_every_k():
    row = make_row("few values", 77)
    for k in range(1, 78):
        assert_same(rf.topk_threshold(torch.from_numpy(row), k), by_sorting(row, k))


def test_sample_that_misleads(backend):
    row = make_row("half-normal", 100_000)
    row[sampled_places(row.size)] += 10
    for k in (1, 900, 1024, 1025, 10_000, 50_000, 99_999):
        assert_same(rf.topk_threshold(torch.from_numpy(row), k), by_sorting(row, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_shapes(backend, dtype):
    scores = torch.randn(2, 3, ROW).to(dtype)
    columns = 60 if backend == ON_HOST else ROW  # that become rows of 3
    for view in (
        scores,
        scores.transpose(0, 1),
        scores[..., ::3],
        scores[..., :columns].transpose(1, 2),
        scores[0, 0],
        scores.flip(-1),
    ):
        n = view.shape[-1]
        k = max(1, n // 4)
        result = rf.topk_threshold(view, k)
        assert result.shape == view.shape[:-1]
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = view.to(result.dtype).contiguous().sort(-1, descending=True).values[..., k - 1]
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_many_rows(backend):
    scores = torch.randn(31 if INTERPRETED else 301, 97)
    expected = scores.sort(-1, descending=True).values[:, 9]
    torch.testing.assert_close(rf.topk_threshold(scores, 10), expected, rtol=0, atol=0)


def test_opcheck():
    for scores in (torch.randn(2, 3, 50), torch.randn(2, 50, dtype=torch.float64).requires_grad_(), torch.randn(7)):
        torch.library.opcheck(torch.ops.robattr_fast.topk_threshold.default, (scores, 5))


def test_compile():
    scores = torch.randn(3, 100, requires_grad=True)
    compiled = torch.compile(lambda s: rf.topk_threshold(s * 2, 7).square().sum(), fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(scores), scores)
    (expected,) = torch.autograd.grad(rf.topk_threshold(scores * 2, 7).square().sum(), scores)
    torch.testing.assert_close(actual, expected)


def test_gradient_goes_to_the_lowest_index():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0], [float("nan"), 1.0, 5.0, 2.0, float("nan")]], requires_grad=True)
    (grad,) = torch.autograd.grad(rf.topk_threshold(scores, 2).nan_to_num(), scores, torch.tensor([7.0, 0.0]))
    torch.testing.assert_close(grad[0], torch.tensor([0.0, 0.0, 7.0, 0.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_has_the_dtype_of_the_scores(dtype):
    scores = torch.randn(2, 50).to(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(rf.topk_threshold(scores, 5).sum(), scores)
    assert grad.dtype == dtype
    assert grad.float().sum() == 2


def test_twice_against_differences(backend):
    scores = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda s: rf.topk_threshold(s, 4), scores, fast_mode=INTERPRETED)
    torch.autograd.gradgradcheck(lambda s: rf.topk_threshold(s, 4) ** 3, scores, fast_mode=INTERPRETED)


@pytest.mark.parametrize(
    ("scores", "k", "error", "message"),
    [
        (torch.randn(5), 0, ValueError, "k: got 0"),
        (torch.randn(5), 6, ValueError, r"takes an integer in \[1, 5\]"),
        (torch.randn(5), 2.0, TypeError, "k: got float"),
        (torch.randn(5), True, TypeError, "k: got bool"),
        (torch.randn(2, 0), 1, ValueError, "scores: got the empty shape"),
        (torch.arange(5), 1, TypeError, "scores: got dtype torch.int64"),
        (torch.tensor(1.0), 1, ValueError, "at least 1 dimension"),
        ([1.0], 1, TypeError, "scores: got list"),
    ],
)
def test_errors(scores, k, error, message):
    with pytest.raises(error, match=message):
        rf.topk_threshold(scores, k)
