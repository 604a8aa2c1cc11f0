"""The house rules of the layout: one basename per operator across the layers, imports that run one way."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from robattr_fast.ops import _schema

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "robattr_fast"

# What stands on one floor imports from lower floors alone; neighbours do not know each other.
FLOORS = [
    {"errors", "build", "files", "machine"},
    {"_extension", "reference", "kernels", "backends"},
    {"ops"},
    {"model", "metrics", "nn"},
    {"inputs", "curvature", "sampling"},
    {"attributions", "certificates"},
    {"report", "integrations"},
    {"jobs", "attacks"},
    {"bench", "training"},
    {"cli"},
    {"__main__", "__init__"},
]
# Floors inside of packages that have some.
INSIDE = {
    "certificates": [
        {"theorems"},
        {"ledger", "fields"},
        {"settings"},
        {"moments"},
        {"certificate"},
        {"engine"},
        {"verify"},
    ],
}

LONGEST = 420
"""Lines of a file: a longer one wants to be two."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PYTHON_FILES = sorted(p for p in PACKAGE.rglob("*.py") if "csrc" not in p.parts and "__pycache__" not in p.parts)
FILES = {module_name(path): path for path in PYTHON_FILES}


def imported(path: Path) -> set[str]:
    """The modules of robattr_fast that the file names in imports, at top level or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 1 and path.name.endswith("_sides.py"):  # run beside another commit's package
                module = f"{module_name(path).rpartition('.')[0]}.{module}"
            else:
                assert node.level == 0, f"{path}: relative import"
            found |= {f"{module}.{alias.name}" if f"{module}.{alias.name}" in FILES else module for alias in node.names}
    return found


def floor(module: str, floors: list[set[str]], depth: int) -> int:
    parts = module.split(".")
    name = parts[depth] if len(parts) > depth else "__init__"
    ranks = [rank for rank, names in enumerate(floors) if name in names]
    assert ranks, f"{name} of {module} stands on no floor"
    return ranks[0]


def our_imports(path: Path) -> list[str]:
    return sorted(name for name in imported(path) if name == "robattr_fast" or name.startswith("robattr_fast."))


def takes_public_names(module: str) -> bool:
    """Sides of benchmarks and the process that runs them are run beside any commit's package."""
    return module.startswith("robattr_fast.bench.") and module.endswith(("_sides", ".worker"))


def is_face(path: Path) -> bool:
    return path.name == "__init__.py"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = module_name(path)
    package = own.split(".")[1] if own != "robattr_fast" else "__init__"
    for name in our_imports(path):
        if takes_public_names(own) and name == "robattr_fast":
            continue
        other = name.split(".")[1] if name != "robattr_fast" else "__init__"
        if other != package:
            assert floor(name, FLOORS, 1) < floor(own, FLOORS, 1), f"{own} imports {name}"
        elif package in INSIDE and not (is_face(path) and own.count(".") == 1):
            floors = INSIDE[package]
            mine, theirs = own.split(".")[2], name.split(".")[2]
            assert mine == theirs or floor(name, floors, 2) < floor(own, floors, 2), f"{own} imports {name}"


def test_no_file_imports_itself_by_way_of_others():
    # A face is the sum of its package: nothing inside of the package needs it.
    graph = {name: [one for one in our_imports(path) if one in FILES] for name, path in FILES.items()}
    for name, path in FILES.items():
        if is_face(path):
            inside = [one for one, its in graph.items() if one.startswith(f"{name}.") and name in its]
            inside = [one for one in inside if not takes_public_names(one)]
            assert not inside, f"{inside} import the face of their own package"
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_package_has_the_name_of_a_public_function():
    package = importlib.import_module("robattr_fast")
    packages = {path.parent.name for path in PYTHON_FILES if is_face(path) and path.parent.parent == PACKAGE}
    functions = {name for name in package.__all__ if not isinstance(getattr(package, name), type(sys))}
    assert not packages & functions


@pytest.mark.parametrize("folder", ["robattr_fast", "kernels", "benchmarks", "examples", "docs"])
def test_no_file_is_too_long(folder):
    if not (ROOT / folder).is_dir():
        pytest.skip(f"{folder} is not beside the tests")
    written = [p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".md", ".html", ".css", ".js", ".toml"}]
    long = {p: len(p.read_text().splitlines()) for p in written if not {"csrc", "records"} & set(p.parts)}
    assert not {str(path): lines for path, lines in long.items() if lines > LONGEST}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_are_leaves(path):
    siblings = {f"robattr_fast.kernels.{p.stem}" for p in path.parent.glob("*.py")}
    for module in imported(path):
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
