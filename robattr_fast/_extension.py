"""What can run here: the compiled extension, if there is one (`robattr_fast.build` makes it), and Triton."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from robattr_fast.errors import BackendError

# The levels of csrc/cpu/isa.h: what the CPU kernels are compiled for, each with what the one before it has.
CPU_ISAS = ("baseline", "avx2", "avx512")


@functools.cache
def load() -> tuple[bool, str]:
    """Load the extension once: (True, its path), or (False, why there is none).

    ROBATTR_FAST_REQUIRE_EXT=1 turns a missing extension into BackendError, ROBATTR_FAST_DISABLE_EXT=1 ignores it.
    An instruction set in ROBATTR_FAST_CPU_ISA that is unknown or that this CPU lacks is a ValueError.
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
            _set_isa(str(path), os.environ.get("ROBATTR_FAST_CPU_ISA", ""))
            return True, str(path)
        except OSError as error:
            reason = f"the extension at {path} does not load: {error}"
        except AttributeError:  # it has none of the functions that are looked up by name
            reason = f"the extension at {path} was built from other sources (python -m robattr_fast.build compiles it)"
    if os.environ.get("ROBATTR_FAST_REQUIRE_EXT") == "1":
        raise BackendError(f"ROBATTR_FAST_REQUIRE_EXT=1, but {reason}")
    return False, reason


def outdated(library: Path) -> str:
    """What to do where the sources of a checkout have changed since ``library`` was built beside them; else nothing."""
    from robattr_fast import build

    csrc = build.csrc_folder()
    if library != build.installed_library() or csrc.is_relative_to(library.parent):
        return ""
    newer = [path for path in csrc.rglob("*") if path.is_file() and path.stat().st_mtime > library.stat().st_mtime]
    return f"{newer[0].name} of csrc/ is newer: make install" if newer else ""


def choose_cpu_isa(wanted: str, has: Sequence[str]) -> str:
    """The instruction set that ROBATTR_FAST_CPU_ISA asks for by ``wanted`` on a CPU that ``has`` these; "" asks for
    the last, the widest. ValueError where it is none of them."""
    if wanted and wanted not in has:
        raise ValueError(f"ROBATTR_FAST_CPU_ISA: got {wanted!r}, expected one of {', '.join(has)}, which this CPU has")
    return wanted or has[-1]


def _set_isa(path: str, wanted: str) -> None:
    library = ctypes.CDLL(path)
    library.robattr_fast_cpu_isa_use(CPU_ISAS.index(choose_cpu_isa(wanted, _isas(library))))


def _isas(library: ctypes.CDLL) -> tuple[str, ...]:
    return CPU_ISAS[: library.robattr_fast_cpu_isa_widest() + 1]


def _loaded() -> str:
    loaded, where = load()
    if not loaded:
        raise BackendError(where)
    return where


def cpu_isas() -> tuple[str, ...]:
    """Those of CPU_ISAS that this CPU has. BackendError without the extension."""
    return _isas(ctypes.CDLL(_loaded()))


def cpu_isa() -> str:
    """The instruction set in use. BackendError without the extension."""
    return CPU_ISAS[ctypes.CDLL(_loaded()).robattr_fast_cpu_isa()]


def set_cpu_isa(wanted: str) -> None:
    """Use this instruction set from now on, as ROBATTR_FAST_CPU_ISA makes it from the start; "" for the widest."""
    _set_isa(_loaded(), wanted)


def can_run_cpu(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """`backends.Implementation.can_run` of every C++ CPU kernel."""
    if device.type != "cpu":
        return False, f"the cpu backend takes CPU tensors, got {device}"
    return load()


def can_run_cuda(operator: str) -> Callable[[torch.device, torch.dtype], tuple[bool, str]]:
    """`backends.Implementation.can_run` of the CUDA C++ kernel ``robattr_fast_C::operator``."""

    def can_run(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        if device.type != "cuda":
            return False, f"the cuda backend takes CUDA tensors, got {device}"
        loaded, reason = load()
        if loaded and not torch._C._dispatch_has_kernel_for_dispatch_key(f"robattr_fast_C::{operator}", "CUDA"):
            reason = "was built without CUDA (needs nvcc >= 12.8 and a torch with CUDA at build time)"
            return False, f"the extension {reason}"
        return loaded, reason

    return can_run


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
