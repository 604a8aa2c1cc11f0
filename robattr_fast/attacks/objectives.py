"""What an adversary wants of a map: each objective is a number per image to raise, and a measure people know.

The number is differentiable and guides; the measure decides which point is kept and is what a result reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from robattr_fast.metrics import centre, centre_shift, kendall, sensitivity, spearman, ssim
from robattr_fast.metrics import cosine as cosine_similarity
from robattr_fast.ops import _check
from robattr_fast.ops.topk_threshold import topk_threshold

State: TypeAlias = dict[str, torch.Tensor]
"""What an objective keeps of the images: tensors [B, ...]."""

CHANNELS = ("keep", "sum")
_SHORT = 4096  # rows whose sort costs less than a call of the operator


def sizes(maps: torch.Tensor, channels: str) -> torch.Tensor:
    """|maps| [B, *M], summed over dimension 1 where channels is "sum" and maps are [B, C, H, W] or more."""
    size = maps.abs()
    return size.sum(dim=1) if channels == "sum" and maps.dim() > 3 else size


def in_top_k(values: torch.Tensor, k: int) -> torch.Tensor:
    """`robattr_fast.metrics.overlap.top_k` of finite rows [B, n] without a sort: ties go to the lowest index."""
    if values.shape[1] <= _SHORT:
        threshold = values.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    else:
        threshold = topk_threshold(values, k)[:, None]
    above, equal = values > threshold, values == threshold
    return above | (equal & (equal.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))


def _share(flat: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Share of the mass of sizes [B, n] that lies in mask [B, n]."""
    return (flat * mask).sum(dim=1) / flat.sum(dim=1)


def _check_channels(channels: str) -> None:
    if channels not in CHANNELS:
        raise ValueError(f"channels: got {channels!r}, expected 'keep' or 'sum'")


class Objective:
    """Base class. Maps are float32 or float64 [B, *M], of B images."""

    rises: bool = False
    """Whether the measure rises as a map moves away."""

    def prepare(self, before: torch.Tensor) -> State:
        """What is needed of the maps of the images themselves."""
        return {"before": before}

    def value(self, maps: torch.Tensor, state: State) -> torch.Tensor:
        """[B], differentiable, to raise."""
        raise NotImplementedError

    def measure(self, maps: torch.Tensor, state: State) -> torch.Tensor:
        """float64 [B]; NaN where a map is constant."""
        raise NotImplementedError

    def unit(self, state: State) -> torch.Tensor | float:
        """What ``value`` is counted in, [B] or a number: a penalty is divided by it."""
        return 1.0


@dataclass(frozen=True)
class TopK(Objective):
    """Push the k largest elements of the map down (Ghorbani et al. 2019, Levine et al. 2019).

    Guided by the share of the map's mass that lies in its old top-k; measured by the overlap of the top-k sets
    (`robattr_fast.overlap`), which falls.

    Args:
        k: elements of the top set; pixels with channels="sum".
        channels: "keep": elements of the map, by absolute value; "sum": absolute values summed over dimension 1.
    """

    k: int
    channels: str = "keep"

    def __post_init__(self) -> None:
        _check.integer("k", self.k, 1, 2**31 - 1)
        _check_channels(self.channels)

    def prepare(self, before: torch.Tensor) -> State:
        flat = sizes(before, self.channels).flatten(1)
        _check.integer("k", self.k, 1, flat.shape[1])
        return {"top": in_top_k(flat, self.k)}

    def value(self, maps: torch.Tensor, state: State) -> torch.Tensor:
        return -_share(sizes(maps, self.channels).flatten(1), state["top"])

    def measure(self, maps: torch.Tensor, state: State) -> torch.Tensor:
        flat = sizes(maps, self.channels).flatten(1)
        kept = (in_top_k(flat, self.k) & state["top"]).sum(dim=1).double() / self.k
        least, most = flat.aminmax(dim=1)
        return kept.where(least < most, torch.nan)


@dataclass(frozen=True)
class MassCenter(Objective):
    """Move the centre of mass of the absolute values (Ghorbani et al. 2019); measured in pixels
    (`robattr_fast.metrics.centre_shift`), guided by its square."""

    rises = True

    def prepare(self, before: torch.Tensor) -> State:
        return {"before": before, "centre": centre(before)}

    def value(self, maps: torch.Tensor, state: State) -> torch.Tensor:
        return (centre(maps) - state["centre"]).square().sum(dim=1)

    def measure(self, maps: torch.Tensor, state: State) -> torch.Tensor:
        return centre_shift(maps, state["before"])


@dataclass(frozen=True, eq=False)
class Region(Objective):
    """Draw the map's mass into a region: its share of the absolute values, which rises.

    Args:
        mask: bool [*M] for all images, or [B, *M]; with channels="sum" without the channels.
        channels: as in `TopK`.
    """

    mask: torch.Tensor
    channels: str = "keep"
    rises = True

    def __post_init__(self) -> None:
        _check_channels(self.channels)
        if not isinstance(self.mask, torch.Tensor) or self.mask.dtype != torch.bool:
            raise TypeError(f"mask: got {getattr(self.mask, 'dtype', type(self.mask).__name__)}, expected bool")

    def prepare(self, before: torch.Tensor) -> State:
        return {"mask": _for_each("mask", self.mask, sizes(before, self.channels)).flatten(1)}

    def value(self, maps: torch.Tensor, state: State) -> torch.Tensor:
        return _share(sizes(maps, self.channels).flatten(1), state["mask"])

    def measure(self, maps: torch.Tensor, state: State) -> torch.Tensor:
        flat = sizes(maps.double(), self.channels).flatten(1)
        least, most = flat.aminmax(dim=1)
        return _share(flat, state["mask"]).where(least < most, torch.nan)


@dataclass(frozen=True, eq=False)
class TargetMap(Objective):
    """Make the map look like another (Dombrowski et al. 2019).

    Measured by the squared distance of the two, each of absolute values and of sum 1, relative to that of the image's
    own map: 1 where nothing was reached, 0 where the map is the target.

    Args:
        map: [*M] for all images, or [B, *M]; with channels="sum" without the channels.
        channels: as in `TopK`.
    """

    map: torch.Tensor
    channels: str = "keep"

    def __post_init__(self) -> None:
        _check_channels(self.channels)
        _check.float_tensor("map", self.map)
        if not bool(self.map.isfinite().all()) or not bool(self.map.abs().sum() > 0):
            raise ValueError("map: got NaN, infinite elements or zeros alone, expected a map")

    def _shares(self, maps: torch.Tensor) -> torch.Tensor:
        flat = sizes(maps, self.channels).flatten(1)
        return flat / flat.sum(dim=1, keepdim=True)

    def prepare(self, before: torch.Tensor) -> State:
        goal = _for_each("map", self.map, sizes(before, self.channels)).to(before.dtype).abs().flatten(1)
        goal = goal / goal.sum(dim=1, keepdim=True)
        return {"goal": goal, "distance": (self._shares(before) - goal).square().sum(dim=1).clamp(min=1e-30)}

    def value(self, maps: torch.Tensor, state: State) -> torch.Tensor:
        return -(self._shares(maps) - state["goal"]).square().sum(dim=1) / state["distance"]

    def measure(self, maps: torch.Tensor, state: State) -> torch.Tensor:
        return -self.value(maps, state).double()

    def unit(self, state: State) -> torch.Tensor | float:
        return state["distance"] / state["goal"].shape[1]  # the mean squared error of the two maps


@dataclass(frozen=True)
class Cosine(Objective):
    """Turn the map away from what it was: its cosine (`robattr_fast.metrics.cosine`) falls. Signs count."""

    def value(self, maps: torch.Tensor, state: State) -> torch.Tensor:
        return -cosine_similarity(maps, state["before"])

    def measure(self, maps: torch.Tensor, state: State) -> torch.Tensor:
        return cosine_similarity(maps, state["before"])


@dataclass(frozen=True)
class Distance(Objective):
    """Move the map far: its L2 distance relative to its norm (`robattr_fast.metrics.sensitivity`) rises."""

    rises = True

    def prepare(self, before: torch.Tensor) -> State:
        return {"before": before, "norm": before.double().flatten(1).norm(dim=1).clamp(min=1e-300)}

    def value(self, maps: torch.Tensor, state: State) -> torch.Tensor:
        moved = (maps - state["before"]).flatten(1).double() / state["norm"][:, None]
        return moved.square().sum(dim=1)

    def measure(self, maps: torch.Tensor, state: State) -> torch.Tensor:
        return sensitivity(state["before"], maps)


MEASURES = {
    "kendall": (kendall, False),
    "spearman": (spearman, False),
    "cosine": (cosine_similarity, False),
    "ssim": (ssim, False),
    "centre_shift": (centre_shift, True),
}
"""Metrics that can decide in place of an objective's own measure, and whether they rise as a map moves."""


@dataclass(frozen=True)
class Measured(Objective):
    """``objective`` as guide, with a metric of `MEASURES` as the measure: of the absolute values of the maps."""

    objective: Objective
    name: str
    channels: str = "keep"

    def __post_init__(self) -> None:
        if self.name not in MEASURES:
            raise ValueError(f"measure: got {self.name!r}, expected one of {', '.join(MEASURES)}")

    @property
    def rises(self) -> bool:  # type: ignore[override]
        return MEASURES[self.name][1]

    def prepare(self, before: torch.Tensor) -> State:
        return self.objective.prepare(before) | {"sizes before": sizes(before, self.channels)}

    def value(self, maps: torch.Tensor, state: State) -> torch.Tensor:
        return self.objective.value(maps, state)

    def measure(self, maps: torch.Tensor, state: State) -> torch.Tensor:
        return MEASURES[self.name][0](sizes(maps, self.channels), state["sizes before"])

    def unit(self, state: State) -> torch.Tensor | float:
        return self.objective.unit(state)


def _for_each(name: str, given: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """``given`` [*M] or [B, *M] as [B, *M], where maps is [B, *M]."""
    if given.shape not in (maps.shape, maps.shape[1:]):
        raise ValueError(
            f"{name}: got shape {tuple(given.shape)}, expected {tuple(maps.shape[1:])} or {tuple(maps.shape)}"
        )
    return given.to(maps.device).expand(maps.shape)
