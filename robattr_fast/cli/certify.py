"""``robattr-fast certify``: images and a model to certificates, pictures, a table and a manifest."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from robattr_fast import images, models, tune_allocator
from robattr_fast.certify import Certificate, files
from robattr_fast.certify import certify as certify_images
from robattr_fast.cli.errors import EXPECTED, bad_input_exits, one_line, report
from robattr_fast.cli.options import at_least_one, checked_device, checked_radii, checked_share
from robattr_fast.cli.progress import SampleProgress
from robattr_fast.cli.results import Results, Row, label
from robattr_fast.cli.resume import SAMPLING, Earlier, stop_rule
from robattr_fast.errors import CertifyInterrupted, ModelError, NonFiniteError
from robattr_fast.model import fingerprint
from robattr_fast.runs import CERTIFICATE

# Of one image, not of the run: the next image may do better.
_IMAGE_FAILURES = (images.ImageError, NonFiniteError, OSError, torch.OutOfMemoryError)


def certify(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Image files, folders of them, .npy or .npz arrays (float [C, H, W] in [0, 1], or uint8 [H, W, C]), "
            "or photographs of scikit-image (skimage:chelsea, or chelsea where no such file exists).",
            show_default=False,
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="demo, timm:name, file.pt2 (of torch.export; loading one can run code that it brings), or "
            "package.module:callable (which runs its code).",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results; made if missing.")] = Path("out"),
    samples: Annotated[int, typer.Option(help="Noisy samples per image.")] = 8192,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the noise, for pixels in [0, 1].")] = 0.2,
    tau: Annotated[float, typer.Option(help="Share of the elements that each sample selects.")] = 0.1,
    gamma: Annotated[float | None, typer.Option(help="Share that saturates (--levels above 1); default tau.")] = None,
    levels: Annotated[int, typer.Option(help="Levels of the relaxed map; 1: elements are in or out.")] = 1,
    alpha: Annotated[float, typer.Option(help="Probability, per image, that any statement about it is wrong.")] = 0.05,
    bound: Annotated[str, typer.Option(help="betting, kl, clopper-pearson or hoeffding.")] = "betting",
    slack: Annotated[
        int | None, typer.Option(help="Bounds that may fail; default: the best (betting), else 0.", show_default=False)
    ] = None,
    retain: Annotated[int, typer.Option(help="Samples whose maps are kept for second moments, 4 to 8192.")] = 2048,
    second_moment: Annotated[
        bool, typer.Option("--second-moment/--no-second-moment", help="Certify by second moments too (part of alpha).")
    ] = True,
    keep_samples: Annotated[
        bool, typer.Option("--keep-samples", help="Write these maps into the certificate: verify computes them again.")
    ] = False,
    k: Annotated[float, typer.Option(help="Size of the top set, as a share of all elements.")] = 0.2,
    radius: Annotated[
        list[float] | None,
        typer.Option(help="L2 radius for table and picture; may be repeated.", show_default="0.01 0.03 0.06"),
    ] = None,
    stop_overlap: Annotated[
        float | None,
        typer.Option(help="End an image once this share of its top set is certified at --stop-radius."),
    ] = None,
    stop_radius: Annotated[float | None, typer.Option(help="L2 radius of --stop-overlap.")] = None,
    on_nonfinite: Annotated[
        str, typer.Option(help="A sample with NaN or infinite scores: raise (fails the image), zero or abstain.")
    ] = "raise",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    target: Annotated[
        int | None, typer.Option(help="Class to explain; default: of each noisy sample its own.", show_default=False)
    ] = None,
    channel_sum: Annotated[
        bool, typer.Option("--channel-sum", help="Sum scores over channels: one per pixel.")
    ] = False,
    size: Annotated[
        int | None, typer.Option(help="Crop and resize to a square; default: as the model does.", show_default=False)
    ] = None,
    batch_size: Annotated[
        str, typer.Option(help="Rows per forward pass, or auto: the fastest by a short trial.")
    ] = "auto",
    memory_format: Annotated[
        str | None,
        typer.Option(help="contiguous or channels_last; default: by the same trial.", show_default=False),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: cuda if present.", show_default=False)
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all.", show_default=False)] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Sample anew what --out already holds.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    """Certify the saliency maps of images.

    Writes per image NAME.safetensors (the certificate) and NAME.png, per run certificates.tsv and manifest.json.
    The same command again goes on where an earlier one was killed (NAME.checkpoint, written every minute): finished
    images are not sampled again, and the files come out as if it had never been interrupted.
    Exit status: 0; 1 if an image failed (the others are finished); 2 if the command cannot be carried out.
    """
    settings = {name: value for name, value in locals().items() if name not in ("paths", "out", "fresh", "traceback")}
    console = Console()
    with bad_input_exits(traceback=traceback):
        _require_packages()
        radii = checked_radii(radius)
        settings |= {"radius": radii, "k": checked_share(k), "batch_size": _checked_batch_size(batch_size)}
        stop_rule(settings, n=2)
        if threads is not None:
            torch.set_num_threads(at_least_one("threads", threads))
        tune_allocator()  # elsewhere than on glibc there is nothing to tune
        place = checked_device(device)
        sources = images.find(paths)
        _make_writable(out)
        files.sweep(out)
        _spare_inputs(sources, out)
        chosen = models.load(model, size=size)
        earlier = Earlier(out, sources, fresh=fresh)
        results = Results(out, settings, radii, place, earlier.of_this_run(settings))
        interrupted = _run(sources, chosen, settings, results, earlier)
    if results.rows:
        console.print(results.table())
        console.print(results.footnote(), highlight=False)
        console.print(f"Written to {out}/", highlight=False)
    if interrupted:
        report("interrupted: what was sampled until then is certified and written")
        raise typer.Exit(130)
    if results.failures:
        raise typer.Exit(1)


def _run(
    sources: list[images.Source], model: models.Model, settings: dict[str, Any], results: Results, earlier: Earlier
) -> bool:
    """All images, one after the other; whether Ctrl-C ended it."""
    module = model.module.to(results.device)
    model_fingerprint = fingerprint(module)
    chosen: dict[torch.Size, dict[str, Any]] = {}
    with SampleProgress(Console(stderr=True), len(sources)) as progress:
        for index, source in enumerate(sources):
            try:
                x = images.read(source.path, model.preprocess)
                show = progress.image(
                    index, source.name, settings["samples"], k_share=settings["k"], radius=results.radii[0]
                )
                batches = chosen.get(x.shape, {name: settings[name] for name in ("batch_size", "memory_format")})
                start = time.perf_counter()
                cert, interrupted = earlier.finished(source, x, model_fingerprint, settings, results.device), False
                drawn = cert is not None and earlier.drawn(source, settings)
                spent = 0.0
                if cert is None:
                    cert, interrupted = _sample(
                        module, x, settings | batches, results.device, show, earlier.checkpoint(source)
                    )
                    spent = time.perf_counter() - start
                seconds = spent + earlier.seconds(source, cert)
                results.add(_write(source, x, cert, model.class_names, results, seconds, drawn=drawn))
                if not interrupted:
                    earlier.checkpoint(source).unlink(missing_ok=True)
                if interrupted:
                    return True
                if cert.settings.batch_size is not None:
                    chosen[x.shape] = {name: getattr(cert.settings, name) for name in batches}
            except _IMAGE_FAILURES as error:
                _fail(results, source, error)
            except EXPECTED as error:
                # Settings and model have worked before: then it is this image that they do not fit.
                if not results.rows:
                    raise
                _fail(results, source, error)
    return False


def _sample(
    module: torch.nn.Module,
    x: torch.Tensor,
    settings: dict[str, Any],
    device: torch.device,
    progress: Any,
    checkpoint: Path,
) -> tuple[Certificate, bool]:
    """The certificate of one image [C, H, W], and whether Ctrl-C cut it short: what was sampled until then is valid."""
    try:
        cert = certify_images(
            module,
            x[None].to(device),
            image_ids=[images.image_id(x)],
            batch_size=settings["batch_size"],
            memory_format=settings["memory_format"],
            stop=stop_rule(settings, x[0].numel() if settings["channel_sum"] else x.numel()),
            checkpoint=checkpoint,
            progress=progress,
            **{name: settings[name] for name in SAMPLING},
        )
        return cert, False
    except CertifyInterrupted as error:
        return error.certificate, True


def _write(
    source: images.Source,
    x: torch.Tensor,
    cert: Certificate,
    class_names: Sequence[str] | None,
    results: Results,
    seconds: float,
    *,
    drawn: bool,
) -> Row:
    """The files of one image (``drawn``: they are there already), and its row of the table."""
    from robattr_fast import plots

    k = max(1, int(results.settings["k"] * cert.settings.n))
    row = Row(
        name=source.name,
        source=str(source.path),
        image_id=images.image_id(x),
        label=label(cert, class_names),
        cert=cert,
        k=k,
        overlaps=cert.overlap(k, results.radii),
        seconds=seconds,
    )
    if drawn:
        return row
    title = f"{source.name}: {row.label.name if class_names else f'class {row.label.number}'}"
    figure = plots.certificate_figure(x, cert, k=k, radii=results.radii, title=title)
    # The certificate last: where it is finished, so is its picture.
    plots.save(figure, results.folder / f"{source.name}.png")
    cert.save(results.folder / f"{source.name}{CERTIFICATE}")
    return row


def _fail(results: Results, source: images.Source, error: Exception) -> None:
    message = one_line(error)
    results.fail(source.name, source.path, message)
    report(message if str(source.path) in message else f"{source.path}: {message}")


def _require_packages() -> None:
    missing = [name for name, module in (("pillow", "PIL"), ("matplotlib", "matplotlib")) if not _present(module)]
    if missing:
        raise ModelError(f"certify needs {' and '.join(missing)}: pip install 'robattr-fast[cli]'")


def _present(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _checked_batch_size(batch_size: str) -> int | str:
    if batch_size == "auto":
        return batch_size
    if not batch_size.isascii() or not batch_size.isdigit():
        raise ValueError(f"batch-size: got {batch_size!r}, takes an integer >= 1 or auto")
    return at_least_one("batch-size", int(batch_size))


def _spare_inputs(sources: list[images.Source], folder: Path) -> None:
    """ValueError if a picture would replace an image that is to be read."""
    inputs = {source.path.resolve() for source in sources}
    for source in sources:
        picture = (folder / f"{source.name}.png").resolve()
        if picture in inputs:
            raise ValueError(f"out: {picture} is an image to certify and would be overwritten; takes another folder")


def _make_writable(folder: Path) -> None:
    """Make the folder; OSError now rather than after the first image if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"out: cannot write to {folder}: {error.strerror}") from error
