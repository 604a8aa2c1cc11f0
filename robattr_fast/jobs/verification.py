"""Certificate files held against themselves, what lies beside them and, with the model, their samples.

Each file is tried by itself: whatever is in it, the others are looked at too.
"""

from __future__ import annotations

import csv
import datetime
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from robattr_fast.certificates import Certificate
from robattr_fast.certificates.verify.counts import sample_faults, support_faults
from robattr_fast.certificates.verify.replay import FALSE_ALARM, FLIPS, replay
from robattr_fast.errors import CertificateFileError
from robattr_fast.inputs import specs
from robattr_fast.jobs.failures import described
from robattr_fast.jobs.record import MANIFEST, TABLE, Record, Records
from robattr_fast.jobs.results import Label, Row, label
from robattr_fast.jobs.sources import find_image
from robattr_fast.model import input_hash
from robattr_fast.report import words
from robattr_fast.report.sizes import top_size

_TOLERANCE = 1e-9  # relative, of numbers that went through text
_NOT_OF_THE_COUNTS = ("name", "source", "class_name", "seconds", "values", "model_class_name")


@dataclass(frozen=True)
class Asked:
    """What is to be computed again of each image: the certified share of each top set at each radius, and up to which
    radius the share ``overlap`` of it stays. ``k``: shares of all elements, or numbers of them."""

    k: Sequence[float] = (0.2,)
    radii: Sequence[float] = (0.01, 0.03, 0.06)
    overlap: float = 0.5


@dataclass(frozen=True)
class Resampling:
    """How samples are taken again.

    Attributes:
        module: as `inputs.specs.load` gives it, on the device.
        images: inputs [C, H, W] that certificates may be of; others are looked for where the run had them.
        samples: how many are chosen at random; None: all.
    """

    model: specs.Model
    module: torch.nn.Module
    device: torch.device
    images: Sequence[torch.Tensor] = ()
    samples: int | None = 64
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """One image of a file, for one size of the top set."""

    image: int
    k: float
    shares: list[float]
    cosines: list[float] | None
    stays_to: float
    label: Label | None
    samples: int


@dataclass
class Verified:
    """One file: what is wrong with it, what could not be looked at, what else there is to say, and what it proves."""

    path: Path
    images: int = 0
    record: Record = field(default_factory=Record)
    faults: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """``failed``, ``not replayed`` or ``ok``."""
        return "failed" if self.faults else "not replayed" if self.unseen else "ok"


def verify_files(
    paths: Iterable[str | Path], asked: Asked | None = None, again: Resampling | None = None, *, catch: bool = True
) -> Iterator[Verified]:
    """Each file in turn.

    Args:
        paths: of certificates, see `find_certificates`.
        again: with the model; without it counts, table and manifest alone are checked.
        catch: whatever a file brings about is a fault of it; else what is no usual error is raised.
    """
    folders = Folders()
    for path in map(Path, paths):
        one = Verified(path)
        try:
            _verify(one, asked or Asked(), again, folders)
        except Exception as error:  # a file may hold anything
            if not catch and not isinstance(error, (CertificateFileError, OSError)):
                raise
            one.faults.append(described(error))
        yield one


class Folders:
    """What lies beside certificates, read once for each folder."""

    def __init__(self) -> None:
        self._read: dict[Path, Records | CertificateFileError | OSError] = {}

    def of(self, certificate: Path) -> Records:
        """Raises CertificateFileError or OSError, for each certificate of a folder anew."""
        folder = certificate.parent
        if folder not in self._read:
            try:
                self._read[folder] = Records(folder)
            except (CertificateFileError, OSError) as error:
                self._read[folder] = error
        found = self._read[folder]
        if isinstance(found, Exception):
            raise found
        return found


def _verify(one: Verified, asked: Asked, again: Resampling | None, folders: Folders) -> None:
    cert = Certificate.load(one.path)
    one.images = len(cert)
    try:
        records = folders.of(one.path)
        one.record = records.of(one.path)
        one.remarks += [f"{name} beside it is of another program and was not compared" for name in records.foreign]
    except (CertificateFileError, OSError) as error:
        one.faults.append(described(error))
    one.faults += support_faults(cert) + sample_faults(cert) + record_faults(cert, one.record)
    one.remarks += words.remarks(cert)
    for index in range(len(cert)):
        image = cert if len(cert) == 1 else cert[index]
        one.found += [found for k in asked.k if (found := _found(one, image, index, k, asked)) is not None]
        if again is not None:
            _replay(one, index, image, again, asked.k[0])


def _found(one: Verified, cert: Certificate, index: int, k: float, asked: Asked) -> Found | None:
    try:
        size = top_size(k, cert.settings.n)
    except ValueError as error:
        one.unseen.append(str(error))
        return None
    nothing = words.nothing_certified(cert, size, asked.radii)
    if nothing is not None:
        one.remarks.append(nothing if one.images == 1 else f"image {index} of {one.images}: {nothing}")
    return Found(
        image=index,
        k=k,
        shares=cert.overlap(size, asked.radii).share[:, 0].tolist(),
        cosines=cert.cosine(asked.radii)[:, 0].tolist() if cert.has_second_moments else None,
        stays_to=float(cert.radius(size, asked.overlap)[0]),
        label=None if cert.class_counts is None else label(cert, None),
        samples=int(cert.samples[0]),
    )


def _replay(one: Verified, index: int, cert: Certificate, again: Resampling, k: float) -> None:
    """With the model: ``cert``, of image ``index`` of the file."""
    which = "" if one.images == 1 else f"image {index} of {one.images}: "
    x = _input(one, cert, again)
    if x is None:
        source = one.record.source
        one.unseen.append(f"{which}its image was not found{f' at {source}' if source else ''}: name it with --image")
        return
    wanted = None if again.samples is None else min(again.samples, int(cert.samples[0]))
    size = top_size(k, cert.settings.n)
    result = replay(cert, again.module, x.to(again.device), samples=wanted, seed=again.seed, k=size)
    one.faults += [which + fault for fault in result.faults]
    if result.differences:
        one.remarks.append(
            f"sampled elsewhere ({'; '.join(result.differences)}): rounding may move an element in "
            f"{100 * FLIPS:g} % of the replayed samples, and more was not held against it"
        )
    if not result.faults:
        one.remarks.append(which + _replayed(result.samples, result.total, exact=not result.differences))


def _replayed(samples: int, total: int, *, exact: bool) -> str:
    if samples < total:
        return (
            f"{samples} of {total} samples replayed, chosen at random: nothing speaks against the counts "
            f"(a true certificate fails this test with probability at most {FALSE_ALARM:g})"
        )
    return f"all {total} samples replayed: " + ("the counts are theirs, exactly" if exact else "the counts agree")


def _input(one: Verified, cert: Certificate, again: Resampling) -> torch.Tensor | None:
    if len(again.images) == 1 and one.images == 1:
        return again.images[0]  # whatever it is: the replay says so
    hashes = cert.settings.input_hashes
    if hashes is None:
        return None
    for x in again.images:
        if input_hash(x) == hashes[0]:
            return x
    return find_image(one.path, one.record, hashes[0], cert.settings.shape, again.model.preprocess)


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
    # Of radii that other runs asked for the row says nothing.
    names = [name.partition("@")[2] for name, text in said.items() if name.startswith("overlap@") and text]
    try:
        radii = [record.radii.get(name) or float(name) for name in names]
        row = Row.of(cert, label(cert, None), int(said["k"]), radii)
    except Exception as error:  # the table may say anything
        return [f"{TABLE}: its row cannot be checked: {described(error)}"]
    return [
        f"{TABLE} says {name} {said.get(name)}, the counts give {value}"
        for name, value in row.tsv(radii).items()
        if name not in _NOT_OF_THE_COUNTS
        and not (name == "model_class" and name not in said)  # tables of before do not have it
        and not _agree(said.get(name), value)
    ]


def _agree(text: str | None, value: object) -> bool:
    if isinstance(value, float):
        try:
            return math.isclose(float(text or "nan"), value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
        except ValueError:
            return False
    return text == ("" if value is None else str(value))


def _only(entries: tuple[Any, ...] | None) -> Any:
    return entries[0] if entries is not None and len(entries) == 1 else None


def smoothing_log(verified: Iterable[Verified], truth: dict[str, int]) -> str:
    """The log of Cohen, Rosenfeld and Kolter's certify.py: predict is -1 where the label abstains.

    label and correct stay empty where the true class is not known.
    """
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(["idx", "label", "predict", "radius", "correct", "time"])
    images = [
        (one, found)
        for one in verified
        if not one.faults
        for found in {found.image: found for found in one.found}.values()
        if found.label is not None
    ]
    for index, (one, found) in enumerate(images):
        assert found.label is not None
        predict = found.label.number if found.label.radius > 0 else -1
        known = truth.get(one.path.stem)
        time = "" if one.record.seconds is None else str(datetime.timedelta(seconds=one.record.seconds))
        correct = "" if known is None else int(predict == known)
        writer.writerow([index, "" if known is None else known, predict, found.label.radius, correct, time])
    return text.getvalue()


def read_labels(path: Path) -> dict[str, int]:
    """True classes by name: lines of NAME and class. Raises ValueError, OSError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"labels: {path} is not a text: {error}") from error
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition("\t" if "\t" in line else " ")
        if not name or not label.isascii() or not label.isdigit():
            raise ValueError(f"labels: {path}, line {number}: got {line!r}, expected a name and a class")
        found[name.strip()] = int(label)
    return found
