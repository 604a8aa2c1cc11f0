"""The C++ kernels give the same bits at every instruction set and number of threads, and run at the level asked for."""

import functools
import hashlib
import os
import re
import subprocess
import sys

import pytest
import torch
from _operators import DTYPES, KINDS, at_isa, make_row, needs_extension

import robattr_fast as rf
from robattr_fast import _extension
from robattr_fast.reference._pack_levels import packed_row_bytes

# One process finds the baseline, for all tests.
pytestmark = [pytest.mark.xdist_group("cpu_isa"), pytest.mark.once, pytest.mark.wheel]


def digest_of_all_kernels(isa: str) -> str:
    """A hash over the bits of everything that the CPU kernels compute, of NaN only where it is."""
    digest = hashlib.sha256()

    def add(tensor):
        digest.update(torch.nan_to_num(tensor.double(), nan=1e300).numpy().tobytes())

    torch.manual_seed(0)
    with at_isa(isa):
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
    return digest.hexdigest()


@functools.cache
def of_the_baseline() -> str:
    return digest_of_all_kernels("baseline")


@pytest.mark.parametrize(("isa", "threads"), [("baseline", 3), ("avx2", 1), ("avx512", 1), ("avx512", 3)])
def test_same_bits(isa, threads):
    expected = of_the_baseline()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert digest_of_all_kernels(isa) == expected
    finally:
        torch.set_num_threads(before)


def test_the_level_in_use_is_the_one_asked_for():
    needs_extension()
    assert _extension.cpu_isa() == (os.environ.get("ROBATTR_FAST_CPU_ISA") or _extension.cpu_isas()[-1])
    for isa in _extension.cpu_isas():
        with at_isa(isa):
            assert _extension.cpu_isa() == isa


@pytest.mark.parametrize(
    ("wanted", "has", "level"),
    [
        ("", "baseline", "baseline"),
        ("", "baseline avx2", "avx2"),
        ("", "baseline avx2 avx512", "avx512"),
        ("baseline", "baseline avx2 avx512", "baseline"),
        ("avx2", "baseline avx2", "avx2"),
        ("avx2", "baseline", None),
        ("avx512", "baseline avx2", None),
        ("AVX2", "baseline avx2", None),
        ("sse9", "baseline avx2 avx512", None),
    ],
)
def test_choice_of_the_level(wanted, has, level):
    has = has.split()
    if level is not None:
        assert _extension.choose_cpu_isa(wanted, has) == level
        return
    message = f"ROBATTR_FAST_CPU_ISA: got '{wanted}', expected one of {', '.join(has)}, which this CPU has"
    with pytest.raises(ValueError, match=re.escape(message)):
        _extension.choose_cpu_isa(wanted, has)


@pytest.mark.parametrize("required", ["0", "1"])
def test_a_level_that_cannot_be_used_is_an_error_when_the_extension_loads(monkeypatch, required):
    """Whether or not the extension is required: the reference must not run in silence where kernels were asked for."""
    needs_extension()
    before = _extension.cpu_isa()
    monkeypatch.setenv("ROBATTR_FAST_CPU_ISA", "sse9")
    monkeypatch.setenv("ROBATTR_FAST_REQUIRE_EXT", required)
    with pytest.raises(ValueError, match="ROBATTR_FAST_CPU_ISA: got 'sse9', expected one of baseline"):
        _extension.load.__wrapped__()
    assert _extension.cpu_isa() == before
    monkeypatch.setenv("ROBATTR_FAST_DISABLE_EXT", "1")  # nothing reads the level
    assert not _extension.load.__wrapped__()[0]


def test_the_first_operator_reports_an_unknown_level():
    needs_extension()
    program = "import torch, robattr_fast as rf; rf.noisy_samples(torch.zeros(1, 3), 1.0, 1)"
    environment = os.environ | {"ROBATTR_FAST_CPU_ISA": "sse9"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].startswith("ValueError: ROBATTR_FAST_CPU_ISA: got 'sse9', expected one of")
