"""The picture of a certificate: photograph, map, what provably stays, and how much of it at which radius.

Needs matplotlib, which is imported on use. Nothing here touches pyplot, hence no display and no global state.
"""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from robattr_fast.certificates.theorems.membership import membership
from robattr_fast.files import write_atomically
from robattr_fast.inputs.images import DRAWN
from robattr_fast.inputs.names import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from robattr_fast.certificates.certificate.certificate import Certificate

OURS = "this certificate"
MARGINAL = "element by element, same samples"
"""The bounds of this certificate without its second moments."""
PUBLISHED = "published procedure, same samples"
"""Levine, Singla and Feizi 2019: Hoeffding's bound and a union over all elements."""

# Okabe and Ito's palette, safe for colour-blind readers. One style per method, in the order of the curves.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-", "linewidth": 2.4},
    {"color": "#D55E00", "linestyle": (0, (5, 2)), "linewidth": 2.0},
    {"color": "#009E73", "linestyle": "-.", "linewidth": 2.0},
    {"color": "#CC79A7", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "linewidth": 2.0},
)
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}
_GRID = 240  # radii at which curves are evaluated


def overlap_curves(
    cert: Certificate, k: int, radii: Sequence[float], marked: Sequence[float] = ()
) -> dict[str, np.ndarray]:
    """Certified share of the top-k at each radius, [R] per method, the best first.

    Of this certificate, of its bounds element by element where second moments do better somewhere, and of the
    published procedure where that is not this certificate itself. cert holds one image. Bounds and moments are
    combined (a second or so per radius for a photograph) at the ``marked`` radii only; what they prove there holds at
    smaller radii too.
    """
    by_element = _shares(cert, k, radii, "marginal")
    best = by_element
    if cert.has_second_moments:
        best = np.maximum(by_element, _shares(cert, k, radii, "second-moment"))
        for radius, share in zip(marked, _shares(cert, k, marked, "best"), strict=True):
            best = np.where(np.asarray(radii) <= radius, np.maximum(best, share), best)
    curves = {OURS: best}
    if (best > by_element).any():
        curves[MARGINAL] = by_element
    published = cert.with_bounds(bound="hoeffding", slack=0, second_moment=False)
    if published.settings.evaluation != cert.settings.evaluation:
        curves[PUBLISHED] = _shares(published, k, radii, "marginal")
    return curves


def _shares(cert: Certificate, k: int, radii: Sequence[float], method: str) -> np.ndarray:
    return cert.overlap(k, list(radii), method).share[:, 0].numpy()


def radius_grid(cert: Certificate, k: int, radii: Sequence[float]) -> list[float]:
    """Radii from 0 to where the certificate fades (2 % are left), and at least to the largest of ``radii``.

    To sigma if all that is 0.
    """
    fade = float(cert.radius(k, 0.02)[0])
    end = max(fade if np.isfinite(fade) else 0.0, *radii)
    return np.linspace(0.0, 1.05 * (end or cert.settings.sigma), _GRID).tolist()


def certificate_figure(
    image: torch.Tensor, cert: Certificate, *, k: int, radii: Sequence[float], title: str = ""
) -> Figure:
    """Four panels for one image: the photograph, its map, certified pixels, certified overlap against the radius.

    Args:
        image: [C, H, W] in [0, 1].
        cert: of this one image, with maps [C, H, W] or [H, W].
        k: size of the top-k set.
        radii: L2 radii (of pixels in [0, 1]) that the curve marks.
        title: a line above.

    Raises:
        ValueError: more than one image, no radius, shapes that do not fit each other.
    """
    shape = tuple(cert.map.shape[1:])
    if len(cert.map) != 1 or image.dim() != 3 or shape not in (tuple(image.shape), tuple(image.shape[1:])):
        raise ValueError(
            f"image: got {tuple(image.shape)} for maps {tuple(cert.map.shape)}, takes [C, H, W] for one map"
        )
    if not radii:
        raise ValueError("radii: got none, takes at least one")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(16, 5.1), dpi=100, facecolor="white")
        grid = figure.add_gridspec(
            1, 5, width_ratios=(1, 1, 1, 0.14, 1.2), left=0.012, right=0.985, top=0.80, bottom=0.15, wspace=0.06
        )
        photograph, saliency, pixels, curve = (figure.add_subplot(grid[0, column]) for column in (0, 1, 2, 4))
        _show_photograph(photograph, image)
        _show_map(saliency, cert.map[0])
        _show_membership(pixels, image, cert, k)
        _show_curves(curve, cert, k, radii)
        heading(figure, title)
        figure.text(0.012, 0.888, _caption(cert, max(radii)), ha="left", fontsize=10.5, color="#444444")
    return figure


def heading(figure: Figure, title: str) -> None:
    """A line above everything: a name, which is no formula."""
    text = figure.suptitle(
        printable(title), x=0.012, y=0.98, ha="left", fontsize=14, fontweight="bold", color="#111111"
    )
    text.set_parse_math(False)


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG (or what the suffix says), atomically. A PNG says that it is ours: it is no photograph to certify."""
    picture, kind = io.BytesIO(), Path(path).suffix[1:] or "png"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # names are in any script
        figure.savefig(picture, format=kind, facecolor="white", metadata={"Software": DRAWN} if kind == "png" else None)
    write_atomically(path, picture.getvalue())


def display_map(values: torch.Tensor, percentile: float = 99.0) -> np.ndarray:
    """[C, H, W] or [H, W] to [H, W] in [0, 1]: the sum over channels, clipped at a percentile and scaled."""
    flat = values.double().sum(0) if values.dim() == 3 else values.double()
    top = float(np.percentile(flat.numpy(), percentile)) or float(flat.max()) or 1.0
    return (flat / top).clamp(0, 1).numpy()


def signed_radius(stays_in: torch.Tensor, stays_out: torch.Tensor) -> np.ndarray:
    """One number per pixel, [H, W]: r > 0 where some channel stays in the top-k within r, -r where all stay out."""
    if stays_in.dim() == 3:
        stays_in, stays_out = stays_in.amax(0), stays_out.amin(0)
    return (stays_in - torch.where(stays_in > 0, 0.0, stays_out)).numpy()


def _caption(cert: Certificate, radius: float) -> str:
    settings = cert.settings
    samples = f"{int(cert.samples[0]):,}".replace(",", " ")
    parts = [
        f"{samples} noisy samples",
        f"σ = {settings.sigma:g}",
        f"level {100 * (1 - settings.evaluation.alpha):g} %",
    ]
    cosine = float(cert.cosine(radius)[0]) if cert.has_second_moments else 0.0
    if cosine > 0:
        least = np.floor(1000 * cosine) / 1000
        parts.append(f"cosine of the maps at radius {radius:g}: at least {least:.3f}")
    return ", ".join(parts)


def _show_photograph(axes: Axes, image: torch.Tensor) -> None:
    picture = image.permute(1, 2, 0) if image.shape[0] == 3 else image.mean(0)
    axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
    _bare(axes, "Image")


def _show_map(axes: Axes, values: torch.Tensor) -> None:
    shown = axes.imshow(display_map(values), cmap="magma", vmin=0, vmax=1)
    _bare(axes, "Smoothed saliency map")
    bar = _colour_bar(axes, shown, [0, 1])
    bar.ax.set_xticklabels(["low", "99th percentile"])


def _show_membership(axes: Axes, image: torch.Tensor, cert: Certificate, k: int) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    flat = membership(cert.lower.flatten(1), cert.upper.flatten(1), k, cert.settings.sigma)
    radius = signed_radius(*(part.view(cert.map.shape)[0] for part in flat))
    finite = np.abs(radius[np.isfinite(radius)])
    limit = float(np.percentile(finite, 99.5)) if finite.any() else 0.0
    limit = limit or float(finite.max(initial=0.0)) or 1.0
    norm, colours = Normalize(-limit, limit), colormaps["PuOr_r"]
    # Over a pale photograph; the more opaque the larger the radius.
    pale = np.repeat(0.55 + 0.45 * image.mean(0).numpy()[:, :, None], 3, axis=2)
    opacity = np.sqrt(np.clip(np.abs(radius) / limit, 0, 1))[:, :, None]
    axes.imshow(pale * (1 - opacity) + colours(norm(radius))[:, :, :3] * opacity)
    _bare(axes, f"Provably in or out of the top {100 * k / cert.settings.n:.3g} %")
    bar = _colour_bar(axes, ScalarMappable(norm, colours), [-limit, 0, limit])
    bar.ax.set_xticklabels([f"out, {limit:.2g}", "certified L2 radius", f"in, {limit:.2g}"])


def _show_curves(axes: Axes, cert: Certificate, k: int, marked: Sequence[float]) -> None:
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator

    grid = sorted({*radius_grid(cert, k, marked), *marked})
    at = np.asarray(sorted(set(marked)))
    curves = overlap_curves(cert, k, grid, at.tolist())
    share = k / cert.settings.n
    for (label, values), style in zip(curves.items(), itertools.cycle(_STYLES), strict=False):
        axes.plot(grid, 100 * values, label=label, **style)
    first = next(iter(curves.values()))
    axes.fill_between(grid, 0, 100 * first, color=_STYLES[0]["color"], alpha=0.08, linewidth=0)
    axes.axhline(100 * share, color="#888888", linewidth=1, linestyle=":")
    axes.annotate(
        "random sets",
        (0, 100 * share),
        (4, 3),
        textcoords="offset points",
        fontsize=9,
        color="#666666",
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )
    heights = 100 * first[np.searchsorted(grid, at)]
    axes.plot(at, heights, "o", color=_STYLES[0]["color"], markersize=6, markeredgecolor="white", zorder=5)
    for radius, height in zip(at, heights, strict=True):
        axes.annotate(
            f"{np.floor(height):.0f} %",
            (radius, height),
            (6, 5),
            textcoords="offset points",
            fontsize=10,
            color=_STYLES[0]["color"],
            fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    # Above 100 % is room for the legend, where no curve can be.
    axes.set(xlim=(0, grid[-1]), ylim=(0, 104 + 9 * len(curves)), yticks=range(0, 101, 20))
    axes.spines["left"].set_bounds(0, 100)
    axes.set_xlabel("L2 radius of the perturbation (pixels in [0, 1])")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_ylabel("certified overlap of the top sets (%)", y=50 / axes.get_ylim()[1])
    axes.set_title(f"Share of the top {100 * share:.3g} % that provably stays", loc="left")
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper right", borderaxespad=0, fontsize=10, handlelength=2.8)


def _bare(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _colour_bar(axes: Axes, shown, ticks: Sequence[float]):
    inset = axes.inset_axes((0.0, -0.075, 1.0, 0.035))
    bar = axes.figure.colorbar(shown, cax=inset, orientation="horizontal", ticks=list(ticks))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=9)
    labels = bar.ax.get_xticklabels()
    for label in labels:
        label.set_horizontalalignment("center")
    labels[0].set_horizontalalignment("left")
    labels[-1].set_horizontalalignment("right")
    return bar
