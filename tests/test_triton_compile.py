"""Triton kernels compile offline for the GPUs that we mean to run on, within budgets. No GPU is needed."""

import os
import re
import shutil
import subprocess

import pytest
from _operators import INTERPRETED

triton = pytest.importorskip("triton", reason="triton is not installed")
if INTERPRETED:
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from robattr_fast.kernels import noisy_samples  # noqa: E402

ARCHITECTURES = (80, 90, 100)


def _resources(cubin: bytes, folder) -> dict[str, int]:
    """Registers and stack bytes of the one kernel in a cubin."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    assert shutil.which(tool), f"triton ships no cuobjdump at {tool}"
    text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("pointer", "channels_last"), [("*fp32", False), ("*fp32", True), ("*bf16", True), ("*fp64", False)]
)
def test_noisy_samples(architecture, pointer, channels_last, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    signature = {
        "x": pointer,
        "out": pointer,
        "image_ids": "*i64",
        "sigma": "fp64",
        "seed_low": "i64",
        "seed_high": "i64",
        "first_sample": "i64",
        **dict.fromkeys(("num_samples", "n", "plane", "channels"), "i32"),
        **dict.fromkeys(("CHANNELS_LAST", "DOUBLE", "BLOCKS"), "constexpr"),
    }
    constants = {"CHANNELS_LAST": channels_last, "DOUBLE": pointer == "*fp64", "BLOCKS": 256}
    # Arguments that equal 1 must stay arguments: as constants they would have no type to convert.
    assert {"seed_low", "seed_high"} <= set(noisy_samples._noisy_samples.do_not_specialize)
    compiled = triton.compile(
        ASTSource(fn=noisy_samples._noisy_samples, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", architecture, 32),
        options={"enable_fp_fusion": False},
    )
    ptx = compiled.asm["ptx"]
    assert "fma.rn.f32" not in ptx, "a contracted multiply-add breaks the promise of equal bits"
    assert "sqrt.rn.f32" in ptx
    assert "sqrt.approx" not in ptx
    used = _resources(compiled.asm["cubin"], tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, "registers spill"
    assert used["REG"] <= 64
