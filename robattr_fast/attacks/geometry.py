"""The set an adversary may choose from: a ball around each image, cut by a box; and where in it to begin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch

from robattr_fast.model import input_hash
from robattr_fast.ops.noisy_samples import noisy_samples

NORMS = ("l2", "linf")
STARTS = ("sphere", "ball", "zero", "curved")
_ROUNDING = 5e-7  # of a norm

Bound: TypeAlias = "float | torch.Tensor"


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """Of everything that is computed about x: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def scaled(rows: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """rows [N, *S] times factors [N]."""
    return rows * factors.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))


@dataclass(frozen=True)
class Ball:
    """Points within ``radius`` of an image, in ``norm``, and inside ``bounds`` (low, high); None: no box.

    radius may be infinite: then the box alone bounds the perturbation.
    """

    norm: str
    radius: float
    bounds: tuple[Bound, Bound] | None

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm: got {self.norm!r}, expected one of {', '.join(NORMS)}")
        if not isinstance(self.radius, int | float) or isinstance(self.radius, bool) or not self.radius >= 0:
            raise ValueError(f"eps: got {self.radius!r}, expected a number >= 0, in the units of the images")
        if self.bounds is not None and len(self.bounds) != 2:
            raise ValueError(f"bounds: got {self.bounds!r}, expected (low, high) or None")

    def check(self, x: torch.Tensor) -> None:
        """ValueError, with the value, if an image lies outside of the box."""
        if self.bounds is None:
            return
        low, high = (torch.as_tensor(bound, device=x.device) for bound in self.bounds)
        outside = (x < low) | (x > high)
        if bool(outside.any()):
            image = int(outside.flatten(1).any(dim=1).to(torch.int8).argmax())
            value = float(x[image][outside[image]].flatten()[0])
            raise ValueError(f"images: image {image} has the value {value:g}, expected values in bounds={self.bounds}")

    def sizes(self, delta: torch.Tensor) -> torch.Tensor:
        """Norms of perturbations [N, *S], float64 [N]."""
        order = 2 if self.norm == "l2" else math.inf
        return torch.linalg.vector_norm(delta.flatten(1), order, dim=1, dtype=torch.float64)

    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        """The direction of norm 1 along which gradients [N, *S] rise fastest; zero for zeros."""
        if self.norm == "linf":
            return gradient.sign()
        # Scaled first: squares of small gradients vanish.
        largest = gradient.flatten(1).abs().amax(dim=1)
        gradient = scaled(gradient, torch.where(largest > 0, 1 / largest, 0).nan_to_num(posinf=0.0))
        return scaled(gradient, 1 / self.sizes(gradient).clamp(min=1e-12))

    def project(self, delta: torch.Tensor) -> torch.Tensor:
        """The nearest perturbations [N, *S] of norm at most the radius."""
        if math.isinf(self.radius):
            return delta
        if self.norm == "linf":
            return delta.clamp(-self.radius, self.radius)
        sizes = self.sizes(delta)
        return scaled(delta, torch.where(sizes > self.radius, self.radius / sizes, 1.0))

    def point(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """x + projected delta [N, *S] in x's dtype, of norm at most radius (1 + 1e-6), inside the box.

        First the ball, then the box: what the box cuts only comes nearer to x. Sums are rounded, by much in half types:
        where that makes a perturbation too long, its elements that grew are moved back by one spacing.
        """
        origin, delta = x.to(delta.dtype), self.project(delta)
        point = origin + delta
        if self.bounds is not None:
            point = point.clamp(*self.bounds)  # type: ignore[arg-type]
        rounded = point.to(x.dtype).to(delta.dtype)
        long = self.sizes(rounded - origin) > self.radius * (1 + _ROUNDING)
        if x.dtype == delta.dtype and not bool(long.any()):
            return rounded
        length = torch.minimum((point - origin).abs(), delta.abs())
        past = (rounded - origin).abs() > length
        spacing = torch.finfo(x.dtype).eps * rounded.abs()
        back = (rounded - spacing.copysign(delta)).to(x.dtype).to(delta.dtype)
        beyond = ((back - origin) * delta < 0) | ((back - origin).abs() > length)
        shorter = torch.where(past, torch.where(beyond, origin, back), rounded)
        if x.dtype == delta.dtype:
            shorter = torch.where(long.view(-1, *[1] * (x.dim() - 1)), shorter, rounded)
        return shorter.to(x.dtype)

    def start(self, kind: str, normals: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Perturbations [N, *shape] at random, from ``normals`` [N, n + 2].

        "sphere": of norm ``radius``, in every direction alike (linf: a corner of the cube). "ball": uniform in the
        ball: n coordinates of a point on the sphere in n + 2 dimensions are.
        """
        inner = normals[:, :-2]
        if self.norm == "linf":
            unit = inner.sign() if kind == "sphere" else torch.erf(inner / math.sqrt(2))
        else:
            unit = scaled(inner, 1 / self.sizes(inner if kind == "sphere" else normals))
        return (self.radius * unit).view(len(normals), *shape)


def normals_of(x: torch.Tensor, ids: torch.Tensor, index: torch.Tensor, seed: int, extra: int = 0) -> torch.Tensor:
    """Standard normals [N, n + extra] of rows x [N, *S], by image id [N], index [N] and seed alone."""
    zeros = torch.zeros(len(x), x[0].numel() + extra, dtype=working_dtype(x), device=x.device)
    return noisy_samples(zeros, 1.0, 1, seed=seed, image_ids=ids, sample_offset=index.to(x.device))[:, 0]


def check_start(start: object) -> None:
    if not (isinstance(start, torch.Tensor) or start in STARTS):
        raise ValueError(f"start: got {start!r}, expected one of {', '.join(STARTS)}, or images [B, *S]")


def default_step(eps: float, steps: int) -> float:
    """2.5 eps / steps (Madry et al. 2018): enough to cross the ball and come back."""
    step = 2.5 * eps / max(steps, 1)
    if step == float("inf"):
        raise ValueError("step_size: got None, expected a number where eps is inf")
    return step


def image_ids(x: torch.Tensor) -> torch.Tensor:
    """Of images [B, *S] in the noise stream, int64 [B]: by what they show, wherever they stand."""
    return torch.tensor([int(input_hash(image)[:8], 16) for image in x], device=x.device)
