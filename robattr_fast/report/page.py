"""One self-contained HTML page from certificates: it asks nothing of a network, and shows nothing that is not proved.

Needs matplotlib and Pillow, which are imported on use.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from string import Template

from robattr_fast.report import words
from robattr_fast.report.entry import Entry, Shown, asset, notes, radius_steps, shown_text
from robattr_fast.report.sizes import size_words

SHARES = (0.05, 0.1, 0.2, 0.5)
"""Sizes of the top set, as shares of all elements."""


def page(
    entries: Sequence[Entry],
    *,
    shares: Sequence[float] = SHARES,
    radii: Sequence[float] = (0.01, 0.03, 0.06),
    title: str = "Certified saliency maps",
    left_out: Sequence[str] = (),
) -> str:
    """The HTML page.

    Args:
        entries: at least one.
        shares: sizes of the top set that its slider offers: shares of all elements in (0, 1/2], or numbers of them.
        radii: L2 radii of the tables; the slider of radii goes at least as far.
        left_out: what could not be shown, and why; named at the top.

    Raises:
        ValueError: no entry, share or radius; an entry that does not hold one image of a shape that can be shown.
    """
    if not (entries and shares and radii):
        raise ValueError(
            f"entries, shares, radii: got {len(entries)}, {len(shares)}, {len(radii)}, expected some of each"
        )
    shares = sorted(set(shares))
    attacked = [radius for entry in entries for _, radius, _ in entry.attacked]
    grid = radius_steps([entry.cert for entry in entries], shares, [*radii, *attacked])
    shown = [Shown(entry, shares, grid) for entry in entries]
    script, style = asset("page.js"), asset("page.css")
    start = min(range(len(grid)), key=lambda step: abs(grid[step] - sorted(radii)[len(radii) // 2]))
    first_share = min(range(len(shares)), key=lambda index: abs(shares[index] - 0.2))
    labels = [size_words(share) for share in shares]
    data = {"radii": grid, "shares": list(shares), "labels": labels, "certificates": [one.data() for one in shown]}
    return Template(asset("page.html")).substitute(
        title=shown_text(title),
        policy="default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src {_source(style)}; script-src {_source(script)}",
        lead=escape(_lead(entries)),
        left_out=notes(f"Left out: {text}" for text in left_out),
        style=style,
        script=script,
        last_step=len(grid) - 1,
        first_step=start,
        last_k=len(shares) - 1,
        first_k=first_share,
        k_stops="".join(f'<option value="{i}" label="{label}">' for i, label in enumerate(labels)),
        articles="\n".join(one.html(index, sorted(set(radii))) for index, one in enumerate(shown)),
        proved="".join(f"<li>{escape(text)}</li>" for text in words.proved([entry.cert for entry in entries])),
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    )


def _lead(entries: Sequence[Entry]) -> str:
    images = f"{len(entries)} images" if len(entries) > 1 else "One image"
    return (
        f"{images}. The sliders choose how far an image may be perturbed and how large a part of the map is meant; the "
        "coloured pixels and all numbers hold for every perturbation of that size."
    )


def _source(text: str) -> str:
    """The text as a source of a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
