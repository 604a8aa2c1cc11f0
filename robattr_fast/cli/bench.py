"""``robattr-fast bench``: what is fast here, beside its peers, and held against its targets."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from robattr_fast.cli.terminal import bad_input_exits, report

_WIDTH = 120


def bench(
    only: Annotated[
        list[str] | None,
        typer.Option(help="Entry or family: P1 ... P7, bounds, gram, attention; may be repeated.", show_default="all"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything, in some 3 minutes.")] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Compare with this commit of the checkout in place of the peers; it is built first."),
    ] = None,
    certificates: Annotated[
        Path,
        typer.Option(help="Folder where P4 keeps its certificates at growing numbers of samples, and looks for them."),
    ] = Path("out") / "bench",
    out: Annotated[
        Path | None,
        typer.Option(help="File of records to add to.", show_default="benchmarks/records/<cpu>.jsonl of the checkout"),
    ] = None,
    record: Annotated[bool, typer.Option("--record/--no-record", help="Keep what was found.")] = True,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    """Measure operators and whole jobs on this CPU.

    Each entry passes a test of correctness first; without it there is no figure. Sides are measured in turns, whole
    jobs in processes of their own with the same number of threads (OMP_NUM_THREADS). Shown are medians and quartiles;
    a ratio is taken between rounds that were neighbours. Close everything else that runs.
    Exit status: 0; 1 if a gate is red or an entry cannot run; 2 if the command cannot be carried out.
    """
    from robattr_fast.bench import base as bases
    from robattr_fast.bench import records
    from robattr_fast.bench.context import Context
    from robattr_fast.bench.registry import chosen
    from robattr_fast.bench.run import run
    from robattr_fast.bench.table import table

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)  # lines of a file are read side by side
    failed = []
    with bad_input_exits(traceback=traceback):
        entries = chosen(only)
        path = (out or records.default_path()) if record else None
        with (
            console.status("") as status,
            nullcontext() if base is None else bases.built(base) as other,
        ):
            context = Context(quick=quick, base=other, certificates=certificates, told=status.update)
            for result in run(entries, context, path):
                console.print(table(result))
                console.print()
                failed += [result.entry] if result.failed else []
        if path is not None:
            console.print(f"Added to {path}", highlight=False)
    for name in failed:
        report(f"{name}: not measured")
    if failed:
        raise typer.Exit(1)
