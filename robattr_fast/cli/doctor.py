"""``robattr-fast doctor``: which backend runs each operator, whether it computes what it should, what is missing."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from robattr_fast.doctor import Examination, examine

_MARKS = {"ok": "[green]ok[/]", "failed": "[bold red]failed[/]", "none": "[yellow]no check[/]"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Check this installation: operators, backends, extension, packages.

    Exit status: 0; 1 if a self-check failed.
    """
    examination = examine()
    if as_json:
        print(json.dumps(examination.to_json(), indent=2))
    else:
        _print(examination, Console())
    if not examination.healthy:
        raise typer.Exit(1)


def _print(examination: Examination, console: Console) -> None:
    operators = Table(box=None, padding=(0, 2, 0, 0), title="Operators", title_justify="left", title_style="bold")
    for heading in ("operator", "device", "backend", "self-check", "passed over"):
        operators.add_column(heading, overflow="fold", no_wrap=heading == "operator")
    for row in examination.operators:
        check = _MARKS[row.check] + ("" if row.check == "ok" else f" {escape(row.detail)}")
        reasons = "; ".join(f"{name}: {reason}" for name, reason in row.passed_over.items())
        operators.add_row(row.operator, row.device, row.backend, check, escape(reasons))
    facts = Table(box=None, padding=(0, 2, 0, 0), title="Installation", title_justify="left", title_style="bold")
    facts.add_column("what")
    facts.add_column("found", overflow="fold")
    facts.add_column("advice", overflow="fold", style="yellow")
    for fact in examination.facts:
        facts.add_row(escape(fact.name), escape(fact.value), escape(fact.advice))
    console.print(operators)
    console.print()
    console.print(facts)
