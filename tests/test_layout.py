"""The house rules of the layout: one basename per operator across the layers, and imports that run one way."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from robattr_fast.ops import _schema

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "robattr_fast"

# A module imports from its own entry here or from an earlier one; entries on one line may not import each other.
LAYERS = [
    {"errors", "build", "rounding", "allocator", "machine"},
    {"_extension", "reference", "kernels", "backends"},
    {"ops"},
    {"exported"},
    {"model"},
    {"arguments", "folding", "perceptron", "step", "trial"},
    {"sampling"},
    {"differentiable"},
    {"smoothgrad", "nn"},
    {"attributions"},
    {"certify", "attacks", "training", "curvature"},
    {"metrics"},
    {"images"},
    {"models", "plots", "runs", "integrations"},
    {"report"},
    {"doctor"},
    {"bench"},
    {"cli"},
    {"__main__", "__init__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def entry(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path):
    """Every robattr_fast module that the file imports, at top level or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 1 and path.name.endswith("_sides.py"):  # run beside another commit's package
                yield ".".join(("robattr_fast", *path.relative_to(PACKAGE).parts[:-1], node.module))
                continue
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


PYTHON_FILES = sorted(p for p in PACKAGE.rglob("*.py") if "csrc" not in p.parts and "__pycache__" not in p.parts)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = entry(path)
    assert own in RANK, f"{own} is not in the layer table"
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "robattr_fast" and len(parts) > 1 and parts[1] in RANK and parts[1] != own:
            assert RANK[parts[1]] < RANK[own], f"{own} imports {module}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_are_leaves(path):
    siblings = {f"robattr_fast.kernels.{p.stem}" for p in path.parent.glob("*.py")}
    for module in imported_modules(path):
        assert module.split(".")[0] in ("torch", "triton", "__future__", "math", "typing") or any(
            module == s or module.startswith(s + ".") for s in {*siblings, "robattr_fast.kernels"}
        ), f"{path.name} imports {module}"


def names(folder: Path, pattern: str) -> set[str]:
    return {p.name.split(".")[0] for p in folder.glob(pattern)} - {"__init__"}


def test_one_basename_per_operator():
    operators = {schema.split("(")[0].rstrip("_") for schema in _schema._PUBLIC}
    files = {name for name in names(PACKAGE / "ops", "*.py") if not name.startswith("_")}
    assert operators == files
    references = {name for name in names(PACKAGE / "reference", "*.py") if not name.startswith("_")}
    assert references == operators
    assert operators <= {name.removeprefix("test_") for name in names(ROOT / "tests", "test_*.py")}
    shared = {"isa"}
    assert names(ROOT / "csrc" / "cpu", "*.cpp") - shared <= operators
    assert names(ROOT / "csrc" / "cuda", "*.cu") <= operators
    assert {name for name in names(ROOT / "kernels", "*.py") if not name.startswith("_")} <= operators


def test_every_operator_is_public():
    package = importlib.import_module("robattr_fast")
    for schema in _schema._PUBLIC:
        name = schema.split("(")[0]
        assert name in package.__all__, f"{name} is not exported by robattr_fast"


def test_the_package_imports_without_optional_ones():
    optional = ["captum", "matplotlib", "PIL", "quantus", "rich", "skimage", "timm", "transformers", "triton", "typer"]
    code = f"import sys; sys.modules.update(dict.fromkeys({optional!r})); import robattr_fast.nn"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("link", ["kernels", "csrc"])
def test_links_lead_to_the_sources(link):
    assert (PACKAGE / link).resolve() == ROOT / link
