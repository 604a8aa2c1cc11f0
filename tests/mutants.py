"""Mutations of the theorems and of the second moments: which of them do the tests notice?

    python tests/mutants.py [WORD ...]

edits one place of a copy of the package at a time (those whose file or text contains a WORD; default all), runs the
quick tests of that place on it, and prints the survivors. Not a part of the suite. A survivor either has its reason in
mutants.txt, where they all are, or asks for a test; the exit status is 1 if there is one of the latter.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds of one mutant
MOMENTS = ("test_lemmas", "test_rounding", "test_known_spectra", "test_second_moment", "test_scatter")
THEOREMS = ("test_lemmas", "test_marginal", "test_membership", "test_label", "test_bounds")
# Whole runs with known truth: they see no constants, and take longest.
LEFT_OUT = "not betting_may_stop and not largest_block and not coverage and not population_bound and not still_verify"

TESTS = {
    "moments/concentration.py": MOMENTS,
    "moments/eigenvalues.py": ("test_rounding", "test_known_spectra", "test_second_moment", "test_scatter"),
    "moments/scatter.py": ("test_rounding", "test_known_spectra", "test_scatter"),
    "moments/deflation.py": ("test_rounding", "test_known_spectra", "test_scatter", "test_second_moment"),
    "moments/second_moment.py": MOMENTS,
    "moments/least_moves.py": ("test_rounding", "test_second_moment"),
    "moments/summary.py": ("test_lemmas", "test_scatter", "test_second_moment", "test_certificate"),
    "theorems/bounds.py": THEOREMS,
    "theorems/marginal.py": THEOREMS,
    "theorems/membership.py": THEOREMS,
    "theorems/label.py": THEOREMS,
}


class Mutant(NamedTuple):
    """place: the file it is in. reason: why it may survive; else empty."""

    place: str
    old: str
    new: str
    reason: str


def listed() -> list[Mutant]:
    """Those of mutants.txt: lines of "[place]", then of "- old", "+ new" and, for a survivor, "= reason"."""
    found, place = [], ""
    for line in (ROOT / "tests" / "mutants.txt").read_text().splitlines():
        kind, text = line[:1], line[2:].replace("\\n", "\n")
        if kind == "[":
            place = line[1:-1]
        elif kind == "-":
            found.append(Mutant(place, text, "", ""))
        elif kind == "+":
            found[-1] = found[-1]._replace(new=text)
        elif kind == "=":
            found[-1] = found[-1]._replace(reason=text)
    return found


def survives(package: Path, place: str, old: str, new: str) -> bool:
    """Whether the tests pass with one edit in the copy. They run in a child that has loaded the libraries already."""
    file = package / "certificates" / place
    text = file.read_text()
    if old not in text:
        raise ValueError(f"{place} does not contain {old!r}")
    file.write_text(text.replace(old, new))
    try:
        if (child := os.fork()) == 0:
            with open(package.parent / "log", "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            signal.alarm(LIMIT)
            sys.path.insert(0, str(package.parent))
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", LEFT_OUT]
            os._exit(any(pytest.main([*options, str(ROOT / "tests" / f"{name}.py")]) for name in TESTS[place]))
        return os.waitpid(child, 0)[1] == 0
    finally:
        file.write_text(text)


def main(words: list[str]) -> int:
    import mpmath  # noqa: F401
    import scipy.optimize
    import scipy.sparse.linalg
    import scipy.stats  # noqa: F401
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # as every test does; it loads half of torch
    sys.dont_write_bytecode = True
    unexpected = tried = 0
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "robattr_fast"
        shutil.copytree(ROOT / "robattr_fast", package, ignore=shutil.ignore_patterns("csrc", "__pycache__"))
        for place, old, new, reason in listed():
            if words and not any(word in f"{place} {old} -> {new}" for word in words):
                continue
            tried += 1
            start = time.perf_counter()
            if survives(package, place, old, new):
                unexpected += not reason
                note = f"SURVIVED ({reason or 'a test is missing'})"
            else:
                note = "killed"
            print(f"{note:10} {place}: {old!r} -> {new!r} [{time.perf_counter() - start:.0f} s]", flush=True)
    print(f"{tried} mutants, {unexpected} survived unexpectedly")
    return int(unexpected > 0)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
