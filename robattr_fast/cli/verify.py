"""``robattr-fast verify``: what certificates prove, computed again from their counts; with the model, from samples."""

from __future__ import annotations

import csv
import datetime
import functools
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from robattr_fast.certificates import Certificate
from robattr_fast.certificates.verify.replay import FALSE_ALARM, FLIPS, replay
from robattr_fast.cli import checks
from robattr_fast.cli.errors import bad_input_exits, one_line, report
from robattr_fast.cli.options import DEFAULT_RADII, at_least_one, checked_device, checked_radii, checked_share
from robattr_fast.errors import CertificateFileError
from robattr_fast.files import write_atomically
from robattr_fast.inputs import images, specs
from robattr_fast.jobs.record import Record, find_certificates, find_image, read_record
from robattr_fast.jobs.results import label
from robattr_fast.machine import tune_allocator
from robattr_fast.model import input_hash
from robattr_fast.report import words
from robattr_fast.report.rounding import percent, rounded_cosine
from robattr_fast.report.rounding import radius as shown_radius

_DEFAULT_REPLAY = 64


@dataclass
class _Verified:
    """One file: its certificate, if it could be read, what is wrong with it, what could not be looked at, and what else
    there is to say."""

    path: Path
    cert: Certificate | None = None
    record: Record = field(default_factory=Record)
    faults: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @functools.cached_property
    def images(self) -> list[Certificate]:
        """A certificate for each image; that of a single one has its bounds already."""
        if self.cert is None:
            return []
        return [self.cert] if len(self.cert) == 1 else [self.cert[index] for index in range(len(self.cert))]


def verify(
    files: Annotated[list[str], typer.Argument(help="Certificates, or folders of them.", show_default=False)],
    k: Annotated[
        list[float] | None,
        typer.Option(help="Size of the top set, as a share of all elements; may be repeated.", show_default="0.2"),
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
    be plausible for it).
    Exit status: 0; 1 if a file fails or an image to replay is not found; 2 if the command cannot be carried out.
    """
    console = Console()
    with bad_input_exits(traceback=traceback):
        shares = [checked_share(share) for share in k or (0.2,)]
        radii = checked_radii(radius)
        if not 0 < overlap <= 1:
            raise ValueError(f"overlap: got {overlap}, takes a share in (0, 1]")
        count = _checked_replay(replay_samples, model)
        if image and model is None:
            raise ValueError("image: got one without --model, takes both")
        if labels is not None and tsv is None:
            raise ValueError("labels: got them without --tsv, takes both")
        truth = _read_labels(labels) if labels is not None else {}
        paths = find_certificates(files)
        if image and len(paths) != 1:
            raise ValueError(f"image: got one for {len(paths)} certificates, takes one certificate")
        if model is not None:
            tune_allocator()
        if threads is not None:
            torch.set_num_threads(at_least_one("threads", threads))
        place = checked_device(device)
        found = [_check(path) for path in paths]
        if model is not None:
            chosen = specs.load(model, size=size)
            given = [images.read(path, chosen.preprocess) for path in image or ()]
            for one in found:
                for index, cert in enumerate(one.images):
                    _replay(one, index, cert, chosen, given, count, replay_seed, place, shares[0])
        console.print(_table(found, shares, radii, overlap))
        for line in _remarks(found):
            console.print(line, highlight=False, soft_wrap=True)
        if tsv is not None:
            write_atomically(tsv, _smoothing_log(found, truth).encode())
    for one in found:
        for fault in one.faults + one.unseen:
            report(fault if str(one.path) in fault else f"{one.path}: {fault}")
    if any(one.faults or one.unseen for one in found):
        raise typer.Exit(1)


def _check(path: Path) -> _Verified:
    """Without the model."""
    one = _Verified(path)
    try:
        one.cert = Certificate.load(path)
        one.record = read_record(path)
    except (CertificateFileError, OSError) as error:
        one.faults.append(one_line(error))
    if one.cert is not None:
        one.faults += checks.support_faults(one.cert) + checks.sample_faults(one.cert)
        one.faults += checks.record_faults(one.cert, one.record)
        one.remarks += words.remarks(one.cert)
    return one


def _replay(
    one: _Verified,
    index: int,
    cert: Certificate,
    model: specs.Model,
    given: list[torch.Tensor],
    count: int | None,
    seed: int,
    device: torch.device,
    k: float,
) -> None:
    """With the model: ``cert``, of image ``index`` of the file."""
    which = "" if len(one.images) == 1 else f"image {index} of {len(one.images)}: "
    x = _input(one, cert, model, given)
    if x is None:
        source = one.record.source
        one.unseen.append(f"{which}its image was not found{f' at {source}' if source else ''}: name it with --image")
        return
    size = max(1, int(k * cert.settings.n))
    wanted = None if count is None else min(count, int(cert.samples[0]))
    result = replay(cert, model.module.to(device), x.to(device), samples=wanted, seed=seed, k=size)
    one.faults += [which + fault for fault in result.faults]
    if result.differences:
        one.remarks.append(
            f"sampled elsewhere ({'; '.join(result.differences)}): rounding may move an element in "
            f"{100 * FLIPS:g} % of the replayed samples, and more was not held against it"
        )
    if not result.faults:
        one.remarks.append(which + _replayed(result.samples, result.total, exact=not result.differences))


def _replayed(samples: int, total: int, *, exact: bool) -> str:
    if samples < total:
        return (
            f"{samples} of {total} samples replayed, chosen at random: nothing speaks against the counts "
            f"(a true certificate fails this test with probability at most {FALSE_ALARM:g})"
        )
    return f"all {total} samples replayed: " + ("the counts are theirs, exactly" if exact else "the counts agree")


def _input(one: _Verified, cert: Certificate, model: specs.Model, given: list[torch.Tensor]) -> torch.Tensor | None:
    if len(given) == 1 and len(one.images) == 1:
        return given[0]  # whatever it is: the replay says so
    hashes = cert.settings.input_hashes
    if hashes is None:
        return None
    for x in given:
        if input_hash(x) == hashes[0]:
            return x
    return find_image(one.path, one.record, hashes[0], cert.settings.shape, model.preprocess)


def _remarks(found: list[_Verified]) -> list[str]:
    """What is true of several certificates is said once."""
    names: dict[str, list[str]] = {}
    for one in found:
        for remark in one.remarks:
            names.setdefault(remark, []).append(one.path.name)
    return [f"{_some(those)}: {remark}" for remark, those in names.items()]


def _some(names: list[str], shown: int = 3) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _table(found: list[_Verified], shares: list[float], radii: list[float], overlap: float) -> Table:
    """One row per image and k."""
    table = Table(
        title="Share of the top of the map that provably stays, by L2 radius, from the counts",
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column("certificate", overflow="fold")
    table.add_column("top", justify="right", no_wrap=True)
    for at in radii:
        table.add_column(f"{at:g}", justify="right", style="bold cyan", no_wrap=True)
    table.add_column(f"{100 * overlap:g} % stays to", justify="right", overflow="fold")
    table.add_column("class", justify="right", overflow="fold")
    table.add_column("certified to", justify="right", overflow="fold")
    table.add_column("samples", justify="right", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for one in found:
        verdict = "[green]ok[/]" if not one.unseen else "[yellow]not replayed[/]"
        verdict = "[bold red]failed[/]" if one.faults else verdict
        if one.cert is None:
            table.add_row(one.path.name, *[""] * (len(radii) + 5), verdict)
            continue
        for index, cert in enumerate(one.images):
            name = one.path.name if len(one.cert) == 1 else f"{one.path.name} [{index}]"
            for share in shares:
                k = max(1, int(share * cert.settings.n))
                table.add_row(
                    name.replace("[", r"\["),
                    f"{100 * share:g} %",
                    *_cells(cert, k, radii),
                    shown_radius(float(cert.radius(k, overlap)[0])),
                    *_label(cert),
                    str(int(cert.samples[0])),
                    verdict,
                )
    return table


def _cells(cert: Certificate, k: int, radii: list[float]) -> list[str]:
    """As in the table of `certify`."""
    shown = [percent(float(share)) for share in cert.overlap(k, radii).share[:, 0]]
    if not cert.has_second_moments:
        return shown
    cosines = [rounded_cosine(float(value)) for value in cert.cosine(radii)[:, 0]]
    return [f"{share}\n[not bold dim]cos {cosine}[/]" for share, cosine in zip(shown, cosines, strict=True)]


def _label(cert: Certificate) -> tuple[str, str]:
    if cert.class_counts is None:
        return "", ""
    voted = label(cert, None)
    return str(voted.number), shown_radius(voted.radius) if voted.radius > 0 else "abstains"


def _smoothing_log(found: list[_Verified], truth: dict[str, int]) -> str:
    """The log of Cohen, Rosenfeld and Kolter's certify.py: predict is -1 where the label abstains.

    label and correct stay empty where the true class is not known.
    """
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(["idx", "label", "predict", "radius", "correct", "time"])
    certs = [(one, cert) for one in found if not one.faults for cert in one.images]
    for index, (one, cert) in enumerate(certs):
        voted = label(cert, None)
        predict = voted.number if voted.radius > 0 else -1
        known = truth.get(one.path.stem)
        time = "" if one.record.seconds is None else str(datetime.timedelta(seconds=one.record.seconds))
        correct = "" if known is None else int(predict == known)
        writer.writerow([index, "" if known is None else known, predict, voted.radius, correct, time])
    return text.getvalue()


def _read_labels(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"labels: {path} is not a text: {error}") from error
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition("\t" if "\t" in line else " ")
        if not name or not label.isascii() or not label.isdigit():
            raise ValueError(f"labels: {path}, line {number}: got {line!r}, takes a name and a class")
        found[name.strip()] = int(label)
    return found


def _checked_replay(text: str | None, model: str | None) -> int | None:
    """Number of samples; None: all."""
    if text is None:
        return _DEFAULT_REPLAY
    if model is None:
        raise ValueError("replay: got it without --model, takes both")
    if text == "all":
        return None
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"replay: got {text!r}, takes an integer >= 1 or all")
    return at_least_one("replay", int(text))
