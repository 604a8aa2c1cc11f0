"""`Certificate`: what it holds, how it is made, written, read and merged. `statements` has what it says."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch

from robattr_fast.certificates.certificate import files
from robattr_fast.certificates.certificate.agreement import check_moments
from robattr_fast.certificates.certificate.contents import check
from robattr_fast.certificates.certificate.merge import merge_settings
from robattr_fast.certificates.certificate.statements import Statements
from robattr_fast.certificates.moments.summary import Summary
from robattr_fast.certificates.settings import Evaluation, Settings
from robattr_fast.errors import CertificateFileError, MergeError
from robattr_fast.model import neutral_methods
from robattr_fast.ops import _check
from robattr_fast.reference._pack_levels import pack_levels
from robattr_fast.reference._select import selected

_KEEP: Any = object()


@neutral_methods
class Certificate(Statements):
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
        super().__init__(self._tensors, settings)
        self.packed = self._tensors.get("packed")

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
        if any(self.disagreements()) and self.agreement is not None:
            parts.append(f"agreement={[round(share, 3) for share in self.agreement.tolist()]}")
        return f"Certificate({', '.join(parts)})"

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a file holds besides the settings, by name."""
        return dict(self._tensors)

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
        """Reads a file. CertificateFileError if it is damaged or contradicts itself, OSError if it cannot be read."""
        tensors, manifest = files.load(path)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(files.CHECKPOINT)}
        try:
            cert = cls(**tensors, settings=Settings.from_json(manifest))
            check_moments(cert.tensors, cert.settings)
            return cert
        except (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as error:
            raise CertificateFileError(f"{os.fspath(path)}: {error}") from error
