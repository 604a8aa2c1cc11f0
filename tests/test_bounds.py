"""Bounds for a number of samples fixed in advance."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom

from robattr_fast.certificates.theorems.bounds import BOUNDS, marginal_bounds, sample_mean


def all_counts(samples: int) -> torch.Tensor:
    return torch.arange(samples + 1, dtype=torch.int32)[None, :, None]


@pytest.mark.parametrize(("samples", "delta"), [(1, 0.1), (50, 0.05), (1000, 1e-7)])
def test_hoeffding(samples, delta):
    lower, upper = marginal_bounds("hoeffding", delta, all_counts(samples), torch.tensor([samples]))
    mean = np.arange(samples + 1) / samples
    width = math.sqrt(math.log(1 / delta) / (2 * samples))
    np.testing.assert_allclose(lower[0], np.clip(mean - width, 0, 1), rtol=1e-12)
    np.testing.assert_allclose(upper[0], np.clip(mean + width, 0, 1), rtol=1e-12)


@pytest.mark.parametrize(("samples", "delta"), [(1, 0.1), (50, 0.05), (1000, 1e-7), (8192, 1e-7)])
def test_kl_solves_its_equation_from_outside(samples, delta):
    lower, upper = marginal_bounds("kl", delta, all_counts(samples), torch.tensor([samples]))
    target = -np.log(np.longdouble(delta))
    for count in range(samples + 1):
        p = np.longdouble(count) / samples
        for bound, limit in ((lower[0, count], 0), (upper[0, count], 1)):
            m = np.longdouble(bound.item())
            if p == limit:
                assert m == limit
                continue
            gains = (p * np.log(p / m) if p > 0 else 0) + ((1 - p) * np.log((1 - p) / (1 - m)) if p < 1 else 0)
            ulps = samples * abs(m - p) / (m * (1 - m)) * 4e-16
            assert 0 <= samples * gains - target < 1e-9 + ulps


@pytest.mark.parametrize(("samples", "delta"), [(1, 0.1), (50, 0.05), (1000, 1e-7)])
def test_kl_is_never_worse_than_hoeffding(samples, delta):
    q = torch.tensor([samples])
    kl, hoeffding = (marginal_bounds(bound, delta, all_counts(samples), q) for bound in ("kl", "hoeffding"))
    assert (kl[0] >= hoeffding[0]).all()
    assert (kl[1] <= hoeffding[1]).all()
    assert (kl[1] - kl[0] < hoeffding[1] - hoeffding[0]).any()


@pytest.mark.parametrize(("samples", "delta"), [(1, 0.1), (50, 0.05), (1000, 1e-7)])
def test_clopper_pearson_is_that_of_scipy(samples, delta):
    lower, upper = marginal_bounds("clopper-pearson", delta, all_counts(samples), torch.tensor([samples]))
    count = np.arange(samples + 1)
    np.testing.assert_allclose(lower[0, 1:], beta.ppf(delta, count[1:], samples - count[1:] + 1), rtol=1e-10)
    np.testing.assert_allclose(upper[0, :-1], beta.isf(delta, count[:-1] + 1, samples - count[:-1]), rtol=1e-10)
    assert lower[0, 0] == 0
    assert upper[0, -1] == 1


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.83])
def test_coverage_of_binary_samples_is_exact(bound, p):
    """The probability of a wrong bound, by summation over all outcomes."""
    samples, delta = 300, 0.05
    lower, upper = marginal_bounds(bound, delta, all_counts(samples), torch.tensor([samples]))
    probability = binom.pmf(np.arange(samples + 1), samples, p)
    assert probability[lower[0].numpy() > p].sum() <= delta
    assert probability[upper[0].numpy() < p].sum() <= delta


@pytest.mark.parametrize("bound", ["hoeffding", "kl", "betting"])
@pytest.mark.parametrize("shares", [(0.9, 0.03, 0.03, 0.04), (0.2, 0.3, 0.1, 0.4)])
def test_coverage_of_level_counts(bound, shares):
    runs, samples, delta = 20000, 200, 0.05
    counts = np.random.default_rng(0).multinomial(samples, shares, size=runs)[None, :, 1:]
    lower, upper = marginal_bounds(bound, delta, torch.tensor(counts, dtype=torch.int32), torch.tensor([samples]))
    mean = sum(level * share for level, share in enumerate(shares)) / 3
    allowed = binom.ppf(0.9999, runs, delta)
    assert (lower > mean).sum() <= allowed
    assert (upper < mean).sum() <= allowed


@pytest.mark.parametrize("bound", BOUNDS)
def test_images_without_samples_know_nothing(bound):
    counts = torch.tensor([[[0], [0]], [[3], [10]]], dtype=torch.int32)
    lower, upper = marginal_bounds(bound, 0.1, counts, torch.tensor([0, 10]))
    assert (lower[0] == 0).all()
    assert (upper[0] == 1).all()
    assert lower[1, 1] > 0
    assert upper[1, 0] < 1


@pytest.mark.parametrize("bound", ["hoeffding", "kl"])
def test_sums_and_counts_agree(bound):
    samples = torch.tensor([100, 200])
    counts = torch.tensor([[[10, 4, 3], [0, 0, 0]], [[20, 0, 100], [0, 0, 200]]], dtype=torch.int32)
    sums = (counts.double() @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)) / 3
    of_counts, of_sums = (marginal_bounds(bound, 0.01, values, samples) for values in (counts, sums))
    torch.testing.assert_close(of_counts, of_sums, rtol=1e-12, atol=1e-14)


def test_equal_weighted_counts_have_equal_means():
    counts = torch.tensor([[[3, 0, 0], [1, 1, 0], [0, 0, 1]]], dtype=torch.int32)
    assert sample_mean(counts, torch.tensor([7])).unique().tolist() == [1 / 7]


@pytest.mark.parametrize("bound", BOUNDS)
def test_unknown_samples_count_as_one_in_upper_bounds_only(bound):
    samples, unknown = torch.tensor([100]), torch.tensor([5], dtype=torch.int32)
    counts = torch.tensor([[[20], [60]]], dtype=torch.int32)
    lower, upper = marginal_bounds(bound, 0.01, counts, samples, unknown=unknown)
    assert torch.equal(lower, marginal_bounds(bound, 0.01, counts, samples)[0])
    assert torch.equal(upper, marginal_bounds(bound, 0.01, counts + 5, samples)[1])
    assert counts.flatten().tolist() == [20, 60]


@pytest.mark.parametrize(
    ("bound", "values", "delta", "words"),
    [
        ("betting", torch.zeros(1, 2, dtype=torch.float64), 0.1, "hoeffding or kl"),
        ("clopper-pearson", torch.zeros(1, 2, dtype=torch.float64), 0.1, "hoeffding or kl"),
        ("clopper-pearson", torch.zeros(1, 2, 3, dtype=torch.int32), 0.1, "levels=1"),
        ("bernstein", torch.zeros(1, 2, 1, dtype=torch.int32), 0.1, "one of hoeffding"),
        ("kl", torch.zeros(1, 2, 1, dtype=torch.int32), 1.5, "delta"),
    ],
)
def test_refused(bound, values, delta, words):
    with pytest.raises(ValueError, match=words):
        marginal_bounds(bound, delta, values, torch.tensor([10]))
