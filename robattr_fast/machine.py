"""What a run takes place on: the device's own name, versions, memory, and the C library's allocator."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_INT = 2**31 - 1
# Activations of a batch take some 100 MiB each. Older releases refuse more than half a heap, 32 MiB.
_MMAP_THRESHOLDS = (2**30, 32 * 2**20)


def device_model(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory() -> int:
    """The most memory that this process has held at a time, in bytes; getrusage would count its parent's too."""
    (peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(peak) * 1024


def versions() -> dict[str, str]:
    """Of everything that may change a number."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "torch": torch.__version__}
    for name in ("robattr-fast", "numpy", "scipy", "pillow", "triton", "timm", "captum"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_features() -> str:
    """The widest instruction set that kernels may use here, as torch calls it; a forced one of ours is added."""
    forced = os.environ.get("ROBATTR_FAST_CPU_ISA")
    return torch.backends.cpu.get_cpu_capability() + (f", ROBATTR_FAST_CPU_ISA={forced}" if forced else "")


def tune_allocator() -> tuple[bool, str]:
    """Let glibc keep freed memory for the next batch instead of returning it to the kernel.

    glibc maps every large block afresh and gives it back when it is freed. The kernel then clears each page again when
    it is first touched, batch after batch.

    For the whole process and for good: the former thresholds cannot be read, hence not restored. Memory that was once
    used stays with the process. The command line calls this; the library never does by itself.

    Returns:
        (True, what was set), or (False, why nothing was): another C library, or glibc refused.
    """
    library, version = platform.libc_ver()
    if library != "glibc":
        return False, f"the C library is {library or 'not glibc'}, whose allocator has no such thresholds"
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    kept = next((size for size in _MMAP_THRESHOLDS if mallopt(_M_MMAP_THRESHOLD, size) == 1), None)
    if kept is None:
        return False, f"glibc {version} refuses mallopt(M_MMAP_THRESHOLD, {_MMAP_THRESHOLDS[-1]})"
    if mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT) != 1:
        return False, f"glibc {version} refuses mallopt(M_TRIM_THRESHOLD, {_LARGEST_INT})"
    return True, f"glibc {version}: freed memory is kept, in blocks of up to {kept >> 20} MiB"
