"""``robattr-fast verify``: what certificates prove, computed again from their counts; with the model, from samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text

from robattr_fast.cli.terminal import Lines, bad_input_exits, report, say, tell
from robattr_fast.files import write_atomically
from robattr_fast.inputs import images, specs
from robattr_fast.inputs.names import listed
from robattr_fast.jobs.options import DEFAULT_RADII, at_least_one, checked_device, checked_radii
from robattr_fast.jobs.record import find_certificates
from robattr_fast.jobs.verification import Asked, Found, Resampling, Verified, read_labels, smoothing_log, verify_files
from robattr_fast.machine import tune_allocator
from robattr_fast.report.rounding import percent, rounded_cosine
from robattr_fast.report.rounding import radius as shown_radius
from robattr_fast.report.sizes import checked_size, size_words

_DEFAULT_REPLAY = 64
_SHOWN = 100  # files that are in order; all others are shown
_VERDICTS = {"ok": "green", "not replayed": "yellow", "failed": "bold red"}


def verify(
    files: Annotated[list[str], typer.Argument(help="Certificates, or folders of them.", show_default=False)],
    k: Annotated[
        list[float] | None,
        typer.Option(
            help="Size of the top set: a share of all elements, or a number of them; may be repeated.",
            show_default="0.2",
        ),
    ] = None,
    radius: Annotated[
        list[float] | None,
        typer.Option(help="L2 radius; may be repeated.", show_default=" ".join(map(str, DEFAULT_RADII))),
    ] = None,
    overlap: Annotated[float, typer.Option(help="Also show up to which radius this share of the top set stays.")] = 0.5,
    model: Annotated[
        str | None,
        typer.Option(help="Model to replay samples with; see certify. Code of the model runs.", show_default=False),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="The image of the one certificate, repeated where it has several; default: where the run had it.",
            show_default=False,
        ),
    ] = None,
    replay_samples: Annotated[
        str | None,
        typer.Option("--replay", help=f"Samples to take again, or all; default {_DEFAULT_REPLAY} with --model."),
    ] = None,
    replay_seed: Annotated[int, typer.Option(help="Of the choice of samples. Choose it yourself.")] = 0,
    size: Annotated[int | None, typer.Option(help="As for certify.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if present.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all.", show_default=False)] = None,
    tsv: Annotated[
        Path | None,
        typer.Option(help="Write idx, label, predict, radius, correct, time: the log of randomized smoothing."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="True classes for --tsv: lines of NAME and class, as in 'chelsea 285'.")
    ] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    """Check certificates and compute what they prove again, from their counts alone.

    Every file is read (its checksum and its counts must hold together) and compared with the certificates.tsv and
    manifest.json beside it, where those name it. With --model, samples are taken again and compared: all of them
    (--replay all: the counts must be equal), or a random part (--replay 64: the counts must contain what it shows and
    be plausible for it). Whatever is in one file, the others are checked too.
    Exit status: 0; 1 if a file fails or an image to replay is not found; 2 if the command cannot be carried out.
    """
    console = Console()
    with bad_input_exits(traceback=traceback):
        asked = Asked([checked_size(one) for one in k or (0.2,)], checked_radii(radius), overlap)
        if not 0 < overlap <= 1:
            raise ValueError(f"overlap: got {overlap}, expected a share in (0, 1]")
        count = _checked_replay(replay_samples, model)
        if image and model is None:
            raise ValueError("image: got one without --model, expected both")
        if labels is not None and tsv is None:
            raise ValueError("labels: got them without --tsv, expected both")
        truth = read_labels(labels) if labels is not None else {}
        paths, passed_over = find_certificates(files)
        if passed_over:
            say("note", f"passed over {listed(passed_over)}")
        if image and len(paths) != 1:
            raise ValueError(f"image: got one for {len(paths)} certificates, expected one certificate")
        if threads is not None:
            torch.set_num_threads(at_least_one("threads", threads))
        place = checked_device(device)
        again = None
        if model is not None:
            tune_allocator()
            chosen = specs.load(model, size=size)
            given = [images.read(path, chosen.preprocess) for path in image or ()]
            again = Resampling(chosen, chosen.module.to(place), place, given, count, replay_seed)
        found = list(verify_files(paths, asked, again, catch=not traceback))
        _table(found, asked).print(console)
        for line in _remarks(found):
            tell(console, line)
        if tsv is not None:
            write_atomically(tsv, smoothing_log(found, truth).encode())
    for one in found:
        for fault in one.faults + one.unseen:
            report(fault if str(one.path) in fault else f"{one.path}: {fault}")
    if any(one.faults or one.unseen for one in found):
        raise typer.Exit(1)


def _remarks(found: Sequence[Verified]) -> Iterator[str]:
    """What is true of several certificates is said once."""
    names: dict[str, list[str]] = {}
    for one in found:
        for remark in one.remarks:
            names.setdefault(remark, []).append(one.path.name)
    return (f"{listed(those)}: {remark}" for remark, those in names.items())


def _table(found: Sequence[Verified], asked: Asked) -> Lines:
    """One row per image and k."""
    lines = Lines(
        "Share of the top of the map that provably stays, by L2 radius, from the counts",
        [
            ("file", "text"),
            ("top", "number"),
            *((f"{at:g}", "number") for at in asked.radii),
            (f"{100 * asked.overlap:g} % stays to", "number"),
            ("class", "number"),
            ("certified to", "number"),
            ("samples", "number"),
            ("verdict", "word"),
        ],
    )
    fine = 0
    for one in found:
        fine += one.verdict == "ok"
        if one.verdict == "ok" and fine > _SHOWN:
            continue
        verdict = Text(one.verdict, _VERDICTS[one.verdict])
        if not one.found:
            lines.add(one.path.stem, *[""] * (len(asked.radii) + 5), verdict)
        for row in one.found:
            name = one.path.stem if one.images == 1 else f"{one.path.stem} [{row.image}]"
            lines.add(name, size_words(row.k), *_cells(row), *_label(row), str(row.samples), verdict)
    if fine > _SHOWN:
        lines.add(f"... and {fine - _SHOWN} more", *[""] * (len(asked.radii) + 5), Text("ok", _VERDICTS["ok"]))
    return lines


def _cells(row: Found) -> list[Text]:
    """As in the table of `certify`, and up to which radius the asked share stays."""
    cells = []
    nothing = not any(row.shares)
    for index, share in enumerate(row.shares):
        below = "" if row.cosines is None else f"\ncos {rounded_cosine(row.cosines[index])}"
        cells.append(Text.assemble(("none" if nothing else percent(share), "bold cyan"), (below, "dim cyan")))
    return [*cells, Text(shown_radius(row.stays_to))]


def _label(row: Found) -> tuple[str, str]:
    if row.label is None:
        return "", ""
    return str(row.label.number), shown_radius(row.label.radius) if row.label.radius > 0 else "abstains"


def _checked_replay(text: str | None, model: str | None) -> int | None:
    """Number of samples; None: all."""
    if text is None:
        return _DEFAULT_REPLAY
    if model is None:
        raise ValueError("replay: got it without --model, expected both")
    if text == "all":
        return None
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"replay: got {text!r}, expected an integer >= 1 or all")
    return at_least_one("replay", int(text))
