"""``robattr-fast attack``: how far an adversary moves the maps of images."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robattr_fast import attacks
from robattr_fast.certificates import Certificate
from robattr_fast.cli.terminal import bad_input_exits, say, tell
from robattr_fast.files import write_atomically
from robattr_fast.inputs import images, specs
from robattr_fast.inputs.names import printable
from robattr_fast.jobs.failures import EXPECTED, one_line
from robattr_fast.jobs.options import at_least_one, checked_device
from robattr_fast.jobs.record import ATTACKED, CERTIFICATE
from robattr_fast.report.attacked import attack_figure
from robattr_fast.report.picture import save
from robattr_fast.report.sizes import checked_size, top_size

GOALS = ("topk", "mass-center", "cosine", "distance")
_SMOOTHED = ("smoothgrad", "sparsified")
_TABLE = "attacks.tsv"


def attack(
    paths: Annotated[list[str], typer.Argument(help="Images, as for certify.", show_default=False)],
    model: Annotated[str, typer.Option(help="As for certify.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the results; made if missing.")] = Path("out"),
    attribution: Annotated[
        str, typer.Option(help="gradient, input_x_gradient, ig, smoothgrad or sparsified.")
    ] = "gradient",
    goal: Annotated[str, typer.Option(help=f"{', '.join(GOALS[:-1])} or {GOALS[-1]}.")] = "topk",
    radius: Annotated[
        list[float] | None, typer.Option(help="Of the ball; may be repeated.", show_default="0.1 0.5")
    ] = None,
    norm: Annotated[str, typer.Option(help="l2 or linf, of pixels in [0, 1].")] = "l2",
    k: Annotated[float, typer.Option(help="Size of the top set: a share of all elements, or a number of them.")] = 0.2,
    steps: Annotated[int, typer.Option(help="Of the ascent.")] = 20,
    restarts: Annotated[int, typer.Option(help="Random starts per image.")] = 1,
    sigma: Annotated[float, typer.Option(help="Of the noise (smoothgrad, sparsified).")] = 0.2,
    samples: Annotated[int, typer.Option(help="Noisy samples per map (smoothgrad, sparsified).")] = 64,
    tau: Annotated[float, typer.Option(help="Share that each sample selects (sparsified).")] = 0.1,
    target: Annotated[int | None, typer.Option(help="Class to explain; default: the predicted one.")] = None,
    certificates: Annotated[
        Path | None,
        typer.Option(
            help="Folder of certify's results: the certified maps are attacked instead, at these radii (L2), and "
            "what is left is written beside each certificate, where report finds it.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the starts.")] = 0,
    size: Annotated[int | None, typer.Option(help="As for certify.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="As for certify.", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all.", show_default=False)] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    """Move the saliency maps of images as far as possible without changing their class.

    Writes attacks.tsv, and per image NAME.attack.png: image, perturbation x 10, map before, map after (at the largest
    radius). With --certificates, the table says what is left of the certified top set, beside what must be left.
    Exit status: 0; 1 if an image failed, or a certificate was contradicted; 2 if the command cannot be carried out.
    """
    console = Console()
    with bad_input_exits(traceback=traceback):
        radii = sorted(set(radius or (0.1, 0.5)))
        k = checked_size(k)
        if goal not in GOALS:
            raise ValueError(f"goal: got {goal!r}, expected one of {', '.join(GOALS)}")
        if threads is not None:
            torch.set_num_threads(at_least_one("threads", threads))
        place = checked_device(device)
        sources, chosen = images.find(paths), specs.load(model, size=size)
        module = chosen.module.to(place)
        out.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"sigma": sigma, "samples": samples} if attribution in _SMOOTHED else {}
        options |= {"tau": tau} if attribution == "sparsified" else {}
        rows: list[dict[str, Any]] = []
        failed = 0
        for source in sources:
            try:
                x = images.read(source.path, chosen.preprocess).to(place)[None]
                if certificates is not None:
                    cert = Certificate.load(certificates / f"{source.name}{CERTIFICATE}")
                    count = top_size(k, cert.settings.n)
                    found = attacks.beside(
                        cert, module, x, k=count, radii=radii, steps=steps, restarts=restarts, attack_samples=samples
                    )
                    mine = _beside_rows(source.name, found, count)
                    write_atomically(certificates / f"{source.name}{ATTACKED}", _tsv(mine))
                else:
                    objective = _objective(goal, top_size(k, x[0].numel()))
                    one = attacks.AttributionPGD(
                        module,
                        attribution,
                        objective,
                        explain_options=options,
                        norm=norm,
                        eps=radii[-1],
                        steps=steps,
                        restarts=restarts,
                        seed=seed,
                    )
                    sweep = one.sweep(x, radii, target)
                    mine = _rows(source.name, sweep, goal)
                    last = sweep.results[-1]
                    title = f"{source.name}: {goal} {float(last.value):.3f} at {norm} {float(last.size):.3g}"
                    shown = (part[0].float().cpu() for part in (x, last.images, last.before, last.after))
                    save(attack_figure(*shown, title=title), out / f"{source.name}.attack.png")
            except EXPECTED as error:
                if traceback:
                    raise
                failed += 1
                say("error", f"{source.name}: {one_line(error)}")
                continue
            rows += mine
            write_atomically(out / _TABLE, _tsv(rows))
    if rows:
        console.print(_table(rows))
        tell(console, f"Written to {out}/")
    crossed = [row["name"] for row in rows if row.get("crossed")]
    for name in dict.fromkeys(crossed):
        say("error", f"{name}: less is left than its certificate says must be")
    if failed or crossed:
        raise typer.Exit(1)


def _objective(goal: str, k: int) -> attacks.Objective:
    if goal == "topk":
        return attacks.TopK(k)
    return {"mass-center": attacks.MassCenter, "cosine": attacks.Cosine, "distance": attacks.Distance}[goal]()


def _rows(name: str, sweep: attacks.Sweep, goal: str) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "radius": radius,
            "size": float(result.size),
            goal: float(result.value),
            "noise_floor": None if result.noise_floor is None else float(result.noise_floor),
            "label_changed": int(result.label_changed),
            "success": int(result.success),
        }
        for radius, result in zip(sweep.radii, sweep.results, strict=True)
    ]


def _beside_rows(name: str, found: attacks.Beside, k: int) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "radius": radius,
            "k": k,
            "certified": float(found.certified[row]),
            "attacked": float(found.attacked[row]),
            "attacked_most": float(found.attacked_most[row]),
            "noise_floor": float(found.noise_floor),
            "crossed": int(found.crossed[row]),
        }
        for row, radius in enumerate(found.radii)
    ]


def _tsv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "name" else "right")
    for row in rows:
        cells = (f"{value:.4g}" if isinstance(value, float) else printable(str(value)) for value in row.values())
        table.add_row(*map(Text, cells))
    return table
