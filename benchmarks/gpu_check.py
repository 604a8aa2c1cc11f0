"""`make gpu-check`: the package built, tested, sanitized and measured on this machine's GPU, in stages.

Each stage ends within eight minutes. What is done for a commit, GPU and set of versions is kept below out/gpu-check and
not done again; where the tree has changes, everything is. The last stage adds to benchmarks/records/<gpu>.jsonl, and
only where the tests have passed. ``--report`` says whether the newest record belongs to today's kernels; it always
succeeds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_entries import ENTRIES
from robattr_fast import build
from robattr_fast.bench import records
from robattr_fast.bench.context import Context
from robattr_fast.bench.run import run
from robattr_fast.machine import versions

ROOT = Path(__file__).resolve().parent.parent
TREES = ("kernels", "csrc")
SECONDS = 8 * 60

# Compiled for the GPU, and run by the fixture `_operators.backend`.
OPERATORS = (
    "betting_bounds",
    "count_sparsified",
    "linear_attention",
    "mlp_smoothgrad",
    "noisy_samples",
    "packed_gram",
    "soft_topk",
    "sparsify",
    "topk_threshold",
)
_WHEEL = """
import torch, robattr_fast as rf
x = torch.rand(2, 3, 37, 41, device="cuda")
assert torch.equal(rf.noisy_samples(x, 0.3, 4), rf.reference.noisy_samples(x, 0.3, 4)), "noise of other bits"
print(rf.__file__)
"""


class StageError(Exception):
    """A stage failed; the message says how."""


@dataclass(frozen=True)
class Machine:
    """Where the check runs: what is done is done for this."""

    root: Path
    gpu: str
    key: dict[str, Any]
    """What a record of a stage belongs to: commit, hashes of the trees, GPU, versions."""
    dirty: bool
    wheel: Path | None
    told: Callable[[str], None] = print

    @property
    def folder(self) -> Path:
        """Logs, and what is done."""
        return self.root / "out" / "gpu-check"

    def is_done(self, stage: str) -> bool:
        path = self.folder / f"{stage}.json"
        return path.exists() and json.loads(path.read_text()) == self.key

    def set_done(self, stage: str, done: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{stage}.json"
        path.unlink(missing_ok=True)
        if done:
            path.write_text(json.dumps(self.key))

    def finishes(
        self, stage: str, command: Sequence[str], *, cwd: Path | None = None, seconds: int = SECONDS, **environment: str
    ) -> None:
        """StageError unless the command ends well and in time; what it prints goes to <stage>.log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"{stage}.log"
        with log.open("a") as file:
            try:
                subprocess.run(
                    command,
                    cwd=cwd or self.root,
                    env=os.environ | environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=seconds,
                    check=True,
                )
            except subprocess.TimeoutExpired as error:
                raise StageError(f"not done after {seconds} seconds: {log}") from error
            except subprocess.CalledProcessError as error:
                last = "\n".join(log.read_text().splitlines()[-15:])
                raise StageError(f"{' '.join(command[:4])} ... ended with {error.returncode}: {log}\n{last}") from error


def trees(root: Path) -> dict[str, str | None]:
    """The hashes of what runs on a GPU, as they are in the commit."""
    return {name: records.git("rev-parse", f"HEAD:{name}", folder=root) for name in TREES}


def here(root: Path, wheel: Path | None) -> Machine:
    """The present machine; it must have a GPU."""
    properties = torch.cuda.get_device_properties(0)
    gpu = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "gibibytes": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    at = records.commit()
    key = {"commit": at["commit"], "trees": trees(root), "gpu": gpu, "versions": versions()}
    return Machine(root, properties.name, key, bool(at["dirty"]), wheel)


def build_stage(machine: Machine) -> str:
    """The extension, in place, with the CUDA kernels where nvcc is; and what a wheel from elsewhere does here."""
    cuda = build.has_cuda()
    environment = {"ROBATTR_FAST_REQUIRE_EXT": "1", "ROBATTR_FAST_CUDA": "1" if cuda else "0"}
    machine.finishes("build", [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], **environment)
    said = "C++ and CUDA kernels" if cuda else "C++ kernels; no nvcc, so no CUDA C++ ones"
    if machine.wheel is None:
        return said
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(machine.wheel) as archive:
            archive.extractall(folder)
        # Where it starts is where Python looks first.
        command = [sys.executable, "-c", _WHEEL]
        machine.finishes("build", command, cwd=Path(folder), PYTHONPATH="", ROBATTR_FAST_REQUIRE_EXT="1")
    return f"{said}; {machine.wheel.name} runs here"


def correct_stage(machine: Machine) -> str:
    """The cases of the operators with their tensors on the GPU, and the tests of public functions there."""
    files = [f"tests/test_{name}.py" for name in OPERATORS]
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    pytest = [sys.executable, "-m", "pytest", "-q", *workers, "tests/test_cuda.py", *files]
    machine.finishes("correct", [*pytest, "-k", "on_gpu or test_cuda"], OMP_NUM_THREADS="1")
    said = (machine.folder / "correct.log").read_text().splitlines()[-1]
    if not re.search(r"\b\d+ passed", said):
        raise StageError(f"no test has run: {said}")
    return said


def sanitize_stage(machine: Machine) -> str:
    """Bad accesses, races and missing barriers, as compute-sanitizer sees them."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return "left out: compute-sanitizer is not installed"
    pytest = [sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py", "-k", "sanitized"]
    checks = ("memcheck", "racecheck", "synccheck")
    for check in checks:
        command = [tool, "--tool", check, "--error-exitcode", "1", "--target-processes", "all", *pytest]
        limit = SECONDS // len(checks)
        machine.finishes("sanitize", command, seconds=limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1", OMP_NUM_THREADS="1")
    return f"{', '.join(checks)}: nothing found"


def bench_stage(machine: Machine) -> str:
    """Every entry that has no record of this commit yet."""
    if not machine.is_done("correct"):
        raise StageError("nothing is measured before the stage `correct` has passed, for this very tree")
    path = machine.root / records.RECORDS / f"{re.sub(r'[^a-z0-9]+', '-', machine.gpu.lower()).strip('-')}.jsonl"
    kept = [record for record in (records.read(path) if path.exists() else []) if _is_ours(record, machine)]
    todo = [entry for entry in ENTRIES if not any(record["entry"] == entry.name for record in kept)]
    # An interrupted entry begins again; the next one does not begin late.
    start = time.monotonic()
    failed = []
    for entry in todo:
        if time.monotonic() - start > SECONDS - 60:
            raise StageError(f"not done after {SECONDS // 60} minutes: the same command goes on with {entry.name}")
        for result in run([entry], Context(told=machine.told), None):
            record = {**result.to_json(), **records.provenance(), **machine.key, "dirty": machine.dirty}
            records.append(path, record)
            failed += [entry.name] if result.failed else []
    if failed:
        raise StageError(f"not measured: {', '.join(failed)}; the reasons are in {path}")
    return f"{len(todo)} entries added to {path}"


def _is_ours(record: dict[str, Any], machine: Machine) -> bool:
    same = all(record.get(name) == value for name, value in machine.key.items())
    return same and not record["dirty"] and record["gate"] == "ok" and not machine.dirty


STAGES: dict[str, Callable[[Machine], str]] = {
    "build": build_stage,
    "correct": correct_stage,
    "sanitize": sanitize_stage,
    "bench": bench_stage,
}
"""In their order. Each says what it did, or raises StageError."""


def check(machine: Machine, stages: Sequence[str]) -> bool:
    """The stages that are not done yet, in their order, up to the first that fails."""
    if machine.dirty:  # what was done, was done for another tree
        for stage in STAGES:
            machine.set_done(stage, False)
    for stage in (name for name in STAGES if name in stages):
        if machine.is_done(stage):
            machine.told(f"{stage}: done before, for this very commit")
            continue
        (machine.folder / f"{stage}.log").unlink(missing_ok=True)
        try:
            said = STAGES[stage](machine)
        except StageError as error:
            machine.set_done(stage, False)
            machine.told(f"{stage}: FAILED: {error}")
            return False
        machine.set_done(stage, True)
        machine.told(f"{stage}: {said}")
    return True


def report(root: Path) -> str:
    """Whether the newest record of a GPU belongs to the kernels of the present commit."""
    folder = root / records.RECORDS
    found = [r for r in (records.read(folder) if folder.is_dir() else []) if "gpu" in r and not r["dirty"]]
    if not found:
        return "GPU records: none; kernels/ and csrc/ have never been measured on a GPU"
    newest, now = found[-1], trees(root)
    where = f"{newest['gpu']['name']}, commit {newest['commit'][:9]}"
    what = f"GPU records: the newest is of {newest['date'][:10]}, {where}"
    stale = [f"{name}/" for name in TREES if newest["trees"][name] != now[name]]
    return f"{what}; {' and '.join(stale)} changed since" if stale else f"{what}, of these very kernels/ and csrc/"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 if all stages asked for have passed, or for a report."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__, allow_abbrev=False)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--report", action="store_true", help="only say how old the newest record is")
    parser.add_argument("--wheel", type=Path, help="made on another machine: it must run here too")
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.stages) - STAGES.keys()):
        parser.error(f"stage: got {', '.join(unknown)}, takes {', '.join(STAGES)}")
    if given.report:
        print(report(ROOT))
        return 0
    if not torch.cuda.is_available():
        why = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}, sees no device"
        print(f"gpu-check needs a GPU, and there is none here: torch {torch.__version__} is {why}.", file=sys.stderr)
        return 1
    return 0 if check(here(ROOT, given.wheel), given.stages or list(STAGES)) else 1


if __name__ == "__main__":
    sys.exit(main())
