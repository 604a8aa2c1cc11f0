"""`Certificate`: counts in, statements out. Everything it says follows from integer counts and its settings."""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from robattr_fast.certify import files, marginal
from robattr_fast.certify.bounds import marginal_bounds, sample_mean
from robattr_fast.certify.label import Prediction, certify_label
from robattr_fast.certify.merge import merge_settings
from robattr_fast.certify.settings import PER_IMAGE, Evaluation, Settings
from robattr_fast.errors import CertificateFileError, MergeError

METHODS = ("best", "marginal", "second-moment")

_KEEP: Any = object()

_DTYPES = {
    "samples": torch.int64,
    "counts": torch.int32,
    "sums": torch.float64,
    "invalid": torch.int32,
    "class_counts": torch.int32,
}


class Overlap(NamedTuple):
    """Certified overlap of the top-k sets."""

    share: torch.Tensor
    """float64 [B], or [R, B] for R radii: at least this share of the displayed top-k stays in the top-k."""
    method: np.ndarray
    """The method that certifies it, an array of strings of the same shape."""


class Certificate:
    """What q noisy samples per image prove about B smoothed maps of shape [*M], n elements each.

    All statements hold together with probability 1 - alpha over the noise, for every k and every radius (L2 norm, in
    the units of x). They speak of the smoothed map at every point of the ball; see docs/certificates.md.

    Attributes:
        counts: int32 [B, n, L], how often each element had each level above 0; None if `levels` is None.
        sums: float64 [B, n], sums of unrounded values, if `levels` is None; else None.
        samples: int64 [B].
        invalid: int32 [B], samples with NaN or infinite scores; they count as the map 0 and vote for no class.
        class_counts: int32 [B, classes], votes of the samples; None if they were not kept.
        settings: everything that was fixed before sampling.

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: shapes or counts that contradict each other or the settings.
    """

    def __init__(
        self,
        *,
        samples: torch.Tensor,
        settings: Settings,
        counts: torch.Tensor | None = None,
        sums: torch.Tensor | None = None,
        invalid: torch.Tensor | None = None,
        class_counts: torch.Tensor | None = None,
    ) -> None:
        if invalid is None:
            invalid = torch.zeros(len(samples), dtype=torch.int32)
        given = {"samples": samples, "counts": counts, "sums": sums, "invalid": invalid, "class_counts": class_counts}
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        _check(tensors, settings)
        self._tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        self._values = self._tensors["sums" if settings.levels is None else "counts"]
        self.settings = settings
        self.counts = self._tensors.get("counts")
        self.sums = self._tensors.get("sums")
        self.samples = self._tensors["samples"]
        self.invalid = self._tensors["invalid"]
        self.class_counts = self._tensors.get("class_counts")
        self._bounds_by_slack: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._gaps_by_k: dict[int, torch.Tensor] = {}

    @classmethod
    def from_counts(
        cls,
        counts: torch.Tensor,
        samples: torch.Tensor | int,
        *,
        sigma: float,
        shape: Sequence[int] | None = None,
        class_counts: torch.Tensor | None = None,
        invalid: torch.Tensor | None = None,
        alpha: float = 0.05,
        bound: str = "betting",
        slack: int | None = 0,
        second_moment: bool = False,
    ) -> "Certificate":
        """A certificate from counts that were made elsewhere. It cannot be merged: its sample indices are unknown.

        Args:
            counts: int32 [B, n, L]; ``counts[..., l - 1]`` samples had the value l/L, all others 0.
            samples: int64 [B], or one int for all images. For every bound but betting they must have been fixed in
                advance.
            sigma: standard deviation of the noise, in the units of x.
            shape: shape [*M] of one map; default [n].
            class_counts: int32 [B, classes].
            invalid: int32 [B], how many of the samples gave no map and counted as 0.
            alpha, bound, slack, second_moment: as in `Settings`, chosen before the counts were seen.
        """
        if not isinstance(counts, torch.Tensor) or counts.ndim != 3:
            raise ValueError(
                f"counts must be a tensor of shape [B, n, L], got {getattr(counts, 'shape', type(counts))}"
            )
        if isinstance(samples, int):
            samples = torch.full((len(counts),), samples, dtype=torch.int64)
        settings = Settings(
            sigma=sigma,
            shape=tuple(shape) if shape is not None else (counts.shape[1],),
            levels=counts.shape[2],
            alpha=alpha,
            bound=bound,
            slack=slack,
            second_moment=second_moment,
            on_nonfinite="raise" if invalid is None else "zero",
        )
        return cls(counts=counts, samples=samples, invalid=invalid, class_counts=class_counts, settings=settings)

    @classmethod
    def from_samples(
        cls, levels: torch.Tensor, *, num_levels: int, sigma: float, shape: Sequence[int] | None = None, **options: Any
    ) -> "Certificate":
        """A certificate from the maps of all samples. levels: uint8 [B, q, n], level l of the value l/num_levels.

        options: as in `from_counts`.
        """
        if not isinstance(levels, torch.Tensor) or levels.dtype != torch.uint8:
            raise TypeError(f"levels must be a uint8 tensor, got {getattr(levels, 'dtype', type(levels).__name__)}")
        if levels.ndim != 3:
            raise ValueError(f"levels must have shape [B, q, n], got {list(levels.shape)}")
        if not 1 <= num_levels <= 255:
            raise ValueError(f"num_levels must lie in 1..255, got {num_levels}")
        if levels.numel() and levels.max() > num_levels:
            raise ValueError(f"levels must not exceed num_levels={num_levels}, got {int(levels.max())}")
        each = [(levels == level).sum(1, dtype=torch.int32) for level in range(1, num_levels + 1)]
        return cls.from_counts(torch.stack(each, 2), levels.shape[1], sigma=sigma, shape=shape, **options)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | slice) -> "Certificate":
        """The certificate of one image (B = 1) or of a slice of the images."""
        images = range(len(self))[index]
        chosen = [images] if isinstance(images, int) else list(images)
        if not chosen:
            raise IndexError(f"no image in {index} of {len(self)}")
        tensors = {name: tensor[chosen] for name, tensor in self._tensors.items()}
        return Certificate(**tensors, settings=self.settings.select(chosen))

    def __repr__(self) -> str:
        used, settings = self.settings.evaluation, self.settings
        samples = sorted(set(self.samples.tolist()))
        spread = str(samples[0]) if len(samples) == 1 else f"{samples[0]}..{samples[-1]}"
        parts = [
            f"{len(self)} x {list(settings.shape)}",
            f"levels={settings.levels}",
            f"samples={spread}",
            f"sigma={settings.sigma:g}",
            f"alpha={used.alpha:g}",
            f"bound={self.evaluated_bound!r}",
            f"slack={used.slack}",
        ]
        if self.invalid.any():
            parts.append(f"invalid={self.invalid.tolist()}")
        if self.exploratory:
            parts.append("exploratory")
        return f"Certificate({', '.join(parts)})"

    @functools.cached_property
    def map(self) -> torch.Tensor:
        """The displayed map: the sample mean, float64 [B, *M] in [0, 1]."""
        return self._shaped(sample_mean(self._values, self.samples))

    @property
    def lower(self) -> torch.Tensor:
        """Lower bounds of the smoothed map, float64 [B, *M]; all bounds hold together (slack 0)."""
        return self._shaped(self._bounds(0)[0])

    @property
    def upper(self) -> torch.Tensor:
        """Upper bounds of the smoothed map, float64 [B, *M]; all bounds hold together (slack 0)."""
        return self._shaped(self._bounds(0)[1])

    @property
    def exploratory(self) -> bool:
        """True if bound, slack or alpha were chosen by `with_bounds` and differ from what was declared."""
        return self.settings.exploration is not None

    @property
    def stopped_off_plan(self) -> bool:
        """True if an image has another number of samples than was planned."""
        plan = self.settings.planned_samples
        return plan is not None and list(plan) != self.samples.tolist()

    @property
    def evaluated_bound(self) -> str:
        """The bound that is used. A bound that needs its number of samples fixed gives way to betting off plan."""
        return "betting" if self.stopped_off_plan else self.settings.evaluation.bound

    @property
    def reason(self) -> str | None:
        """Why `evaluated_bound` is not the bound asked for; None if it is."""
        asked = self.settings.evaluation.bound
        if self.evaluated_bound == asked:
            return None
        return (
            f"{asked} holds for {list(self.settings.planned_samples or ())} samples as planned, "
            f"not for {self.samples.tolist()}: evaluated by betting, which holds at any time"
        )

    def overlap(self, k: int, radius: float | Sequence[float] | torch.Tensor, method: str = "best") -> Overlap:
        """The share of the displayed top-k that provably stays in the top-k within an L2 radius.

        Args:
            k: size of the top-k set, in 1..n//2. Ties of the displayed map go to the lowest index.
            radius: one L2 radius, or R of them; in the units of x.
            method: "marginal" (T3, T4), "second-moment" (T7), or "best" of those that this certificate holds.

        Returns:
            share and method, each [B], or [R, B] for a sequence of radii.

        Raises:
            ValueError: k, radius or method out of range.
        """
        self._check_method(method)
        radii, scalar = _radii(radius)
        count = marginal.certified_count(self._gaps(k), radii, self.settings.n)
        share, won = count.double() / k, np.full(count.shape, "marginal")
        return Overlap(share[0], won[0]) if scalar else Overlap(share, won)

    def radius(self, k: int, overlap: float, method: str = "best") -> torch.Tensor:
        """The largest L2 radius at which the certified overlap is at least `overlap`, float64 [B].

        0 where it is not reached at any radius, inf where it holds at all. overlap: a share in (0, 1]; k, method as in
        `overlap`, whose inverse this is.
        """
        self._check_method(method)
        if not 0 < overlap <= 1:
            raise ValueError(f"overlap must lie in (0, 1], got {overlap}")
        gaps = self._gaps(k)
        # The least count whose share, rounded as `overlap` rounds it, is enough.
        count = math.ceil(overlap * k)
        if count / k < overlap:
            count += 1
        elif (count - 1) / k >= overlap:
            count -= 1
        return marginal.certified_radius(gaps, count, self.settings.n)

    def pixels(self, radius: float | Sequence[float] | torch.Tensor) -> torch.Tensor:
        """Elements whose smoothed value provably stays on its side of 1/2 within an L2 radius (T5).

        int8 [B, *M], or [R, B, *M] for R radii: 1 above 1/2, -1 below, 0 abstains. Raises ValueError unless levels=1.
        """
        if self.settings.levels != 1:
            raise ValueError(f"pixels are certified for 0/1 maps, levels=1; this has levels={self.settings.levels}")
        radii, scalar = _radii(radius)
        signs = marginal.certified_pixels(*self._bounds(0), radii, self.settings.sigma)
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
        return certify_label(
            self.class_counts, self.samples, ledger.label, self.settings.sigma, self._usable_bound(levels=1)
        )

    def with_bounds(self, *, bound: str = _KEEP, slack: int | None = _KEEP, alpha: float = _KEEP) -> "Certificate":
        """The same counts with another bound, slack or alpha. For exploration: see `exploratory`."""
        used = self.settings.exploration or Evaluation(self.settings.alpha, self.settings.bound, self.settings.slack)
        changes: dict[str, Any] = {"bound": bound, "slack": slack, "alpha": alpha}
        changed = dataclasses.replace(used, **{name: v for name, v in changes.items() if v is not _KEEP})
        return Certificate(**self._tensors, settings=self.settings.exploring(changed))

    def merge(self, other: "Certificate") -> "Certificate":
        """The certificate of the samples of both.

        Raises MergeError unless both speak of the same smoothed maps, from samples that no two of them share.
        """
        settings = merge_settings(self.settings, other.settings)
        if self._tensors.keys() != other._tensors.keys():
            raise MergeError(f"contents differ: {sorted(self._tensors)} and {sorted(other._tensors)}")
        merged = {}
        for name, tensor in self._tensors.items():
            if tensor.shape != other._tensors[name].shape:
                raise MergeError(f"{name} differs: {list(tensor.shape)} and {list(other._tensors[name].shape)}")
            merged[name] = tensor + other._tensors[name]
        return Certificate(**merged, settings=settings)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the certificate to a file, atomically. Raises OSError if it cannot be written."""
        files.save(path, self._tensors, self.settings.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Certificate":
        """Reads a file. Raises CertificateFileError if it is damaged or contradicts itself, OSError if missing."""
        tensors, manifest = files.load(path)
        try:
            return cls(**tensors, settings=Settings.from_json(manifest))
        except (TypeError, ValueError) as error:
            raise CertificateFileError(f"{os.fspath(path)}: {error}") from error

    def _shaped(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.view(len(self), *self.settings.shape)

    def _check_method(self, method: str) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if method == "second-moment":
            raise ValueError("this certificate holds no second moments")

    def _usable_bound(self, levels: int | None) -> str:
        """The evaluated bound, for means of samples with this many levels."""
        if self.evaluated_bound == "betting" and levels is None:
            raise ValueError(f"{self.reason}, and betting needs level counts, not the sums of levels=None")
        return self.evaluated_bound

    def _bounds(self, slack: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper bounds, float64 [B, n], at the level that leaves at most `slack` of the 2n wrong (T4)."""
        if slack not in self._bounds_by_slack:
            settings = self.settings
            self._bounds_by_slack[slack] = marginal_bounds(
                self._usable_bound(settings.levels),
                settings.ledger.marginal * (slack + 1) / (2 * settings.n),
                self._values,
                self.samples,
                unknown=self.invalid if settings.on_nonfinite == "abstain" else None,
            )
        return self._bounds_by_slack[slack]

    def _gaps(self, k: int) -> torch.Tensor:
        """Radii below which at least 1..k elements of the displayed top-k stay, float64 [B, k], best over slack."""
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k must be an int, got {type(k).__name__}")
        if not 1 <= k <= self.settings.n // 2:
            raise ValueError(f"k must lie in 1..n//2 = 1..{self.settings.n // 2}, got {k}")
        if k not in self._gaps_by_k:
            top = marginal.top_k(self.map.flatten(1), k)
            slack = self.settings.evaluation.slack
            choices = marginal.slack_candidates(k) if slack is None else (slack,)
            gaps = [marginal.sampled_gaps(*self._bounds(m), top, k, self.settings.sigma, m) for m in choices]
            self._gaps_by_k[k] = torch.stack(gaps).amax(0)
        return self._gaps_by_k[k]


def _radii(radius: float | Sequence[float] | torch.Tensor) -> tuple[torch.Tensor, bool]:
    """float64 [R], and whether it was a single number."""
    radii = torch.as_tensor(radius, dtype=torch.float64)
    if radii.ndim > 1 or not ((radii >= 0) & radii.isfinite()).all():
        raise ValueError(f"radius must be one finite number >= 0 or a sequence of them, got {radius}")
    return radii.reshape(-1), radii.ndim == 0


def _check(tensors: dict[str, torch.Tensor], settings: Settings) -> None:
    """Raises unless dtypes, shapes and counts agree with each other and with the settings."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != _DTYPES[name]:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(f"{name} must be a tensor of {_DTYPES[name]}, got {kind}")
    kept = "counts" if settings.levels is not None else "sums"
    if ("counts" in tensors, "sums" in tensors) != (kept == "counts", kept == "sums"):
        raise ValueError(
            f"levels={settings.levels} takes {kept} alone, got {sorted(tensors.keys() & {'counts', 'sums'})}"
        )
    samples, invalid, values = tensors["samples"], tensors["invalid"], tensors[kept]
    images, n = samples.numel(), settings.n
    expected = {"samples": (images,), "invalid": (images,), "counts": (images, n, settings.levels), "sums": (images, n)}
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensors[name].shape)}")
    if images == 0:
        raise ValueError("a certificate needs at least one image")
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
