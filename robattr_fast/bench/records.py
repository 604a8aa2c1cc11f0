"""Records of benchmarks: one JSON line per entry and run, with the commit and the machine that they belong to."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from robattr_fast.bench.process import HERE
from robattr_fast.machine import cpu_features, device_model, versions

RECORDS = Path("benchmarks") / "records"
"""Below the root of a checkout."""


def git(*arguments: str, folder: Path = HERE) -> str | None:
    """What git prints, or None where it fails: no checkout, or no git."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> dict[str, Any]:
    """``commit``, and ``dirty``: tracked files differ from it. None for both outside of a checkout of this package."""
    if git("ls-files", "--error-unmatch", str(Path(__file__).resolve())) is None:
        return {"commit": None, "dirty": None}
    # Records of earlier entries of the same run do not make the code another.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":(exclude){RECORDS}")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}


def provenance() -> dict[str, Any]:
    """Everything that a figure depends on besides what was measured."""
    cpu = torch.device("cpu")
    machine = {"cpu": device_model(cpu), "cores": _cores(), "isa": cpu_features()}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {**commit(), "date": date, "machine": machine, "versions": versions()}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_path() -> Path:
    """benchmarks/records/<cpu>.jsonl of the checkout; outside of one, <cpu>.jsonl in the working directory."""
    machine = provenance()["machine"]
    name = re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['cores']} cores".lower()).strip("-")
    folder = HERE / RECORDS
    return (folder if folder.parent.is_dir() else Path()) / f"{name}.jsonl"


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, sort_keys=True) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file, or of the .jsonl files of a folder, oldest first."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    found = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: not a record: {error}") from error
    return sorted(found, key=lambda record: record["date"])


def latest(records: list[dict[str, Any]], entry: str) -> dict[str, Any] | None:
    """The last complete record of an entry that was measured on a green gate, with everything and on its own."""
    fit = [r for r in records if r["entry"] == entry and r["gate"] == "ok" and not r["quick"] and r["base"] is None]
    return fit[-1] if fit else None
