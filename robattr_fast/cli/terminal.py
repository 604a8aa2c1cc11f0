"""What the commands print: lines, and one kind of table. Names and messages are data, which no terminal acts on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robattr_fast.inputs.names import printable
from robattr_fast.jobs.failures import EXPECTED, one_line

_TEXT = 8  # a column of text has at least this width, or that of its longest text
_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold"}


def say(kind: str, message: str) -> None:
    """``error: ...``, ``warning: ...`` or ``note: ...``, on one line of stderr."""
    line = Text.assemble((f"{kind}:", _STYLES[kind]), " ", printable(" ".join(message.split("\n"))))
    Console(stderr=True).print(line, soft_wrap=True)


def report(message: str) -> None:
    """``error: ...`` on stderr."""
    say("error", message)


def tell(console: Console, message: str) -> None:
    """A line, as long as it is."""
    console.print(Text(printable(message)), soft_wrap=True)


@contextmanager
def bad_input_exits(*, traceback: bool = False) -> Iterator[None]:
    """Report an expected error on one line and leave with status 2; with ``traceback`` let it pass.

    What the library logs meanwhile is shown as warnings.
    """
    logger, handler = logging.getLogger("robattr_fast"), _Shown(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    except EXPECTED as error:
        if traceback:
            raise
        report(one_line(error))
        raise typer.Exit(2) from error
    finally:
        logger.removeHandler(handler)


class _Shown(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say("warning", one_line(ValueError(record.getMessage())))


class Lines:
    """A table under construction: of each column its heading, and whether it holds text, which may be broken anywhere,
    or numbers, which are never broken. Where a console is too narrow for its numbers, each row becomes a list.

    Args:
        title: a line above.
        columns: heading and kind, ``text``, ``number`` or ``word`` (a number that stands on the left).
    """

    def __init__(self, title: str, columns: Sequence[tuple[str, str]]) -> None:
        self.title, self.columns = title, list(columns)
        self.rows: list[list[Text]] = []

    def add(self, *cells: str | Text) -> None:
        """A row; a str is shown as it is, without markup."""
        self.rows.append([cell if isinstance(cell, Text) else Text(printable(cell)) for cell in cells])

    def print(self, console: Console) -> None:
        for padding in (2, 1):
            widths = self._widths(console.width, padding)
            if widths is not None:
                console.print(self._table(widths, padding))
                return
        console.print(Text(printable(self.title), style="bold"))
        for row in self.rows:
            console.print(self._as_list(row))

    def _widths(self, width: int, padding: int) -> list[int] | None:
        """Of the columns: numbers whole, headings broken at spaces alone; None if that is too much."""
        least, whole, wished = [], [], []
        for index, (heading, kind) in enumerate(self.columns):
            cells = max((line.cell_len for row in self.rows for line in row[index].split("\n")), default=0)
            words = max((cell_len(word) for word in heading.split()), default=0)
            least.append(max(words, cells if kind != "text" else min(cells, _TEXT)))
            longest = max((cell_len(word) for row in self.rows for word in row[index].plain.split()), default=0)
            whole.append(max(least[-1], longest))
            wished.append(max(cell_len(heading), cells))
        spare = width - sum(least) - padding * len(least)
        if spare < 0:
            return None
        # First words are kept whole, then lines.
        for goal in (whole, wished):
            for index in sorted(range(len(least)), key=lambda index: self.columns[index][1] != "text"):
                more = max(0, min(goal[index] - least[index], spare))
                least[index] += more
                spare -= more
        return least

    def _table(self, widths: list[int], padding: int) -> Table:
        title = Text(printable(self.title), style="bold")
        table = Table(title=title, title_justify="left", box=None, padding=(0, padding, 0, 0))
        for width, (heading, kind) in zip(widths, self.columns, strict=True):
            table.add_column(
                Text(printable(heading)), justify="right" if kind == "number" else "left", overflow="fold", width=width
            )
        for row in self.rows:
            table.add_row(*row)
        return table

    def _as_list(self, row: list[Text]) -> Table:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(overflow="fold", style="dim")
        table.add_column(overflow="fold")
        for (heading, _), cell in zip(self.columns, row, strict=True):
            if cell.plain:
                table.add_row(Text(printable(heading)), cell)
        return table
