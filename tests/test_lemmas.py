"""Lemmas 3 to 5, the shares of alpha and the one-sided bounds against a second evaluation in 40 digits (`_lemmas`).

A bound of the package must lie on the safe side of the exact one and within TIGHT of it, relative.
"""

import functools
import itertools
import math

import _lemmas as exact
import numpy as np
import pytest
import torch
from mpmath import mp, mpf

from robattr_fast import Certificate
from robattr_fast.certificates.ledger import AlphaLedger
from robattr_fast.certificates.moments.concentration import (
    GramSummary,
    error_bound,
    frobenius_bound,
    look_schedule,
    spectral_bound,
    summarize_gram,
)
from robattr_fast.certificates.moments.deflation import DeflatedSummary
from robattr_fast.certificates.moments.second_moment import SecondMoments, second_moments
from robattr_fast.certificates.theorems import marginal
from robattr_fast.certificates.theorems.bounds import marginal_bounds
from robattr_fast.certificates.theorems.label import certify_label
from robattr_fast.certificates.theorems.membership import membership

# Roots are searched to 1e-9 and enlarged by as much; where they depend weakly on an inequality a little more is lost.
TIGHT = 2e-8


def assert_just_above(found, truth, tight=TIGHT):
    assert truth <= mpf(found) <= truth * (1 + mpf(tight))


def assert_largest(found, admits, high):
    """``found`` bounds every admissible number up to ``high`` and is near the largest."""
    found, high = mpf(found), mpf(high)
    assert found <= high * (1 + mpf(TIGHT))
    assert admits(min(found * (1 - mpf(TIGHT)), high))
    if found < high * (1 - mpf(10) ** -14):
        assert not any(admits(found * (high / found) ** (mpf(i) / 25)) for i in range(26))


@pytest.mark.parametrize("delta", [0.3, 0.0068, 1e-5])
@pytest.mark.parametrize("q", [2, 3, 4, 5, 512, 8192])
@pytest.mark.parametrize(
    ("trace", "F", "lam", "B2"),
    [(11974.0, 145.0, 103.0, 18452.0), (3.0, 1.5, 0.7, 9.0), (0.0, 2.0, 2.0, 4.0), (5.0, 3.0, 50.0, 12.0)],
)
def test_lemma_3(trace, F, lam, B2, q, delta):
    assert_just_above(error_bound(trace, q, F, lam, B2, delta), exact.error(trace, q, F, lam, B2, delta), 1.1e-9)


def test_lemma_3_takes_either_bound():
    """The cases above tell the two apart: each is the smaller one somewhere."""
    cantelli = [
        exact.deviation(q, 145, 103, 18452, delta) == 145 * mp.sqrt(2 * q * (q - 1) * (1 / mpf(delta) - 1))
        for q, delta in itertools.product((2, 512, 8192), (0.3, 1e-5))
    ]
    assert len(set(cantelli)) == 2


SPECTRA = {
    "photograph": (exact.Blocks(109.0, 145**2 + 11974**2 / 2048 + 5000, 2048, 1, 2048), 18452.0, 15052),
    "four blocks": (exact.Blocks(115.0, 1.1e5, 8192, 4, 2048), 18452.0, 15052),
    "after the pilots": (exact.Blocks(41.0, 3.3e4, 7160, 4, 1016), 18452.0, 15052),
    "many small blocks": (exact.Blocks(1.1, 9.0, 390, 13, 30), 14.5, 8),
    "a priori": (exact.Blocks(0.4, 1.0, 200, 2, 100), 16.0, 8),
    "nothing seen": (exact.Blocks(0.0, 0.0, 8192, 1, 8192), 20000.0, 15052),
    "invalid": (exact.Blocks(1.4, 11.0, 300, 3, 100, shift=0.6), 14.5, 8),
    "hopeless": (exact.Blocks(7.0, 60.0, 12, 3, 4), 9.0, 8),
}


@pytest.mark.parametrize("delta", [0.2, 0.0034, 1e-6])
@pytest.mark.parametrize("name", SPECTRA)
def test_lemma_4(name, delta):
    seen, B2, k = SPECTRA[name]
    found = spectral_bound(
        seen.eigenvalue, seen.fourth, seen.rows, B2, k, delta, seen.shift, blocks=seen.blocks, fewest=seen.fewest
    )
    assert_largest(found, lambda y: exact.spectral_admits(y, seen, B2, k, delta), min(k, B2))
    if seen.fewest == seen.rows // seen.blocks:
        assert found == spectral_bound(
            seen.eigenvalue, seen.fourth, seen.rows, B2, k, delta, seen.shift, blocks=seen.blocks
        )


def test_lemma_4_gives_the_number_of_the_page():
    seen, B2, k = SPECTRA["photograph"]
    assert spectral_bound(seen.eigenvalue, seen.fourth, 2048, B2, k, 0.2 * 0.75 * 0.0225) == pytest.approx(182, abs=0.5)


HALVES = {
    "photograph": (exact.Halves(2048, 1, 120.0, 3400.0, 2.6e4), 182.0, 18452.0, 15052),
    "four blocks": (exact.Halves(2048, 4, 125.0, 3500.0, 2.7e4), 205.0, 18452.0, 15052),
    "odd rows": (exact.Halves(201, 3, 1.2, 3.0, 1.5), 2.0, 12.0, 8),
    "one pattern": (exact.Halves(512, 1, 0.0, 8.0, 0.0), 0.5, 16.0, 8),
    "nothing seen": (exact.Halves(512, 2, 0.3, 8.0, 0.0), 0.5, 16.0, 8),
    "hopeless": (exact.Halves(4, 2, 3.0, 4.0, 20.0), 8.0, 12.0, 8),
}


@pytest.mark.parametrize("delta", [0.2, 0.0025, 1e-5])
@pytest.mark.parametrize("name", HALVES)
def test_lemma_5(name, delta):
    halves, lam, B2, k = HALVES[name]
    summary = GramSummary(
        rows=halves.block_rows * halves.blocks, blocks=halves.blocks, norm2=1.0, eigenvalue=1.0, fourth=1.0,
        half_eigenvalue=halves.lambda_A, half_norm2=halves.a2, half_mean=halves.w,
    )  # fmt: skip
    Z_u = exact.crossed(halves, k, delta) if halves.lambda_A else mpf(0)
    found = mpf(frobenius_bound(summary, lam, B2, k, delta))
    high = mpf(lam) * min(k, mpf(B2))
    assert_largest(found**2, lambda y: exact.frobenius_admits(y, halves, lam, B2, k, delta, Z_u), high)


def summary_of(levels: np.ndarray, num_levels: int, rows: int) -> GramSummary:
    parts = [torch.from_numpy(part) for part in np.split(levels, len(levels) // rows)]
    return functools.reduce(GramSummary.joined, [summarize_gram(part @ part.T, num_levels) for part in parts])


RUNS = {
    "one block, one look": (100, 100, 100, 0),
    "three blocks": (600, 600, 200, 0),
    "a look at two of three": (512, 600, 200, 0),
    "a look inside the first": (512, 2048, 1024, 0),
    "invalid": (600, 600, 200, 3),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_evaluation_is_the_fixed_point_of_the_lemmas(name):
    """Every event at its share, with B^2 = k + ||p||^2 as small as the events themselves make it."""
    samples, planned, retained, invalid = RUNS[name]
    rng = np.random.default_rng(samples + planned)
    n, k, num_levels, alpha = 40, 6, 3, 0.04
    kept = rng.random((samples, n)).argsort(1) < k
    kept[: samples // 2, :3], kept[: samples // 2, 3:] = True, kept[: samples // 2, 3:] & (rng.random(n - 3) < 0.5)
    levels = np.where(kept, rng.integers(1, num_levels + 1, (samples, n)), 0)
    rows = min(samples, retained) if samples < retained else samples // 200 * 200 if retained == 200 else retained
    block = min(rows, retained)
    summary = summary_of(levels[:rows], num_levels, block)
    shrunk = None if invalid else DeflatedSummary(rows - 20, summary.blocks, block - 20, summary.eigenvalue / 2, 3.0)
    counts = torch.from_numpy(np.stack([(levels == value).sum(0) for value in range(1, num_levels + 1)], 1)).int()
    found = second_moments(
        counts, samples, summary, planned=planned, retained=retained, k_tau=k, sigma=0.5, alpha=alpha,
        invalid=2 * invalid, invalid_rows=invalid, deflated=shrunk,
    )  # fmt: skip

    maps = levels / num_levels
    mean = maps.mean(0)
    norm2 = float((mean**2).sum())
    trace = float(((maps - mean) ** 2).sum() / (samples - 1)) + 2 * invalid * (k + norm2) / (samples - 1)
    apart, missing = k + summary.norm2, 2 * invalid / samples * mp.sqrt(k)
    seen = exact.Blocks(
        summary.eigenvalue + invalid / rows * apart, summary.fourth + invalid / rows * apart**2, rows, summary.blocks,
        block, shift=min(1, invalid / block) * math.sqrt(k),
    )  # fmt: skip
    halves = exact.Halves(block, summary.blocks, summary.half_eigenvalue, summary.half_norm2, summary.half_mean)

    def paid(event):
        return exact.level(event, alpha, planned, samples)

    B2 = exact.sure(k, mp.sqrt(norm2), found.error)
    assert_largest(found.spectral, lambda y: exact.spectral_admits(y, seen, B2, k, paid("spectral")), min(k, B2))
    lam = mpf(found.spectral)
    if invalid:
        assert mpf(found.frobenius) == pytest.approx(mp.sqrt(lam * k), rel=1e-12)
    else:
        Z_u = exact.crossed(halves, k, paid("frobenius"))
        assert_largest(
            mpf(found.frobenius) ** 2,
            lambda y: exact.frobenius_admits(y, halves, lam, B2, k, paid("frobenius"), Z_u),
            lam * min(k, B2),
        )
        after = exact.Blocks(shrunk.eigenvalue, shrunk.fourth, shrunk.rows, shrunk.blocks, shrunk.fewest)
        assert_largest(found.deflated, lambda y: exact.spectral_admits(y, after, B2, k, paid("deflated")), lam)
    e = missing + exact.error(trace, samples, found.frobenius, lam, B2, paid("error"))
    assert e * (1 - mpf(10) ** -13) <= found.error <= e * (1 + mpf(TIGHT))
    assert found.norm == pytest.approx(math.sqrt(norm2), rel=1e-14)


@pytest.mark.parametrize("planned", [2, 512, 513, 8192])
def test_looks_pay_their_shares(planned):
    for look, part in look_schedule(planned).items():
        assert part == pytest.approx(float(exact.level("error", 1, planned, look) / exact.SHARES["error"]), rel=1e-15)
    assert sum(exact.SHARES.values()) == 1


@pytest.mark.parametrize("radius", [0.0, 0.01, 0.1, 0.3, 5.0])
@pytest.mark.parametrize(
    ("norm", "e", "lam", "mu"), [(20.0, 1.3, 85.0, 30.0), (2.0, 2.5, 1.0, 0.3), (3.0, 0.1, 0.0, 0.0)]
)
def test_theorem_7(radius, norm, e, lam, mu):
    k, sigma = 40, 0.25
    moments = SecondMoments(sigma, 512, k, norm, 0.0, e, lam, 1.0, mu)
    moved, shrunk = (exact.c(mpf(radius) / mpf(sigma)) * mp.sqrt(mpf(value)) for value in (lam, mu))
    M0, farthest = min(moved, mp.sqrt(2 * k)), mp.sqrt(mpf(norm) ** 2 + k)
    M, M_W = min(e + M0, farthest), min(e + shrunk, farthest)
    near = 1e-13
    assert moments.smoothed_distance(radius) == pytest.approx(float(M0), rel=near)
    assert moments.distance(radius) == pytest.approx(float(M), rel=near)
    assert moments.deflated_distance(radius) == pytest.approx(float(M_W), rel=near)
    assert moments.cosine(radius) == pytest.approx(float(mp.sqrt(1 - (M / norm) ** 2)) if norm > M else 0, rel=near)
    inner = mpf(norm) - e
    assert moments.smoothed_cosine(radius) == pytest.approx(
        float(mp.sqrt(1 - (M0 / inner) ** 2)) if inner > M0 else 0, rel=near
    )


@pytest.mark.parametrize("distance", [0.5, 1.3, 1.4, 2.0, 7.0, 21.0])
def test_radius_of_a_distance(distance):
    moments = SecondMoments(0.25, 512, 40, 20.0, 0.0, 1.3, 85.0, 1.0, 30.0)
    for found, lam in ((moments.radius(distance), 85), (moments.deflated_radius(distance), 30)):
        g = (mpf(distance) - mpf(1.3)) / mp.sqrt(lam)
        if g <= 0:
            assert found == 0
        elif distance > math.sqrt(20**2 + 40):
            assert found == math.inf
        else:
            truth = mpf(0.25) * mp.sqrt(mp.log1p(g**2))
            assert truth * (1 - mpf(2e-9)) <= found < truth


# The one-sided bounds and what they pay


def mirrored(found, counts):
    """Lower bounds as they are, upper bounds as those of the misses."""
    lower, upper = (side[0].tolist() for side in found)
    return [*zip(counts, lower, strict=True)], [*zip(counts, upper, strict=True)]


@pytest.mark.parametrize(("q", "delta"), [(1, 0.1), (7, 0.3), (300, 0.01), (8192, 1e-7)])
def test_hoeffding_and_kl(q, delta):
    hits = sorted({0, 1, q // 9, q // 2, q - 1, q})
    values = torch.tensor(hits, dtype=torch.int32)[None, :, None]
    t = mp.log(1 / mpf(delta))
    for count, low in mirrored(marginal_bounds("hoeffding", delta, values, torch.tensor([q])), hits)[0]:
        assert low == pytest.approx(float(max(exact.hoeffding(mpf(count) / q, q, delta), 0)), rel=1e-14, abs=1e-15)
    lower, upper = mirrored(marginal_bounds("kl", delta, values, torch.tensor([q])), hits)
    for sides, end in ((lower, 0), (upper, 1)):
        for count, bound in sides:
            mean, m = mpf(count) / q, mpf(bound)
            if mean == end:
                assert m == end
                continue
            assert (m > mean) == bool(end)
            assert m in (0, 1) or q * exact.kl(mean, m) >= t
            nearer = m + (mean - m) * mpf(1e-9)
            # ulps of 1 - m, where the bound is near 1, are larger than that.
            assert q * exact.kl(mean, nearer) <= t or abs(m - end) < 1e-6


@pytest.mark.parametrize(("q", "delta"), [(1, 0.1), (7, 0.3), (120, 1e-6)])
def test_clopper_pearson(q, delta):
    hits = sorted({0, 1, q // 9, q // 2, q - 1, q})
    values = torch.tensor(hits, dtype=torch.int32)[None, :, None]
    lower, upper = mirrored(marginal_bounds("clopper-pearson", delta, values, torch.tensor([q])), hits)
    for count, bound in lower:
        assert bound == 0 if count == 0 else exact.tail(q, count, bound) == pytest.approx(delta, rel=1e-10)
    for count, bound in upper:
        assert bound == 1 if count == q else exact.tail(q, q - count, 1 - mpf(bound)) == pytest.approx(delta, rel=1e-10)


def paid_by(lower: float, mean: float, q: int) -> float:
    """The level of a Hoeffding bound."""
    return math.exp(-2 * q * (mean - lower) ** 2)


@pytest.mark.parametrize(("slack", "events"), [(0, 1), (2, 2)])
def test_what_a_bound_pays(slack, events):
    """The marginal share divided among events and 2n bounds; with slack m, m + 1 times as much for the overlap."""
    n, q, k, alpha, sigma = 12, 4000, 3, 0.05, 0.5
    hits = np.linspace(3400, 600, n).astype(np.int32)
    made = Certificate.from_counts(
        torch.from_numpy(hits)[None, :, None], q, sigma=sigma, alpha=alpha, bound="hoeffding", slack=slack
    )
    share = alpha if slack == 0 else 0.9 * alpha
    for side, sign in ((made.lower[0], 1), (made.upper[0], -1)):
        for hit, bound in zip(hits.tolist(), side.tolist(), strict=True):
            assert paid_by(sign * bound, sign * hit / q, q) == pytest.approx(share / events / (2 * n), rel=1e-9)
    delta = share / events * (slack + 1) / (2 * n)
    width = math.sqrt(math.log(1 / delta) / (2 * q))
    for i in range(1, k - slack + 1):
        stays, enters = hits[i + slack - 1] / q - width, hits[k + k - i - slack] / q + width
        gap = mpf(sigma) / 2 * (exact.quantile(stays) - exact.quantile(enters))
        # T4: i + m of the box leave i.
        assert float(made.radius(k, i / k)) == pytest.approx(float(gap), rel=1e-9)


def test_the_ledger_is_that_of_the_page():
    usual = AlphaLedger.allot(0.2, bound="betting", slack=None, second_moment=True)
    assert (usual.label, usual.marginal, usual.moment) == pytest.approx((0.02, 0.09, 0.09), rel=1e-15)
    without = AlphaLedger.allot(0.2, bound="betting", slack=None, second_moment=False)
    assert (without.label, without.marginal, without.moment) == pytest.approx((0.02, 0.18, 0.0), rel=1e-15)
    published = AlphaLedger.allot(0.2, bound="hoeffding", slack=0, second_moment=False)
    assert (published.label, published.marginal, published.moment) == (0.0, 0.2, 0.0)


def test_the_label_pays_half():
    label, radius = certify_label(
        torch.tensor([[300, 700]], dtype=torch.int32), torch.tensor([1000]), 0.03, 0.25, "hoeffding"
    )
    truth = mpf(0.25) * exact.quantile(exact.hoeffding(mpf(7) / 10, 1000, mpf(3) / 200))
    assert label.item() == 1
    assert radius.item() == pytest.approx(float(truth), rel=1e-12)


def test_gaps_of_theorems_2_3_and_membership():
    rng = np.random.default_rng(0)
    n, k, sigma = 11, 4, 0.3
    low = rng.uniform(0.02, 0.9, n)
    high = low + rng.uniform(0, 0.08, n)
    top = np.zeros(n, dtype=bool)
    top[rng.permutation(n)[:k]] = True

    def z(values):
        return [exact.quantile(value) for value in values]

    ranked = sorted(z(low), reverse=True)
    gaps = marginal.population_gaps(torch.from_numpy(low)[None], k, sigma)[0].tolist()
    for i, gap in enumerate(gaps, 1):
        assert gap == pytest.approx(float(sigma / 2 * (ranked[i - 1] - ranked[2 * k - i])), rel=1e-12)
    stays, enters = sorted(z(low[top]), reverse=True), sorted(z(high[~top]), reverse=True)
    gaps = marginal.sampled_gaps(
        torch.from_numpy(low)[None], torch.from_numpy(high)[None], torch.from_numpy(top)[None], k, sigma
    )[0].tolist()
    for i, gap in enumerate(gaps, 1):
        assert gap == pytest.approx(float(sigma / 2 * (stays[i - 1] - enters[k - i])), rel=1e-12)
    stays_in, stays_out = membership(torch.from_numpy(low), torch.from_numpy(high), k, sigma)
    rival, bar = sorted(z(high))[-k - 1], sorted(z(low))[-k]
    for j in range(n):
        inside, outside = exact.quantile(low[j]) - rival, bar - exact.quantile(high[j])
        assert stays_in[j].item() == pytest.approx(max(0.0, float(sigma / 2 * inside)), rel=1e-12)
        assert stays_out[j].item() == pytest.approx(max(0.0, float(sigma / 2 * outside)), rel=1e-12)


def test_radius_at_the_ends_of_the_distance():
    """Distances are to stay below: at e_q itself, and at the cap, that is no radius and not every radius."""
    still = SecondMoments(0.25, 512, 40, 20.0, 0.0, 1.3, 0.0, 1.0)
    assert (still.radius(1.3), still.radius(1.4)) == (0.0, math.inf)
    moving = SecondMoments(0.25, 512, 40, 20.0, 0.0, 1.3, 85.0, 1.0)
    assert moving.radius(math.sqrt(440)) < moving.radius(math.sqrt(441)) == math.inf
