"""What the counts of a certificate must satisfy, checked without its model."""

from __future__ import annotations

import torch

from robattr_fast.certificates.certificate.certificate import Certificate
from robattr_fast.certificates.moments.summary import Summary
from robattr_fast.certificates.verify.replay import same_moments
from robattr_fast.reference._pack_levels import unpack_levels
from robattr_fast.reference._select import selected

_TOLERANCE = 1e-9  # relative, of sums of float64


def support_faults(cert: Certificate) -> list[str]:
    """No sample selects more than k_tau elements, so that all counts of an image are at most q k_tau together."""
    if cert.settings.tau is None:
        return []
    largest = selected(cert.settings.tau, cert.settings.n)
    totals = cert.sums.sum(1) if cert.sums is not None else cert.counts.sum((1, 2)) if cert.counts is not None else None
    assert totals is not None
    allowed = (cert.samples - cert.invalid).double() * largest
    return [
        f"counts: image {image} has {float(total):g} selections, its samples have at most {float(most):g}"
        for image, (total, most) in enumerate(zip(totals, allowed, strict=True))
        if total > most * (1 + _TOLERANCE)
    ]


def sample_faults(cert: Certificate) -> list[str]:
    """Samples that the file holds: their second moments are made again, and no count may exclude what they show."""
    if cert.packed is None or cert.gram_summary is None or cert.counts is None:
        return []
    levels = cert.counts.shape[2]
    faults = []
    for image, (packed, summary) in enumerate(zip(cert.packed, cert.gram_summary, strict=True)):
        rows, rest = packed[: int(summary[0])], packed[int(summary[0]) :]
        samples = int(cert.samples[image])
        planned = samples if cert.settings.planned_samples is None else cert.settings.planned_samples[image]
        again = Summary.of_rows(rows, planned, cert.settings.retain, levels, cert.settings.n, int(summary[-1]))
        if rest.any() or not same_moments(again.to_tensors(), cert, image):
            faults.append(f"gram_summary: image {image} has other second moments than its packed samples")
        shown = _level_counts(rows, levels, cert.settings.n)
        claimed = cert.counts[image].long()
        # What is not shown was drawn later, and can only add.
        later = int(cert.samples[image]) - len(rows)
        if ((shown > claimed) | (shown + later < claimed)).any():
            faults.append(f"counts: image {image} has counts that its packed samples exclude")
    return faults


def _level_counts(rows: torch.Tensor, levels: int, n: int) -> torch.Tensor:
    """int64 [n, L] of packed rows, a few at a time: unpacked they are large."""
    counts = torch.zeros(n, levels, dtype=torch.int64)
    for part in rows.split(64):
        unpacked = unpack_levels(part, levels, n)
        for level in range(1, levels + 1):
            counts[:, level - 1] += (unpacked == level).sum(0)
    return counts
