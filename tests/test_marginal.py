"""Overlap and pixel theorems against brute force, against maps that attain them, and against a literal evaluation."""

import itertools
import math

import numpy as np
import pytest
import torch
from _larger import larger
from scipy.stats import binom, norm

from robattr_fast.certificates.certificate.certificate import Certificate
from robattr_fast.certificates.settings import Settings
from robattr_fast.certificates.theorems import marginal
from robattr_fast.metrics.overlap import top_k


def overlap_at(values: torch.Tensor, k: int, radius: float, sigma: float) -> int:
    gaps = marginal.population_gaps(values[None], k, sigma)
    return int(marginal.certified_count(gaps, torch.tensor([radius]), len(values))[0, 0])


def smallest_overlap(values: np.ndarray, top: np.ndarray, k: int, shift: float, steps: int) -> int:
    """Least overlap of `top` with the top-k set, over all ways to move each Phi^-1(p) by one of `steps` shifts."""
    shifts = np.array(list(itertools.product(np.linspace(-shift, shift, steps), repeat=len(values))))
    moved = norm.ppf(values) + shifts
    # Ties in favour of elements outside `top`: the worst case.
    order = np.lexsort((np.broadcast_to(top, moved.shape), -moved), axis=1)
    return int(top[order[:, :k]].sum(1).min())


@pytest.mark.parametrize(("n", "steps"), [(4, 5), (6, 3), (9, 2)])
@pytest.mark.parametrize("seed", range(12))
def test_population_overlap_is_sound_and_attained(n, steps, seed):
    rng = np.random.default_rng(seed)
    values = rng.uniform(0.02, 0.98, n)
    for k in range(1, n + 1):
        top = np.zeros(n, dtype=bool)
        top[np.argsort(-values)[:k]] = True
        for shift in (0.0, 0.1, 0.4, 1.0):
            certified = overlap_at(torch.from_numpy(values), k, 0.3 * shift, 0.3)
            # The extreme shifts are among the steps, so the worst case is found, and it is the certified one.
            assert certified == smallest_overlap(values, top, k, shift, steps)


def half_space_value(offsets: np.ndarray, normals: np.ndarray, x: float, sigma: float) -> np.ndarray:
    """E 1[a (x + e) + b > 0] for e ~ N(0, sigma^2) and a = +-1, exactly."""
    return norm.cdf((normals * x + offsets) / sigma)


def test_parallel_half_spaces_attain_the_overlap_and_the_neighbouring_index_is_wrong():
    rng = np.random.default_rng(0)
    violations = 0
    for _ in range(200):
        n, sigma, radius = 20, 0.5, rng.uniform(0.01, 0.3)
        k = int(rng.integers(2, n // 2 + 1))
        values = np.sort(rng.uniform(0.05, 0.95, n))[::-1]
        certified = overlap_at(torch.from_numpy(values.copy()), k, radius, sigma)
        # Elements certified+1..k fall, the same number behind them rise, those ahead and far behind get out of the way.
        normals = np.ones(n)
        normals[certified:k] = -1
        normals[2 * k - certified :] = -1
        offsets = sigma * norm.ppf(values)
        np.testing.assert_allclose(half_space_value(offsets, normals, 0.0, sigma), values)
        moved = half_space_value(offsets, normals, radius, sigma)
        attained = len(set(np.argsort(-moved)[:k]) & set(range(k)))
        assert attained == certified
        # With the index 2k - i + 2 in place of 2k - i + 1 more would be claimed than these maps keep.
        z = norm.ppf(values)
        wrong = sum(2 * k - i + 2 > n or z[i - 1] - 2 * radius / sigma > z[2 * k - i + 1] for i in range(1, k + 1))
        violations += wrong > attained
    assert violations > 20


@pytest.mark.parametrize("seed", range(20))
def test_sampled_overlap_is_sound_for_every_map_within_the_bounds(seed):
    """Brute force over p in {L, U} and shifts of either sign; S is arbitrary."""
    rng = np.random.default_rng(seed)
    n = 6
    values = rng.uniform(0.05, 0.95, n)
    lower, upper = np.clip(values - rng.uniform(0, 0.1, n), 0.01, 1), np.clip(values + rng.uniform(0, 0.1, n), 0, 0.99)
    for k in range(1, n + 1):
        top = np.zeros(n, dtype=bool)
        top[rng.permutation(n)[:k] if seed % 2 else np.argsort(-values)[:k]] = True
        bounds = torch.from_numpy(np.stack([lower, upper]))
        gaps = marginal.sampled_gaps(bounds[:1], bounds[1:], torch.from_numpy(top)[None], k, 1.0)
        for radius in (0.0, 0.05, 0.2, 0.5):
            certified = int(marginal.certified_count(gaps, torch.tensor([radius]), n)[0, 0])
            # All maps between the bounds, at their ends, and all shifts, at theirs.
            picks = np.array(list(itertools.product((False, True), repeat=n)))
            moved = norm.ppf(np.where(picks, upper, lower)) + np.where(picks, radius, -radius)
            order = np.lexsort((np.broadcast_to(top, moved.shape), -moved), axis=1)
            worst = int(top[order[:, :k]].sum(1).min())
            assert certified == worst


@pytest.mark.parametrize("slack", [1, 2])
@pytest.mark.parametrize("seed", range(10))
def test_slack_pays_for_wrong_bounds(seed, slack):
    """Up to `slack` bounds wrong in the worst way: the certified overlap still holds."""
    rng = np.random.default_rng(seed)
    n, k = 10, 5
    values = rng.uniform(0.05, 0.95, n)
    top = np.zeros(n, dtype=bool)
    top[np.argsort(-values)[:k]] = True
    for wrong in itertools.combinations(range(n), slack):
        lower, upper = values - 0.01, values + 0.01
        for element in wrong:
            lower[element] = upper[element] = 0.999 if top[element] else 0.001
        bounds = torch.from_numpy(np.stack([lower, upper]))
        gaps = marginal.sampled_gaps(bounds[:1], bounds[1:], torch.from_numpy(top)[None], k, 1.0, slack)
        for radius in (0.0, 0.1, 0.3):
            certified = int(marginal.certified_count(gaps, torch.tensor([radius]), n)[0, 0])
            moved = norm.ppf(values) + np.where(top, -radius, radius)
            assert certified <= top[np.lexsort((top, -moved))[:k]].sum()


def test_zero_and_one_never_move():
    gaps = marginal.population_gaps(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), 2, 0.25)
    assert gaps.tolist() == [[math.inf, math.inf]]
    gaps = marginal.population_gaps(torch.tensor([[1.0, 1.0, 1.0, 0.0]]), 2, 0.25)
    # The second and the third cannot be told apart, but only one of the two first can leave.
    assert gaps.tolist() == [[math.inf, -math.inf]]
    assert (marginal.population_gaps(torch.zeros(1, 4), 2, 0.25) == -math.inf).all()
    assert (marginal.population_gaps(torch.ones(1, 4), 2, 0.25) == -math.inf).all()


def test_large_sets_share_at_least_2k_minus_n():
    gaps = marginal.population_gaps(torch.full((1, 5), 0.5), 4, 1.0)
    assert marginal.certified_count(gaps, torch.tensor([0.0, 1e9]), 5).tolist() == [[3], [3]]
    assert marginal.certified_radius(gaps, 3, 5).item() == math.inf
    assert marginal.certified_radius(gaps, 4, 5).item() == 0
    bounds = torch.tensor([[0.0] * 5, [1.0] * 5], dtype=torch.float64)
    top = torch.tensor([[True, True, True, True, False]])
    gaps = marginal.sampled_gaps(bounds[:1], bounds[1:], top, 4, 1.0, slack=4)
    assert marginal.certified_count(gaps, torch.tensor([0.0]), 5).item() == 3


def test_inequalities_are_strict():
    gaps = torch.tensor([[0.3, 0.2, 0.2]], dtype=torch.float64)
    assert marginal.certified_count(gaps, torch.tensor([0.2, 0.3], dtype=torch.float64), 10).tolist() == [[1], [0]]
    below = marginal.certified_radius(gaps, 3, 10)
    assert 0 < below.item() < 0.2
    assert marginal.certified_count(gaps, below, 10).item() == 3
    assert torch.nextafter(below, torch.tensor([1.0], dtype=torch.float64)).item() == 0.2


def test_ties_of_the_map_go_to_the_lowest_index():
    assert top_k(torch.tensor([[0.5, 0.7, 0.5, 0.5, 0.7]]), 3).tolist() == [[True, True, False, False, True]]
    wide = torch.zeros(2, 5000)
    wide[1, 4000] = 1
    top = top_k(wide, 10)
    assert top[0].nonzero().flatten().tolist() == list(range(10))
    assert top[1].nonzero().flatten().tolist() == [*range(9), 4000]


@pytest.mark.parametrize("k", [0, 7])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match="k must lie"):
        marginal.population_gaps(torch.rand(1, 6), k, 1.0)


@pytest.mark.parametrize("q", [200, 5000])
def test_parity_with_the_published_procedure(q):
    """hoeffding, slack 0, sums: the certified count of a literal numpy evaluation, over k and radius."""
    rng = np.random.default_rng(q)
    n, sigma, alpha = 60, 0.2, 0.05
    sums = rng.beta(0.5, 1.0, size=(3, n)) * q
    settings = Settings(sigma=sigma, shape=(3, 4, 5), levels=None, bound="hoeffding", slack=0, alpha=alpha)
    certificate = Certificate(sums=torch.from_numpy(sums), samples=torch.full((3,), q), settings=settings)
    radii = [0.0, 0.001, 0.01, 0.03, 0.1, 0.5]
    c = math.sqrt(math.log(2 * n / alpha) / (2 * q))
    some = 0
    for k in (1, 2, 7, 30):
        share = certificate.overlap(k, radii).share
        for (r, radius), image in itertools.product(enumerate(radii), range(3)):
            mean = sums[image] / q
            order = np.argsort(-mean, kind="stable")
            low = np.sort(np.maximum(mean[order[:k]] - c, 0))[::-1]
            high = np.sort(np.minimum(mean[order[k:]] + c, 1))[::-1]
            expected = 0
            for i in range(1, k + 1):
                if norm.cdf(norm.ppf(low[i - 1]) - 2 * radius / sigma) > high[k - i]:
                    expected = i
            assert share[r, image] * k == pytest.approx(expected)
            some += expected
    assert some > 20


def claims_too_much(certificate: Certificate, truth: torch.Tensor, k: int) -> torch.Tensor:
    """Runs in which the certified overlap exceeds the true one at any radius; truth: the smoothed map, float64 [n]."""
    top = top_k(certificate.map.flatten(1), k)
    exact = truth.expand(len(certificate), -1).contiguous()
    limits = marginal.sampled_gaps(exact, exact, top, k, certificate.settings.sigma)
    # The overlap is a staircase in the radius, which falls at the gaps: it exceeds another one where a gap is larger.
    return (certificate._gaps(k).clamp_min(0) > limits.clamp_min(0)).any(1)


@pytest.mark.parametrize(
    ("bound", "slack"),
    [("hoeffding", 0), ("kl", 0), ("clopper-pearson", 0), ("clopper-pearson", 2), ("betting", 0), ("betting", None)],
)
def test_coverage_of_overlap_and_pixels(bound, slack):
    """2000 runs with known maps: claims that are too large occur in at most alpha of them."""
    runs, samples, k, alpha = 2000, 400, 20, 0.3
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(np.linspace(0.9, 0.1, 64))
    counts = rng.binomial(samples, truth.numpy(), size=(runs, 64))[:, :, None]
    certificate = Certificate.from_counts(
        torch.tensor(counts, dtype=torch.int32), samples, sigma=0.5, bound=bound, slack=slack, alpha=alpha
    )
    allowed = binom.ppf(0.9999, runs, alpha)
    assert claims_too_much(certificate, truth, k).sum() <= allowed
    assert (certificate._gaps(k)[:, 0] > 0).float().mean() > 0.9

    true_radius = 0.5 * torch.special.ndtri(truth)
    pixels = certificate.pixels([0.0, 0.05, 0.2])
    wrong = torch.zeros(runs, dtype=torch.bool)
    for radius, signs in zip((0.0, 0.05, 0.2), pixels, strict=True):
        wrong |= ((signs == 1) & (true_radius <= radius) | (signs == -1) & (-true_radius <= radius)).any(1)
    assert wrong.sum() <= allowed
    assert (pixels[0] == 1).any()
    assert (pixels[0] == -1).any()


@pytest.mark.parametrize("runs", [200, *larger(2000)])
def test_betting_may_stop_when_it_looks_best(runs):
    """T4 and T5 at the worst of 20 looks, with the best slack: still wrong in at most alpha of the runs."""
    k, alpha = 12, 0.3
    rng = np.random.default_rng(2)
    truth = torch.from_numpy(np.concatenate([np.full(16, 0.55), np.full(24, 0.45)]))
    counts = np.zeros((runs, 40, 1), dtype=np.int32)
    wrong = torch.zeros(runs, dtype=torch.bool)
    for look in range(20):
        counts += rng.binomial(50, truth.numpy(), size=(runs, 40)).astype(np.int32)[:, :, None]
        certificate = Certificate.from_counts(
            torch.from_numpy(counts), 50 * (look + 1), sigma=0.5, alpha=alpha, slack=None
        )
        wrong |= claims_too_much(certificate, truth, k)
        wrong |= ((certificate.lower > truth) | (certificate.upper < truth)).any(1)
    assert wrong.sum() <= binom.ppf(0.9999, runs, alpha)


def test_pixels_follow_their_formula():
    lower = torch.tensor([[0.0, 0.2, 0.6, 0.9, 1.0]], dtype=torch.float64)
    upper = torch.tensor([[0.0, 0.3, 0.8, 1.0, 1.0]], dtype=torch.float64)
    radii = torch.tensor([0.0, 0.1, 0.4, 100.0])
    signs = marginal.certified_pixels(lower, upper, radii, 0.5)
    assert signs.dtype == torch.int8
    expected = [[-1, -1, 1, 1, 1], [-1, -1, 1, 1, 1], [-1, 0, 0, 1, 1], [-1, 0, 0, 0, 1]]
    assert signs[:, 0].tolist() == expected
    edge = marginal.certified_pixels(lower[:, 2:3], upper[:, 2:3], 0.5 * torch.special.ndtri(lower[0, 2:3]), 0.5)
    assert edge.item() == 0
