"""What a run leaves behind: numbers for people, for programs (TSV) and for the record."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from robattr_fast import backends
from robattr_fast.certificates import Certificate
from robattr_fast.certificates.settings import Settings
from robattr_fast.files import write_atomically
from robattr_fast.jobs.record import CERTIFICATE, MANIFEST, TABLE, Record
from robattr_fast.machine import device_model, versions
from robattr_fast.report.rounding import percent, radius, rounded_cosine

_STAR = "*"  # of a share that second moments certify


class Label(NamedTuple):
    """The class that most noisy samples vote for, and the radius within which it is certified (0: abstains)."""

    number: int
    name: str
    radius: float


def label(cert: Certificate, class_names: Sequence[str] | None) -> Label:
    """The prediction of a certificate of one image."""
    assert cert.class_counts is not None
    index = int(cert.class_counts[0].argmax())
    name = class_names[index] if class_names is not None and index < len(class_names) else str(index)
    certified = float(cert.prediction().radius[0]) if cert.settings.ledger.label > 0 else 0.0
    return Label(index, name, certified)


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
    reason: str | None
    """Why ``bound`` is not the one asked for."""
    settings: Settings
    seconds: float
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
        index: int = 0,
    ) -> Row:
        """What ``cert``, of one image, says; it is not kept, for a run may have thousands."""
        overlaps, ids = cert.overlap(k, radii), cert.settings.image_ids
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
            reason=cert.reason,
            settings=cert.settings,
            seconds=seconds,
            index=index,
        )

    def cells(self) -> list[str]:
        """What the table says of each radius: the share, a star if second moments certify it, below it the cosine."""
        starred = "second-moment" in self.methods
        cells = []
        for share, method, cosine in zip(self.shares, self.methods, self.cosines, strict=True):
            star = f" {_STAR}" if method == "second-moment" else "  " if starred else ""
            below = f"\n[not bold dim]cos {rounded_cosine(cosine)}[/]" if cosine else ""
            cells.append(percent(share) + star + below)
        return cells

    def tsv(self, radii: Sequence[float]) -> dict[str, Any]:
        """Columns of certificates.tsv, in full precision."""
        settings = self.settings
        return {
            "name": self.name,
            "source": self.source,
            "image_id": self.image_id,
            "class": self.label.number,
            "class_name": self.label.name,
            "label_radius": self.label.radius,
            "samples": self.samples,
            "invalid": self.invalid,
            "sigma": settings.sigma,
            "tau": settings.tau,
            "gamma": settings.gamma,
            "levels": settings.levels,
            "alpha": settings.alpha,
            "bound": self.bound,
            "n": settings.n,
            "k": self.k,
            **_per_radius("overlap", radii, self.shares),
            **_per_radius("method", radii, self.methods),
            **_per_radius("cosine", radii, self.cosines),
            "seconds": round(self.seconds, 3),
        }


def _per_radius(quantity: str, radii: Sequence[float], values: Sequence[Any]) -> dict[str, Any]:
    return {f"{quantity}@{at:g}": value for at, value in zip(radii, values, strict=True)}


@dataclass
class Results:
    """Collects the images of a run; everything in the folder is complete after each of them."""

    folder: Path
    settings: dict[str, Any]
    radii: list[float]
    device: torch.device
    earlier: dict[str, Record] = field(default_factory=dict)
    """Of the same run, before it was interrupted: kept in table and manifest until the image's turn has come."""
    rows: list[Row] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.earlier.pop(row.name, None)
        self.rows.append(row)
        self.rows.sort(key=lambda one: one.index)
        self._write()

    def fail(self, name: str, source: Path, error: str) -> None:
        self.earlier.pop(name, None)
        self.failures.append({"name": name, "source": str(source), "error": error})
        self._write()

    def _write(self) -> None:
        rows: list[dict[str, Any]] = [row.tsv(self.radii) for row in self.rows]
        rows += [record.row for record in self.earlier.values() if record.row]
        if rows:
            text = io.StringIO()
            writer = csv.DictWriter(text, rows[0].keys(), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_atomically(self.folder / TABLE, text.getvalue().encode())
        manifest = json.dumps(self._manifest(), indent=2, allow_nan=False)
        write_atomically(self.folder / MANIFEST, manifest.encode() + b"\n")

    def _manifest(self) -> dict[str, Any]:
        used = self.rows[0].settings if self.rows else None
        return {
            "settings": self.settings,
            "model_fingerprint": used and used.model_fingerprint,
            "versions": versions(),
            "device": {
                "name": str(self.device),
                "model": device_model(self.device),
                "threads": torch.get_num_threads(),
            },
            "backends": {row.operator: row.backend for row in backends.explain() if row.device == self.device.type},
            "images": [
                {
                    "name": row.name,
                    "source": row.source,
                    "image_id": row.image_id,
                    "input_hash": (row.settings.input_hashes or (None,))[0],
                    "batch_size": row.settings.batch_size,
                    "memory_format": row.settings.memory_format,
                    "files": [f"{row.name}{CERTIFICATE}", f"{row.name}.png"],
                    "seconds": round(row.seconds, 3),
                }
                for row in self.rows
            ]
            + [record.image for record in self.earlier.values()],
            "failures": self.failures,
        }

    def table(self) -> Table:
        """One row per image."""
        table = Table(
            title=f"Share of the top {100 * self.settings['k']:.3g} % of the map that provably stays, by L2 radius",
            title_justify="left",
            title_style="bold",
            box=None,
            padding=(0, 2, 0, 0),
        )
        table.add_column("image", overflow="fold")
        for at in self.radii:
            table.add_column(f"{at:g}", justify="right", style="bold cyan", no_wrap=True)
        table.add_column("class", overflow="fold")
        table.add_column("class certified to", justify="right", overflow="fold")
        table.add_column("samples", justify="right", overflow="fold")
        table.add_column("time", justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                row.name,
                *row.cells(),
                row.label.name,
                radius(row.label.radius) if row.label.radius > 0 else "abstains",
                str(row.samples),
                f"{row.seconds:.0f} s",
            )
        return table

    def footnote(self) -> str:
        """What the table's numbers mean."""
        first = self.rows[0]
        note = (
            f"With confidence {100 * (1 - first.settings.alpha):g} %, whatever the perturbation of that L2 norm "
            f"(pixels in [0, 1]; noise sigma {first.settings.sigma:g}; {first.bound} bounds)."
        )
        for reason in dict.fromkeys(row.reason for row in self.rows if row.reason):
            note += f" {reason[0].upper()}{reason[1:]}."
        if any("second-moment" in row.methods for row in self.rows):
            note += f" {_STAR} by second moments, the others element by element."
        if any(any(row.cosines) for row in self.rows):
            note += " cos: least cosine of the map with the perturbed one."
        return note
