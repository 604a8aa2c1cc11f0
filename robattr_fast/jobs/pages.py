"""The HTML page of certificate files: each is tried by itself, and what cannot be shown is named on the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from robattr_fast.certificates import Certificate
from robattr_fast.certificates.verify.counts import support_faults
from robattr_fast.errors import CertificateFileError
from robattr_fast.inputs.images import Preprocess
from robattr_fast.inputs.names import from_cell
from robattr_fast.jobs.failures import described
from robattr_fast.jobs.record import Record, read_attacked
from robattr_fast.jobs.sources import find_image
from robattr_fast.jobs.verification import Folders, record_faults
from robattr_fast.report.page import SHARES, Entry, page
from robattr_fast.report.sizes import top_size


class Page(NamedTuple):
    """The HTML, and of what is not on it the reasons."""

    html: str
    left_out: list[str]


def page_of_files(
    paths: Iterable[str | Path],
    *,
    preprocess: Preprocess | None = None,
    k: Sequence[float] = SHARES,
    radii: Sequence[float] = (0.01, 0.03, 0.06),
    title: str = "Certified saliency maps",
    catch: bool = True,
) -> Page:
    """One page from certificate files, as ``robattr-fast report`` makes it.

    Args:
        paths: of certificates, see `find_certificates`.
        preprocess: the model's, for images that are none of the usual crops.
        k: sizes of the top set, as shares of all elements or numbers of them.
        catch: whatever a file brings about leaves it out; else what is no usual error is raised.

    Raises:
        CertificateFileError: no file can be shown.
    """
    folders, entries, left_out = Folders(), [], []
    for path in map(Path, paths):
        try:
            entries += _entries(path, preprocess, k, radii, folders)
        except Exception as error:  # a file may hold anything
            if not catch and not isinstance(error, (CertificateFileError, OSError)):
                raise
            reason = described(error)
            left_out.append(reason if str(path) in reason else f"{path}: {reason}")
    if not entries:
        raise CertificateFileError("; ".join(left_out) or "no certificate was named")
    return Page(page(entries, shares=k, radii=radii, title=title, left_out=left_out), left_out)


def _entries(
    path: Path, preprocess: Preprocess | None, k: Sequence[float], radii: Sequence[float], folders: Folders
) -> list[Entry]:
    """The images of one file; everything that may fail with what it holds is done here, and kept."""
    certs = Certificate.load(path)
    record = folders.of(path).of(path)
    faults = support_faults(certs) + record_faults(certs, record)
    if faults:
        raise CertificateFileError(f"{path}: {faults[0]} (robattr-fast verify says more)")
    hashes = certs.settings.input_hashes
    entries = []
    attacked = read_attacked(path) if len(certs) == 1 else []
    for index in range(len(certs)):
        cert = certs[index]
        shape = cert.settings.shape
        for size in k:
            cert.overlap(top_size(size, cert.settings.n), radii)
        if cert.has_second_moments:
            cert.cosine(radii)
        image = None if hashes is None else find_image(path, record, hashes[index], shape, preprocess)
        missing = "The image was not found, or is not the one that was certified: the map is shown alone."
        if image is not None and image.shape[-2:] != shape[-2:]:
            image, missing = None, "The map has not the height and width of the image and is shown alone."
        entries.append(
            Entry(
                name=path.stem if len(certs) == 1 else f"{path.stem} [{index}]",
                cert=cert,
                image=image,
                attacked=attacked,
                class_name=from_cell(record.row.get("class_name", "")),
                own_class=_own_class(cert, record),
                remarks=[] if image is not None else [missing],
            )
        )
    return entries


def _own_class(cert: Certificate, record: Record) -> str:
    """Of the image itself, where most noisy copies have another."""
    if cert.settings.clean_class is None or cert.disagreements()[0] is None:
        return ""
    return from_cell(record.row.get("model_class_name", "")) or str(cert.settings.clean_class[0])
