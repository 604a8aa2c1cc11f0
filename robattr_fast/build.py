"""How the extension is compiled: one description for setup.py and for ``python -m robattr_fast.build``.

Importing this module needs no torch, so that setup.py can load it by path.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "_C.abi3.so"

# -ffp-contract=off: the noise stream promises bits, and a fused multiply-add rounds once where two roundings are due.
# The other two let the compiler vectorise square roots; neither changes a result.
CXX_FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
# gcc 12 calls its own _mm512_undefined_ps uninitialised, and torch's headers leave parameters unused.
CXX_FLAGS += [
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-Wno-unused-parameter",
    "-Wno-unknown-pragmas",
]
# The oldest LibTorch stable ABI that has everything we call: one binary serves this torch and every later one.
MACROS = [("TORCH_TARGET_VERSION", "0x020b000000000000")]
# Machine code for A100, H100 and B200, and PTX that newer GPUs compile at first use.
ARCHITECTURES = (80, 90, 100)
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "--fmad=false",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fvisibility=hidden",
    *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES),
    f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}",
]


@dataclass(frozen=True)
class Build:
    """Sources and flags of the extension; paths are absolute."""

    sources: list[str]
    include_dirs: list[str]
    cxx_flags: list[str]
    nvcc_flags: list[str]
    macros: list[tuple[str, str | None]]
    cuda: bool


def describe(csrc: Path, *, cuda: bool) -> Build:
    """The build of the sources below ``csrc``; ``cuda`` adds csrc/cuda."""
    folders = [csrc, csrc / "cpu", *([csrc / "cuda"] if cuda else [])]
    sources = [str(p) for folder in folders for p in sorted(folder.iterdir()) if p.suffix in (".cpp", ".cu")]
    if not sources:
        raise FileNotFoundError(f"no sources below {csrc}")
    macros = [*MACROS, *([("ROBATTR_CUDA", None), ("USE_CUDA", None)] if cuda else [])]
    return Build(sources, [str(csrc)], CXX_FLAGS, NVCC_FLAGS, macros, cuda)


def has_compiler() -> bool:
    """Whether a C++ compiler is on the path (CXX, else c++ or g++)."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++"))


def has_cuda() -> bool:
    """Whether torch was built for CUDA and nvcc knows ARCHITECTURES: then the CUDA sources join the extension.

    ROBATTR_FAST_CUDA=0 leaves them out, ROBATTR_FAST_CUDA=1 makes it a RuntimeError if they cannot be built. Where a
    torch with CUDA has to go without them, stderr says why.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = os.environ.get("ROBATTR_FAST_CUDA", "")
    if wanted == "0":
        return False
    nvcc = shutil.which(f"{CUDA_HOME}/bin/nvcc") if CUDA_HOME else None
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
    elif nvcc is None:
        reason = "nvcc was not found (set CUDA_HOME)"
    else:
        reason = _unknown_architectures(nvcc)
    if reason and wanted == "1":
        raise RuntimeError(f"ROBATTR_FAST_CUDA=1, but {reason}")
    if reason and torch.version.cuda is not None:
        print(f"robattr_fast: without CUDA kernels: {reason}", file=sys.stderr)
    return not reason


def _unknown_architectures(nvcc: str) -> str:
    """Why this nvcc cannot compile for ARCHITECTURES; "" if it can."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        return f"{nvcc} --list-gpu-arch fails: {listed.stderr.strip()}"
    missing = [f"sm_{number}" for number in ARCHITECTURES if f"compute_{number}" not in listed.stdout.split()]
    return f"{nvcc} does not compile for {', '.join(missing)} (nvcc 12.8 is the first for sm_100)" if missing else ""


def csrc_folder() -> Path:
    """csrc/ as it lies in (or, in a checkout, linked into) the package."""
    return (Path(__file__).parent / "csrc").resolve()


def installed_library() -> Path:
    """Where setup.py puts the extension."""
    return Path(__file__).parent / LIBRARY


def cached_library() -> Path:
    """Where this module puts it: a private user cache, keyed by the sources, the flags and torch's version."""
    import torch

    csrc = csrc_folder()
    digest = hashlib.sha256(f"{torch.__version__} {sys.version_info[:2]} {CXX_FLAGS} {NVCC_FLAGS} {MACROS}".encode())
    for path in sorted(p for p in csrc.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(csrc)).encode() + b"\0" + path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "robattr_fast" / digest.hexdigest()[:16] / LIBRARY


def main() -> None:
    """Compile the extension into the user cache, from where the package loads it."""
    from torch.utils.cpp_extension import load

    if not has_compiler():
        sys.exit("no C++ compiler found: install g++ (or set CXX) and try again")
    target = cached_library()
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    build = describe(csrc_folder(), cuda=has_cuda())
    defines = [f"-D{name}" + (f"={value}" if value else "") for name, value in build.macros]
    load(
        name=LIBRARY.removesuffix(".so"),
        sources=build.sources,
        extra_cflags=build.cxx_flags + defines,
        extra_cuda_cflags=build.nvcc_flags + defines,
        extra_include_paths=build.include_dirs,
        build_directory=str(target.parent),
        with_cuda=build.cuda,
        is_python_module=False,
        verbose=True,
    )
    print(f"built {target}")


if __name__ == "__main__":
    main()
