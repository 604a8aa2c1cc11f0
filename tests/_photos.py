"""Photographs of noise, as files."""

import numpy as np
from PIL import Image


def write_photos(folder, count):
    """photo0.png, photo1.png, ... of 12 x 10 pixels in ``folder``, which must not exist."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(folder / f"photo{index}.png")
