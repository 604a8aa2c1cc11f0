"""What the tensors of a certificate must be, and that they agree with each other and with its settings."""

from __future__ import annotations

import torch

from robattr_fast.certificates.moments.summary import DIRECTIONS, SUMMARY_COLUMNS, summary_of
from robattr_fast.certificates.settings import PER_IMAGE, Settings
from robattr_fast.reference._pack_levels import packed_row_bytes

DTYPES = {
    "samples": torch.int64,
    "counts": torch.int32,
    "sums": torch.float64,
    "invalid": torch.int32,
    "class_counts": torch.int32,
    "gram_summary": torch.float64,
    "directions": torch.int8,
    "packed": torch.uint8,
}


def check(tensors: dict[str, torch.Tensor], settings: Settings) -> None:
    """Raises unless dtypes, shapes and counts agree with each other and with the settings."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != DTYPES[name]:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(f"{name} must be a tensor of {DTYPES[name]}, got {kind}")
    kept = "counts" if settings.levels is not None else "sums"
    if ("counts" in tensors, "sums" in tensors) != (kept == "counts", kept == "sums"):
        raise ValueError(
            f"levels={settings.levels} takes {kept} alone, got {sorted(tensors.keys() & {'counts', 'sums'})}"
        )
    samples, invalid, values = tensors["samples"], tensors["invalid"], tensors[kept]
    images, n = samples.numel(), settings.n
    expected = {
        "samples": (images,),
        "invalid": (images,),
        "counts": (images, n, settings.levels),
        "sums": (images, n),
        "gram_summary": (images, SUMMARY_COLUMNS),
        "directions": (images, DIRECTIONS, n),
    }
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensors[name].shape)}")
    if images == 0:
        raise ValueError("a certificate needs at least one image")
    if (samples > 2**31 - 1).any():
        raise ValueError(f"samples must be at most 2^31 - 1 per image, got {int(samples.max())}")
    if (samples < 0).any() or (invalid < 0).any() or (invalid > samples).any():
        raise ValueError("invalid samples must be between 0 and samples")
    if settings.on_nonfinite == "raise" and invalid.any():
        raise ValueError(f"on_nonfinite='raise' leaves no invalid samples, got {invalid.tolist()}")
    valid = samples - invalid
    total = values if kept == "sums" else values.sum(2, dtype=torch.int64)
    # Written so that NaN fails.
    if not ((values >= 0).all() and (total <= valid[:, None]).all()):
        raise ValueError(f"{kept} of an element must not be negative, nor exceed the valid samples together")
    if (votes := tensors.get("class_counts")) is not None:
        if votes.ndim != 2 or votes.shape[0] != images or votes.shape[1] == 0:
            raise ValueError(f"class_counts must have shape [{images}, classes], got {list(votes.shape)}")
        if (votes < 0).any() or (votes.sum(1, dtype=torch.int64) > valid).any():
            raise ValueError("class_counts must not be negative, nor exceed the valid samples together")
    for name in PER_IMAGE:
        entries = getattr(settings, name)
        if entries is not None and len(entries) != images:
            raise ValueError(f"{name} must have one entry per image, got {len(entries)} for {images}")
    if settings.intervals is not None:
        lengths = [sum(end - start for start, end in image) for image in settings.intervals]
        if lengths != samples.tolist():
            raise ValueError(f"intervals hold {lengths} samples, samples say {samples.tolist()}")
    if (packed := tensors.get("packed")) is not None:
        _check_packed(packed, tensors.get("gram_summary"), settings, images)
    if (summary := tensors.get("gram_summary")) is not None:
        rows = summary[:, 0]
        if not (summary.isfinite().all() and (summary >= 0).all() and (rows % 1 == 0).all()):
            raise ValueError("gram_summary must be finite and not negative, with a whole number of rows")
        if (rows > samples).any() or (summary[:, -1] > rows).any() or (settings.retain == 0 and rows.any()):
            raise ValueError(f"gram_summary must come from the samples, {settings.retain} of them at a time")
        _check_deflation(summary, tensors.get("directions"), settings, samples)
    elif "directions" in tensors:
        raise ValueError("directions take the gram_summary that was made with them")


def _check_deflation(
    summary: torch.Tensor, directions: torch.Tensor | None, settings: Settings, samples: torch.Tensor
) -> None:
    squares = summary[:, -1 - DIRECTIONS : -1]
    if (squares >= 1).any() or ((squares > 0).any(1) != (squares > 0).all(1)).any():
        raise ValueError("gram_summary must have all squares of a deflation in (0, 1), or none")
    if (squares > 0).any() and directions is None:
        raise ValueError("gram_summary has a deflation, which takes its directions")
    for image, row in enumerate(summary if directions is not None else ()):
        assert directions is not None
        if not row[0]:
            continue
        planned = int(samples[image]) if settings.planned_samples is None else settings.planned_samples[image]
        known = summary_of(settings, planned).restored(row, directions[image])
        if known.deflation is not None and not known.deflation.independent:
            raise ValueError(f"directions of image {image} must be linearly independent")
        if known.deflated is not None and (known.deflation is None or not known.follows_pilots):
            raise ValueError(f"gram_summary of image {image} must be deflated from the samples after its pilots")


def _check_packed(packed: torch.Tensor, summary: torch.Tensor | None, settings: Settings, images: int) -> None:
    if summary is None or settings.levels is None:
        raise ValueError("packed rows take the gram_summary that was made of them")
    row_bytes = packed_row_bytes(settings.n, settings.levels)
    if packed.ndim != 3 or packed.shape[0] != images or packed.shape[2] != row_bytes:
        raise ValueError(f"packed must have shape [{images}, m, {row_bytes}], got {list(packed.shape)}")
    if not (summary[:, 0] <= packed.shape[1]).all():
        raise ValueError(f"gram_summary must come from the {packed.shape[1]} packed rows, got {summary[:, 0].tolist()}")
