"""Results as a person reads them."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from robattr_fast.bench.measure import OURS, Result


def figure(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _spread(found: dict[str, Any]) -> str:
    return f"{figure(found['q1'])} to {figure(found['q3'])}"


def _verdict(one: dict[str, Any]) -> str:
    if one["target"] is None:
        return ""
    mark = "[green]met[/]" if one["met"] else "[bold red]not met[/]"
    return f"{mark} ({one['sense']} {one['target']:g})"


def table(result: Result) -> Table:
    """One entry: its sides, what they are held against, the floor."""
    shown = Table(
        title=f"{result.entry}  {result.title}",
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
    )
    shown.add_column("", overflow="fold")
    for heading in ("median", "quartiles"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("")
    shown.add_column("target")
    if result.gate != "ok":
        shown.add_row("[bold red]gate[/]", "", "", escape(result.gate), "[bold red]no figures[/]")
        return shown
    for label, side in result.sides.items():
        if "error" in side:
            shown.add_row(escape(label), "", "", f"[yellow]{escape(side['error'])}[/]", "")
            continue
        notes = [f"batch {side['batch_size']}"] if "batch_size" in side else []
        notes += [side["memory_format"]] if "memory_format" in side else []
        unit = f"{result.unit}{', ' if notes else ''}{', '.join(notes)}"
        style = "bold cyan" if label == OURS else None
        shown.add_row(escape(label), figure(side["median"]), _spread(side), unit, "", style=style)
    if result.floor is not None:
        note = (
            f"{result.unit}, moving {result.floor['bytes']:g} bytes at {result.floor['gigabytes_per_second']:.3g} GB/s"
        )
        shown.add_row("[dim]floor[/]", figure(result.floor["median"]), "", f"[dim]{note}[/]", "")
    for one in result.ratios:
        name = one.get("what", "")
        label = f"{one['of']} / {OURS}" if one["unit"] == "times" and one["of"] != OURS else one["of"]
        text = f"  {label}" + (f": {name}" if name else "")
        shown.add_row(escape(text), figure(one["median"]), _spread(one), one["unit"], _verdict(one), style="not bold")
    for image, needed in result.details.get("needed", {}).items():
        if needed is None:
            note = "its certificates are not there: run without --quick, or name them with --certificates"
        else:
            missing = [name for name in ("marginal", "second-moment") if needed[name] is None]
            note = f"published at q = 8192: {needed['share']:.4f}"
            note += f"; never reached by {' and '.join(missing)}" if missing else ""
        shown.add_row(f"  {image}", "", "", escape(note), "")
    return shown
