"""What `verify` holds against a certificate without its model: the counts themselves, and what lies beside the file."""

from __future__ import annotations

import math

import torch

from robattr_fast.certificates import Certificate
from robattr_fast.certificates.moments.summary import Summary
from robattr_fast.certificates.verify.replay import same_moments
from robattr_fast.jobs.record import MANIFEST, TABLE, Record
from robattr_fast.jobs.results import Row, label
from robattr_fast.reference._pack_levels import unpack_levels
from robattr_fast.reference._select import selected

_TOLERANCE = 1e-9  # relative, of numbers that went through text
_NOT_OF_THE_COUNTS = ("name", "source", "class_name", "seconds")


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


def record_faults(cert: Certificate, record: Record) -> list[str]:
    """Where manifest or table say something else than the certificate."""
    settings, faults = cert.settings, []
    if record.image:
        said = {"model_fingerprint": record.model_fingerprint, **record.image}
        held = {
            "model_fingerprint": settings.model_fingerprint,
            "image_id": _only(settings.image_ids),
            "input_hash": _only(settings.input_hashes),
            "batch_size": settings.batch_size,
            "memory_format": settings.memory_format,
        }
        faults += [
            f"{MANIFEST} says {name} {said.get(name)}, the file {held[name]}"
            for name in held
            if said.get(name) != held[name]
        ]
    return faults + (_row_faults(cert, record) if record.row else [])


def _row_faults(cert: Certificate, record: Record) -> list[str]:
    """The row is made again from the counts, for its own k and radii."""
    said = record.row
    if len(cert) != 1:
        return [f"{TABLE} has one image of this name, the file {len(cert)}"]
    columns = [name for name in said if name.startswith("overlap@")]
    known = {f"{radius:g}": radius for radius in record.settings.get("radius") or ()}
    try:
        k = int(said["k"])
        radii = [known.get(name.partition("@")[2]) or float(name.partition("@")[2]) for name in columns]
        row = Row.of(cert, label(cert, None), k, radii)
    except (KeyError, ValueError, TypeError) as error:
        return [f"{TABLE}: its row cannot be checked: {error}"]
    held = row.tsv(radii)
    return [
        f"{TABLE} says {name} {said.get(name)}, the counts give {value}"
        for name, value in held.items()
        if name not in _NOT_OF_THE_COUNTS and not _agree(said.get(name), value)
    ]


def _agree(text: str | None, value: object) -> bool:
    if isinstance(value, float):
        try:
            return math.isclose(float(text or "nan"), value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
        except ValueError:
            return False
    return text == ("" if value is None else str(value))


def _only(entries: tuple | None):
    return entries[0] if entries is not None and len(entries) == 1 else None
