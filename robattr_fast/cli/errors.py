"""Errors as a person reads them: one line, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from robattr_fast.jobs.failures import EXPECTED, one_line


def report(message: str) -> None:
    """``error: ...`` on stderr."""
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_escaped(message)}", highlight=False)


def warn(message: str) -> None:
    """``warning: ...`` on stderr."""
    Console(stderr=True, soft_wrap=True).print(f"[bold yellow]warning:[/] {_escaped(message)}", highlight=False)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@contextmanager
def bad_input_exits(*, traceback: bool = False) -> Iterator[None]:
    """Report an expected error on one line and leave with status 2; with ``traceback`` let it pass."""
    try:
        yield
    except EXPECTED as error:
        if traceback:
            raise
        report(one_line(error))
        raise typer.Exit(2) from error
