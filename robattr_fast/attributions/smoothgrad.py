"""SmoothGrad (Smilkov et al. 2017) and its relatives: one map per image from q noisy gradients, nothing of size q kept.

Hooker et al. 2019 (squared), Adebayo et al. 2018 (vargrad), Levine et al. 2019 (scaled, sparsified).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from robattr_fast.attributions.differentiable import Recomputation
from robattr_fast.errors import NonFiniteError
from robattr_fast.model import neutral
from robattr_fast.ops import _check
from robattr_fast.ops.soft_topk import soft_topk
from robattr_fast.ops.sparsify import sparsify
from robattr_fast.reference._select import selected
from robattr_fast.sampling.arguments import check_images
from robattr_fast.sampling.batch import Scored, next_batch
from robattr_fast.sampling.map import Map, Stream
from robattr_fast.sampling.sampler import SamplingProgress, prepared

_REPORT_SECONDS = 0.5

RowMap = Callable[[torch.Tensor], torch.Tensor]
"""Gradients [N, *S] to maps [N, *S], each row by itself."""


class _Mean:
    """Running float64 sum of f(gradient) over samples."""

    def __init__(self, f: RowMap, like: torch.Tensor) -> None:
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


def _check_finite(scored: Scored) -> None:
    finite = torch.isfinite(scored.scores).flatten(1).all(dim=1)
    if not bool(finite.all()):
        segment = scored.segment
        sample = segment.first_sample + int((~finite).to(torch.int8).argmax())
        raise NonFiniteError(f"model: sample {sample} of image {segment.image} has a NaN or infinite gradient")


KINDS = ("plain", "absolute", "squared", "vargrad", "scaled", "sparsified", "soft_topk")


def _row_map(
    kind: str, n: int, tau: float, gamma: float | None, levels: int | None, temperature: float | None
) -> RowMap:
    """What `smoothgrad` averages (vargrad: of what it takes the variance); n is the number of elements of a row."""
    if kind == "soft_topk":
        if temperature is None:
            raise ValueError("temperature: got None, takes a number > 0 for kind='soft_topk'")
        width = _check.temperature(temperature)
        k = selected(tau, n)
        if k >= n:
            raise ValueError(
                f"tau: got {tau}, takes for kind='soft_topk' less than all of the {n} elements of an image"
            )
        return lambda g: soft_topk(g.abs().flatten(1), k, width).view_as(g)
    if temperature is not None:
        raise ValueError(f"temperature: got {temperature}, takes None for kind={kind!r}")
    maps: dict[str, RowMap] = {
        "plain": lambda g: g,
        "absolute": torch.abs,
        "squared": lambda g: g.double() ** 2,
        "vargrad": lambda g: g,
        "scaled": _min_max,
        "sparsified": lambda g: sparsify(g.abs().flatten(1), tau, gamma, levels=levels).view_as(g),
    }
    return maps[kind]


def _check_differentiable(kind: str, levels: int | None) -> None:
    if kind == "sparsified" and levels is not None:
        raise ValueError(f"levels: got {levels}, takes None with differentiable=True: a rounded map has no gradient")


class _Reporter:
    """Tells ``progress`` how far an image is, twice a second and at its end."""

    def __init__(self, progress: bool | Callable[[SamplingProgress], None], images: int, samples: int) -> None:
        self._tell = _print_progress if progress is True else progress or None
        self._images, self._samples = images, samples
        self._last = time.monotonic()

    def report(self, image: int, done: int) -> None:
        now = time.monotonic()
        if self._tell is not None and (done == self._samples or now - self._last >= _REPORT_SECONDS):
            self._last = now
            self._tell(SamplingProgress(image, self._images, done, self._samples))


def _print_progress(event: SamplingProgress) -> None:
    line = f"image {event.image + 1}/{event.images}: {event.samples}/{event.total} samples"
    print(line, file=sys.stderr, flush=True)


@neutral()
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
    temperature: float | None = None,
    seed: int = 0,
    first_sample: int = 0,
    image_ids: torch.Tensor | Sequence[int] | None = None,
    batch_size: int | str = "auto",
    differentiable: bool = False,
    progress: bool | Callable[[SamplingProgress], None] = False,
) -> torch.Tensor:
    """A saliency map per image: the mean of a function of the input gradient over noisy copies of the image.

    Args:
        model: eval-mode module that returns logits [N, classes]; it is explained on a private copy.
        x: [B, *S] float images.
        kind: "plain" (mean of g), "absolute" (|g|), "squared" (g^2), "vargrad" (population variance of g), "scaled"
            (|g| min-max normalised per sample), "sparsified" (`sparsify` of |g|) or "soft_topk" (`soft_topk` of |g|).
        sigma: standard deviation of the noise, in the units of x.
        samples: number q of noisy copies per image.
        target: class or classes [B] to explain; None: the largest logit of each noisy copy.
        tau, gamma, levels: see `sparsify`; used by kind="sparsified" only, but for kind="soft_topk" tau gives k.
        temperature: of kind="soft_topk", in the units of |g|; None for every other.
        seed, first_sample, image_ids: see `noisy_samples`.
        batch_size: rows per forward pass, or "auto" for a short measured trial.
        differentiable: give the map a graph to x and to the parameters of the model that require gradients, for one
            backward pass. Every kind, "sparsified" with levels=None. The value is that of differentiable=False to the
            bit. The backward pass draws every batch again, so that memory does not grow with q; it costs about three
            times the time of the forward pass. Gradients hold the class of target=None constant, and the support as
            `sparsify` does.
        progress: True prints lines to stderr, a callable is told (`SamplingProgress`), about twice a second; of the
            forward pass only.

    A model in training mode is refused, differentiable or not: active dropout and statistics of the batch make the map
    a random function. A training loop calls model.eval() before and model.train() after; the map keeps eval mode, as
    the private copy does, in its backward pass.

    Returns:
        [B, *S] in x's dtype (float32 for half types), detached unless differentiable.

    Raises:
        TypeError, ValueError: a bad argument. ModelError: a model that cannot be explained, or, if differentiable, that
        holds an operator without a second derivative; found before any sample is drawn. NonFiniteError: a NaN or
        infinite gradient.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, takes one of {', '.join(KINDS)}")
    check_images(x)
    samples = _check.integer("samples", samples, 1, 2**32 - 1)
    first_sample = _check.integer("first_sample", first_sample, 0, 2**32 - samples)
    tau, gamma = _check.fractions(tau, gamma)
    if differentiable:
        _check_differentiable(kind, levels)
    row_map = _row_map(kind, x[0].numel(), tau, gamma, levels, temperature)
    accumulator = _Variance(x) if kind == "vargrad" else _Mean(row_map, x)
    map = Map.checked(x, sigma=sigma, target=target)
    sampler = prepared(model, x, map, Stream.checked(x, seed, image_ids))
    derived = torch.square if kind == "vargrad" else row_map
    recomputation = Recomputation(model, sampler, derived, x) if differentiable else None
    if recomputation is not None:
        recomputation.check(first_sample)
    sampler.set_batch_size(batch_size, samples * x.shape[0])
    reporter = _Reporter(progress, x.shape[0], samples)
    done, wanted = [0] * x.shape[0], [samples] * x.shape[0]
    while segments := next_batch(done, wanted, first_sample, sampler.batch_size):
        for scored in sampler.run(segments):
            image = scored.segment.image
            _check_finite(scored)
            accumulator.add(image, scored.scores)
            done[image] += scored.segment.count
            reporter.report(image, done[image])
    value = accumulator.result(samples).to(torch.promote_types(x.dtype, torch.float32))
    if recomputation is None:
        return value
    # A variance is the mean of (g - m)^2 with m as a constant: around the mean it does not change with m.
    centre = accumulator.mean if isinstance(accumulator, _Variance) else None
    return recomputation.attach(value, first_sample, samples, centre)
