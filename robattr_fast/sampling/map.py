"""Which map of a noisy sample is smoothed, and which noise it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from robattr_fast.model import Explanation
from robattr_fast.ops import _check
from robattr_fast.sampling.arguments import check_autocast, check_explain, check_image_ids, check_images, check_target


@dataclass(frozen=True, kw_only=True)
class Map:
    """A fixed function of one noisy sample, but for the model: what is smoothed, counted and certified.

    Attributes:
        sigma: standard deviation of the noise, in the units of x.
        explain: name of the method, or a callable; see `certify`.
        target: class per image; None: the largest logit of each noisy sample.
        channel_sum: scores are summed over channels before selection.
        tau, gamma, levels: of `sparsify`; tau None: scores are not selected from.
        autocast: dtype in which the model runs under torch.autocast; None: as its surroundings have it.
    """

    sigma: float
    explain: str | Explanation = "gradient"
    target: tuple[int, ...] | None = None
    channel_sum: bool = False
    tau: float | None = None
    gamma: float | None = None
    levels: int | None = 1
    autocast: torch.dtype | None = None

    @classmethod
    def checked(
        cls,
        x: torch.Tensor,
        *,
        sigma: float,
        explain: str | Explanation = "gradient",
        target: int | Sequence[int] | torch.Tensor | None = None,
        channel_sum: bool = False,
        tau: float | None = None,
        gamma: float | None = None,
        levels: int | None = 1,
        autocast: torch.dtype | str | None = None,
    ) -> Map:
        """Of arguments as a user gives them, for images x [B, *S]. TypeError or ValueError names what is wrong."""
        check_images(x)
        sigma = _check.positive("sigma", sigma)
        if tau is not None:
            tau, gamma = _check.fractions(tau, gamma)
        if levels is not None:
            levels = _check.integer("levels", levels, 1, 15)
        check_explain(explain, channel_sum, x)
        classes = check_target(target, x)
        return cls(
            sigma=sigma,
            explain=explain,
            target=None if classes is None else tuple(classes.tolist()),
            channel_sum=channel_sum,
            tau=tau,
            gamma=gamma,
            levels=levels,
            autocast=check_autocast(autocast, x),
        )

    def shape(self, x: torch.Tensor) -> tuple[int, ...]:
        """Of the map of one image of x [B, *S]."""
        return tuple(x.shape[2:] if self.channel_sum else x.shape[1:])


class Stream(NamedTuple):
    """The part of the noise stream that the images have."""

    seed: int
    image_ids: tuple[int, ...]

    @classmethod
    def checked(cls, x: torch.Tensor, seed: int, image_ids: torch.Tensor | Sequence[int] | None) -> Stream:
        """Of arguments as a user gives them, for images x [B, *S]; image_ids None: 0, 1, ..."""
        _check.seed(seed)
        return cls(int(seed), tuple(check_image_ids(image_ids, x).tolist()))
