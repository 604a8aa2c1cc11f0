"""What a certificate says: overlap, radii, distances, pixels, the label. All of it follows from counts and settings."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from robattr_fast.certificates.certificate.evaluation import Evaluated
from robattr_fast.certificates.moments.second_moment import SecondMoments
from robattr_fast.certificates.moments.summary import Moments, no_summary
from robattr_fast.certificates.settings import Settings
from robattr_fast.certificates.theorems import marginal
from robattr_fast.certificates.theorems.bounds import sample_mean
from robattr_fast.certificates.theorems.label import Prediction
from robattr_fast.metrics.overlap import set_size, top_k

METHODS = ("best", "marginal", "second-moment")


class Overlap(NamedTuple):
    """Certified overlap of the top-k sets."""

    share: torch.Tensor
    """float64 [B], or [R, B] for R radii: at least this share of the displayed top-k stays in the top-k."""
    method: np.ndarray
    """The method that certifies it, an array of strings of the same shape."""


class Statements:
    """What is proved about B smoothed maps of shape [*M], n elements each. `Certificate` documents the attributes."""

    def __init__(self, tensors: dict[str, torch.Tensor], settings: Settings) -> None:
        """tensors: checked, on the CPU, by the names of the attributes."""
        self.settings = settings
        self.counts = tensors.get("counts")
        self.sums = tensors.get("sums")
        self.samples = tensors["samples"]
        self.invalid = tensors["invalid"]
        self.class_counts = tensors.get("class_counts")
        self.gram_summary = tensors.get("gram_summary")
        self.directions = tensors.get("directions")
        self._values = tensors["sums" if settings.levels is None else "counts"]
        self._evaluated = Evaluated(settings, self._values, self.samples, self.invalid)
        self._gaps_by_k: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.samples)

    @functools.cached_property
    def map(self) -> torch.Tensor:
        """The displayed map: the sample mean, float64 [B, *M] in [0, 1]."""
        return self._shaped(sample_mean(self._values, self.samples))

    @property
    def lower(self) -> torch.Tensor:
        """Lower bounds of the smoothed map, float64 [B, *M]; all bounds hold together (slack 0)."""
        return self._shaped(self._evaluated.bounds(0)[0])

    @property
    def upper(self) -> torch.Tensor:
        """Upper bounds of the smoothed map, float64 [B, *M]; all bounds hold together (slack 0)."""
        return self._shaped(self._evaluated.bounds(0)[1])

    @property
    def exploratory(self) -> bool:
        """True if bound, slack or alpha were chosen by `with_bounds` and differ from what was declared."""
        return self.settings.exploration is not None

    @property
    def stopped_off_plan(self) -> bool:
        """True if an image has another number of samples than was planned."""
        return any(self._evaluated.off_plan)

    @property
    def evaluated_bound(self) -> str:
        """The bound that is used, joined by " + " where images differ. Off plan it is betting, see `reason`."""
        return " + ".join(dict.fromkeys(self._evaluated.names))

    @property
    def reason(self) -> str | None:
        """Why `evaluated_bound` is not the bound asked for; None if it is."""
        return self._evaluated.reason

    @property
    def has_second_moments(self) -> bool:
        """True if second moments (T7) prove something of every image: `distance` and `cosine` may be asked for."""
        return all(moments.proved is not None for moments in self._moments)

    @property
    def second_moments(self) -> list[SecondMoments | None]:
        """Per image what second moments (T7) prove; None where they prove nothing."""
        return [moments.proved for moments in self._moments]

    @property
    def clean_class(self) -> torch.Tensor | None:
        """int64 [B]: the class that the model gives to each image itself; -1: none. None where it was not recorded."""
        classes = self.settings.clean_class
        return None if classes is None else torch.tensor(classes, dtype=torch.int64)

    @property
    def clean_score(self) -> torch.Tensor | None:
        """float64 [B]: softmax probability of `clean_class`. None where it was not recorded."""
        scores = self.settings.clean_score
        return None if scores is None else torch.tensor(scores, dtype=torch.float64)

    @property
    def agreement(self) -> torch.Tensor | None:
        """float64 [B]: the share of the samples whose class is `clean_class`. None where classes are not known."""
        clean = self.clean_class
        if clean is None or self.class_counts is None:
            return None
        votes = self.class_counts.gather(1, clean.clamp_min(0)[:, None])[:, 0]
        return votes.where(clean >= 0, 0).double() / self.samples.clamp_min(1)

    def disagreements(self, names: Sequence[str] | None = None) -> list[str | None]:
        """Per image one line if most of its noisy copies get another class than the image itself; else None.

        names: of the classes.
        """
        agreement, clean = self.agreement, self.clean_class
        if agreement is None or clean is None or self.class_counts is None:
            return [None] * len(self)

        def named(number: int) -> str:
            known = names is not None and number < len(names)
            return f"class {number} ({names[number]})" if names is not None and known else f"class {number}"

        lines: list[str | None] = []
        for image, (own, share) in enumerate(zip(clean.tolist(), agreement.tolist(), strict=True)):
            votes, samples = self.class_counts[image], int(self.samples[image])
            most = int(votes.argmax())
            if not samples or int(votes[most]) == 0 or (own >= 0 and int(votes[own]) == int(votes[most])):
                lines.append(None)
                continue
            said = f"the model says {named(own)}" if own >= 0 else "the model gives the image no finite logits"
            lines.append(
                f"image {image}: {said}, most noisy copies {named(most)} ({100 * int(votes[most]) / samples:.0f} % of "
                f"them, {100 * share:.0f} % the former): what is certified is about the smoothed model; a smaller "
                "sigma brings the two together"
            )
        return lines

    def overlap(self, k: float, radius: float | Sequence[float] | torch.Tensor, method: str = "best") -> Overlap:
        """The share of the displayed top-k that provably stays in the top-k within an L2 radius.

        Args:
            k: size of the top-k set: a number of elements in 1..n//2, or a float, their share in (0, 1/2]. Ties of the
                displayed map go to the lowest index.
            radius: one L2 radius, or R of them; in the units of x.
            method: "marginal" (T3, T4), "second-moment" (T7), or "best" of those that this certificate holds.

        Returns:
            share and method, each [B], or [R, B] for a sequence of radii.

        Raises:
            ValueError: k, radius or method out of range.
        """
        k = self._checked_size(k, method)
        radii, scalar = _radii(radius)
        by_moments = method != "marginal" and any(moments.proved for moments in self._moments)
        count = self._moment_counts(k, radii) if by_moments else torch.zeros(len(radii), len(self), dtype=torch.int64)
        won = np.full(count.shape, "second-moment")
        if not by_moments or method == "best":
            marginal_count = marginal.certified_count(self._gaps(k), radii, self.settings.n)
            won = np.where(by_moments & (count > marginal_count), won, "marginal")
            count = count.maximum(marginal_count)
        share = count.double() / k
        return Overlap(share[0], won[0]) if scalar else Overlap(share, won)

    def radius(self, k: float, overlap: float, method: str = "best") -> torch.Tensor:
        """The largest L2 radius at which the certified overlap is at least `overlap`, float64 [B].

        0 where it is not reached at any radius, inf where it holds at all. overlap: a share in (0, 1]; k, method as in
        `overlap`, whose inverse this is.
        """
        k = self._checked_size(k, method)
        if not 0 < overlap <= 1:
            raise ValueError(f"overlap must lie in (0, 1], got {overlap}")
        # The least count whose share, rounded as `overlap` rounds it, is enough.
        count = math.ceil(overlap * k)
        if count / k < overlap:
            count += 1
        elif (count - 1) / k >= overlap:
            count -= 1
        found = []
        if method != "second-moment":
            found.append(marginal.certified_radius(self._gaps(k), count, self.settings.n))
        if method != "marginal":
            found.append(torch.tensor([moments.radius(k, count) for moments in self._moments], dtype=torch.float64))
        return torch.stack(found).amax(0)

    def distance(self, radius: float | Sequence[float] | torch.Tensor) -> torch.Tensor:
        """Upper bound on the L2 distance from the displayed map to the smoothed map anywhere within an L2 radius (T7).

        float64 [B], or [R, B] for R radii. Raises ValueError, with the reason, if there are no second moments.
        """
        return self._moment_values(radius, "distance")

    def cosine(self, radius: float | Sequence[float] | torch.Tensor) -> torch.Tensor:
        """Lower bound on the cosine of the displayed map and the smoothed map anywhere within an L2 radius (T7).

        float64 [B], or [R, B] for R radii; 0 where nothing is proved. Raises ValueError, with the reason, if there are
        no second moments.
        """
        return self._moment_values(radius, "cosine")

    def pixels(self, radius: float | Sequence[float] | torch.Tensor) -> torch.Tensor:
        """Elements whose smoothed value provably stays on its side of 1/2 within an L2 radius (T5).

        int8 [B, *M], or [R, B, *M] for R radii: 1 above 1/2, -1 below, 0 abstains. Raises ValueError unless levels=1.
        """
        if self.settings.levels != 1:
            raise ValueError(f"pixels are certified for 0/1 maps, levels=1; this has levels={self.settings.levels}")
        radii, scalar = _radii(radius)
        signs = marginal.certified_pixels(*self._evaluated.bounds(0), radii, self.settings.sigma)
        signs = signs.view(len(radii), len(self), *self.settings.shape)
        return signs[0] if scalar else signs

    def prediction(self) -> Prediction:
        """The certified label of each image and its L2 radius (T6).

        Raises ValueError if no votes were kept, or the whole of alpha went to the overlap.
        """
        if self.class_counts is None:
            raise ValueError("this certificate holds no class_counts, which the prediction is certified from")
        ledger = self.settings.ledger
        if ledger.label == 0:
            raise ValueError(
                "bound='hoeffding' with slack 0 and without second moments spends all of alpha on the overlap, "
                "none on the label"
            )
        return self._evaluated.prediction(self.class_counts)

    def _shaped(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.view(len(self), *self.settings.shape)

    def _checked_size(self, k: float, method: str) -> int:
        """The number of elements in the top-k set that a query is about."""
        size = set_size(k, self.settings.n, self.settings.n // 2)
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if method == "second-moment":
            self._require_moments()
        return size

    @functools.cached_property
    def _moments(self) -> list[Moments]:
        settings = self.settings
        summary = self.gram_summary if self.gram_summary is not None else no_summary(len(self))
        directions: Any = self.directions if self.directions is not None else [None] * len(self)
        return [
            Moments(
                settings,
                image,
                self._values[image],
                samples,
                summary[image],
                directions[image],
                int(self.invalid[image]),
            )
            for image, samples in enumerate(self.samples.tolist())
        ]

    def _require_moments(self) -> None:
        for image, moments in enumerate(self._moments):
            if moments.reason is not None:
                raise ValueError(f"image {image} has no second moments: {moments.reason}")

    def _moment_counts(self, k: int, radii: torch.Tensor) -> torch.Tensor:
        """Certified counts by T7, int64 [R, B]."""
        rows = [[moments.overlap(k, radius) for moments in self._moments] for radius in radii.tolist()]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(radii), len(self))

    def _moment_values(self, radius: float | Sequence[float] | torch.Tensor, name: str) -> torch.Tensor:
        self._require_moments()
        radii, scalar = _radii(radius)
        rows = [[getattr(moments.proved, name)(r) for moments in self._moments] for r in radii.tolist()]
        values = torch.tensor(rows, dtype=torch.float64)
        return values[0] if scalar else values

    def _slacks(self, k: int) -> Sequence[int]:
        slack = self.settings.evaluation.slack
        return marginal.slack_candidates(k) if slack is None else (slack,)

    def _gaps(self, k: int) -> torch.Tensor:
        """Radii below which at least 1..k elements of the displayed top-k stay, float64 [B, k], best over slack."""
        if k not in self._gaps_by_k:
            top = top_k(self.map.flatten(1), k)
            gaps = [
                marginal.sampled_gaps(*self._evaluated.bounds(m), top, k, self.settings.sigma, m)
                for m in self._slacks(k)
            ]
            self._gaps_by_k[k] = torch.stack(gaps).amax(0)
        return self._gaps_by_k[k]


def _radii(radius: float | Sequence[float] | torch.Tensor) -> tuple[torch.Tensor, bool]:
    """float64 [R], and whether it was a single number."""
    radii = torch.as_tensor(radius, dtype=torch.float64)
    if radii.ndim > 1 or not ((radii >= 0) & radii.isfinite()).all():
        raise ValueError(f"radius must be one finite number >= 0 or a sequence of them, got {radius}")
    return radii.reshape(-1), radii.ndim == 0
