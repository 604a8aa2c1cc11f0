"""How large familiar changes of a photograph are in L2 norm, to compare certified radii with.

    python examples/familiar_changes.py

The photograph is chelsea of scikit-image, as a model of 224 x 224 pixels gets it: [3, 224, 224], values in [0, 1].
Prints a Markdown table. Needs Pillow and scikit-image, of the extra "cli".
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from robattr_fast.inputs import images
from robattr_fast.report.rounding import grey_levels, psnr, rounded_psnr


def photograph() -> torch.Tensor:
    """[3, 224, 224] in [0, 1]: the central square, resized with an antialiasing filter and not rounded to 8 bits."""
    (source,) = images.find(["skimage:chelsea"])
    square = images.read(source.path, images.centre_crop(300)).double()  # its height: nothing is resized
    return functional.interpolate(square[None], 224, mode="bilinear", antialias=True)[0].clamp(0, 1)


def to_bytes(x: torch.Tensor) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return (255 * x).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def from_bytes(pixels: np.ndarray) -> torch.Tensor:
    """[3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).double() / 255


def jpeg(x: torch.Tensor, quality: int) -> torch.Tensor:
    """Written as JPEG and read again, colours at half of the resolution as Pillow's default is."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(to_bytes(x)).save(buffer, "JPEG", quality=quality)
    return from_bytes(np.asarray(Image.open(buffer)))


def moved(x: torch.Tensor, values: int) -> torch.Tensor:
    """The first ``values`` values by one grey level, away from the nearer end."""
    flat = x.flatten().clone()
    flat[:values] += torch.where(flat[:values] > 0.5, -1.0, 1.0).double() / 255
    return flat.view_as(x)


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one value by one grey level": lambda x: moved(x, 1),
    "one pixel in all colours by one grey level": lambda x: moved(x, 3),
    "234 values by one grey level": lambda x: moved(x, 234),
    "rounded to 8 bits": lambda x: from_bytes(to_bytes(x)),
    "every value by one grey level (brightness)": lambda x: moved(x, x.numel()),
    "JPEG, quality 100": lambda x: jpeg(x, 100),
    "JPEG, quality 95": lambda x: jpeg(x, 95),
    "JPEG, quality 75": lambda x: jpeg(x, 75),
    "Gaussian noise, sigma 0.2": lambda x: (
        x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    ),
    "shifted by one pixel": lambda x: x.roll(1, 2),
    "mirrored": lambda x: x.flip(2),
}


def measured() -> dict[str, float]:
    """The L2 norm of each change."""
    x = photograph()
    return {name: float((change(x) - x).double().norm()) for name, change in CHANGES.items()}


def table() -> str:
    """In Markdown."""
    values = photograph().numel()
    lines = ["| change | L2 | as values by one grey level | PSNR |", "|---|---|---|---|"]
    for name, radius in measured().items():
        count = f"{grey_levels(radius):,}".replace(",", " ")
        if grey_levels(radius) > values:
            count = f"all, by {255 * radius / values**0.5:.2g} in the root mean square"
        lines.append(f"| {name} | {radius:.3g} | {count} | {rounded_psnr(psnr(radius, values))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
