"""Builds the extension where a torch and a compiler are at hand; else a pure-Python package that runs the reference.

Metadata stand in pyproject.toml, flags and sources in robattr_fast/build.py.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINKS = {"robattr_fast/kernels": "../kernels", "robattr_fast/csrc": "../csrc"}


def restore_links() -> None:
    """Archives and copies can lose the committed links: kernels/ and csrc/ would be missing from the package."""
    for link, target in LINKS.items():
        path = ROOT / link
        if path.is_symlink() or path.is_dir():
            continue
        if path.is_file():
            path.unlink()  # a checkout without symlink support leaves a text file
        path.symlink_to(target, target_is_directory=True)


def load_build_module():
    spec = importlib.util.spec_from_file_location("robattr_fast_build", ROOT / "robattr_fast" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def extension_arguments() -> dict:
    """Arguments of setup() that build the extension; empty, with the reason printed, where that cannot be done."""
    build = load_build_module()
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

        reason = "" if build.has_compiler() else "no C++ compiler found"
    except ImportError as error:
        reason = f"torch cannot be imported at build time ({error}); use --no-build-isolation"
    if reason:
        if os.environ.get("ROBATTR_FAST_REQUIRE_EXT") == "1":
            sys.exit(f"ROBATTR_FAST_REQUIRE_EXT=1, but {reason}")
        print(f"robattr_fast: pure-Python install: {reason}", file=sys.stderr)
        return {}
    recipe = build.describe(ROOT / "csrc", cuda=build.has_cuda())
    extension = (CUDAExtension if recipe.cuda else CppExtension)(
        name="robattr_fast._C",
        sources=[os.path.relpath(source, ROOT) for source in recipe.sources],
        include_dirs=recipe.include_dirs,
        define_macros=recipe.macros,
        extra_compile_args={"cxx": recipe.cxx_flags, "nvcc": recipe.nvcc_flags},
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


restore_links()
setup(**extension_arguments())
