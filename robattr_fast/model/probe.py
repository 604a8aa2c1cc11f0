"""A model known by what it does: logits and gradients of a few fixed noise inputs, as numbers for a manifest."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from robattr_fast.model.checks import GRADIENT, apart, competing
from robattr_fast.model.gradient import Explanation, autocast, dtype_name, dtype_named, output_form, scores
from robattr_fast.ops.noisy_samples import noisy_samples

_ROWS = 4
_SEED, _IMAGE = 0x6964656E74697479, 2**32 - 1  # of the noise; samples 2^31 and on, which no run of one image reaches
_FIRST = 2**31
_LOGITS = 32  # at most so many are recorded, evenly spaced, and the largest
_DIRECTIONS = 4  # along which gradients are recorded


def behaviour(
    model: nn.Module,
    x: torch.Tensor,
    explain: str | Explanation = "gradient",
    dtype: torch.dtype | None = None,
    *,
    rows: int = _ROWS,
) -> dict[str, Any]:
    """What a private copy does with noise around 0.5, of the shape, dtype and device of one image of x [B, *S].

    dtype: of torch.autocast, or None. rows: of a batch; a model that was exported for one batch size takes no other.
    Of logits, every one or 32 evenly spaced ones and the largest; of gradients, and of a callable's scores, the norm
    and four directions. Numbers that are not finite are None.
    """
    inputs, along = _noise(x.shape[1:], x.dtype, x.device)
    logits, slopes, method = [], [], []
    for start in range(0, _ROWS, rows):
        chosen = [min(row, _ROWS - 1) for row in range(start, start + rows)]
        batch = inputs[chosen]
        kept = min(rows, _ROWS - start)
        with autocast(x.device, dtype):
            if callable(explain):
                found, values = scores(model, batch, None, explain)
                method += _features(found[:kept], along)
            else:
                gradient, values = scores(model, batch, None, "gradient")
                slopes += _features(gradient[:kept], along)
        logits += [_logits(row) for row in values[:kept]]
    return {
        "shape": tuple(x.shape[1:]),
        "dtype": dtype_name(x.dtype),
        "autocast": None if dtype is None else dtype_name(dtype),
        "output": output_form(model),
        "logits": tuple(logits),
        "gradients": tuple(slopes),
        "scores": tuple(method),
    }


@functools.lru_cache(maxsize=2)
def _noise(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [4, *shape] and directions [4, n] in float64."""
    image = torch.full((1, *shape), 0.5, dtype=dtype, device=device)
    ids = torch.tensor([_IMAGE], device=device)
    inputs = noisy_samples(image, 0.25, _ROWS, seed=_SEED, first_sample=_FIRST, image_ids=ids)[0]
    along = noisy_samples(torch.zeros_like(image), 1.0, _DIRECTIONS, seed=_SEED, first_sample=2 * _FIRST - 8)[0]
    return inputs, along.double()


def _number(value: float) -> float | None:
    return float(f"{value:.8g}") if math.isfinite(value) else None


def _logits(row: torch.Tensor) -> tuple[float | None, ...]:
    count = len(row)
    chosen = range(count) if count <= _LOGITS else [i * (count - 1) // (_LOGITS - 1) for i in range(_LOGITS)]
    values = row.double().tolist()
    return (*(_number(values[i]) for i in chosen), _number(max(values)))


def _features(found: torch.Tensor, along: torch.Tensor) -> list[tuple[float | None, ...]]:
    """Norm and components of each row."""
    rows = found.detach().double()
    shape = along if rows.shape[1:] == along.shape[1:] else along.sum(dim=1)
    sums = rows.flatten(1) @ shape.flatten(1).T
    return [tuple(map(_number, (float(row.norm()), *sums[i].tolist()))) for i, row in enumerate(rows)]


def other_behaviour(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """How two behaviours differ by more than rounding; None where they do not, or cannot be compared."""
    if any(recorded.get(name) != here.get(name) for name in ("shape", "dtype", "autocast")):
        return None
    coarse = [dtype_named(here["autocast"]), dtype_named(here["dtype"])]
    eps = max(torch.finfo(dtype).eps for dtype in coarse if dtype is not None)
    theirs, ours = (torch.tensor(_filled(side["logits"]), dtype=torch.float64) for side in (recorded, here))
    if theirs.shape != ours.shape:
        return "another number of logits"
    far, _ = apart(ours, theirs, competing(theirs), eps)
    if far > eps**0.5:
        return f"logits of fixed inputs differ by {far:.1e}"
    allowed = max(GRADIENT, 4 * eps**0.5)
    for name in ("gradients", "scores"):
        pairs = zip(recorded[name], here[name], strict=False)
        for row, (theirs_, ours_) in enumerate(pairs):
            if int(theirs[row, :-1].argmax()) != int(ours[row, :-1].argmax()):
                continue  # rounding decides between two largest
            if (None in theirs_) != (None in ours_):
                return f"{name} of fixed inputs differ"
            if None in theirs_:
                continue
            scale = max(abs(theirs_[0]), abs(ours_[0]))
            # Components along standard normal directions have the size of the norm; a few times it at most.
            turned = max(abs(a - b) for a, b in zip(theirs_, ours_, strict=True))
            if turned > 3 * allowed * scale:
                return f"{name} of fixed inputs differ by {turned / scale:.1e} of their norm"
    return None


def _filled(rows: Any) -> list[list[float]]:
    return [[-math.inf if value is None else value for value in row] for row in rows]
