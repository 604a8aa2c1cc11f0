"""The C++ kernels give the same bits at every instruction set and number of threads."""

import os
import subprocess
import sys

import pytest
from _operators import needs_extension

pytestmark = pytest.mark.xdist_group("cpu_isa")  # one process finds the baseline, for all tests

# Prints a hash over the bits of everything the CPU kernels compute, of NaN only where it is.
_PROGRAM = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[1])
from _operators import DTYPES, KINDS, make_row
import robattr_fast as rf
from robattr_fast.reference._pack_levels import packed_row_bytes

digest = hashlib.sha256()
def add(tensor):
    digest.update(torch.nan_to_num(tensor.double(), nan=1e300).numpy().tobytes())

torch.set_num_threads(int(sys.argv[2]))
torch.manual_seed(0)
with rf.backends.use("cpu", strict=True):
    for dtype in DTYPES:
        for n in (1, 5, 64, 1000, 8195):
            x = torch.randn(2, n).to(dtype)
            add(rf.noisy_samples(x, 0.3, 5, seed=2**64 - 1, first_sample=2**31))
            for sigma in (1e-7, 1e6):  # half's denormals, and its overflow
                add(rf.noisy_samples(torch.zeros_like(x), sigma, 2))
        for shape in ((3, 40, 40), (5, 31, 29), (70, 9, 9)):
            add(rf.noisy_samples(torch.randn(2, *shape).to(dtype), 0.3, 2, channels_last=True))
    for n in (1, 7, 33, 784, 8192, 30001):
        rows = torch.stack([torch.from_numpy(make_row(kind, n, seed=5)) for kind in sorted(KINDS)])
        for dtype in DTYPES:
            scores = rows.to(dtype)
            add(rf.topk_threshold(scores, max(1, n // 7)))
            for levels in (1, 15, None):
                add(rf.sparsify(scores, 0.2, 0.05, levels=levels))
            counts = torch.zeros(3, n, 15, dtype=torch.int32)
            add(rf.count_sparsified_(counts, scores.reshape(3, -1, n), 0.2, 0.05))
            add(counts)
            for levels in (1, 15):
                counts = torch.zeros(3, n, levels, dtype=torch.int32)
                packed = torch.full((3, len(KINDS) // 3, packed_row_bytes(n, levels)), 255, dtype=torch.uint8)
                rf.count_sparsified_(counts, scores.reshape(3, -1, n), 0.2, 0.05, packed=packed)
                add(packed)
print(digest.hexdigest())
"""


def run(isa: str, threads: int) -> str:
    needs_extension()
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, os.path.dirname(__file__), str(threads)],
        env=os.environ | {"ROBATTR_FAST_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    if f"got {isa}, this CPU has" in result.stderr:
        pytest.skip(f"this CPU lacks {isa}")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def baseline():
    return run("baseline", 1)


@pytest.mark.parametrize(("isa", "threads"), [("baseline", 3), ("avx2", 1), ("avx512", 1), ("", 2)])
def test_same_bits(baseline, isa, threads):
    assert run(isa, threads) == baseline


def test_unknown_level_is_an_error():
    needs_extension()
    program = "import torch, robattr_fast as rf; rf.noisy_samples(torch.zeros(1, 3), 1.0, 1)"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"ROBATTR_FAST_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "ROBATTR_FAST_CPU_ISA: got sse9, takes baseline, avx2 or avx512" in result.stderr
