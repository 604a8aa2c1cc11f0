"""What `certify` says of each image: in full precision for programs, and for the record."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from robattr_fast import backends
from robattr_fast.certificates import Certificate
from robattr_fast.inputs.names import cell, from_cell
from robattr_fast.jobs.folder import Folder
from robattr_fast.jobs.record import CERTIFICATE, PICTURE, Record
from robattr_fast.machine import device_model, versions
from robattr_fast.report import words


class Label(NamedTuple):
    """The class that most noisy samples vote for, and the radius within which it is certified (0: abstains)."""

    number: int
    name: str
    radius: float


def label(cert: Certificate, class_names: Sequence[str] | None) -> Label:
    """The prediction of a certificate of one image."""
    assert cert.class_counts is not None
    index = int(cert.class_counts[0].argmax())
    certified = float(cert.prediction().radius[0]) if cert.settings.ledger.label > 0 else 0.0
    return Label(index, class_name(index, class_names), certified)


def class_name(index: int, class_names: Sequence[str] | None) -> str:
    """The name of a class, or its number."""
    return str(class_names[index]) if class_names is not None and index < len(class_names) else str(index)


@dataclass
class Row:
    """One certified image."""

    name: str
    source: str
    image_id: int | None
    label: Label
    k: int
    shares: list[float]
    methods: list[str]
    cosines: list[float | None]
    """Certified cosine of the maps; None without second moments. This and the two above at each radius of the run."""
    samples: int
    invalid: int
    bound: str
    sigma: float
    tau: float | None
    gamma: float | None
    levels: int | None
    alpha: float
    n: int
    seconds: float
    values: int | None = None
    """Of the image: pixels times channels."""
    own: tuple[int, str] | None = None
    """The class that the model gives to the image itself (-1: none), and its name; None where it is not known."""
    differs: str | None = None
    """What is to be said where most noisy copies are of another class than the image itself."""
    reason: str | None = None
    """Why ``bound`` is not the one asked for."""
    nothing: str | None = None
    """Why nothing of the top set is certified, if so."""
    index: int = 0
    """Its place in the run."""

    @classmethod
    def of(
        cls,
        cert: Certificate,
        label: Label,
        k: int,
        radii: Sequence[float],
        *,
        name: str = "",
        source: str = "",
        seconds: float = 0.0,
        values: int | None = None,
        class_names: Sequence[str] | None = None,
        index: int = 0,
    ) -> Row:
        """What ``cert``, of one image, says; it is not kept, for a run may have thousands."""
        settings, ids = cert.settings, cert.settings.image_ids
        overlaps = cert.overlap(k, radii)
        return cls(
            name=name,
            source=source,
            image_id=ids[0] if ids else None,
            label=label,
            k=k,
            shares=overlaps.share[:, 0].tolist(),
            methods=overlaps.method[:, 0].tolist(),
            cosines=cert.cosine(radii)[:, 0].tolist() if cert.has_second_moments else [None] * len(radii),
            samples=int(cert.samples[0]),
            invalid=int(cert.invalid[0]),
            bound=cert.evaluated_bound,
            sigma=settings.sigma,
            tau=settings.tau,
            gamma=settings.gamma,
            levels=settings.levels,
            alpha=settings.alpha,
            n=settings.n,
            seconds=seconds,
            values=values,
            index=index,
        ).explained(cert, radii, class_names)

    def explained(self, cert: Certificate, radii: Sequence[float], class_names: Sequence[str] | None) -> Row:
        """With what the table does not hold."""
        nothing = None if any(self.shares) else words.nothing_certified(cert, self.k, radii)
        own = None
        if cert.settings.clean_class is not None:
            number = cert.settings.clean_class[0]
            own = number, class_name(number, class_names) if number >= 0 else "none"
        differs = words.disagreements(cert, class_names)[0]
        return dataclasses.replace(self, reason=cert.reason, nothing=nothing, own=own, differs=differs)

    @property
    def classes(self) -> str:
        """For people: of the noisy copies, and of the image itself where that is another."""
        return words.classes(self.label.name, self.own[1] if self.own is not None and self.differs else None)

    @classmethod
    def from_tsv(cls, row: dict[str, str], radii: Sequence[float], index: int) -> Row:
        """Inverse of `tsv`, for these radii. Raises KeyError or ValueError where the table has no such row."""

        def number(text: str) -> float | None:
            return None if text == "" else float(text)

        def each(quantity: str) -> list[str]:
            return [row[f"{quantity}@{at:g}"] for at in radii]

        return cls(
            name=from_cell(row["name"]),
            source=from_cell(row["source"]),
            image_id=None if row["image_id"] == "" else int(row["image_id"]),
            label=Label(int(row["class"]), from_cell(row["class_name"]), float(row["label_radius"])),
            k=int(row["k"]),
            shares=[float(share) for share in each("overlap")],
            methods=each("method"),
            cosines=[number(cosine) for cosine in each("cosine")],
            samples=int(row["samples"]),
            invalid=int(row["invalid"]),
            bound=row["bound"],
            sigma=float(row["sigma"]),
            tau=number(row["tau"]),
            gamma=number(row["gamma"]),
            levels=None if row["levels"] == "" else int(row["levels"]),
            alpha=float(row["alpha"]),
            n=int(row["n"]),
            seconds=float(row["seconds"]),
            values=int(row["values"]),
            index=index,
        )

    def tsv(self, radii: Sequence[float]) -> dict[str, Any]:
        """Columns of certificates.tsv, in full precision."""
        return {
            "name": cell(self.name),
            "source": cell(self.source),
            "image_id": self.image_id,
            "class": self.label.number,
            "class_name": cell(self.label.name),
            "label_radius": self.label.radius,
            "samples": self.samples,
            "invalid": self.invalid,
            "sigma": self.sigma,
            "tau": self.tau,
            "gamma": self.gamma,
            "levels": self.levels,
            "alpha": self.alpha,
            "bound": self.bound,
            "n": self.n,
            "k": self.k,
            **_per_radius("overlap", radii, self.shares),
            **_per_radius("method", radii, self.methods),
            **_per_radius("cosine", radii, self.cosines),
            "seconds": round(self.seconds, 3),
            "values": self.values,
            "model_class": None if self.own is None else self.own[0],
            "model_class_name": None if self.own is None else cell(self.own[1]),
        }


def _per_radius(quantity: str, radii: Sequence[float], values: Sequence[Any]) -> dict[str, Any]:
    return {f"{quantity}@{at:g}": value for at, value in zip(radii, values, strict=True)}


def describe(settings: dict[str, Any], model_fingerprint: str, device: torch.device) -> dict[str, Any]:
    """What the manifest says of a run."""
    return {
        "settings": settings,
        "model_fingerprint": model_fingerprint,
        "versions": versions(),
        "device": {"name": str(device), "model": device_model(device), "threads": torch.get_num_threads()},
        "backends": {row.operator: row.backend for row in backends.explain() if row.device == device.type},
    }


def entry(row: Row, cert: Certificate) -> dict[str, Any]:
    """What the manifest says of an image."""
    settings = cert.settings
    return {
        "name": row.name,
        "source": row.source,
        "image_id": row.image_id,
        "input_hash": (settings.input_hashes or (None,))[0],
        "batch_size": settings.batch_size,
        "memory_format": settings.memory_format,
        "files": [f"{row.name}{CERTIFICATE}", f"{row.name}{PICTURE}"],
        "seconds": round(row.seconds, 3),
    }


@dataclass
class Results:
    """The images of a run: kept as rows of numbers, and noted in its folder one by one."""

    folder: Folder
    settings: dict[str, Any]
    run: dict[str, Any]
    """What the manifest says of it, see `describe`."""
    rows: list[Row] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def radii(self) -> list[float]:
        return self.settings["radius"]

    def add(self, row: Row, noted: dict[str, Any], record: Record) -> None:
        """An image. Nothing is written where the ``record`` says the same already."""
        self.rows.append(row)
        same = record.settings == self.settings and {**record.image, "run": None} == {**noted, "run": None}
        said = {name: "" if value is None else str(value) for name, value in row.tsv(self.radii).items()}
        same = same and row.name not in self.folder.before.failures
        if not (same and all(record.row.get(name) == text for name, text in said.items())):
            self.folder.add(self.run, noted, row.tsv(self.radii))

    def fail(self, name: str, source: Path, error: str) -> None:
        """An image without a result."""
        self.failures.append({"name": name, "source": str(source), "error": error})
        self.folder.fail(self.failures[-1])

    def settle(self, order: Iterable[str]) -> None:
        """At the end: rows and the folder's manifest and table in the order of the run."""
        self.rows.sort(key=lambda row: row.index)
        self.folder.settle(self.run, order)
