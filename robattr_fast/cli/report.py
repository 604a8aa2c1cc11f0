"""``robattr-fast report``: certificates as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from robattr_fast.certificates import Certificate
from robattr_fast.cli import checks
from robattr_fast.cli.errors import bad_input_exits
from robattr_fast.cli.options import DEFAULT_RADII, checked_radii, checked_share
from robattr_fast.errors import CertificateFileError
from robattr_fast.files import write_atomically
from robattr_fast.inputs import specs
from robattr_fast.inputs.images import Preprocess
from robattr_fast.jobs.record import find_certificates, find_image, read_attacked, read_record
from robattr_fast.report.page import SHARES, Entry, page


def report(
    files: Annotated[list[str], typer.Argument(help="Certificates, or folders of them.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    k: Annotated[
        list[float] | None,
        typer.Option(
            help="Size of the top set, as a share of all elements; may be repeated.",
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
    certified (its hash is compared). The page needs no network and loads nothing.
    Exit status: 0; 2 if the command cannot be carried out, a damaged certificate included.
    """
    with bad_input_exits(traceback=traceback):
        shares = [checked_share(share) for share in k or SHARES]
        radii = checked_radii(radius)
        if size is not None and model is None:
            raise ValueError("size: got one without --model, takes both")
        preprocess = None if model is None else specs.load(model, size=size).preprocess
        entries = [entry for path in find_certificates(files) for entry in _entries(path, preprocess)]
        write_atomically(out, page(entries, shares=shares, radii=radii, title=title).encode())
    Console().print(f"Written to {out}", highlight=False)


def _entries(path: Path, preprocess: Preprocess | None) -> list[Entry]:
    """The images of one file."""
    certs, record = Certificate.load(path), read_record(path)
    faults = checks.support_faults(certs) + checks.record_faults(certs, record)
    if faults:
        raise CertificateFileError(f"{path}: {faults[0]} (robattr-fast verify says more)")
    hashes = certs.settings.input_hashes
    attacked = read_attacked(path) if len(certs) == 1 else []
    entries = []
    for index in range(len(certs)):
        cert = certs[index]
        shape = cert.settings.shape
        image = None if hashes is None else find_image(path, record, hashes[index], shape, preprocess)
        missing = "The image was not found, or is not the one that was certified: the map is shown alone."
        if image is not None and image.shape[-2:] != shape[-2:]:
            image, missing = None, "The map has not the height and width of the image and is shown alone."
        entries.append(
            Entry(
                name=path.stem if len(certs) == 1 else f"{path.stem} [{index}]",
                cert=cert,
                image=image,
                class_name=record.row.get("class_name", ""),
                remarks=() if image is not None else (missing,),
                attacked=attacked,
            )
        )
    return entries
