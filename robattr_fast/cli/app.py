"""The typer application."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from robattr_fast.cli.attack import attack
from robattr_fast.cli.bench import bench
from robattr_fast.cli.certify import certify
from robattr_fast.cli.doctor import doctor
from robattr_fast.cli.report import report
from robattr_fast.cli.verify import verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"robattr-fast {metadata.version('robattr-fast')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Saliency maps that come with a proof."""


app.command()(certify)
app.command()(verify)
app.command()(attack)
app.command()(report)
app.command()(bench)
app.command()(doctor)
