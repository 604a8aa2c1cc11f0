"""What a run took place on: the device's own name, and the versions of everything that may change a number."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch


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
