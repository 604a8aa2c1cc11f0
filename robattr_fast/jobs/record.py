"""What runs of `certify` wrote beside their certificates: a manifest, a table, and a journal while a run goes on.

``manifest.json`` and ``certificates.tsv`` name each image once. For each image a run appends a line to the table, and
one to ``manifest.jsonl``, the journal; at its end the journal goes into the manifest and the table is put in order.
Where a run was killed the journal stays, and is read as if it were in the manifest: of one name the last line counts.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robattr_fast.errors import CertificateFileError
from robattr_fast.inputs.names import cell, from_cell

MANIFEST, TABLE, JOURNAL = "manifest.json", "certificates.tsv", "manifest.jsonl"
CERTIFICATE, PICTURE, CHECKPOINT = ".safetensors", ".png", ".checkpoint"
ATTACKED = ".attacked.tsv"
"""What an attack left of the certified top set, beside the certificate."""

RUN = ("settings", "model_fingerprint", "versions", "device", "backends")
"""What the manifest says of a run."""


def find_certificates(paths: Iterable[str | Path]) -> tuple[list[Path], list[str]]:
    """Certificate files, in their order, and the names of what was passed over; a folder stands for its
    ``*.safetensors``, sorted, without hidden files.

    Raises OSError if there is no such file or folder, or no certificate in it.
    """
    found: dict[Path, None] = {}
    passed_over: list[str] = []
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            every = sorted(entry for entry in path.iterdir() if entry.name.endswith(CERTIFICATE))
            files = [entry for entry in every if not entry.name.startswith(".") and entry.is_file()]
            passed_over += [str(entry) for entry in every if entry not in set(files)]
        if not files or not files[0].exists():
            raise FileNotFoundError(f"{path}: no certificate here" if path.is_dir() else f"{path}: no such file")
        found |= dict.fromkeys(files)
    return list(found), passed_over


def read_attacked(path: Path) -> list[tuple[int, float, float]]:
    """(k, radius, share that was left) per row of the attack beside a certificate; none without one.

    Raises CertificateFileError if there is one that cannot be read.
    """
    beside = path.with_name(f"{path.stem}{ATTACKED}")
    if not beside.exists():
        return []
    try:
        with beside.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file, delimiter="\t")
            return [(int(row["k"]), float(row["radius"]), float(row["attacked"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise CertificateFileError(f"{beside}: not what robattr-fast attack writes ({error})") from error


@dataclass(frozen=True)
class Record:
    """What manifest and table say of one certificate; empty where they are missing or do not name it."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Of the run."""
    model_fingerprint: str | None = None
    image: dict[str, Any] = field(default_factory=dict)
    """The manifest's entry of the image."""
    row: dict[str, str] = field(default_factory=dict)
    """The table's row of the image, as it is written there (`inputs.names.from_cell`)."""

    @property
    def seconds(self) -> float | None:
        """How long sampling took."""
        seconds = self.image.get("seconds")
        known = isinstance(seconds, (int, float)) and math.isfinite(seconds) and 0 <= seconds < 1e9
        return float(seconds) if known else None  # type: ignore[arg-type]

    @property
    def source(self) -> str | None:
        """The path of the image as the run was told."""
        source = self.image.get("source")
        return source if isinstance(source, str) else None

    @property
    def radii(self) -> dict[str, float]:
        """The radii of the run, by their names in the columns of the table."""
        radii = self.settings.get("radius")
        numbers = [one for one in radii if isinstance(one, (int, float))] if isinstance(radii, list) else []
        return {f"{radius:g}": float(radius) for radius in numbers}


class Records:
    """Manifest, journal and table of one folder, read once.

    Attributes:
        run: what the manifest says of its newest run; None where it names none.
        runs: what it says of every run, by `run_id`.
        images, failures: entries by name; ``run`` of an image is the id of its run.
        columns, rows: of the table; rows by the first cell.
        foreign: names of the files that are there but belong to something else.

    Raises:
        CertificateFileError: manifest or table cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run: dict[str, Any] | None = None
        self.runs: dict[str, dict[str, Any]] = {}
        self.images: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, dict[str, Any]] = {}
        self.foreign: list[str] = []
        self._doubled: dict[str, str] = {}
        self.going_on = (folder / JOURNAL).exists()
        """A run is writing, or was killed."""
        self._take_manifest(_read_json(folder / MANIFEST))
        if self.going_on:
            self._take_journal()
        self.columns, self.rows = self._read_table()

    def of(self, certificate: Path, *, strict: bool = True) -> Record:
        """Of one certificate of this folder. Raises CertificateFileError if it is named twice, where ``strict``."""
        name = certificate.name.removesuffix(CERTIFICATE)
        if strict and name in self._doubled and not self.going_on:
            raise CertificateFileError(f"{self.folder / self._doubled[name]}: names {name} more than once")
        entry = self.images.get(name, {})
        run = self.runs.get(entry.get("run", ""), {})
        return Record(
            settings=run.get("settings") or (self.run or {}).get("settings", {}),
            model_fingerprint=run.get("model_fingerprint"),
            image=entry,
            row=self.rows.get(cell(name)) or self.rows.get(name) or {},
        )

    def _take_manifest(self, manifest: dict[str, Any] | None) -> None:
        if manifest is None:
            return
        path = self.folder / MANIFEST
        entries, failures = manifest.get("images", []), manifest.get("failures", [])
        settings, others = manifest.get("settings", {}), manifest.get("runs", {})
        if not (
            _are_objects(entries)
            and all(isinstance(entry.get("files", []), list) for entry in entries)
            and _are_objects(failures)
            and isinstance(settings, dict)
            and isinstance(others, dict)
            and _are_objects(list(others.values()))
            and all(isinstance(run.get("settings", {}), dict) for run in others.values())
        ):
            raise CertificateFileError(f"{path}: is not the manifest of a run")
        if not manifest.keys() & {"settings", "images"}:
            self.foreign.append(MANIFEST)
            return
        self.run = {name: manifest.get(name) for name in RUN}
        newest = run_id(self.run)
        self.runs = {**others, newest: self.run}
        for entry in entries:
            for name in _certificates_of(entry):
                if name in self.images:
                    self._doubled[name] = MANIFEST
                run = entry.get("run")
                self.images[name] = {**entry, "run": run if isinstance(run, str) else newest}
        self.failures = {str(failure.get("name")): failure for failure in failures}

    def _take_journal(self) -> None:
        """Line by line; a line that was cut short by a kill is passed over."""
        try:
            lines = (self.folder / JOURNAL).read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:  # the run has just ended
            return
        except ValueError as error:
            raise CertificateFileError(f"{self.folder / JOURNAL}: cannot be read: {error}") from error
        for line in lines:
            try:
                said = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(said, dict):
                continue
            if isinstance(said.get("run"), dict):
                self.run = said["run"]
                self.runs[run_id(self.run)] = self.run
            if isinstance(entry := said.get("image"), dict):
                for name in _certificates_of(entry):
                    self.images[name] = entry
                    self.failures.pop(name, None)
            if isinstance(failure := said.get("failure"), dict):
                self.failures[str(failure.get("name"))] = failure

    def _read_table(self) -> tuple[list[str], dict[str, dict[str, str]]]:
        path = self.folder / TABLE
        try:
            text = path.read_bytes().decode("utf-8")
        except FileNotFoundError:
            return [], {}
        except ValueError as error:
            raise CertificateFileError(f"{path}: cannot be read: {error}") from error
        if self.going_on and not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
        try:
            reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t")
            table = list(reader)
        except csv.Error as error:
            raise CertificateFileError(f"{path}: cannot be read: {error}") from error
        columns = list(reader.fieldnames or ())
        if columns and not {"name", "source", "image_id"} <= set(columns):
            self.foreign.append(TABLE)
        if any(None in row or None in row.values() for row in table):
            if not self.going_on:
                raise CertificateFileError(f"{path}: its rows differ in length")
            table = [row for row in table if None not in row and None not in row.values()]
        rows: dict[str, dict[str, str]] = {}
        for row in table:
            name = row.get("name", "")
            if name in rows:
                self._doubled[from_cell(name)] = TABLE
            rows[name] = row
        return columns, rows


def run_id(run: dict[str, Any]) -> str:
    """The same for the same settings, model and machine."""
    said = json.dumps({name: run.get(name) for name in RUN}, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def _read_json(path: Path) -> dict[str, Any] | None:
    """An object; None if there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise CertificateFileError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CertificateFileError(f"{path}: is not the manifest of a run")
    return found


def _are_objects(entries: Any) -> bool:
    return isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)


def _certificates_of(entry: dict[str, Any]) -> list[str]:
    """The names of its certificates, of which there is one."""
    files = entry.get("files", [])
    files = [file for file in files if isinstance(file, str)] if isinstance(files, list) else []
    return [file.removesuffix(CERTIFICATE) for file in files if file.endswith(CERTIFICATE)]
