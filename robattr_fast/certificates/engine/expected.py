"""What a planned run is expected to find, from few pilot samples: for choosing only, nothing is proved by it."""

from __future__ import annotations

import dataclasses
import math

import torch

from robattr_fast.certificates.certificate.certificate import Certificate
from robattr_fast.certificates.moments.concentration import (
    DEFLATED_SHARE,
    LAST_LOOK_SHARE,
    GramSummary,
    block_rows,
    mean_map,
    spectral_bound,
    summarize_gram,
    trace_estimate,
)
from robattr_fast.certificates.moments.deflation import DIRECTIONS, DeflatedSummary, pilot_rows
from robattr_fast.certificates.moments.eigenvalues import centred_gram
from robattr_fast.certificates.moments.second_moment import SecondMoments, TopKCost
from robattr_fast.certificates.moments.summary import no_summary
from robattr_fast.certificates.settings import Settings
from robattr_fast.ops.packed_gram import packed_gram


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the planned run of one image is expected to find: its certificate, but for the deflation of T7."""

    certificate: Certificate
    deflated: DeflatedSummary | None

    def judged(self, k: int, radius: float) -> tuple[float, str, float]:
        """The share of the top-k at ``radius``, the method, and the radius at which half of the top-k stays.

        A deflation is judged as if no map moved along its directions: they change few elements of the top-k.
        """
        found = self.certificate.overlap(k, radius)
        share, method, half = float(found.share[0]), str(found.method[0]), float(self.certificate.radius(k, 0.5)[0])
        proved = self.certificate.second_moments[0]
        if proved is None or self.deflated is None:
            return share, method, half
        proved = dataclasses.replace(proved, deflated=self._eigenvalue(proved))
        cost = TopKCost(self.certificate.map.flatten(), k)
        kept = cost.overlap(proved.deflated_distance(radius)) / k
        half = max(half, proved.deflated_radius(cost.distance(-(-k // 2))))
        return (kept, "second-moment", half) if kept > share else (share, method, half)

    def _eigenvalue(self, proved: SecondMoments) -> float:
        assert self.deflated is not None
        seen = self.deflated
        delta = self.certificate.settings.ledger.moment * DEFLATED_SHARE * LAST_LOOK_SHARE
        sure = proved.k_tau + min(proved.norm + proved.error, math.sqrt(proved.k_tau)) ** 2
        found = spectral_bound(
            seen.eigenvalue, seen.fourth, seen.rows, sure, proved.k_tau, delta, blocks=seen.blocks, fewest=seen.fewest
        )
        return min(found, proved.spectral)


def expected(seen: Certificate, settings: Settings) -> Expected:
    """What the planned run of one image is expected to find, from its pilot samples."""
    assert seen.counts is not None
    assert settings.planned_samples is not None
    (samples,) = settings.planned_samples
    pilot = int(seen.samples[0])
    trace = trace_estimate(seen.counts[0], pilot)
    invalid = int(seen.invalid[0])
    summary = deflated = None
    if seen.packed is not None:
        assert settings.levels is not None
        block = block_rows(samples, settings.retain)
        products = packed_gram(seen.packed[0], settings.levels)
        gram = _expected_summary(summarize_gram(products, settings.levels), trace, block, samples // block)
        summary = no_summary(1)
        summary[0, : len(gram.to_array())] = torch.from_numpy(gram.to_array())
        summary[0, -1] = invalid * gram.rows // pilot
        if not (invalid and settings.on_nonfinite == "abstain"):
            values = torch.linalg.eigvalsh(centred_gram(products, settings.levels) / pilot)
            deflated = _expected_deflated(float(values[-1 - DIRECTIONS]), trace, pilot, block, samples)
    certificate = Certificate(
        counts=_expected_counts(seen.counts[0], pilot, samples, trace)[None],
        samples=torch.tensor([samples]),
        invalid=torch.tensor([invalid * samples // pilot], dtype=torch.int32),
        gram_summary=summary,
        settings=settings,
    )
    return Expected(certificate, deflated)


def _expected_deflated(next_value: float, trace: float, pilot: int, block: int, samples: int) -> DeflatedSummary | None:
    """The `DeflatedSummary` of the planned run.

    next_value: of the empirical covariance of ``pilot`` samples the largest eigenvalue below those of the directions.
    Directions from P samples keep an error of variance trace/P each (as in `_expected_summary`).
    """
    pilots = pilot_rows(samples, block)
    rows = samples // block * block - pilots
    if min(pilots, block, rows) < 8:
        return None
    eigenvalue = max(next_value - trace / pilot, 0.0) + DIRECTIONS * trace / pilots + trace / block
    return DeflatedSummary(rows, -(-rows // block), min(rows, block), eigenvalue, 3 * eigenvalue**2 + trace**2 / block)


def _expected_counts(counts: torch.Tensor, pilot: int, samples: int, trace: float) -> torch.Tensor:
    """Counts int32 [n, L] of ``pilot`` samples, shrunk and spread to those of ``samples``.

    A mean of few samples scatters more from element to element than one of many: shrinking it to its average over the
    elements, by one factor, gives the scatter that ``samples`` samples are expected to have, which is that of the
    smoothed map (the pilot's less trace/pilot) and trace/samples. Ties of small counts are broken at random, within
    half a count.
    """
    mean = mean_map(counts, pilot)
    scatter = float((mean - mean.mean()).square().sum())
    expected = max(scatter - trace / pilot, 0.0) + trace / samples
    shrink = min((expected / scatter) ** 0.5, 1.0) if scatter > 0 else 1.0
    # How often an element reaches each level or a higher one: rounding these errs by half a sample in all.
    reached = counts.double().flip(1).cumsum(1).flip(1)
    centre = reached.mean(0)
    jitter = torch.rand(len(counts), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    spread = centre + shrink * (reached + jitter.where(reached > 0, 0.0) - centre)
    scaled = (spread.clamp(0, pilot) * (samples / pilot)).round().to(torch.int32)
    return scaled - torch.nn.functional.pad(scaled[:, 1:], (0, 1))


def _expected_summary(seen: GramSummary, trace: float, block: int, blocks: int) -> GramSummary:
    """The `GramSummary` of ``blocks`` blocks of ``block`` rows, from that of fewer rows (or more) in one block.

    The empirical covariance of m samples has a top eigenvalue of about lambda + (trace - lambda)/m where many small
    eigenvalues stand below it (Baik and Silverstein, Eigenvalues of large sample covariance matrices of spiked
    population models, 2006, in the limit of a bulk far below the top), the squared mean is up by trace/m, and the
    squared Gram matrix over m has trace^2 on its diagonal (its spread is neglected: from few samples ``fourth`` comes
    out too large).
    """
    half_seen, half = seen.rows // 2, block // 2

    def top(eigenvalue: float, before: int, after: int) -> float:
        # Of the pilot the bulk is subtracted, but never all: tr(Sigma^2)/tr(Sigma) <= lambda.
        least = min(seen.half_mean / trace, eigenvalue) if trace > 0 else 0.0
        population = max((eigenvalue - trace / before) / (1 - 1 / before), least)
        return population + max(trace - population, 0.0) / after

    def moved(value: float, excess: float, before: int, after: int) -> float:
        return max(value - excess / before, 0.0) + excess / after

    return GramSummary(
        rows=blocks * block,
        blocks=blocks,
        norm2=moved(seen.norm2, trace, seen.rows, block),
        eigenvalue=top(seen.eigenvalue, seen.rows, block),
        fourth=moved(seen.fourth, trace**2, seen.rows, block),
        half_eigenvalue=top(seen.half_eigenvalue, half_seen, half),
        half_norm2=moved(seen.half_norm2, trace, half_seen, half),
        half_mean=seen.half_mean,
    )
