"""``robattr-fast report``: certificates as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from robattr_fast.cli.terminal import bad_input_exits, say, tell
from robattr_fast.files import write_atomically
from robattr_fast.inputs import specs
from robattr_fast.inputs.names import listed
from robattr_fast.jobs.options import DEFAULT_RADII, checked_radii
from robattr_fast.jobs.pages import page_of_files
from robattr_fast.jobs.record import find_certificates
from robattr_fast.report.page import SHARES
from robattr_fast.report.sizes import checked_size


def report(
    files: Annotated[list[str], typer.Argument(help="Certificates, or folders of them.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    k: Annotated[
        list[float] | None,
        typer.Option(
            help="Size of the top set: a share of all elements, or a number of them; may be repeated.",
            show_default=" ".join(map(str, SHARES)),
        ),
    ] = None,
    radius: Annotated[
        list[float] | None,
        typer.Option(help="L2 radius of the tables; may be repeated.", show_default=" ".join(map(str, DEFAULT_RADII))),
    ] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Certified saliency maps",
    model: Annotated[
        str | None,
        typer.Option(
            help="Model whose preprocess finds the images; see certify. Needed where it is not one of the usual crops.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[int | None, typer.Option(help="As for certify.", show_default=False)] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    """One self-contained HTML page from certificates: images, maps, what provably stays at which radius.

    An image is shown if it still lies where the run had it, or beside its certificate, and is the very input that was
    certified (its hash is compared). A file that is damaged, or that its table contradicts, is left out, and named on
    the page. The page needs no network and loads nothing.
    Exit status: 0; 1 if a file was left out; 2 if the command cannot be carried out, or nothing is left.
    """
    with bad_input_exits(traceback=traceback):
        sizes = [checked_size(size) for size in k or SHARES]
        radii = checked_radii(radius)
        if size is not None and model is None:
            raise ValueError("size: got one without --model, expected both")
        preprocess = None if model is None else specs.load(model, size=size).preprocess
        paths, passed_over = find_certificates(files)
        if passed_over:
            say("note", f"passed over {listed(passed_over)}")
        made = page_of_files(paths, preprocess=preprocess, k=sizes, radii=radii, title=title, catch=not traceback)
        write_atomically(out, made.html.encode())
    tell(Console(), f"Written to {out}")
    for reason in made.left_out:
        say("error", reason)
    if made.left_out:
        raise typer.Exit(1)
