"""The CUDA sources compile offline for the GPUs that we mean to run on, within budgets. No GPU is needed."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from robattr_fast import build

CSRC = Path(__file__).resolve().parent.parent / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: CUDA sources cannot be compiled here"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="the tests run without a checkout: no csrc beside them"),
]

# Two blocks of 512 threads share the 65536 registers of a multiprocessor where rows of 32-bit keys stay in shared
# memory; elsewhere one block has them. ptxas 13.0 for sm_100 puts a few values on the stack.
STACK = {80: 0, 90: 0, 100: 32}


def cuobjdump() -> str:
    """CUDA's own, or the one that comes with Triton."""
    triton = Path(sysconfig.get_path("purelib")) / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = shutil.which("cuobjdump") or (str(triton) if triton.exists() else None)
    if tool is None:
        pytest.skip("no cuobjdump: it comes with CUDA and with Triton")
    return tool


def compile_source(source: Path, target: Path, *flags: str) -> None:
    torch_include = Path(torch.__file__).parent / "include"
    defines = [f"-D{name}={value}" for name, value in build.MACROS] + ["-DROBATTR_CUDA", "-DUSE_CUDA"]
    common = [flag for flag in build.NVCC_FLAGS if not flag.startswith("-gencode")]
    command = [NVCC, *common, *defines, f"-I{CSRC}", f"-isystem={torch_include}", *flags, "-o", target, source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["topk_threshold", "count_sparsified"])
@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
def test_instructions_and_resources(architecture, operator, tmp_path):
    cubin = tmp_path / "kernels.cubin"
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    compile_source(CSRC / "cuda" / f"{operator}.cu", cubin, target, "-cubin", "--keep", f"--keep-dir={tmp_path}")
    ptx = (tmp_path / f"{operator}.ptx").read_text()
    assert f".target sm_{architecture}" in ptx
    assert "fma.rn.f32" not in ptx
    assert "mul.rn.f32" in ptx
    text = subprocess.run([cuobjdump(), "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    found = re.findall(r"Function \S*?\d(Float\d\d|BFloat16)ELb([01])\S*:\n\s*(REG:.*)", text.stdout)
    kernels = {(element, bool(int(resident))): usage for element, resident, usage in found}
    assert len(kernels) == len(found) == 8  # four types of scores, rows in shared memory or not
    for kernel, usage in kernels.items():
        used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
        resident_32_bit = kernel[1] and kernel[0] != "Float64"
        assert used["REG"] <= (64 if resident_32_bit else 128), (kernel, usage)
        assert used["STACK"] + used["LOCAL"] <= STACK[architecture], (kernel, usage)
        # The launcher asks for all dynamic shared memory there is: nothing static beside what sm_90 and later reserve.
        assert used["SHARED"] == (1024 if architecture >= 90 else 0), (kernel, usage)
    sass = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    # Histograms of equal keys: one instruction counts all lanes that meet.
    assert "ATOMS.POPC.INC" in sass
    assert ("UCGABAR_ARV" in sass) == (architecture >= 90), "cluster barriers"
    # Global memory: additions that return nothing, and no other atomics.
    assert bool(re.search(r"\bREDG?\.E\.ADD\.STRONG\.GPU\b", sass)) == (operator == "count_sparsified")
    assert not re.search(r"\bATOMG?\.", sass)


def test_the_build_has_every_architecture_and_ptx():
    """What nvcc would put into the binary by the flags of the build."""
    command = [NVCC, "--dryrun", "-c", *build.NVCC_FLAGS, CSRC / "cuda" / "topk_threshold.cu"]
    steps = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    images = set(re.findall(r"--image\d*=kind=(\w+),sm=(\d+)", steps))
    expected = {("elf", str(number)) for number in build.ARCHITECTURES}
    assert images == expected | {("ptx", str(build.ARCHITECTURES[-1]))}


@pytest.mark.slow
def test_bindings_compile(tmp_path):
    compiler = os.environ.get("CXX", "g++")
    include = Path(torch.__file__).parent / "include"
    defines = [f"-D{name}={value}" for name, value in build.MACROS] + ["-DROBATTR_CUDA", "-DUSE_CUDA"]
    command = [compiler, "-std=c++20", "-fsyntax-only", *defines, f"-I{CSRC}", f"-I{include}", CSRC / "bindings.cpp"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
