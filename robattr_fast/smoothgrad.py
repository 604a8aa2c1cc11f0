"""SmoothGrad (Smilkov et al. 2017) and its relatives: one map per image from q noisy gradients, nothing of size q kept.

Hooker et al. 2019 (squared), Adebayo et al. 2018 (vargrad), Levine et al. 2019 (scaled, sparsified).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from robattr_fast import model as _model
from robattr_fast.errors import NonFiniteError
from robattr_fast.ops import _check
from robattr_fast.ops.sparsify import sparsify
from robattr_fast.sampling import Sampler, Scored, check_image_ids, check_images, check_target, next_batch


class _Mean:
    """Running float64 sum of f(gradient) over samples."""

    def __init__(self, f: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor) -> None:
        self.f = f
        self.sum = torch.zeros(like.shape, dtype=torch.float64, device=like.device)

    def add(self, image: int, gradient: torch.Tensor) -> None:
        self.sum[image] += self.f(gradient).sum(dim=0, dtype=torch.float64)

    def result(self, samples: int) -> torch.Tensor:
        return self.sum / samples


class _Variance:
    """Welford's running variance, batch by batch (Chan et al. 1983): no cancellation of large squares."""

    def __init__(self, like: torch.Tensor) -> None:
        self.mean = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
        self.m2 = torch.zeros_like(self.mean)
        self.count = [0] * like.shape[0]

    def add(self, image: int, gradient: torch.Tensor) -> None:
        g = gradient.double()
        mean, m2 = g.mean(dim=0), g.var(dim=0, correction=0) * g.shape[0]
        before, now = self.count[image], g.shape[0]
        delta = mean - self.mean[image]
        self.mean[image] += delta * (now / (before + now))
        self.m2[image] += m2 + delta**2 * (before * now / (before + now))
        self.count[image] += now

    def result(self, samples: int) -> torch.Tensor:
        return self.m2 / samples


def _min_max(gradient: torch.Tensor) -> torch.Tensor:
    """|g| of each sample mapped to [0, 1]; a constant |g| gives 0."""
    size = gradient.abs().flatten(1)
    low, high = size.amin(dim=1, keepdim=True), size.amax(dim=1, keepdim=True)
    span = high - low
    return ((size - low) / torch.where(span > 0, span, torch.ones_like(span))).view_as(gradient)


def _sparsifier(tau: float, gamma: float | None, levels: int | None) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda gradient: sparsify(gradient.abs().flatten(1), tau, gamma, levels=levels).view_as(gradient)


def _check_finite(scored: Scored) -> None:
    finite = torch.isfinite(scored.scores).flatten(1).all(dim=1)
    if not bool(finite.all()):
        segment = scored.segment
        sample = segment.first_sample + int((~finite).to(torch.int8).argmax())
        raise NonFiniteError(f"model: sample {sample} of image {segment.image} has a NaN or infinite gradient")


KINDS = ("plain", "absolute", "squared", "vargrad", "scaled", "sparsified")


def _accumulator(kind: str, x: torch.Tensor, tau: float, gamma: float | None, levels: int | None) -> _Mean | _Variance:
    if kind == "vargrad":
        return _Variance(x)
    f: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "plain": lambda g: g,
        "absolute": torch.abs,
        "squared": lambda g: g.double() ** 2,
        "scaled": _min_max,
        "sparsified": _sparsifier(tau, gamma, levels),
    }
    return _Mean(f[kind], x)


def smoothgrad(
    model: nn.Module,
    x: torch.Tensor,
    *,
    kind: str = "plain",
    sigma: float,
    samples: int,
    target: int | Sequence[int] | torch.Tensor | None = None,
    tau: float = 0.1,
    gamma: float | None = None,
    levels: int | None = 1,
    seed: int = 0,
    first_sample: int = 0,
    image_ids: torch.Tensor | Sequence[int] | None = None,
    batch_size: int | str = "auto",
) -> torch.Tensor:
    """A saliency map per image: the mean of a function of the input gradient over noisy copies of the image.

    Args:
        model: eval-mode module that returns logits [N, classes]; it is explained on a private copy.
        x: [B, *S] float images.
        kind: "plain" (mean of g), "absolute" (|g|), "squared" (g^2), "vargrad" (population variance of g), "scaled"
            (|g| min-max normalised per sample) or "sparsified" (`sparsify` of |g|).
        sigma: standard deviation of the noise, in the units of x.
        samples: number q of noisy copies per image.
        target: class or classes [B] to explain; None: the largest logit of each noisy copy.
        tau, gamma, levels: see `sparsify`; used by kind="sparsified" only.
        seed, first_sample, image_ids: see `noisy_samples`.
        batch_size: rows per forward pass, or "auto" for a short measured trial.

    Returns:
        [B, *S] in x's dtype (float32 for half types), detached.

    Raises:
        TypeError, ValueError: a bad argument. ModelError: a model that cannot be explained. NonFiniteError: a NaN
        or infinite gradient.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, takes one of {', '.join(KINDS)}")
    check_images(x)
    sigma = _check.positive("sigma", sigma)
    _check.integer("samples", samples, 1, 2**32 - 1)
    _check.integer("first_sample", first_sample, 0, 2**32 - samples)
    tau, gamma = _check.fractions(tau, gamma)
    sampler = Sampler(
        _model.private_copy(model),
        x,
        sigma=sigma,
        target=check_target(target, x),
        explain="gradient",
        seed=seed,
        image_ids=check_image_ids(image_ids, x),
    )
    sampler.prepare()
    sampler.set_batch_size(batch_size, samples)
    accumulator = _accumulator(kind, x, tau, gamma, levels)
    done, wanted = [0] * x.shape[0], [samples] * x.shape[0]
    while segments := next_batch(done, wanted, first_sample, sampler.batch_size):
        for scored in sampler.run(segments):
            _check_finite(scored)
            accumulator.add(scored.segment.image, scored.scores)
            done[scored.segment.image] += scored.segment.count
    return accumulator.result(samples).to(torch.promote_types(x.dtype, torch.float32))
