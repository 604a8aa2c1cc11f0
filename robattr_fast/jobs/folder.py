"""The folder of a run: what it writes there, and whose files it leaves alone.

Several runs may write into one folder at a time, as long as they have no image in common: each appends its lines under
a lock, and holds a file that names its images for as long as it lives.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from robattr_fast.files import append_line, locked, sweep, write_atomically
from robattr_fast.inputs.images import drawn_by_us
from robattr_fast.inputs.names import cell, listed
from robattr_fast.jobs.record import (
    CERTIFICATE,
    CHECKPOINT,
    JOURNAL,
    MANIFEST,
    PICTURE,
    RUN,
    TABLE,
    Records,
    run_id,
)

_CLAIM = ".claim"
_FORMAT = b'"format":"robattr-fast certificate'


class WriteError(OSError):
    """Something cannot be written into the folder of the run: the run ends."""


class Folder:
    """``with Folder(path, names) as folder: ...``

    Attributes:
        before: what the folder held of earlier runs.

    Raises:
        OSError: the folder cannot be made or written to.
        ValueError: another run is certifying some of these images into it; or files that are no results bear the
            names of results.
        CertificateFileError: its manifest or table cannot be read.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self._names = path, list(names)
        self._claim: IO[str] | None = None
        self._told = False  # the journal of our run
        self._changed = False
        self._table: tuple[int, list[str]] | None = None  # inode and columns when last looked at

    def __enter__(self) -> Folder:
        _make_writable(self.path)
        with locked(self.path):
            self.before = Records(self.path)
            if self.before.foreign:
                raise ValueError(
                    f"out: {self.path / self.before.foreign[0]} is of another program and would be overwritten; "
                    "expected another folder"
                )
            self._spare_others()
            self._claim_names()
            results = {f"{name}{suffix}" for name in self._names for suffix in (CERTIFICATE, PICTURE, CHECKPOINT)}
            sweep(self.path, results | {MANIFEST, TABLE})
        return self

    def __exit__(self, *_: object) -> None:
        if self._claim is not None:
            Path(self._claim.name).unlink(missing_ok=True)
            fcntl.flock(self._claim, fcntl.LOCK_UN)
            self._claim.close()

    def file(self, name: str, suffix: str) -> Path:
        """A file of an image."""
        return self.path / f"{name}{suffix}"

    def add(self, run: dict[str, Any], entry: dict[str, Any], row: dict[str, Any]) -> None:
        """Note an image: its entry of the manifest and its row of the table. Raises WriteError."""
        self._append({"image": {**entry, "run": run_id(run)}}, run, row)

    def fail(self, failure: dict[str, str]) -> None:
        """Note an image that failed. Raises WriteError."""
        self._append({"failure": failure})

    def _append(
        self, said: dict[str, Any], run: dict[str, Any] | None = None, row: dict[str, Any] | None = None
    ) -> None:
        try:
            with locked(self.path):
                if run is not None and not self._told:
                    append_line(self.path / JOURNAL, json.dumps({"run": run}))
                    self._told = True
                append_line(self.path / JOURNAL, json.dumps(said))
                self._changed = True
                if row is not None:
                    self._append_row(row)
        except OSError as error:
            raise WriteError(str(error)) from error

    def _append_row(self, row: dict[str, Any]) -> None:
        table = self.path / TABLE
        inode = table.stat().st_ino if table.exists() else None
        if inode is None or self._table is None or self._table[0] != inode:
            held = Records(self.path)
            columns = list(dict.fromkeys((*held.columns, *row)))
            if columns != held.columns:
                _write_table(table, columns, held.rows.values())
            self._table = (table.stat().st_ino, columns)
        append_line(table, _line(self._table[1], row))

    def settle(self, run: dict[str, Any], order: Iterable[str]) -> None:
        """Put the journal into the manifest and the table in order: images of others first, then in this order."""
        if not self._changed and not self.before.going_on:
            return
        rank = {name: index for index, name in enumerate(order)}
        with locked(self.path):
            held = Records(self.path)
            images = sorted(held.images.items(), key=lambda item: rank.get(item[0], -1))
            used = dict.fromkeys(str(entry.get("run")) for _, entry in images)
            newest = run if run_id(run) in used or held.run is None else held.run
            write_atomically(self.path / MANIFEST, _manifest(newest, held, used, [entry for _, entry in images]))
            if held.rows:
                ranked = {cell(name): index for name, index in rank.items()}
                rows = sorted(held.rows.items(), key=lambda item: ranked.get(item[0], -1))
                _write_table(self.path / TABLE, held.columns, [row for _, row in rows])
            (self.path / JOURNAL).unlink(missing_ok=True)
        self._changed = False

    def _claim_names(self) -> None:
        ours = set(self._names)
        for path in self.path.glob(f".robattr-fast-*{_CLAIM}"):
            try:
                with open(path, "r+", encoding="utf-8") as other:
                    try:
                        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        path.unlink()
                    except BlockingIOError:
                        common = sorted(ours & set(json.load(other)))
                        if common:
                            raise ValueError(
                                f"out: another run is writing {listed(common)} into {self.path}; "
                                "expected another folder, other images, or that it ends first"
                            ) from None
            except FileNotFoundError:
                continue
        path = self.path / f".robattr-fast-{os.getpid()}-{secrets.token_hex(4)}{_CLAIM}"
        self._claim = open(path, "x", encoding="utf-8")  # noqa: SIM115 (held for as long as the run lives)
        fcntl.flock(self._claim, fcntl.LOCK_EX)
        json.dump(self._names, self._claim)
        self._claim.flush()

    def _spare_others(self) -> None:
        """ValueError where a file of ours would replace one that is none."""
        there = set(os.listdir(self.path))
        for name in self._names:
            if name in self.before.images:
                continue
            for suffix, is_ours in ((CERTIFICATE, _is_certificate), (CHECKPOINT, _is_certificate), (PICTURE, None)):
                file = self.file(name, suffix)
                if file.name not in there:
                    continue
                ours = is_ours(file) if is_ours else drawn_by_us(file) or f"{name}{CHECKPOINT}" in there
                if not ours:
                    raise ValueError(
                        f"out: {file} is not of a run and would be overwritten; expected another folder, or none"
                    )


def _is_certificate(path: Path) -> bool:
    """Its header says so; what follows may be damaged."""
    with open(path, "rb") as file:
        return _FORMAT in file.read(1 << 20)


def _make_writable(folder: Path) -> None:
    """Make the folder; OSError now rather than after the first image if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"out: cannot write to {folder}: {error.strerror}") from error


def _manifest(newest: dict[str, Any], held: Records, used: Iterable[str], images: list[dict[str, Any]]) -> bytes:
    """Images of another run than the newest say which."""
    own = run_id(newest)
    others = {one: held.runs[one] for one in used if one != own and one in held.runs}
    for entry in images:
        if entry.get("run") not in others:
            entry.pop("run", None)
    manifest = {name: newest.get(name) for name in RUN} | ({"runs": others} if others else {})
    manifest |= {"images": images, "failures": list(held.failures.values())}
    return json.dumps(manifest, indent=2, allow_nan=False).encode() + b"\n"


def _write_table(path: Path, columns: list[str], rows: Iterable[dict[str, str]]) -> None:
    lines = [_line(columns, dict(zip(columns, columns, strict=True))), *(_line(columns, row) for row in rows)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def _line(columns: list[str], row: dict[str, Any]) -> str:
    """Cells are written as they are: those that hold text went through `cell`."""
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="").writerow([row.get(name, "") for name in columns])
    return text.getvalue()


Say = Callable[[str, str], None]
"""Is told ``error``, ``warning`` or ``note``, and what there is to say, in one line."""
