"""What can run here: the compiled extension, if there is one (`robattr_fast.build` makes it), and Triton."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from robattr_fast.errors import BackendError


@functools.cache
def load() -> tuple[bool, str]:
    """Load the extension once: (True, its path), or (False, why there is none).

    ROBATTR_FAST_REQUIRE_EXT=1 turns a missing extension into BackendError, ROBATTR_FAST_DISABLE_EXT=1 ignores it.
    """
    if os.environ.get("ROBATTR_FAST_DISABLE_EXT") == "1":
        return False, "the extension is disabled by ROBATTR_FAST_DISABLE_EXT=1"
    from robattr_fast import build  # here, so that `python -m robattr_fast.build` does not find itself imported

    reason = "the extension is not built (python -m robattr_fast.build compiles it)"
    for locate in (build.installed_library, build.cached_library):
        path = locate()
        if not path.exists():
            continue
        try:
            torch.ops.load_library(path)
            return True, str(path)
        except OSError as error:
            reason = f"the extension at {path} does not load: {error}"
    if os.environ.get("ROBATTR_FAST_REQUIRE_EXT") == "1":
        raise BackendError(f"ROBATTR_FAST_REQUIRE_EXT=1, but {reason}")
    return False, reason


def can_run_cpu(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """`backends.Implementation.can_run` of every C++ CPU kernel."""
    if device.type != "cpu":
        return False, f"the cpu backend takes CPU tensors, got {device}"
    return load()


def can_run_cuda(operator: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """`backends.Implementation.can_run` of the CUDA C++ kernel ``robattr_fast_C::operator``, bound to its name."""
    if device.type != "cuda":
        return False, f"the cuda backend takes CUDA tensors, got {device}"
    loaded, reason = load()
    if loaded and not torch._C._dispatch_has_kernel_for_dispatch_key(f"robattr_fast_C::{operator}", "CUDA"):
        return False, "the extension was built without CUDA (needs nvcc >= 12.8 and a torch with CUDA at build time)"
    return loaded, reason


def can_run_triton(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """`backends.Implementation.can_run` of every Triton kernel."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed (pip install 'robattr-fast[triton]')"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return True, ""
    return False, f"triton takes CUDA tensors, got {device} (TRITON_INTERPRET=1 interprets it on the CPU)"


def can_run_anywhere(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """`backends.Implementation.can_run` of every reference."""
    return True, ""
