"""The CUDA kernels on a CPU.

csrc/cuda is compiled by g++ against host_cuda/cuda/rt.cuh, with sanitizers, into a process of its own that executes
each call under four orders of threads. machine.h says what it reports.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from robattr_fast.reference._pack_levels import packed_row_bytes

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # nvcc's
    "-Wno-unused-parameter",
]
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def missing() -> str:
    """Why the kernels cannot run here, or ''."""
    if shutil.which("g++") is None:
        return "the host machine is compiled by g++, which is not installed"
    if platform.machine() != "x86_64":
        return f"the host machine switches fibers in x86-64 assembly, this is {platform.machine()}"
    if not CSRC.is_dir():
        return "the tests run without a checkout: no csrc beside them"
    return ""


def compile_program(source: Path, *defines: str, csrc: Path = CSRC) -> Path:
    """The sanitized program of one source file, compiled once per content of all sources, whatever process asks."""
    digest = hashlib.sha256(" ".join([*FLAGS, *defines]).encode())
    for path in sorted(
        p for folder in (HERE, csrc / "cuda", csrc / "common") for p in folder.rglob("*") if p.is_file()
    ):
        if path.suffix != ".pyc":
            digest.update(path.name.encode() + path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"robattr_fast_host_cuda_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    program = folder / f"{source.stem}-{digest.hexdigest()[:16]}"
    with open(f"{program}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            building = f"{program}.{os.getpid()}"
            command = ["g++", *FLAGS, *(f"-D{d}" for d in defines), f"-I{HERE}", f"-I{csrc}", "-o", building, source]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            os.replace(building, program)
    return program


@dataclass(frozen=True)
class Device:
    """What the kernels are told of the GPU. Little shared memory sends short rows down the paths of long ones."""

    shared_per_block: int
    shared_for_two: int
    clusters: bool


@dataclass(frozen=True)
class Route:
    """How a call was executed."""

    cluster: int
    resident: bool
    staged: bool
    sampled: int


class HostMachine:
    """The kernels on one simulated device, with the signatures of `robattr_fast_C`."""

    def __init__(self, program: Path, device: Device, clusters: int) -> None:
        self._device, self._clusters = device, clusters
        self.route: Route | None = None
        self.ended = False  # the process has reported a fault and is gone
        self._process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def close(self) -> str:
        """End the process. Returns what it has to say, '' if nothing was wrong."""
        _, errors = self._process.communicate()
        return errors.decode() or (f"it ended with status {status}" if (status := self._process.returncode) else "")

    def _call(self, operation: int, scores: torch.Tensor, *numbers: int) -> bytes:
        images, samples, n = scores.shape
        # The storage from the first to the last element that the strides reach, and not a byte more.
        span = sum((size - 1) * stride for size, stride in zip(scores.shape, scores.stride(), strict=True)) + 1
        payload = scores.as_strided((span,), (1,)).contiguous().view(torch.uint8).numpy().tobytes()
        device = (self._device.shared_per_block, self._device.shared_for_two, self._device.clusters, self._clusters)
        head = (operation, TYPES.index(scores.dtype), images, samples, n, *scores.stride(), 0, len(payload))
        process = self._process
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(struct.pack("19q", *head, *numbers, *device) + payload)
            process.stdin.flush()
        size = process.stdout.read(8)
        if len(size) != 8:
            self.ended = True
            raise AssertionError(self.close())
        reply = process.stdout.read(struct.unpack("q", size)[0])
        cluster, resident, staged, sampled = struct.unpack("4q", reply[:32])
        self.route = Route(cluster, bool(resident), bool(staged), sampled)
        return reply[32:]

    def topk_threshold(self, out: torch.Tensor, scores: torch.Tensor, k: int) -> None:
        reply = self._call(0, scores[None], k, k, 0, 0, 0)
        out.copy_(torch.frombuffer(bytearray(reply), dtype=out.dtype).view(out.shape))

    def count_sparsified_(self, counts, invalid, packed, scores, k_tau: int, k_gamma: int) -> bool:
        levels, n = counts.shape[2], scores.shape[2]
        reply = bytearray(
            self._call(1, scores, k_tau, k_gamma, levels, int(packed is not None), packed_row_bytes(n, levels))
        )
        ends = counts.numel() * 4, (counts.numel() + invalid.numel()) * 4
        counts += torch.frombuffer(reply[: ends[0]], dtype=torch.int32).view(counts.shape)
        invalid += torch.frombuffer(reply[ends[0] : ends[1]], dtype=torch.int32).view(invalid.shape)
        if packed is not None:
            packed.copy_(torch.frombuffer(reply[ends[1] :], dtype=torch.uint8).view(packed.shape))
        return False
