"""The table of a run of `certify`."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from robattr_fast.cli.terminal import Lines, tell
from robattr_fast.jobs.results import Results, Row
from robattr_fast.report.rounding import percent, radius, rounded_cosine
from robattr_fast.report.sizes import size_words
from robattr_fast.report.words import radius_words

_STAR = "*"  # of a share that second moments certify
_SHOWN = 100  # rows; a person reads no more of them


def print_results(results: Results, console: Console) -> None:
    """Rows, and what their numbers mean; nothing if there is no row."""
    if not results.rows:
        return
    found = table(results)
    if found.rows:
        found.print(console)
    for row in [row for row in results.rows if row.nothing is not None][:_SHOWN]:
        known = f"class {row.classes}" if row.differs is None else row.classes
        label = f"certified to {radius(row.label.radius)}" if row.label.radius > 0 else "not certified"
        tell(console, f"{row.name}: {row.nothing} ({known}: {label}; {row.samples} samples)")
    if len(results.rows) > _SHOWN:
        tell(console, f"certificates.tsv has all {len(results.rows)} images; at most {_SHOWN} of a kind are shown here")
    for line in notes(results):
        console.print(Text(line))


def table(results: Results) -> Lines:
    """One row per image of which something is certified."""
    shown = [row for row in results.rows if row.nothing is None][:_SHOWN]
    lines = Lines(
        f"Share of the top {size_words(results.settings['k'])} of the map that provably stays, by L2 radius",
        [
            ("image", "text"),
            *((f"{at:g}", "number") for at in results.radii),
            ("class", "text"),
            ("class certified to", "number"),
            ("samples", "number"),
            ("time", "number"),
        ],
    )
    for row in shown:
        lines.add(
            row.name,
            *cells(row),
            row.classes,
            radius(row.label.radius) if row.label.radius > 0 else "abstains",
            str(row.samples),
            f"{row.seconds:.0f} s",
        )
    return lines


def cells(row: Row) -> list[Text]:
    """What the table says of each radius: the share, a star if second moments certify it, below it the cosine."""
    starred = "second-moment" in row.methods
    found = []
    for share, method, cosine in zip(row.shares, row.methods, row.cosines, strict=True):
        star = f" {_STAR}" if method == "second-moment" else "  " if starred else ""
        below = f"\ncos {rounded_cosine(cosine)}" if cosine else ""
        found.append(Text.assemble((percent(share) + star, "bold cyan"), (below, "dim cyan")))
    return found


def notes(results: Results) -> list[str]:
    """What the table's numbers mean."""
    first = results.rows[0]
    note = (
        f"With confidence {100 * (1 - first.alpha):g} %, whatever the perturbation of that L2 norm "
        f"(pixels in [0, 1]; noise sigma {first.sigma:g}; {first.bound} bounds)."
    )
    for reason in dict.fromkeys(row.reason for row in results.rows if row.reason):
        note += f" {reason[0].upper()}{reason[1:]}."
    if any("second-moment" in row.methods for row in results.rows):
        note += f" {_STAR} by second moments, the others element by element."
    if any(any(row.cosines) for row in results.rows):
        note += " cos: least cosine of the map with the perturbed one."
    values = {row.values for row in results.rows if row.values}
    return [note, radius_words(results.radii, min(values, default=0))]
