"""The typer application."""

from __future__ import annotations

import typer

from robattr_fast.cli.bench import bench
from robattr_fast.cli.certify import certify
from robattr_fast.cli.doctor import doctor
from robattr_fast.cli.report import report
from robattr_fast.cli.verify import verify

app = typer.Typer(
    help="Saliency maps that come with a proof.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(certify)
app.command()(verify)
app.command()(report)
app.command()(bench)
app.command()(doctor)
