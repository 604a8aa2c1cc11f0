"""`soft_topk` on every backend against bisection in extended precision, and its gradients."""

import math

import numpy as np
import pytest
import torch
from _larger import larger
from _operators import (
    FAST_MODES,
    FEWER_DTYPES,
    INTERPRETED,
    KINDS,
    LONG_KINDS,
    backend,
    check_second_derivative_under_compile,
    examples,
    make_row,
    rows,
    strided,
)
from hypothesis import assume, given
from hypothesis import strategies as st

import robattr_fast as rf

__all__ = ["backend"]

LONG = 1_500 if INTERPRETED else 8_195  # more than one block of a kernel

# Three roundings of x, of 3 u |x| at most, and one of y move h by less than u (3 max x exp(-x) + ln(n) / 4) < 4 u; the
# sums' roundings come on top.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 2e-14}


def by_bisection(row: np.ndarray, k: int, temperature: float) -> np.ndarray:
    """h of one row: written independently of the package, in 80 bits."""
    if not np.isfinite(row).all():
        return np.full(row.size, np.nan)
    u = row.astype(np.longdouble) / np.longdouble(temperature)
    low, high = u.min() - 50, u.max() + 50
    for _ in range(70):  # 2e4 / 2^70
        middle = (low + high) / 2
        if (1 / (1 + np.exp(np.clip(middle - u, -11000, 11000)))).sum() > k:
            low = middle
        else:
            high = middle
    return (1 / (1 + np.exp(np.clip(low - u, -11000, 11000)))).astype(np.float64)


def scale(row: np.ndarray) -> float:
    finite = np.abs(row[np.isfinite(row)])
    return float(finite.max(initial=0)) or 1.0


def check(h: torch.Tensor, row: np.ndarray, k: int, temperature: float):
    tolerance = TOLERANCE[h.dtype]
    np.testing.assert_allclose(h.double().numpy(), by_bisection(row, k, temperature), rtol=0, atol=tolerance)
    if not h.isnan().any():
        assert abs(float(h.double().sum()) - k) <= 2 * tolerance * k
        assert ((h >= 0) & (h <= 1)).all()


@given(
    row=rows,
    share=st.floats(0, 1),
    ratio=st.one_of(st.floats(-4, 3).map(lambda e: 10.0**e), st.sampled_from([1e-4, 1e3])),
    step=st.integers(1, 3),
)
@examples(120)
def test_against_bisection(backend, row, share, ratio, step):
    assume(row.size > 1 and (row.size <= 1100 or not INTERPRETED))  # an interpreted pass over a block takes 1 ms
    k = min(max(1, round(share * row.size)), row.size - 1)
    temperature = min(max(ratio * scale(row), 5e-324), 1e308)
    check(rf.soft_topk(strided(row, step), k, temperature), row, k, temperature)


@pytest.mark.parametrize("kind", LONG_KINDS)
@pytest.mark.parametrize("ratio", [*larger(1e-4), 0.03])
def test_long_rows(backend, kind, ratio):
    row = make_row(kind, LONG, seed=1)
    for k in (800, LONG - 1):
        temperature = ratio * scale(row)
        check(rf.soft_topk(torch.from_numpy(row), k, temperature), row, k, temperature)


@pytest.mark.parametrize("n", [2, 17, 1000])
def test_equal_scores_share_alike(backend, n):
    for value in (0.0, -3.0, 1e-42):
        for k in {1, n // 2, n - 1}:
            for temperature in (1e-30, 1e30):
                h = rf.soft_topk(torch.full((n,), value), k, temperature)
                torch.testing.assert_close(h, torch.full((n,), k / n), rtol=1e-6, atol=1e-7)


def test_the_limits_of_the_temperature(backend):
    """Cold: the k largest, and ties share what is left of k. Hot: k / n."""
    scores = torch.tensor([[4.0, -1.0, 3.0, 2.0, 0.0], [1.0, 1.0, 5.0, 1.0, -2.0]])
    cold = torch.tensor([[1.0, 0, 1, 1, 0], [2 / 3, 2 / 3, 1, 2 / 3, 0]])
    for temperature in (1e-3, 5e-324):
        torch.testing.assert_close(rf.soft_topk(scores, 3, temperature), cold, rtol=1e-6, atol=1e-7)
    for temperature in (1e8, 1e308):
        torch.testing.assert_close(rf.soft_topk(scores, 3, temperature), torch.full((2, 5), 0.6))


def test_two_scores_by_hand(backend):
    # sigmoid(a) + sigmoid(b) = 1 where b = -a: nu is the mean.
    h = rf.soft_topk(torch.tensor([1.0, 2.0], dtype=torch.float64), 1, 0.25)
    expected = 1 / (1 + math.exp(-2.0))
    torch.testing.assert_close(h, torch.tensor([1 - expected, expected], dtype=torch.float64), rtol=1e-14, atol=0)


def test_order_and_shift(backend):
    scores = torch.randn(5, 200, dtype=torch.float64)
    h = rf.soft_topk(scores, 20, 0.3)
    assert torch.equal(h.argsort(-1), scores.argsort(-1))
    torch.testing.assert_close(rf.soft_topk(scores + 1, 20, 0.3), h)
    torch.testing.assert_close(rf.soft_topk(4 * scores, 20, 1.2), h)
    torch.testing.assert_close(rf.soft_topk(-scores, 180, 0.3), 1 - h)


def test_overflowing_differences(backend):
    top = torch.finfo(torch.float32).max
    scores = torch.tensor([top, -top, top, 0.0])
    check(rf.soft_topk(scores, 2, top), scores.numpy(), 2, top)
    check(rf.soft_topk(scores, 1, 1e3 * top), scores.numpy(), 1, 1e3 * top)


def test_rows_with_nan_or_inf_are_nan_and_others_are_not(backend):
    scores = torch.rand(4, 50)
    scores[0, 3], scores[1, 4], scores[2, 49] = torch.nan, torch.inf, -torch.inf
    scores.requires_grad_()
    h = rf.soft_topk(scores, 10, 0.1)
    assert h[:3].isnan().all()
    assert h[3].isfinite().all()
    (grad,) = torch.autograd.grad(h, scores, torch.rand(4, 50))
    assert grad[:3].isnan().all()
    assert grad[3].isfinite().all()


@pytest.mark.parametrize("dtype", FEWER_DTYPES)
def test_dtypes_and_strides(backend, dtype):
    scores = torch.randn(2, 3, 9 if INTERPRETED else 90).to(dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for view in (scores, scores.transpose(0, 1), scores[..., ::3], scores.transpose(1, 2), scores.flip(1)):
        h = rf.soft_topk(view, 2, 0.2)
        assert (h.shape, h.dtype) == (view.shape, compute)
        for got, row in zip(h.reshape(-1, view.shape[-1]), view.to(compute).reshape(-1, view.shape[-1]), strict=True):
            check(got, row.numpy(), 2, 0.2)


def eager(scores, k, temperature):
    """Bisection as one would write it in PyTorch, in the dtype of the scores."""
    low = scores.amin(-1, keepdim=True) - 20 * temperature
    high = scores.amax(-1, keepdim=True) + 20 * temperature
    for _ in range(40):
        middle = (low + high) / 2
        too_low = torch.sigmoid((scores - middle) / temperature).sum(-1, keepdim=True) > k
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return torch.sigmoid((scores - low) / temperature)


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("n", [784, 3_072] if INTERPRETED else [784, 9_000])
def test_error_against_plain_pytorch(backend, n, temperature):
    scores = torch.randn(4, n)
    exact = torch.from_numpy(np.stack([by_bisection(row, n // 10, temperature) for row in scores.double().numpy()]))
    ours = (rf.soft_topk(scores, n // 10, temperature).double() - exact).abs().max()
    theirs = (eager(scores, n // 10, temperature).double() - exact).abs().max()
    assert ours <= 2 * theirs + torch.finfo(torch.float32).eps


def test_opcheck():
    op = torch.ops.robattr_fast.soft_topk.default
    torch.library.opcheck(op, (torch.rand(2, 3, 40), 5, 0.1))
    torch.library.opcheck(op, (torch.rand(2, 40, dtype=torch.float64).requires_grad_(), 5, 0.1))
    torch.library.opcheck(op, (torch.rand(7).bfloat16().requires_grad_(), 5, 0.1))


def test_compile():
    scores = torch.randn(3, 100, requires_grad=True)

    def loss(s):
        return rf.soft_topk(s * 2, 7, 0.5).square().sum()

    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(scores), scores)
    (expected,) = torch.autograd.grad(loss(scores), scores)
    torch.testing.assert_close(actual, expected)


def test_second_derivative_under_compile():
    scores = torch.randn(2, 30, requires_grad=True)
    check_second_derivative_under_compile(lambda s: rf.soft_topk(s, 7, 0.5), scores)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.5), (4, 0.2), (11, 3.0)])
@pytest.mark.parametrize("fast_mode", FAST_MODES)
def test_twice_against_differences(backend, k, temperature, fast_mode):
    scores = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda s: rf.soft_topk(s, k, temperature), scores, fast_mode=fast_mode)
    torch.autograd.gradgradcheck(lambda s: rf.soft_topk(s, k, temperature), scores, fast_mode=fast_mode)


def test_third_derivative(backend):
    def second(s):
        (first,) = torch.autograd.grad(rf.soft_topk(s, 3, 0.4).square().sum(), s, create_graph=True)
        return torch.autograd.grad((first**2).sum(), s, create_graph=True)[0]

    torch.autograd.gradcheck(second, torch.randn(1, 8, dtype=torch.float64, requires_grad=True))


def test_gradient_by_hand(backend):
    # h = (1 - a, a) with a = sigmoid(2), w equal for both: d h_1 = w / T (d s_1 - d s_0) / 2.
    scores = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(rf.soft_topk(scores, 1, 0.25)[1], scores)
    a = 1 / (1 + math.exp(-2.0))
    slope = a * (1 - a) / 0.25 / 2
    torch.testing.assert_close(grad, torch.tensor([-slope, slope], dtype=torch.float64))


def test_gradient_of_a_hard_row_keeps_its_digits(backend):
    """1 - h of the third score is 1e-9: in float32 it is lost, and with it half of the gradient."""
    scores = torch.tensor([9.0, 8.0, 2.0, 1.0, 0.0, -3.0], requires_grad=True)
    weight = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    temperature = 0.5 / math.log(1e9)
    (grad,) = torch.autograd.grad(rf.soft_topk(scores, 3, temperature), scores, weight)
    slope = 1e-9 / temperature / 2
    torch.testing.assert_close(grad, torch.tensor([0.0, 0, slope, -slope, 0, 0]), rtol=1e-3, atol=1e-3 * slope)


@pytest.mark.parametrize("temperature", [1e-6, 1e-2, 1e6])
def test_gradients_of_finite_rows_are_finite(backend, temperature):
    values = [make_row(kind, 64) for kind in sorted(KINDS)]
    scores = torch.from_numpy(np.stack([row for row in values if np.isfinite(row).all()])).requires_grad_()
    h = rf.soft_topk(scores, 10, temperature)
    (first,) = torch.autograd.grad(h, scores, torch.randn_like(h), create_graph=True)
    assert h.isfinite().all()
    assert first.isfinite().all()
    (second,) = torch.autograd.grad(first.sum(), scores)
    assert second.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_has_the_dtype_of_the_scores(dtype):
    scores = torch.rand(2, 64).to(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(rf.soft_topk(scores, 5, 0.1).square().sum(), scores)
    assert grad.dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, r"k: got 0, takes an integer in \[1, 4\]"),
        ({"k": 5}, ValueError, r"k: got 5, takes an integer in \[1, 4\]"),
        ({"k": 2.0}, TypeError, "k: got float"),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0"),
        ({"temperature": float("inf")}, ValueError, "temperature: got inf"),
        ({"temperature": torch.tensor(1.0)}, TypeError, "temperature: got a tensor, takes a number"),
        ({"scores": torch.arange(5)}, TypeError, "scores: got dtype torch.int64"),
        ({"scores": torch.rand(3, 1), "k": 1}, ValueError, "takes rows of at least 2 elements"),
        ({"scores": torch.tensor(1.0)}, ValueError, "at least 1 dimension"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        rf.soft_topk(**({"scores": torch.rand(5), "k": 2, "temperature": 1.0} | arguments))
