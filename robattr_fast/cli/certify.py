"""``robattr-fast certify``: images and a model to certificates, pictures, a table and a manifest."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from robattr_fast.cli.progress import SampleProgress
from robattr_fast.cli.results import print_results
from robattr_fast.cli.terminal import bad_input_exits, report, say, tell
from robattr_fast.errors import ModelError
from robattr_fast.jobs.job import certify_folder
from robattr_fast.jobs.options import Options


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
    retain: Annotated[
        int, typer.Option(help="Samples whose maps are kept at a time, for second moments, 4 to 8192.")
    ] = 2048,
    second_moment: Annotated[
        bool, typer.Option("--second-moment/--no-second-moment", help="Certify by second moments too (part of alpha).")
    ] = True,
    keep_samples: Annotated[
        bool, typer.Option("--keep-samples", help="Write these maps into the certificate: verify computes them again.")
    ] = False,
    k: Annotated[
        float, typer.Option(help="Size of the top set: a share of all elements (0.2), or a number of them (50).")
    ] = 0.2,
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
    autocast: Annotated[
        str | None,
        typer.Option(help="bfloat16 or float16: the model under torch.autocast; default: without.", show_default=False),
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
    images are not sampled again, and the files come out as if it had never been interrupted. Other images may be
    certified into the same folder, also at the same time; files of other programs are never replaced.
    Images are turned upright; transparent parts are shown on white; of an animation the first frame is taken; more
    than 8 bits per channel are refused. Of a folder of images hidden files are passed over.
    Exit status: 0; 1 if an image failed (the others are finished); 2 if the command cannot be carried out.
    """
    given = {name: value for name, value in locals().items() if name in Options.__dataclass_fields__}
    console = Console()
    with bad_input_exits(traceback=traceback):
        _require_packages()
        options = Options(**given | {"radius": radius or (), "batch_size": _checked_batch_size(batch_size)})
        with SampleProgress(Console(stderr=True)) as progress:
            results = certify_folder(paths, model, out, options, fresh=fresh, say=say, show=progress.images)
    print_results(results, console)
    if results.rows:
        tell(console, f"Written to {out}/")
    if results.interrupted:
        report(
            "interrupted: what was sampled until then is certified and written; the same command goes on, and second "
            "moments, which certify most, come with complete blocks of samples"
        )
        raise typer.Exit(130)
    if results.failures:
        raise typer.Exit(1)


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
        raise ValueError(f"batch-size: got {batch_size!r}, expected an integer >= 1 or auto")
    return int(batch_size)
