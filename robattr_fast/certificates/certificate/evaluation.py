"""The marginal bounds of a certificate's images: which bound applies to which image, and at which level."""

import functools

import torch

from robattr_fast.certificates.settings import Settings
from robattr_fast.certificates.theorems.bounds import marginal_bounds
from robattr_fast.certificates.theorems.label import Prediction, certify_label


class Evaluated:
    """Bounds of B images, computed on first use and kept.

    values: int32 [B, n, L] counts or float64 [B, n] sums; samples: int64 [B]; invalid: int32 [B].
    """

    def __init__(self, settings: Settings, values: torch.Tensor, samples: torch.Tensor, invalid: torch.Tensor) -> None:
        self.settings = settings
        self._values, self._samples, self._invalid = values, samples, invalid
        self._by_slack: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @functools.cached_property
    def off_plan(self) -> tuple[bool, ...]:
        """Per image: it has another number of samples than was planned, or is a union of runs."""
        samples = self._samples.tolist()
        if self.settings.merged:
            return (True,) * len(samples)
        plan = self.settings.planned_samples or samples
        return tuple(planned != have for planned, have in zip(plan, samples, strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """Per image the bound that is used: off plan, one that needs its number of samples fixed yields to betting."""
        return tuple("betting" if off else self.settings.evaluation.bound for off in self.off_plan)

    @property
    def reason(self) -> str | None:
        """Why a bound is not the one asked for; None if all are."""
        asked = self.settings.evaluation.bound
        if all(name == asked for name in self.names):
            return None
        return (
            f"{asked} holds for {list(self.settings.planned_samples or ())} samples as planned, not for "
            f"{self._samples.tolist()}: evaluated by betting, which holds at any time. If what the run showed decided "
            "when it ended, the two bounds together err with probability up to 2 alpha"
        )

    def bounds(self, slack: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper bounds, float64 [B, n], at the level that leaves at most `slack` of the 2n wrong (T4).

        One martingale pays for every slack of betting at once. A fixed-size bound with a slack declared above 0 pays
        for two events, that one and "none is wrong", and each gets half.
        """
        if slack in self._by_slack:
            return self._by_slack[slack]
        settings = self.settings
        events = 2 if settings.evaluation.bound != "betting" and settings.evaluation.slack else 1
        delta = settings.ledger.marginal / events * (slack + 1) / (2 * settings.n)
        lower, upper = (torch.empty(self._values.shape[:2], dtype=torch.float64) for _ in range(2))
        for name, images in self._groups():
            if name == "betting" and settings.levels is None:
                raise ValueError(f"{self.reason}, and betting needs level counts, not the sums of levels=None")
            unknown = self._invalid[images] if settings.on_nonfinite == "abstain" else None
            lower[images], upper[images] = marginal_bounds(
                name, delta, self._values[images], self._samples[images], unknown=unknown
            )
        self._by_slack[slack] = lower, upper
        return lower, upper

    def prediction(self, class_counts: torch.Tensor) -> Prediction:
        """The certified labels (T6) from votes int32 [B, classes]."""
        settings = self.settings
        label = torch.empty(len(class_counts), dtype=torch.int64)
        radius = torch.empty(len(class_counts), dtype=torch.float64)
        for name, images in self._groups():
            label[images], radius[images] = certify_label(
                class_counts[images], self._samples[images], settings.ledger.label, settings.sigma, name
            )
        return Prediction(label, radius)

    def _groups(self) -> list[tuple[str, list[int]]]:
        """The images of each bound."""
        return [
            (name, [image for image, used in enumerate(self.names) if used == name])
            for name in dict.fromkeys(self.names)
        ]
