"""The image of a certificate, found again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from robattr_fast import model
from robattr_fast.inputs import images
from robattr_fast.jobs.record import Record

# The parts of a photograph that models are commonly shown, as shares of its shorter side.
_CROPS = (1.0, 224 / 256)


def find_image(
    certificate: Path, record: Record, input_hash: str, shape: Sequence[int], preprocess: images.Preprocess | None
) -> torch.Tensor | None:
    """The image [C, H, W] of a certificate if it can be found where the run had it, or beside the certificate.

    It is the very input of the model: nothing is returned whose hash is not ``input_hash``.

    Args:
        shape: of the certificate's maps.
        preprocess: the model's. None: the usual ones are tried, whole images and central squares.
    """
    if record.source is None:
        return None
    source = Path(record.source)
    side = shape[-1]
    tried = [preprocess] if preprocess is not None else [images.to_tensor]
    if preprocess is None and len(shape) > 1 and shape[-2] == side:
        tried += [images.centre_crop(side, fraction=fraction) for fraction in _CROPS]
    for path in (source, certificate.parent / source, certificate.parent / source.name):
        try:
            if not path.is_file():
                continue
        except (OSError, ValueError):  # a path that no file system takes
            continue
        for attempt in tried:
            try:
                x = images.read(path, attempt)
            except (images.ImageError, OSError):
                break
            if model.input_hash(x) == input_hash:
                return x
    return None
