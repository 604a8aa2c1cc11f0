"""What a run of ``robattr-fast certify`` left beside its certificates: its manifest, its table, its images."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from robattr_fast import model
from robattr_fast.errors import CertificateFileError
from robattr_fast.inputs import images

MANIFEST, TABLE = "manifest.json", "certificates.tsv"
CERTIFICATE, CHECKPOINT = ".safetensors", ".checkpoint"
ATTACKED = ".attacked.tsv"
"""What an attack left of the certified top set, beside the certificate."""

# The parts of a photograph that models are commonly shown, as shares of its shorter side.
_CROPS = (1.0, 224 / 256)


def find_certificates(paths: Iterable[str | Path]) -> list[Path]:
    """Certificate files, in their order; a folder stands for its ``*.safetensors``, sorted.

    Raises OSError if there is no such file or folder, or no certificate in it.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        files = sorted(path.glob(f"*{CERTIFICATE}")) if path.is_dir() else [path]
        if not files or not files[0].exists():
            raise FileNotFoundError(f"{path}: no certificate here" if path.is_dir() else f"{path}: no such file")
        found |= dict.fromkeys(files)
    return list(found)


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
    """The table's row of the image."""

    @property
    def seconds(self) -> float | None:
        """How long sampling took."""
        seconds = self.image.get("seconds")
        return float(seconds) if isinstance(seconds, (int, float)) else None

    @property
    def source(self) -> str | None:
        """The path of the image as the run was told."""
        source = self.image.get("source")
        return source if isinstance(source, str) else None


def read_record(certificate: Path) -> Record:
    """What lies beside a certificate. Raises CertificateFileError if manifest or table cannot be read."""
    manifest = _read_manifest(certificate.with_name(MANIFEST))
    listed = [entry for entry in manifest.get("images", []) if certificate.name in entry.get("files", [])]
    rows = [row for row in _read_table(certificate.with_name(TABLE)) if row.get("name") == certificate.stem]
    for name, found in ((MANIFEST, listed), (TABLE, rows)):
        if len(found) > 1:
            raise CertificateFileError(f"{certificate.with_name(name)}: names {certificate.stem} {len(found)} times")
    return Record(
        settings=manifest.get("settings", {}),
        model_fingerprint=manifest.get("model_fingerprint") if listed else None,
        image=listed[0] if listed else {},
        row=rows[0] if rows else {},
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CertificateFileError(f"{path}: cannot be read: {error}") from error
    entries = manifest.get("images", []) if isinstance(manifest, dict) else None
    if not (
        isinstance(entries, list)
        and all(isinstance(entry, dict) and isinstance(entry.get("files", []), list) for entry in entries)
        and isinstance(manifest.get("settings", {}), dict)
    ):
        raise CertificateFileError(f"{path}: is not the manifest of a run")
    return manifest


def _read_table(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (ValueError, csv.Error) as error:
        raise CertificateFileError(f"{path}: cannot be read: {error}") from error
    if any(None in row or None in row.values() for row in rows):
        raise CertificateFileError(f"{path}: its rows differ in length")
    return rows


def find_image(
    certificate: Path, record: Record, input_hash: str, shape: Sequence[int], preprocess: images.Preprocess | None
) -> torch.Tensor | None:
    """The image [C, H, W] of a certificate if it can be found where the run had it, or beside the certificate.

    It is the very input of the model: nothing is returned whose hash is not ``input_hash``.

    Args:
        shape: of the certificate's maps.
        preprocess: the model's. None: the usual ones are tried, whole images and central squares.
    """
    if record.source is None:
        return None
    source = Path(record.source)
    side = shape[-1]
    tried = [preprocess] if preprocess is not None else [images.to_tensor]
    if preprocess is None and len(shape) > 1 and shape[-2] == side:
        tried += [images.centre_crop(side, fraction=fraction) for fraction in _CROPS]
    for path in (source, certificate.parent / source, certificate.parent / source.name):
        if not path.is_file():
            continue
        for attempt in tried:
            try:
                x = images.read(path, attempt)
            except images.ImageError:
                break
            if model.input_hash(x) == input_hash:
                return x
    return None
