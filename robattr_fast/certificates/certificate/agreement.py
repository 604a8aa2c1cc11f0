"""That second moments are possible ones of the counts beside them: what every set of samples must satisfy.

A file may be written by anybody. These are inequalities that hold for all samples, with nothing random in them, so that
no true file is refused. They do not fix the numbers: `verify` with all samples does (docs/verify.md).

Of m samples h in [0, 1]^n with at most k elements that are not 0, mean p and empirical covariance S (over m):
tr S = mean ||h||^2 - ||p||^2; tr S / min(n, m - 1) <= lambda(S) <= tr S; of the centred Gram matrix the entries squared
have a largest eigenvalue kappa m with lambda(S)^2 <= kappa <= lambda(S) max ||h - p||^2 (Cauchy, Schur).
"""

from __future__ import annotations

import torch

from robattr_fast.certificates.moments.concentration import block_rows, mean_map, rows_in_blocks
from robattr_fast.certificates.moments.deflation import DIRECTIONS
from robattr_fast.certificates.moments.summary import Summary, summary_of
from robattr_fast.certificates.settings import Settings
from robattr_fast.reference._select import selected

_TOLERANCE = 1e-5  # relative; bounds on eigenvalues are tight to 1e-6
_ROUNDING = 1e-9  # of k, for numbers that are 0 but for rounding


def check_moments(tensors: dict[str, torch.Tensor], settings: Settings) -> None:
    """ValueError where ``gram_summary`` cannot be that of samples with these counts."""
    summary, counts = tensors.get("gram_summary"), tensors.get("counts")
    if summary is None or counts is None:
        return
    for image, row in enumerate(summary):
        samples = int(tensors["samples"][image])
        planned = samples if settings.planned_samples is None else settings.planned_samples[image]
        if not row[0]:
            if row.any():
                raise ValueError(f"gram_summary of image {image} must be of samples, it has numbers of none")
            continue
        directions = tensors.get("directions")
        blank = torch.zeros(DIRECTIONS, counts.shape[1], dtype=torch.int8)
        known = summary_of(settings, planned).restored(row, blank if directions is None else directions[image])
        found = _contradiction(known, counts[image], samples, int(tensors["invalid"][image]), settings, planned)
        if found:
            raise ValueError(f"gram_summary of image {image} contradicts the counts: {found}")


def _contradiction(
    known: Summary, counts: torch.Tensor, samples: int, invalid: int, settings: Settings, planned: int
) -> str | None:
    gram = known.gram
    assert gram is not None
    n, levels = counts.shape
    k = float(n if settings.tau is None else selected(settings.tau, n))
    rows, size, apart = gram.rows, gram.block_rows, samples - gram.rows
    block = block_rows(planned, settings.retain)
    if rows != rows_in_blocks(samples, planned, settings.retain) or gram.blocks != max(1, rows // block):
        return f"{rows} rows in {gram.blocks} blocks, of {samples} samples"
    if known.invalid > invalid:
        return f"{known.invalid} of its rows are invalid, of {invalid} samples"
    weights = torch.arange(1, levels + 1, dtype=torch.float64) / levels
    squares = float((counts.double() @ weights.square()).sum())  # of ||h||^2, over all samples
    most, least = min(squares, rows * k), max(squares - apart * k, 0.0)
    norm = float(mean_map(counts, samples).square().sum().sqrt())
    # Of the mean of the rows, which lack the samples apart.
    low = max(samples * norm - apart * k**0.5, 0.0) / rows
    high = samples * norm / rows

    def fits(name: str, value: float, at_least: float, at_most: float, unit: float = k) -> str | None:
        slack = _ROUNDING * unit
        if at_least * (1 - _TOLERANCE) - slack <= value <= at_most * (1 + _TOLERANCE) + slack:
            return None
        return f"{name} is {value:g}, expected {at_least:g} to {at_most:g}"

    trace = max(least / rows - gram.norm2, 0.0), max(most / rows - low**2, 0.0)  # mean over the blocks
    degrees = max(min(n, size - 1), 1)
    reach = (k**0.5 + gram.norm2**0.5) ** 2  # of ||h - p||^2 in a block
    half, rest = size // 2, size - size // 2
    # What the first halves must have, if all others have as much as they can.
    halves = max(least - gram.blocks * rest * k, 0.0) / (gram.blocks * half)
    half_reach = (k**0.5 + gram.half_norm2**0.5) ** 2
    checks = [
        fits("norm2", gram.norm2, low**2, min(k, (gram.blocks * high) ** 2)),
        fits("eigenvalue", gram.eigenvalue, trace[0] / degrees, trace[1]),
        fits("fourth", gram.fourth, gram.eigenvalue**2, gram.eigenvalue * reach, k**2),
        fits("half_norm2", gram.half_norm2, 0.0, min(k, gram.norm2 * (size / half) ** 2)),
        fits("half_eigenvalue", gram.half_eigenvalue, 0.0, min(k, gram.eigenvalue * gram.blocks * size / half)),
        fits("half_mean", gram.half_mean, 0.0, gram.half_eigenvalue * half_reach, k**2),
        fits(
            "half_eigenvalue with half_norm2",
            max(min(n, half - 1), 1) * gram.half_eigenvalue + gram.half_norm2,
            halves,
            float("inf"),
        ),
    ]
    if known.deflated is not None and known.deflation is not None:
        part = known.deflated
        outside = samples - part.rows
        first = part.rows - (part.blocks - 1) * size if part.fewest < size else size
        # The mean of a part of a block is at most that of the block, times its share.
        norms = first * min(k, gram.norm2 * (size / first) ** 2) + (part.rows - first) * gram.norm2
        largest = gram.eigenvalue * rows / part.rows
        shrunk = sum(1 - square for square in known.deflation.squares) * largest
        left = (max(squares - outside * k, 0.0) - norms) / part.rows - shrunk
        checks += [
            fits("deflated eigenvalue", part.eigenvalue, max(left, 0.0) / degrees, largest),
            fits("deflated fourth", part.fourth, part.eigenvalue**2, part.eigenvalue * 4 * k, k**2),
        ]
    return next((found for found in checks if found), None)
