"""The label certificate: formula, abstention, and coverage with the class chosen from the same samples."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom, norm

from robattr_fast.certificates.theorems.bounds import BOUNDS
from robattr_fast.certificates.theorems.label import certify_label


def votes(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def test_formula():
    label, radius = certify_label(votes([3, 90, 7]), torch.tensor([100]), 0.01, 0.5, "clopper-pearson")
    assert label.tolist() == [1]
    assert label.dtype == torch.int64
    assert radius.item() == pytest.approx(0.5 * norm.ppf(beta.ppf(0.005, 90, 11)), rel=1e-9)


@pytest.mark.parametrize("bound", BOUNDS)
def test_abstains(bound):
    """On ties, on small leads, without samples, and when too many samples vote for no class."""
    counts = votes([500, 500, 0], [510, 490, 0], [0, 0, 0], [500, 100, 0], [999, 1, 0])
    samples = torch.tensor([1000, 1000, 0, 1000, 1000])
    label, radius = certify_label(counts, samples, 0.01, 1.0, bound)
    assert label.tolist() == [-1, -1, -1, -1, 0]
    assert (radius[:4] == 0).all()
    assert radius[4] > 1


def false_claims(shares: list[float], bound: str, alpha: float, looks: int, seed: int = 0) -> int:
    """Of 4000 runs, those in which a label or a radius that is not true is claimed at any of the looks."""
    rng = np.random.default_rng(seed)
    truth = torch.tensor([norm.ppf(share) if share < 1 else math.inf for share in shares], dtype=torch.float64)
    counts = np.zeros((4000, len(shares)), dtype=np.int32)
    wrong = torch.zeros(4000, dtype=torch.bool)
    for look in range(1, looks + 1):
        counts += rng.multinomial(400 // looks, shares, size=4000).astype(np.int32)
        samples = torch.full((4000,), 400 // looks * look)
        label, radius = certify_label(torch.from_numpy(counts), samples, alpha, 1.0, bound)
        wrong |= (label >= 0) & (radius > truth[label])
    return int(wrong.sum())


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.52, 0.48], [0.45, 0.4, 0.15], [0.8, 0.1, 0.1]])
@pytest.mark.parametrize(("bound", "looks"), [("hoeffding", 1), ("kl", 1), ("clopper-pearson", 1), ("betting", 20)])
def test_coverage(shares, bound, looks):
    assert false_claims(shares, bound, 0.05, looks) <= binom.ppf(0.9999, 4000, 0.05)


def test_the_half_is_needed():
    """At level alpha instead of alpha/2, two classes of equal share break the certificate: alpha/2 * 2 is doubled."""
    assert false_claims([0.5, 0.5], "clopper-pearson", 0.1, 1) > binom.ppf(0.9999, 4000, 0.05)
