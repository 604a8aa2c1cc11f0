"""`Certificate`: counts in, statements out. Everything it says follows from integer counts and its settings."""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from robattr_fast.certificates.certificate import files
from robattr_fast.certificates.certificate.contents import check
from robattr_fast.certificates.certificate.evaluation import Evaluated
from robattr_fast.certificates.certificate.merge import merge_settings
from robattr_fast.certificates.moments.second_moment import SecondMoments
from robattr_fast.certificates.moments.summary import Moments, Summary, no_summary
from robattr_fast.certificates.settings import Evaluation, Settings
from robattr_fast.certificates.theorems import marginal
from robattr_fast.certificates.theorems.bounds import sample_mean
from robattr_fast.certificates.theorems.label import Prediction
from robattr_fast.errors import CertificateFileError, MergeError
from robattr_fast.metrics.overlap import top_k
from robattr_fast.ops import _check
from robattr_fast.reference._pack_levels import pack_levels
from robattr_fast.reference._select import selected

METHODS = ("best", "marginal", "second-moment")

_KEEP: Any = object()


class Overlap(NamedTuple):
    """Certified overlap of the top-k sets."""

    share: torch.Tensor
    """float64 [B], or [R, B] for R radii: at least this share of the displayed top-k stays in the top-k."""
    method: np.ndarray
    """The method that certifies it, an array of strings of the same shape."""


class Certificate:
    """What q noisy samples per image prove about B smoothed maps of shape [*M], n elements each.

    All statements about one image hold together with probability 1 - alpha over the noise, for every k and every
    radius (L2 norm, in the units of x); for N images together, take alpha / N. They speak of the smoothed map at every
    point of the ball; see docs/certificates.md.

    Attributes:
        counts: int32 [B, n, L], how often each element had each level above 0; None if `levels` is None.
        sums: float64 [B, n], sums of unrounded values, if `levels` is None; else None.
        samples: int64 [B].
        invalid: int32 [B], samples with NaN or infinite scores; they count as the map 0 and vote for no class.
        class_counts: int32 [B, classes], votes of the samples; None if they were not kept.
        gram_summary: float64 [B, 16], what T7 needs of the retained samples (`moments`); None without second moments.
        directions: int8 [B, 2, n], the directions of the map that vary most, from the first of these samples
            (`deflation`); None without second moments.
        packed: uint8 [B, m, row_bytes], the packed levels of the retained samples (`keep_samples=True`; rows that an
            image has no sample for are zero); else None.
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
        gram_summary: torch.Tensor | None = None,
        directions: torch.Tensor | None = None,
        packed: torch.Tensor | None = None,
    ) -> None:
        if invalid is None:
            invalid = torch.zeros(len(samples), dtype=torch.int32)
        given = {
            "samples": samples,
            "counts": counts,
            "sums": sums,
            "invalid": invalid,
            "class_counts": class_counts,
            "gram_summary": gram_summary,
            "directions": directions,
            "packed": packed,
        }
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        check(tensors, settings)
        self._tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        self._values = self._tensors["sums" if settings.levels is None else "counts"]
        self.settings = settings
        self.counts = self._tensors.get("counts")
        self.sums = self._tensors.get("sums")
        self.samples = self._tensors["samples"]
        self.invalid = self._tensors["invalid"]
        self.class_counts = self._tensors.get("class_counts")
        self.gram_summary = self._tensors.get("gram_summary")
        self.directions = self._tensors.get("directions")
        self.packed = self._tensors.get("packed")
        self._evaluated = Evaluated(settings, self._values, self.samples, self.invalid)
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
            alpha, bound, slack: as in `Settings`, chosen before the counts were seen.
            second_moment: must be False.
        """
        if not isinstance(counts, torch.Tensor) or counts.ndim != 3:
            raise ValueError(
                f"counts must be a tensor of shape [B, n, L], got {getattr(counts, 'shape', type(counts))}"
            )
        if second_moment:
            raise ValueError(
                "second_moment: got True, but counts do not tell how elements move together; from_samples does"
            )
        if not isinstance(samples, torch.Tensor):
            samples = torch.full((len(counts),), _check.integer("samples", samples, 0, 2**31 - 1), dtype=torch.int64)
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
        cls,
        levels: torch.Tensor,
        *,
        num_levels: int,
        sigma: float,
        tau: float | None = None,
        second_moment: bool = True,
        retain: int = 2048,
        **options: Any,
    ) -> "Certificate":
        """A certificate from the maps of all samples: counts and second moments alike. It cannot be merged.

        Args:
            levels: uint8 [B, q, n], level l of the value l/num_levels; q was fixed in advance.
            tau: at most max(1, floor(tau n + 1e-9)) elements of a sample are not 0, fixed before the samples were seen.
                None: any number may be; second moments then prove less.
            second_moment, retain: as in `certify`; second moments take num_levels of at most 15, else pass False.
            num_levels, sigma, options: as in `from_counts`.

        Raises:
            TypeError, ValueError: an argument outside of what is named above, or a sample that contradicts ``tau``.
        """
        if not isinstance(levels, torch.Tensor) or levels.dtype != torch.uint8:
            raise TypeError(f"levels must be a uint8 tensor, got {getattr(levels, 'dtype', type(levels).__name__)}")
        if levels.ndim != 3:
            raise ValueError(f"levels must have shape [B, q, n], got {list(levels.shape)}")
        if not 1 <= num_levels <= 255:
            raise ValueError(f"num_levels must lie in 1..255, got {num_levels}")
        if second_moment and num_levels > 15:
            raise ValueError(f"second_moment: got True, which takes num_levels in 1..15, got {num_levels}")
        if second_moment and not 4 <= retain <= 8192:
            raise ValueError(f"retain must lie in 4..8192, got {retain}")
        if levels.numel() and levels.max() > num_levels:
            raise ValueError(f"levels must not exceed num_levels={num_levels}, got {int(levels.max())}")
        samples, n = levels.shape[1:]
        if tau is not None and levels.numel() and (most := int((levels > 0).sum(2).max())) > selected(tau, n):
            raise ValueError(f"levels: a sample selects {most} elements, tau={tau} allows {selected(tau, n)} of {n}")
        each = [(levels == level).sum(1, dtype=torch.int32) for level in range(1, num_levels + 1)]
        counted = cls.from_counts(torch.stack(each, 2), samples, sigma=sigma, **options)
        settings = dataclasses.replace(
            counted.settings, tau=tau, second_moment=second_moment, retain=retain if second_moment else 0
        )
        if not second_moment:
            return cls(**counted.tensors, settings=settings)
        found = [
            Summary.of_rows(pack_levels(rows, num_levels), samples, retain, num_levels, n, 0).to_tensors()
            for rows in levels.cpu()
        ]
        return cls(
            **counted.tensors,
            gram_summary=torch.stack([row for row, _ in found]),
            directions=torch.stack([directions for _, directions in found]),
            settings=settings,
        )

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
            *([] if settings.autocast is None else [f"autocast={settings.autocast!r}"]),
        ]
        if self.invalid.any():
            parts.append(f"invalid={self.invalid.tolist()}")
        if self.exploratory:
            parts.append("exploratory")
        return f"Certificate({', '.join(parts)})"

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a file holds besides the settings, by name."""
        return dict(self._tensors)

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
        self._check_query(k, method)
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

    def radius(self, k: int, overlap: float, method: str = "best") -> torch.Tensor:
        """The largest L2 radius at which the certified overlap is at least `overlap`, float64 [B].

        0 where it is not reached at any radius, inf where it holds at all. overlap: a share in (0, 1]; k, method as in
        `overlap`, whose inverse this is.
        """
        self._check_query(k, method)
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

    def with_bounds(
        self,
        *,
        bound: str = _KEEP,
        slack: int | None = _KEEP,
        alpha: float = _KEEP,
        second_moment: bool = _KEEP,
    ) -> "Certificate":
        """The same counts with another bound, slack, alpha, or use of alpha. For exploration: see `exploratory`."""
        settings = self.settings
        used = settings.exploration or Evaluation(
            settings.alpha, settings.bound, settings.slack, settings.second_moment
        )
        changes: dict[str, Any] = {"bound": bound, "slack": slack, "alpha": alpha, "second_moment": second_moment}
        changed = dataclasses.replace(used, **{name: v for name, v in changes.items() if v is not _KEEP})
        return Certificate(**self._tensors, settings=self.settings.exploring(changed))

    def merge(self, other: "Certificate") -> "Certificate":
        """The certificate of the samples of both.

        Raises MergeError unless both speak of the same smoothed maps, from samples that no two of them share.
        """
        settings = merge_settings(self.settings, other.settings)
        # Second moments are planned for one run; the union is evaluated by its counts.
        ours, theirs = (cert._tensors.keys() - {"gram_summary", "directions", "packed"} for cert in (self, other))
        if ours != theirs:
            raise MergeError(f"contents differ: {sorted(ours)} and {sorted(theirs)}")
        merged = {}
        for name in ours:
            tensor = self._tensors[name]
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
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(files.CHECKPOINT)}
        try:
            return cls(**tensors, settings=Settings.from_json(manifest))
        except (TypeError, ValueError) as error:
            raise CertificateFileError(f"{os.fspath(path)}: {error}") from error

    def _shaped(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.view(len(self), *self.settings.shape)

    def _check_query(self, k: int, method: str) -> None:
        _check.integer("k", k, 1, self.settings.n // 2)
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if method == "second-moment":
            self._require_moments()

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
