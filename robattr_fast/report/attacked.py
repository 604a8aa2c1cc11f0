"""The picture of an attack: image, perturbation, the map before and the map after.

Needs matplotlib, which is imported on use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from robattr_fast.report.picture import display_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAGNIFIED = 10


def attack_figure(
    image: torch.Tensor, perturbed: torch.Tensor, before: torch.Tensor, after: torch.Tensor, *, title: str = ""
) -> Figure:
    """Four panels: the image, ten times its perturbation on grey, the absolute values of the two maps on one scale.

    image, perturbed: [C, H, W] in [0, 1]. before, after: [C, H, W] or [H, W]. title: a line above.
    """
    if image.shape != perturbed.shape or image.dim() != 3 or before.shape != after.shape:
        shapes = [tuple(one.shape) for one in (image, perturbed, before, after)]
        raise ValueError(f"image, perturbed, before, after: got shapes {shapes}, expected two equal pairs")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), dpi=100, facecolor="white", layout="constrained")
    axes = figure.subplots(1, 4)
    maps = torch.stack([before, after]).double().abs()
    scaled = display_map(torch.cat([*maps], dim=-1))  # one percentile for both
    width = before.shape[-1]
    delta = 0.5 + _MAGNIFIED * (perturbed - image) / 2
    panels = [
        ("Image", _picture(image)),
        (f"Perturbation x {_MAGNIFIED}", _picture(delta)),
        ("Map before", scaled[:, :width]),
        ("Map after", scaled[:, width:]),
    ]
    for axis, (name, values) in zip(axes, panels, strict=True):
        axis.imshow(values, cmap="magma" if name.startswith("Map") else "gray", vmin=0, vmax=1)
        axis.set_title(name, loc="left")
        axis.set_axis_off()
    figure.suptitle(title, ha="left", x=0.01, fontweight="bold")
    return figure


def _picture(image: torch.Tensor) -> np.ndarray:
    return (image.permute(1, 2, 0) if image.shape[0] == 3 else image.mean(0)).clamp(0, 1).numpy()
