"""The machine on which CUDA kernels run without a GPU finds what it is there to find."""

import subprocess

import host_cuda
import pytest

pytestmark = [pytest.mark.once, pytest.mark.xdist_group("host_machine")]


@pytest.fixture(scope="module")
def run():
    if reason := host_cuda.missing():
        pytest.skip(reason)
    program = host_cuda.compile_program(host_cuda.HERE / "faults.cpp")
    return lambda kernel: subprocess.run([program, kernel], capture_output=True, text=True, check=False)


THREADS = range(64)


@pytest.mark.parametrize(
    ("kernel", "out"),
    [
        ("rotate", [(t + 1) % 64 for t in THREADS]),
        ("overwrite", [(t + 1) % 64 for t in THREADS]),
        ("count", [64 for t in THREADS]),
        ("remote", [100 + t for t in THREADS] + list(THREADS)),
        ("within-warp", [t ^ 1 for t in THREADS]),
        ("warp-operations", [15 for t in THREADS]),
    ],
)
def test_correct_kernels(run, kernel, out):
    result = run(kernel)
    assert result.returncode == 0, result.stderr
    checksum = sum((i + 1) * value for i, value in enumerate(out))
    assert result.stdout.split() == 4 * [str(checksum)]  # one per schedule


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("missing-barrier", "race on shared memory|read before it was written"),
        ("missing-barrier-before-write", "write after read|read after write"),
        ("missing-atomic", "race on shared memory"),
        ("missing-warp-barrier", "read before it was written|read after write"),
        ("missing-cluster-barrier", "read before it was written|read after write"),
        ("read-while-adding", "race on shared memory"),
        ("add-to-what-is-being-written", "write after write|read before it was written"),
        ("remote-after-the-end", "its block has ended"),
        ("remote-that-may-end", "its block ends while another accesses it"),
        ("uninitialised", "read before it was written"),
        ("shared-out-of-bounds", "element 64 of an array of 64"),
        ("shared-too-small", "beyond the end of shared memory"),
        ("global-out-of-bounds", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
        ("endless-recursion", "stack-overflow|SEGV"),
        ("overflow", "signed integer overflow"),
        ("divergent-barrier", "63 of 64 threads wait for sync_threads"),
        ("barriers-at-two-places", "divergent barrier: thread"),
        ("divergent-shuffle", "16 of 32 threads wait for a warp operation"),
        ("divergent-cluster-barrier", "64 of 128 threads wait for cluster_sync"),
    ],
)
def test_faults_are_found(run, kernel, message):
    result = run(kernel)
    assert result.returncode != 0, f"{kernel} passed for correct"
    assert any(part in result.stderr for part in message.split("|")), result.stderr
