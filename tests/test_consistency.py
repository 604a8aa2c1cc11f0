"""Tests of a claimed population by a part of it: level under true claims, power against false ones."""

import numpy as np
import pytest
from _larger import larger
from scipy.stats import binomtest, hypergeom

from robattr_fast.certificates.verify.consistency import implausible, mean_refuted

pytestmark = pytest.mark.once


def test_tails_of_one_count():
    claimed, found = np.full(21, 30), np.arange(21)
    law = hypergeom(100, 30, 20)
    tails = np.minimum(law.cdf(found), law.sf(found - 1))
    for level in (1e-3, 0.05):
        # 21 counts, two tails each.
        np.testing.assert_array_equal(implausible(claimed, found, 100, 20, level), tails < level / 42)


@pytest.mark.parametrize(
    ("claimed", "found", "excluded"), [(0, 0, False), (0, 1, True), (100, 20, False), (100, 19, True), (90, 9, True)]
)
def test_what_the_claim_excludes(claimed, found, excluded):
    """With 90 hits of 100 a draw of 20 holds at least 10."""
    assert implausible(np.array([claimed]), np.array([found]), 100, 20, 1e-12).tolist() == [excluded]


def draws(values, sample, runs, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.permutation(values)[:sample] for _ in range(runs)]


@pytest.mark.parametrize("runs", [200, *larger(1500)])
@pytest.mark.parametrize("kind", ["binary", "narrow", "rare"])
def test_a_true_claim_is_refuted_at_most_as_often_as_stated(kind, runs):
    rng = np.random.default_rng(1)
    values = {
        "binary": (rng.random(200) < 0.4).astype(float),
        "narrow": rng.normal(0.6, 0.02, 200).clip(0, 1),
        "rare": (np.arange(200) < 2).astype(float),
    }[kind]
    level = 0.1
    refuted = sum(mean_refuted(drawn, values.sum(), 200, level) for drawn in draws(values, 60, runs))
    assert binomtest(refuted, runs, level, alternative="greater").pvalue > 1e-3
    counts = np.array([int((values > 0.5).sum())])
    wrong = sum(
        bool(implausible(counts, np.array([int((drawn > 0.5).sum())]), 200, 60, level)[0])
        for drawn in draws(values, 60, runs, seed=1)
    )
    assert binomtest(wrong, runs, level, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize("shift", [-0.25, 0.25])
def test_a_false_claim_is_refuted(shift):
    values = np.random.default_rng(2).normal(0.5, 0.05, 400).clip(0, 1)
    claim = values.sum() + shift * 400
    assert all(mean_refuted(drawn, claim, 400, 1e-3) for drawn in draws(values, 100, 20))
    assert not any(mean_refuted(drawn, claim, 400, 1e-3, margin=abs(shift)) for drawn in draws(values, 100, 20))


def test_the_whole_population_settles_it():
    values = np.full(50, 0.5)
    assert mean_refuted(values, 24.9, 50, 1e-9)
    assert not mean_refuted(values, 25.0, 50, 1e-9)
    assert mean_refuted(np.array([0.0, 1.0]), 0.0, 50, 1e-9)
