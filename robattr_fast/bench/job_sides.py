"""Sides and gates of whole jobs: from an image and a model to counts and what they certify.

This file is run beside any commit of the package: it takes public names where the jobs are those of `certify`.
"""

from __future__ import annotations

import importlib
import signal
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

import robattr_fast as rf

Spec = dict[str, Any]
Side = Callable[[], dict[str, Any]]

SIGMA, TAU, ALPHA = 0.2, 0.1, 0.05


def _module(*names: str) -> ModuleType:
    """The first of these modules of the package that the commit measured has: newest name first."""
    for name in names[:-1]:
        try:
            return importlib.import_module(f"robattr_fast.{name}")
        except ModuleNotFoundError:
            continue
    return importlib.import_module(f"robattr_fast.{names[-1]}")


def _small_cnn() -> nn.Module:
    """For 28x28 images of one channel; weights by a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 7 * 7, 10)).eval()


def _pooled() -> nn.Module:
    """For 224x224 images of three channels: next to no work, so that many samples take little time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(588, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


def _perceptron(width: int) -> nn.Module:
    """For 28x28 images of one channel; weights by a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10)).eval()


def _resnet50() -> nn.Module:
    """For 224x224 images of three channels; of torchvision, weights by a fixed seed."""
    from torchvision.models import resnet50

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return resnet50().eval()


_MADE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet50": (_resnet50, (3, 224, 224)),
    "small-cnn": (_small_cnn, (1, 28, 28)),
    "perceptron": (partial(_perceptron, 256), (1, 28, 28)),
    "narrow-perceptron": (partial(_perceptron, 32), (1, 28, 28)),
    "pooled": (_pooled, (3, 224, 224)),
}


def model_and_image(spec: Spec) -> tuple[nn.Module, torch.Tensor]:
    """Of a job: ``model`` is a name of _MADE, with a random image, or of `models.load`, with the photograph ``image``.

    Image: [1, C, H, W]. Both of ``dtype`` (float32) and on ``device`` (a CPU).
    """
    device, dtype = torch.device(spec.get("device", "cpu")), getattr(torch, spec.get("dtype", "float32"))
    if spec["model"] in _MADE:
        make, shape = _MADE[spec["model"]]
        x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1))
        return make().to(device, dtype), x.to(device, dtype)
    images, specs = _module("inputs.images", "images"), _module("inputs.specs", "models")
    loaded = specs.load(spec["model"])
    x = images.read(images.find([spec["image"]])[0].path, loaded.preprocess)[None]
    return loaded.module.to(device, dtype), x.to(device, dtype)


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def published_batch(model: nn.Module, x: torch.Tensor, rows: int, k_tau: int, sums: torch.Tensor) -> None:
    """One batch as the published code takes it: randn and add, autograd.grad, topk, where and sum."""
    z = (x + torch.randn(rows, *x.shape[1:], device=x.device) * SIGMA).requires_grad_()
    logits = model(z)
    (gradient,) = torch.autograd.grad(logits.max(dim=1).values.sum(), z)
    scores = gradient.abs().flatten(1)
    threshold = scores.topk(k_tau).values[:, -1:]
    sums += torch.where(scores >= threshold, 1.0, 0.0).sum(0)


def _published(spec: Spec) -> Side:
    """The published loop, eager. spec: model, image, samples per round, batch sizes of which the fastest is taken."""
    model, x = model_and_image(spec)
    n = x.numel()
    k_tau, sums = int(TAU * n), torch.zeros(n, device=x.device)

    def rate(rows: int) -> float:
        start = time.perf_counter()
        published_batch(model, x, rows, k_tau, sums)
        _wait(x)
        return (time.perf_counter() - start) / rows

    for rows in spec["batch_sizes"]:
        rate(rows)  # first touch
    best = min(spec["batch_sizes"], key=lambda rows: min(rate(rows), rate(rows)) if len(spec["batch_sizes"]) > 1 else 0)

    def round() -> dict[str, Any]:
        batches = max(1, spec["samples"] // best)
        start = time.perf_counter()
        for _ in range(batches):
            published_batch(model, x, best, k_tau, sums)
        _wait(x)
        return {"seconds": time.perf_counter() - start, "units": batches * best, "batch_size": best}

    return round


def _captum(spec: Spec) -> Side:
    """NoiseTunnel(Saliency) of Captum: the mean gradient, without selection or certificate."""
    from captum.attr import NoiseTunnel, Saliency

    model, x = model_and_image(spec)
    tunnel, target = NoiseTunnel(Saliency(model)), int(model(x).argmax())

    def attribute(samples: int) -> None:
        # Its own batches: it keeps the gradient of every sample until the end.
        options = {"nt_samples": samples, "nt_samples_batch_size": spec["batch_size"], "stdevs": SIGMA}
        tunnel.attribute(x.clone().requires_grad_(), nt_type="smoothgrad", target=target, **options)

    attribute(spec["batch_size"])

    def round() -> dict[str, Any]:
        start = time.perf_counter()
        attribute(spec["samples"])
        _wait(x)
        return {"seconds": time.perf_counter() - start, "units": spec["samples"]}

    return round


class _ModelClock:
    """Adds up the time that `certify` spends in the model: its forward pass and the gradient of its input."""

    def __init__(self) -> None:
        from robattr_fast import model

        self.seconds, self._scores = 0.0, model.scores
        model.scores = self._timed  # type: ignore[assignment]

    def _timed(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = self._scores(*arguments)
        self.seconds += time.perf_counter() - start
        return result


class _Rate:
    """`certify` for ``planned`` samples, cut off after ``samples`` more, at the pace that it keeps.

    A round begins where the one before ended in the noise stream. The first one chooses the batches; later ones keep
    them. ``setup`` are the seconds of a first call before its first batch: copies, folding, the trial of batches.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec, self.clock = spec, _ModelClock()
        self.model, self.x = model_and_image(spec)
        self.first = 0
        self.batches: dict[str, Any] = {}
        self.setup = self._call()["setup"]

    def __call__(self) -> dict[str, Any]:
        return {**self._call(), "setup": self.setup, **self.batches}

    def _call(self) -> dict[str, Any]:
        events = []

        def progress(event: Any) -> None:
            events.append((time.perf_counter(), event.samples, self.clock.seconds))
            # What comes before the first event is not at full pace.
            if event.samples - events[0][1] >= self.spec["samples"]:
                signal.raise_signal(signal.SIGINT)

        start = time.perf_counter()
        options = {"sigma": SIGMA, "tau": TAU, "alpha": ALPHA, "samples": self.spec["planned"]}
        try:
            certificate = rf.certify(
                self.model, self.x, **options, **self.batches, first_sample=self.first, progress=progress
            )
        except rf.CertifyInterrupted as stopped:
            certificate = stopped.certificate
        if len(events) < 2:
            raise ValueError(f"planned: got {self.spec['planned']} samples, which are done before a pace can be seen")
        self.first += int(certificate.samples[0])
        self.batches = {
            name: value
            for name in ("batch_size", "memory_format")
            if (value := getattr(certificate.settings, name, None)) is not None
        }
        (t0, s0, m0), (t1, s1, m1) = events[0], events[-1]
        seconds, units = t1 - t0, s1 - s0
        setup = max(0.0, t0 - start - s0 * seconds / units)
        return {"seconds": seconds, "units": units, "model_seconds": m1 - m0, "setup": setup}


def _whole(spec: Spec) -> Side:
    """All of `certify` and one question to its certificate: copies, folding, trial, samples, bounds."""
    model, x = model_and_image(spec)
    settings = {"sigma": SIGMA, "tau": TAU, "alpha": ALPHA, "samples": spec["samples"]}

    def round() -> dict[str, Any]:
        start = time.perf_counter()
        certificate = rf.certify(model, x, **settings, second_moment=spec.get("second_moment", True))
        certificate.overlap(x.numel() // 5, 0.06)
        return {"seconds": time.perf_counter() - start, "units": spec["samples"]}

    round()
    return round


def _evaluation(spec: Spec) -> Side:
    """What a certificate costs after its ``samples``: for ``retain`` > 0 their second moments, bounds and overlap.

    gram: seconds of the summary of all blocks. look: of bounds and overlap from counts alone. last: of both methods.
    """
    summary = _module("certificates.moments.summary", "certify.moments")
    rng = np.random.default_rng(0)
    n, samples, retain = spec["n"], spec["samples"], spec["retain"]
    share = np.sort(rng.beta(0.5, 4.5, n)).astype(np.float32)
    # Two factors move the elements together, as directions of a real map do.
    loadings = 0.5 * rng.choice(np.array([-1, 1], np.float32), (2, n))
    packed = np.zeros((samples if retain else 0, -(-n // 512) * 64), np.uint8)
    for row in packed:
        moved = share * (1 + rng.uniform(-1, 1, 2).astype(np.float32) @ loadings)
        row[: -(-n // 8)] = np.packbits(rng.random(n, dtype=np.float32) < moved, bitorder="little")
    counts = torch.from_numpy(rng.binomial(samples, share).astype(np.int32))[None, :, None]
    settings = _module("certificates", "certify").Settings(
        sigma=SIGMA, shape=(n,), tau=TAU, planned_samples=(samples,), alpha=ALPHA, second_moment=True, retain=retain
    )

    # How long the search for deflated moves takes depends on the map: where there is a real one, it is that one's.
    drawn = rf.Certificate.load(spec["file"]) if spec.get("file") else None

    def asked(certificate: rf.Certificate) -> float:
        start = time.perf_counter()
        certificate.overlap(n // 5, 0.06)
        return time.perf_counter() - start

    def round() -> dict[str, Any]:
        gram, look = 0.0, asked(rf.Certificate.from_counts(counts, samples, sigma=SIGMA, slack=None))
        last = look
        if retain:
            start = time.perf_counter()
            parts = summary.Summary.of_rows(torch.from_numpy(packed), samples, retain, 1, n, 0).to_tensors()
            gram = time.perf_counter() - start
            moments = {"gram_summary": parts[0][None], "directions": parts[1][None]}
            made = rf.Certificate(counts=counts, samples=torch.tensor([samples]), settings=settings, **moments)
            last = asked(made if drawn is None else rf.Certificate(**drawn.tensors, settings=drawn.settings))
        return {"seconds": gram + last, "units": 1, "gram": gram, "look": look, "last": last}

    return round


def _memory(spec: Spec) -> Side:
    """Peak resident memory of this process after one `certify` of ``samples`` samples, as ``bytes``."""
    from robattr_fast.machine import peak_memory

    model, x = model_and_image(spec)

    def round() -> dict[str, Any]:
        start = time.perf_counter()
        rf.certify(model, x, sigma=SIGMA, tau=TAU, samples=spec["samples"], retain=spec["retain"], batch_size=16)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "units": spec["samples"], "bytes": peak_memory()}

    return round


def _gate_job(spec: Spec) -> str:
    """`certify` against a plain loop on the same noise: equal but for what rounding turns at thresholds."""
    model, x = model_and_image(spec)
    n, samples = x.numel(), 8
    ours = rf.certify(model, x, sigma=SIGMA, tau=TAU, samples=samples, batch_size=4, second_moment=False, seed=3)
    z = rf.reference.noisy_samples(x, SIGMA, samples, seed=3)[0].requires_grad_()
    logits = model(z)
    (gradient,) = torch.autograd.grad(logits.max(dim=1).values.sum(), z)
    scores = gradient.abs().flatten(1)
    order = scores.sort(dim=1, descending=True, stable=True)
    k_tau = int(TAU * n + 1e-9)
    kept = torch.zeros_like(scores).scatter_(1, order.indices[:, :k_tau], 1.0)
    tied = scores.gather(1, order.indices[:, k_tau - 1, None]) == scores.gather(1, order.indices[:, k_tau, None])
    theirs = torch.where((scores > 0) & ~tied, kept, 0.0).sum(0).int().cpu()
    untied = int((~tied).sum())
    if untied < samples:
        return f"certify: {samples - untied} of {samples} rows of this model tie at the threshold: choose another"
    assert ours.counts is not None
    assert ours.class_counts is not None
    flipped = int((ours.counts[0, :, 0] - theirs).abs().sum())
    if flipped > 0.02 * samples * k_tau:
        return f"certify: {flipped} of {samples * k_tau} selections are not those of a plain loop on the same noise"
    votes = torch.bincount(logits.argmax(1), minlength=logits.shape[1]).cpu()
    return "" if torch.equal(votes.int(), ours.class_counts[0]) else "certify: the votes are not those of a plain loop"


SIDES: dict[str, Callable[[Spec], Side]] = {
    "job.published": _published,
    "job.captum": _captum,
    "job.ours": _Rate,
    "job.whole": _whole,
    "job.evaluation": _evaluation,
    "job.memory": _memory,
}
"""Name to a function of the spec that makes the side."""

GATES: dict[str, Callable[[Spec], str]] = {"job": _gate_job}
"""Name to a function of the spec that says what is wrong, or nothing."""
