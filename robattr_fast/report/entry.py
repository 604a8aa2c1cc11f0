"""One certified image of a report: what is computed for it, and its part of the page."""

from __future__ import annotations

import base64
import importlib.resources
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from string import Template
from typing import Any

import numpy as np
import torch

from robattr_fast.certificates import Certificate
from robattr_fast.certificates.theorems.membership import membership
from robattr_fast.inputs.names import printable
from robattr_fast.report import picture, words
from robattr_fast.report.rounding import grey_levels, percent, psnr, rounded_cosine, rounded_psnr
from robattr_fast.report.rounding import radius as shown_radius
from robattr_fast.report.sizes import size_words, top_size

_STEPS = 80  # of the slider at most; a byte of `steps` holds up to 127 on either side
_PALE = (0.55, 0.45)  # grey level of black, and what white adds
_NO_IMAGE = 0xE4
_ATTACKED = (
    '<span class="key"><svg viewBox="0 0 34 8" aria-hidden="true"><circle class="attacked" cx="17" cy="4" r="3.5"/>'
    "</svg>left by an attack</span>"
)


@dataclass(frozen=True)
class Entry:
    """One certified image of a page.

    Attributes:
        name: its heading.
        cert: of this one image, with maps [n], [H, W] or [C, H, W].
        image: the model's input [C, H, W] in [0, 1], of the height and width of the maps; None: the map alone is shown.
        class_name: of the class that most samples vote for.
        own_class: of the class that the model gives to the image itself, where most noisy copies have another.
        remarks: printed above the pictures, beside those on the certificate itself.
        attacked: (k, L2 radius, share) of the top-k that an attack left, drawn beside what is certified.

    Raises:
        ValueError: more than one image, or shapes that cannot be shown together.
    """

    name: str
    cert: Certificate
    image: torch.Tensor | None = None
    class_name: str = ""
    own_class: str = ""
    remarks: Sequence[str] = field(default_factory=tuple)
    attacked: Sequence[tuple[int, float, float]] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        shape = self.cert.settings.shape
        if len(self.cert) != 1 or len(shape) > 3:
            raise ValueError(f"cert: got {len(self.cert)} maps of shape {list(shape)}, takes one of up to 3 dimensions")
        if self.image is not None and (self.image.dim() != 3 or self.image.shape[1:] != self.picture_shape[1:]):
            raise ValueError(f"image: got {list(self.image.shape)} for a map of shape {list(shape)}")

    @property
    def picture_shape(self) -> torch.Size:
        """The shape of the map as [C, H, W]."""
        return torch.Size((1,) * (3 - len(self.cert.settings.shape)) + self.cert.settings.shape)


def radius_steps(certs: Sequence[Certificate], shares: Sequence[float], radii: Sequence[float]) -> list[float]:
    """Equal steps of a round size from 0 to where every certificate has faded (2 % are left), and past ``radii``."""
    ends = [*radii]
    for cert in certs:
        ends += [float(cert.radius(top_size(share, cert.settings.n), 0.02)[0]) for share in shares]
    end = max(end for end in (*ends, 0.0) if math.isfinite(end)) or certs[0].settings.sigma
    least = end / _STEPS
    power = 10.0 ** math.floor(math.log10(least))
    step = next(round(factor * power, 15) for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    return [float(f"{index * step:.12g}") for index in range(math.ceil(end / step - 1e-9) + 1)]


def certified_steps(cert: Certificate, k: int, grid: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """For how many radii of the grid, which starts at 0, an element surely stays in, or out: int64 [n] each."""
    lower, upper = (bound.flatten(1) for bound in (cert.lower, cert.upper))
    radii = torch.tensor(grid, dtype=torch.float64)
    stays_in, stays_out = membership(lower[0], upper[0], k, cert.settings.sigma)
    return torch.searchsorted(radii, stays_in), torch.searchsorted(radii, stays_out)


class Shown:
    """An entry, with everything that the page says of it computed once."""

    def __init__(self, entry: Entry, shares: Sequence[float], grid: list[float]) -> None:
        self.entry, self.shares, self.grid = entry, shares, grid
        self.sets: list[dict[str, Any]] = []
        curves = [_curves(entry.cert, top_size(share, entry.cert.settings.n), grid) for share in shares]
        self.methods = list(dict.fromkeys(name for of_share in curves for name in of_share))
        for share, by_method in zip(shares, curves, strict=True):
            k = top_size(share, entry.cert.settings.n)
            inside, outside = certified_steps(entry.cert, k, grid)
            steps = np.arange(len(grid))[:, None]
            self.sets.append(
                {
                    "k": k,
                    "attacked": [[radius, left] for size, radius, left in entry.attacked if size == k],
                    "counts": [by_method.get(name) for name in self.methods],
                    "inside": (inside.numpy() > steps).sum(1).tolist(),
                    "outside": (outside.numpy() > steps).sum(1).tolist(),
                    "steps": _base64(_codes(inside.view(entry.picture_shape), outside.view(entry.picture_shape))),
                }
            )

    def data(self) -> dict:
        """For the script."""
        if self.entry.image is None:
            pale = np.full(self.entry.picture_shape[1:], _NO_IMAGE, np.uint8)
        else:
            pale = (255 * (_PALE[0] + _PALE[1] * self.entry.image.mean(0).numpy())).round().astype(np.uint8)
        cert = self.entry.cert
        cosines = cert.cosine(self.grid)[:, 0].tolist() if cert.has_second_moments else None
        return {"n": cert.settings.n, "pale": _base64(pale), "sets": self.sets, "cosines": cosines}

    def html(self, index: int, radii: Sequence[float]) -> str:
        """Its part of the page."""
        from matplotlib import colormaps

        entry, cert = self.entry, self.entry.cert
        _, height, width = entry.picture_shape
        saliency = picture.display_map(cert.map[0].view(entry.picture_shape))
        name = shown_text(entry.name)
        photograph = ""
        if entry.image is not None:
            source = _png(entry.image.expand(3, -1, -1).permute(1, 2, 0).numpy())
            photograph = (
                f'<figure><img src="{source}" alt="{name}" width="{width}" height="{height}">'
                "<figcaption>Image, as the model gets it</figcaption></figure>"
            )
        return Template(asset("article.html")).substitute(
            index=index,
            name=name,
            facts=shown_text(_facts(entry)),
            remarks=notes([*entry.remarks, *words.remarks(cert)]),
            photograph=photograph,
            map=_png(colormaps["magma"](saliency)[:, :, :3]),
            width=width,
            height=height,
            grid=_axes(self.grid),
            panels="panels" if photograph else "panels pair",
            paths="".join(f'<path class="m{i}" data-method="{i}"/>' for i in reversed(range(len(self.methods)))),
            key="".join(_key(i, method) for i, method in enumerate(self.methods))
            + (_ATTACKED if entry.attacked else ""),
            columns="".join(f'<th scope="col">{radius:g}</th>' for radius in radii),
            rows=_rows(entry, self.shares, radii),
            manifest="".join(
                f'<tr><th scope="row">{shown_text(key)}</th><td>{shown_text(json.dumps(value))}</td></tr>'
                for key, value in cert.settings.to_json().items()
            ),
        )


def shown_text(text: str) -> str:
    """Data as text of the page, whatever it holds."""
    return escape(printable(text))


def notes(texts: Iterable[str]) -> str:
    """Remarks as paragraphs."""
    return "".join(f'<p class="note">{shown_text(text)}</p>' for text in texts)


def asset(name: str) -> str:
    """A file of this package, as text."""
    return (importlib.resources.files(__package__) / name).read_text(encoding="utf-8").strip()


def _curves(cert: Certificate, k: int, grid: list[float]) -> dict[str, list[int]]:
    """Certified overlap in elements [R] per method; the certificate's own comes first."""
    curves = {picture.OURS: cert.overlap(k, grid).share[:, 0].numpy()}
    curves |= {name: shares for name, shares in picture.overlap_curves(cert, k, grid).items() if name not in curves}
    return {name: (shares * k).round().astype(int).tolist() for name, shares in curves.items()}


def _codes(inside: torch.Tensor, outside: torch.Tensor) -> np.ndarray:
    """One byte per pixel: s where some channel stays in for s steps, 128 + s where all stay out; 0 elsewhere."""
    stays_in, stays_out = inside.amax(0), outside.amin(0)
    return torch.where(stays_in > 0, stays_in, torch.where(stays_out > 0, 128 + stays_out, 0)).to(torch.uint8).numpy()


def _axes(grid: Sequence[float]) -> str:
    """Lines and numbers of the coordinate system that the script draws in: shares upwards, radii to the right."""
    left, right, top, bottom = 44, 452, 12, 256
    lines = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - (bottom - top) * share
        lines.append(f'<line x1="{left}" x2="{right}" y1="{y:g}" y2="{y:g}"/>')
        lines.append(f'<text x="{left - 6}" y="{y + 4:g}" text-anchor="end">{100 * share:.0f} %</text>')
    last = len(grid) - 1
    every = next(step for step in (1, 2, 5, 10, 20, 25, 50) if last // step <= 7)
    for step in range(0, last + 1, every):
        x = left + (right - left) * step / last
        lines.append(f'<text x="{x:g}" y="{bottom + 17}" text-anchor="middle">{grid[step]:g}</text>')
    return "".join(lines)


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _png(image: np.ndarray) -> str:
    """[H, W, 3] in [0, 1] as a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((255 * image).round().astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _facts(entry: Entry) -> str:
    cert = entry.cert
    settings = cert.settings
    facts = []
    if cert.class_counts is not None:
        number = int(cert.class_counts[0].argmax())
        radius = float(cert.prediction().radius[0]) if settings.ledger.label > 0 else 0.0
        known = f"class {entry.class_name} ({number})" if entry.class_name else f"class {number}"
        facts.append(f"{known}, {f'certified to radius {shown_radius(radius)}' if radius > 0 else 'not certified'}")
        if entry.own_class:
            facts[-1] = f"noisy copies say {facts[-1]}; the model says {entry.own_class}"
    facts += [
        f"{int(cert.samples[0])} samples",
        f"noise sigma {settings.sigma:g}",
        f"{cert.evaluated_bound} bounds",
        f"confidence {100 * (1 - settings.evaluation.alpha):g} %",
    ]
    return " · ".join(facts)


def _rows(entry: Entry, shares: Sequence[float], radii: Sequence[float]) -> str:
    cert = entry.cert
    rows: list[tuple[str, list[str]]] = []
    one_line: dict[str, str | None] = {}
    for share in shares:
        k = top_size(share, cert.settings.n)
        kept = [percent(float(value)) for value in cert.overlap(k, radii).share[:, 0]]
        size = f"{size_words(share)}, {k} elements" if share < 1 else f"{k} elements"
        rows.append((size, [*kept, shown_radius(float(cert.radius(k, 0.5)[0]))]))
        one_line[size] = words.nothing_certified(cert, k, radii)
    if cert.has_second_moments:
        rows.append(("cosine with the map shown", [*(rounded_cosine(float(v)) for v in cert.cosine(radii)[:, 0]), ""]))
    rows.append(("values that may change by one grey level of 255", [*(f"{grey_levels(at)}" for at in radii), ""]))
    if entry.image is not None:
        rows.append(("PSNR", [*(rounded_psnr(psnr(at, entry.image.numel())) for at in radii), ""]))
    lines = []
    for name, values in rows:
        cells = "".join(f"<td>{value}</td>" for value in values)
        if (nothing := one_line.get(name)) is not None:
            cells = f'<td colspan="{len(values)}">{shown_text(nothing)}</td>'
        lines.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return "".join(lines)


def _key(index: int, method: str) -> str:
    line = f'<svg viewBox="0 0 34 8" aria-hidden="true"><path class="m{index}" d="M0 4H34"/></svg>'
    return f'<span class="key">{line}{escape(method)}</span>'
