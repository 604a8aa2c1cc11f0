"""`sparsify` on every backend against a sort, and its gradients."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from _larger import larger
from _operators import (
    FEWER_DTYPES,
    INTERPRETED,
    LONG_KINDS,
    LONG_ROW,
    ROW,
    backend,
    check_second_derivative_under_compile,
    examples,
    make_row,
    rows,
    sampled_places,
    short_rows,
    sorted_levels,
    strided,
    takes_views,
)
from hypothesis import given
from hypothesis import strategies as st

import robattr_fast as rf
from robattr_fast.reference._select import selected

__all__ = ["backend"]

LEVELS = (1, 2, 3, 15)


def expected_map(row, tau, gamma, levels):
    level = sorted_levels(row, selected(tau, row.size), selected(gamma, row.size), levels or 1)
    if level is None:
        return np.full_like(row, np.nan)
    if levels is not None:
        return level.astype(row.dtype) / row.dtype.type(levels)
    g = np.sort(row)[::-1][selected(gamma, row.size) - 1]
    with np.errstate(all="ignore"):
        return np.where(level > 0, np.where(row < g, row / g, row.dtype.type(1)), row.dtype.type(0))


def test_selected():
    assert selected(0.29, 100) == 29
    assert selected(0.1, 150_528) == 15_052
    assert selected(1e-9, 5) == 1
    assert selected(1.0, 7) == 7
    for n in (100, 784, 1000):
        assert [selected(k / n, n) for k in range(1, n + 1)] == list(range(1, n + 1))


@given(
    row=st.one_of(rows, short_rows),
    tau=st.one_of(st.floats(1e-4, 1), st.sampled_from([0.1, 0.5, 1.0])),
    ratio=st.one_of(st.floats(0.01, 1), st.just(1.0)),
    levels=st.sampled_from([*LEVELS, None]),
    step=st.integers(1, 3),
)
@examples(250)
def test_against_sort(backend, row, tau, ratio, levels, step):
    gamma = tau * ratio
    h = rf.sparsify(strided(row, step), tau, gamma, levels=levels).numpy()
    np.testing.assert_array_equal(h, expected_map(row, tau, gamma, levels))
    assert (h > 0).sum() <= selected(tau, row.size)


@pytest.mark.parametrize("kind", LONG_KINDS)
@pytest.mark.parametrize("levels", [*larger(1, None), 15])
def test_long_rows(backend, kind, levels):
    row = make_row(kind, LONG_ROW, seed=1)
    for tau, gamma in ((0.1, 0.01), (0.9, 0.5)):
        h = rf.sparsify(torch.from_numpy(row), tau, gamma, levels=levels).numpy()
        np.testing.assert_array_equal(h, expected_map(row, tau, gamma, levels))


def test_sample_that_misleads(backend):
    row = make_row("half-normal", 100_000)
    row[sampled_places(row.size)] += 10
    for levels in (1, 15, None):
        h = rf.sparsify(torch.from_numpy(row), 0.1, 0.03, levels=levels).numpy()
        np.testing.assert_array_equal(h, expected_map(row, 0.1, 0.03, levels))


@pytest.mark.parametrize("larger", [0, 300])
def test_ties_at_the_bound_of_the_sample(backend, larger):
    # The 10000 largest elements of the row are all that the sample sees, and the last of them are equal.
    row = make_row("half-normal", 100_000) / 10
    places = sampled_places(row.size)
    row[places] = 1
    row[np.setdiff1d(np.arange(row.size), places)[: 10_000 - places.size]] = 1
    row[np.flatnonzero(row == 1)[:larger]] = 2
    for k in (larger + 1, 9999, 10_000, 10_001):
        tau = k / row.size
        for levels in (1, 15):
            h = rf.sparsify(torch.from_numpy(row), tau, tau / 2, levels=levels).numpy()
            np.testing.assert_array_equal(h, expected_map(row, tau, tau / 2, levels))


def test_ties_at_the_threshold(backend):
    scores = torch.tensor([3.0, 2.0, 2.0, 1.0])
    for k, expected in ((1, [1, 0, 0, 0]), (2, [1, 0, 0, 0]), (3, [1, 1, 1, 0]), (4, [1, 1, 1, 1])):
        assert rf.sparsify(scores, k / 4).tolist() == expected


def test_edges_of_the_levels(backend):
    # g = 3: the edges are 0, 1 and 2, and an element at an edge stays below it.
    scores = torch.tensor([3.0, 2.0, np.nextafter(np.float32(2), np.float32(3)), 1.0, 0.5, 0.0, -1.0])
    h = rf.sparsify(scores, 1.0, 1 / 7, levels=3)
    torch.testing.assert_close(h * 3, torch.tensor([3.0, 2.0, 3.0, 1.0, 1.0, 0.0, 0.0]))


def test_zero_g_gives_the_highest_value(backend):
    scores = torch.tensor([1e-45, 2.0, 0.0, -1.0])
    for levels in (1, 15, None):
        assert rf.sparsify(scores, 1.0, 0.75, levels=levels).tolist() == [1, 1, 0, 0]


def test_invalid_rows_are_nan_and_others_are_not(backend):
    scores = torch.rand(4, 50)
    scores[0, 3], scores[1, 4], scores[2, 0] = torch.nan, torch.inf, -torch.inf
    for levels in (1, 15, None):
        h = rf.sparsify(scores, 0.2, 0.1, levels=levels)
        assert h[:3].isnan().all()
        assert h[3].isfinite().all()


@pytest.mark.parametrize("dtype", FEWER_DTYPES)
@pytest.mark.parametrize("levels", [1, 15, None])
def test_dtypes_and_strides(backend, dtype, levels):
    scores = torch.randn(2, 3, ROW).to(dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    rows = scores[..., 3:]  # farther apart than they are long
    views = (rows, scores, scores.transpose(0, 1), scores[..., ::3], scores.transpose(1, 2), scores.flip(1))
    for view in views if takes_views(dtype) else views[:1]:
        h = rf.sparsify(view, 0.3, 0.1, levels=levels)
        assert (h.shape, h.dtype) == (view.shape, compute)
        expected = [expected_map(r, 0.3, 0.1, levels) for r in view.to(compute).reshape(-1, view.shape[-1]).numpy()]
        np.testing.assert_array_equal(h.reshape(-1, view.shape[-1]).numpy(), np.stack(expected))


def test_opcheck():
    op = torch.ops.robattr_fast.sparsify.default
    for levels in (1, 15, None):
        torch.library.opcheck(op, (torch.rand(2, 3, 40), 0.3, 0.1, levels))
    torch.library.opcheck(op, (torch.rand(2, 40, dtype=torch.float64).requires_grad_(), 0.3, 0.1, None))


@pytest.mark.parametrize("levels", [1, 15, None])
def test_compile(levels):
    scores = torch.rand(3, 100)
    compiled = torch.compile(
        lambda s: rf.sparsify(s + 1, 0.3, 0.1, levels=levels) * 2, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(scores), rf.sparsify(scores + 1, 0.3, 0.1, levels=levels) * 2)


def spaced(*shape):
    """Positive scores that finite differences cannot reorder."""
    n = shape[-1]
    return torch.stack([(torch.randperm(n, dtype=torch.float64) + 1) / n for _ in range(shape[0])]).requires_grad_()


@pytest.mark.parametrize(("tau", "gamma"), [(0.5, 0.2), (1.0, 0.05), (0.5, None)])
def test_twice_against_differences(backend, tau, gamma):
    scores = spaced(3, 20)
    torch.autograd.gradcheck(lambda s: rf.sparsify(s, tau, gamma, levels=None), scores, fast_mode=INTERPRETED)
    torch.autograd.gradgradcheck(lambda s: rf.sparsify(s, tau, gamma, levels=None), scores, fast_mode=INTERPRETED)


def test_third_derivative(backend):
    scores = spaced(1, 10)

    def second(s):
        (first,) = torch.autograd.grad(rf.sparsify(s, 0.6, 0.2, levels=None).square().sum(), s, create_graph=True)
        return torch.autograd.grad((first**2).sum(), s, create_graph=True)[0]

    torch.autograd.gradcheck(second, scores)


def test_backward_in_another_thread_keeps_the_backend(monkeypatch):
    """Autograd's threads of CUDA devices do not inherit the context of the caller."""
    ran = []
    implementation = rf.backends._registry["topk_threshold"]["reference"]
    recorded = dataclasses.replace(
        implementation, call=lambda *args, out: ran.append(1) or implementation.call(*args, out=out)
    )
    monkeypatch.setitem(rf.backends._registry["topk_threshold"], "reference", recorded)
    scores = spaced(2, 20)
    with rf.backends.use("reference", strict=True):
        total = rf.sparsify(scores, 0.5, 0.2, levels=None).sum()
    thread = threading.Thread(target=total.backward)
    thread.start()
    thread.join()
    assert ran == [1]
    assert scores.grad.count_nonzero() > 0


def test_gradient_by_hand(backend):
    # k_tau = 4, k_gamma = 2: support 4, 2, 2, 1; g = 2, attained first at index 1; only 1 lies below it.
    scores = torch.tensor([4.0, 2.0, 1.0, 2.0, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 10.0, 100.0, 1000.0, 1e4, 1e5], dtype=torch.float64)
    (grad,) = torch.autograd.grad(rf.sparsify(scores, 4 / 6, 2 / 6, levels=None), scores, weight)
    assert grad.tolist() == [0, -100 / 4, 100 / 2, 0, 0, 0]


def test_gradient_is_zero_where_nothing_can_move(backend):
    scores = torch.tensor([[1.0, 0.0, 0.0, -1.0], [1.0, torch.nan, 0.5, 0.2]], requires_grad=True)
    h = rf.sparsify(scores, 1.0, 0.75, levels=None)
    (grad,) = torch.autograd.grad(h, scores, torch.ones_like(h))
    assert grad.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_has_the_dtype_of_the_scores(dtype):
    scores = torch.rand(2, 64).to(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(rf.sparsify(scores, 0.5, 0.1, levels=None).sum(), scores)
    assert grad.dtype == dtype
    assert grad.isfinite().all()
    assert grad.count_nonzero() > 20


def test_rounded_maps_have_no_gradient():
    assert not rf.sparsify(torch.rand(10, requires_grad=True), 0.5, levels=4).requires_grad


def test_gradient_under_compile():
    scores = torch.rand(3, 100, requires_grad=True)

    def loss(s):
        return rf.sparsify(s, 0.3, 0.1, levels=None).pow(3).sum()

    (expected,) = torch.autograd.grad(loss(scores), scores)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(scores), scores)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tau": 0.0}, ValueError, "tau: got 0.0"),
        ({"tau": 1.1}, ValueError, "tau: got 1.1"),
        ({"tau": float("nan")}, ValueError, "tau: got nan"),
        ({"gamma": 0.6}, ValueError, "gamma: got 0.6"),
        ({"gamma": 0.0}, ValueError, "gamma: got 0.0"),
        ({"levels": 0}, ValueError, "levels: got 0"),
        ({"levels": 16}, ValueError, "levels: got 16"),
        ({"levels": 1.5}, TypeError, "levels: got float"),
        ({"scores": torch.arange(5)}, TypeError, "scores: got dtype torch.int64"),
        ({"scores": torch.empty(0)}, ValueError, "scores: got the empty shape"),
        ({"scores": torch.tensor(1.0)}, ValueError, "at least 1 dimension"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        rf.sparsify(**({"scores": torch.rand(5), "tau": 0.5} | arguments))


def test_second_derivative_under_compile():
    scores = spaced(1, 30).detach().requires_grad_()
    check_second_derivative_under_compile(lambda s: rf.sparsify(s, 0.5, 0.2, levels=None), scores)
