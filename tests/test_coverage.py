"""Whole certificates over 2000 runs with known truth: some statement is false in at most alpha of them.

Overlap for every radius, bounds and pixels of every element, label and its radius, all from the counts of the same
samples; with betting at whichever of many looks a false statement shows.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from _larger import larger
from scipy.stats import binom, norm

from robattr_fast import Certificate
from robattr_fast.certificates.theorems import marginal
from robattr_fast.metrics.overlap import top_k

pytestmark = pytest.mark.once

RUNS, N, K, SIGMA, ALPHA = 2000, 40, 12, 0.5, 0.3
ALLOWED = binom.ppf(0.9999, RUNS, ALPHA)
CLASSES = np.array([0.52, 0.48])  # a close vote: the label is certified late, if at all


def truth(levels: int) -> tuple[np.ndarray, torch.Tensor]:
    """Probability of each level [N, levels + 1], and the smoothed map [N], whose two plateaus lie close together."""
    high = np.where(np.arange(N) < 16, 0.55, 0.45)
    chances = binom.pmf(np.arange(levels + 1), levels, high[:, None])
    return chances, torch.from_numpy(chances @ np.arange(levels + 1) / levels)


def growing(levels: int, looks: int, step: int, **options) -> Iterator[Certificate]:
    """RUNS certificates as one batch, after ``step`` samples each, then after twice as many, and so on."""
    rng = np.random.default_rng(5)
    chances, _ = truth(levels)
    counts = np.zeros((RUNS, N, levels), dtype=np.int32)
    votes = np.zeros((RUNS, 2), dtype=np.int32)
    for look in range(1, looks + 1):
        counts += rng.multinomial(step, chances, size=(RUNS, N)).astype(np.int32)[:, :, 1:]
        votes += rng.multinomial(step, CLASSES, size=RUNS).astype(np.int32)
        yield Certificate.from_counts(
            torch.from_numpy(counts.copy()),
            look * step,
            sigma=SIGMA,
            class_counts=torch.from_numpy(votes.copy()),
            alpha=ALPHA,
            **options,
        )


def false_statements(certificate: Certificate, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """By kind of statement, the runs [RUNS] in which one is false."""
    # Overlap: the population's own staircase, of the same displayed set, is the most that any procedure may claim.
    top = top_k(certificate.map, K)
    exact = values.expand(RUNS, -1).contiguous()
    limits = marginal.sampled_gaps(exact, exact, top, K, SIGMA)
    radii = [float(certificate.radius(K, share).max()) for share in (0.25, 0.5, 0.75, 1.0)]
    queries = sorted({0.0, *(share * radius for radius in radii for share in (0.1, 0.3, 0.6, 1.0))})
    claimed = (certificate.overlap(K, queries).share * K).round()
    overlap = (claimed > marginal.certified_count(limits, torch.tensor(queries, dtype=torch.float64), N)).any(0)
    bounds = ((certificate.lower > values) | (certificate.upper < values)).any(1)
    label, radius = certificate.prediction()
    holds = torch.from_numpy(SIGMA * norm.ppf(CLASSES))
    false = {"overlap": overlap, "bounds": bounds, "label": (label >= 0) & (radius > holds[label])}
    if certificate.settings.levels == 1:
        reach = SIGMA * torch.special.ndtri(values)
        signs = {r: certificate.pixels(r) for r in (0.0, 0.02, 0.05)}
        wrong = [(s == 1) & (r >= reach) | (s == -1) & (r >= -reach) for r, s in signs.items()]
        false["pixels"] = torch.stack(wrong).any(0).any(1)
    return false


def ever_false(levels: int, looks: int, step: int, **options) -> tuple[int, dict[str, int]]:
    """Runs in which any statement is false at any look, and of each kind."""
    found: dict[str, torch.Tensor] = {}
    for certificate in growing(levels, looks, step, **options):
        for kind, false in false_statements(certificate, truth(levels)[1]).items():
            found[kind] = found.get(kind, torch.zeros(RUNS, dtype=torch.bool)) | false
    return int(torch.stack([*found.values()]).any(0).sum()), {kind: int(runs.sum()) for kind, runs in found.items()}


@pytest.mark.parametrize(
    ("levels", "bound", "slack"),
    [
        (1, "hoeffding", 1),
        (1, "kl", 0),
        (1, "clopper-pearson", 0),
        (1, "clopper-pearson", 3),
        (3, "hoeffding", 1),
        (3, "kl", 2),
    ],
)
def test_at_the_planned_size(levels, bound, slack):
    assert ever_false(levels, 1, 600, bound=bound, slack=slack)[0] <= ALLOWED


@pytest.mark.parametrize(("levels", "slack"), [(1, None), *larger((1, 2), (3, None))])
def test_betting_at_the_worst_of_many_looks(levels, slack):
    assert ever_false(levels, 12, 50, bound="betting", slack=slack)[0] <= ALLOWED


def test_other_bounds_do_not_survive_the_worst_look():
    """So the test above can fail."""
    false, kinds = ever_false(1, 12, 50, bound="clopper-pearson", slack=0)
    assert false > ALLOWED
    assert kinds["bounds"] > ALLOWED


def test_certificates_claim_something():
    """Nothing is false of a certificate that claims nothing."""
    *_, last = growing(1, 1, 20000, slack=None)
    assert (last.overlap(K, 0.01).share > 0.5).double().mean() > 0.9
    assert (last.pixels(0.0) != 0).double().mean() > 0.9
    assert (last.prediction().label == 0).double().mean() > 0.5
