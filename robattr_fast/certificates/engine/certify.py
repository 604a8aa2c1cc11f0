"""`certify`: the loop that turns noisy samples into counts, and the counts into a `Certificate`."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from robattr_fast import model as _model
from robattr_fast.certificates.certificate.certificate import Certificate
from robattr_fast.certificates.certificate.merge import joined
from robattr_fast.certificates.engine.environment import environment
from robattr_fast.certificates.engine.fused import LARGEST_BATCH, Fused, fused_sampling
from robattr_fast.certificates.engine.interrupt import DeferredInterrupt
from robattr_fast.certificates.engine.state import State
from robattr_fast.certificates.moments.concentration import look_schedule
from robattr_fast.certificates.settings import Settings
from robattr_fast.certificates.theorems.bounds import check_bound
from robattr_fast.errors import CertifyInterrupted
from robattr_fast.ops import _check
from robattr_fast.reference.noisy_samples import STREAM_VERSION
from robattr_fast.sampling.arguments import check_autocast, check_explain, check_image_ids, check_images, check_target
from robattr_fast.sampling.sampler import Sampler, Segment, next_batch

_logger = logging.getLogger("robattr_fast")

_REPORT_SECONDS = 0.5
_CHECKPOINT_SECONDS = 60.0
# Looks for a stop grow geometrically, so that they cost a fixed small share of the run. A run hits them exactly: when
# it stops depends neither on the batch size nor on where it was interrupted.
_FIRST_LOOK, _LOOK_GROWTH = 64, 1.1
_MEASURED = torch.bfloat16  # what autocast="auto" tries


@dataclass(frozen=True)
class StopWhen:
    """End an image's sampling once ``overlap`` (a share of its top-k) is certified at L2 ``radius``."""

    k: int
    radius: float
    overlap: float

    def __post_init__(self) -> None:
        _check.integer("k", self.k, 1, 2**31 - 1)
        _check.positive("radius", self.radius)
        if not 0 < self.overlap <= 1:
            raise ValueError(f"overlap: got {self.overlap}, takes a share in (0, 1]")


@dataclass(frozen=True)
class Progress:
    """What a ``progress`` callable is told: ``samples`` of ``total`` are done for ``image`` of ``images``.

    ``certificate()`` is that image's certificate so far; asking for it costs time, and is for the callable alone: once
    it has returned, sampling goes on.
    """

    image: int
    images: int
    samples: int
    total: int
    certificate: Callable[[], Certificate]


@dataclass
class _Run:
    """One call of `certify`: what is sampled next, when to look, when to save, when to report."""

    sampler: Sampler
    state: State
    first_sample: int
    samples: int
    stop: StopWhen | None
    checkpoint: Path | None
    progress: Callable[[Progress], None] | None
    batch_size: int | None
    """Of all samples so far; None if they differ."""
    fused: Fused | None

    def __post_init__(self) -> None:
        several = self.stop is not None and self.state.retained and self.samples >= 2
        self.moment_looks = set(look_schedule(self.samples)) if several else {self.samples}
        self.looks = sorted(self.moment_looks | set(betting_looks(self.samples))) if self.stop else [self.samples]
        self.wanted = [self._next_look(done) for done in self.state.done]
        for image in range(len(self.wanted)):
            self._look(image)
        self.last_report = self.last_save = time.monotonic()

    @property
    def recorded_batch_size(self) -> int | None:
        """None where samples were not all taken in batches of one size, or not each in the row of its index."""
        size = self.batch_size
        if size is None or size != self.sampler.batch_size:
            return None
        # A look ends the batch of a single image early.
        return None if self.stop is not None and len(self.wanted) == 1 and _FIRST_LOOK % size else size

    def certificate(self, image: int | None = None, *, moments: bool = True) -> Certificate:
        return self.state.certificate(self.first_sample, self.recorded_batch_size, image, moments=moments)

    def finish(self) -> Certificate:
        """Take all samples that are left."""
        with DeferredInterrupt() as interrupt:
            while segments := next_batch(self.state.done, self.wanted, self.first_sample, self.sampler.batch_size):
                for image in self._take(segments):
                    self._look(image)
                self._report(segments[-1].image)
                self._save()
                if interrupt.requested:
                    break
            certificate = self.certificate()
            self._save(final=True)
        if interrupt.requested:
            raise CertifyInterrupted(certificate)
        return certificate

    def _take(self, segments: Sequence[Segment]) -> Iterator[int]:
        """Sample the segments, as far as memory allows; the image of each once it is counted."""
        if self.fused is not None:
            for segment in segments:
                self.state.add_fused(segment, self.fused, self.first_sample)
                yield segment.image
            return
        first = not any(self.state.done)
        captured = len(segments) == 1 and self.state.add_captured(segments[0], self.sampler, self.first_sample)
        batch = [] if captured else self.sampler.run(segments)
        if first:
            self.batch_size = self.sampler.batch_size
        if captured:
            yield segments[0].image
        for scored in batch:
            self.state.add(scored, self.first_sample)
            yield scored.segment.image

    def _look(self, image: int) -> None:
        """At a scheduled look, stop the image if what is wanted is certified: betting bounds hold at any time."""
        done = self.state.done[image]
        if self.stop is None or done not in self.looks or done == self.samples:
            return
        certificate = self.certificate(image, moments=done in self.moment_looks)
        share = certificate.overlap(self.stop.k, self.stop.radius).share
        self.wanted[image] = done if float(share) >= self.stop.overlap else self._next_look(done)

    def _next_look(self, done: int) -> int:
        return next((look for look in self.looks if look > done), self.samples)

    def _report(self, image: int) -> None:
        done = self.state.done[image]
        now = time.monotonic()
        over = done == self.wanted[image]
        if self.progress is not None and (over or now - self.last_report >= _REPORT_SECONDS):
            self.last_report = now
            self.progress(
                Progress(
                    image, len(self.state.done), done, self.samples, lambda: self.certificate(image, moments=False)
                )
            )

    def _save(self, *, final: bool = False) -> None:
        """Write the checkpoint if it is due. A disk that is full costs the checkpoint, not the run."""
        if self.checkpoint is None or not (final or time.monotonic() - self.last_save >= _CHECKPOINT_SECONDS):
            return
        try:
            self.state.save(self.checkpoint, self.first_sample, self.recorded_batch_size, final=final)
        except OSError as error:
            _logger.warning("checkpoint: %s cannot be written (%s); the run goes on", self.checkpoint, error)
        self.last_save = time.monotonic()


def betting_looks(samples: int) -> Iterator[int]:
    """Multiples of 64, so that usual batches are not cut."""
    look = _FIRST_LOOK
    while look < samples:
        yield look
        look = -(-int(look * _LOOK_GROWTH + 1) // _FIRST_LOOK) * _FIRST_LOOK


def _print_progress(event: Progress) -> None:
    line = f"image {event.image + 1}/{event.images}: {event.samples}/{event.total} samples"
    print(line, file=sys.stderr, flush=True)


def _resumable(path: Path, wanted: Settings, first_sample: int, *, any_autocast: bool) -> Certificate | None:
    """The checkpoint at ``path``, if there is one; ValueError if it belongs to another run."""
    if not path.exists():
        return None
    found = Certificate.load(path)
    started = [intervals[0][0] for intervals in found.settings.intervals or () if intervals]
    if any(start != first_sample for start in started):
        raise ValueError(
            f"checkpoint: {path} holds samples from {started[0]} on, got first_sample={first_sample}; takes a new path"
        )
    moving = ["intervals", "batch_size", "memory_format", "folded", "versions", "backends"]
    if any_autocast and found.settings.autocast in (None, _model.dtype_name(_MEASURED)):
        moving.append("autocast")
    theirs, ours = found.settings.to_json(), wanted.to_json()
    differ = [name for name in ours if name not in moving and theirs.get(name) != ours[name]]
    if differ:
        raise ValueError(
            f"checkpoint: {path} holds another run (differs in {', '.join(differ)}); "
            "takes a new path, or the arguments of that run"
        )
    return found


def certify(
    model: nn.Module,
    x: torch.Tensor,
    *,
    sigma: float,
    tau: float = 0.1,
    gamma: float | None = None,
    levels: int | None = 1,
    samples: int = 8192,
    first_sample: int = 0,
    image_ids: torch.Tensor | Sequence[int] | None = None,
    target: int | Sequence[int] | torch.Tensor | None = None,
    explain: str | _model.Explanation = "gradient",
    channel_sum: bool = False,
    seed: int = 0,
    alpha: float = 0.05,
    bound: str | None = None,
    slack: int | None = None,
    second_moment: bool = True,
    retain: int = 2048,
    keep_samples: bool = False,
    stop: StopWhen | None = None,
    batch_size: int | str = "auto",
    memory_format: str | None = None,
    autocast: torch.dtype | str | None = None,
    on_nonfinite: str = "raise",
    checkpoint: str | os.PathLike | None = None,
    progress: bool | Callable[[Progress], None] = False,
) -> Certificate:
    """Sample the sparsified SmoothGrad map of each image and certify it.

    On a GPU the gradients of a small perceptron are made and counted by `mlp_smoothgrad`, which is logged: scores then
    differ from those of the model's own passes by rounding.

    Args:
        model: eval-mode module that returns logits [N, classes]; it is explained on a private copy.
        x: [B, *S] finite float images; sigma and radii are in its units.
        sigma: standard deviation of the noise.
        tau, gamma, levels: the map of one sample, see `sparsify`.
        samples: samples per image, at most 2^31 - 1.
        first_sample, image_ids, seed: which part of the noise stream, see `noisy_samples`.
        target: class or classes [B] to explain; None: the largest logit of each noisy sample. A class chosen by looking
            at x is part of the map: it stays frozen as x moves.
        explain: "gradient" (|d f_c / d z|), "input_x_gradient" (|z * d f_c / d z|), or a callable
            (model, batch [N, *S], target [N]) -> scores [N, *S]. It must be a fixed function of the noisy batch: the
            certificate is void for one that also looks at x.
        channel_sum: sum the scores over dimension 1 of x before selection; the map then has shape S[1:].
        alpha: probability, for each image, that any statement about it is wrong. For N images together take alpha / N.
        bound: "betting", "kl", "clopper-pearson" (levels=1) or "hoeffding"; default betting, or kl for levels=None.
        slack: number m of bounds that may fail (T4); None: the best for each query with betting, else 0.
        second_moment: set .45 alpha aside for second moments (T7), which certify overlap at larger radii, distances and
            cosines. levels=None has none.
        retain: samples of each image whose maps are kept at a time (one bit per element at levels=1, else four), for
            T7: 4 to 8192. All samples are used, in equal blocks of at most as many. Memory is constant in ``samples``.
        keep_samples: the certificate holds these maps themselves (`Certificate.packed`), so that anyone can compute the
            second moments again.
        stop: end an image's sampling early, once this is certified; takes bound="betting".
        batch_size: rows per forward pass, or "auto" for a short measured trial.
        memory_format: "contiguous" or "channels_last", in which the model gets its batches; None: by the same trial,
            contiguous where batch_size is a number. Models round differently in each: the certificate records it.
        autocast: torch.bfloat16 or torch.float16, in which the model runs under torch.autocast, for float32 x; None:
            without, also inside of a torch.autocast of the caller. It makes another model, and the map is that one's.
            "auto": bfloat16 where the trial finds it faster, and logits of a few samples within 2 % of those of
            float32. Parts of one run that are sampled apart may then differ, and do not merge.
        on_nonfinite: a sample with NaN or infinite scores is an error ("raise"), the zero map ("zero"), or the zero map
            that also counts as 1 in every upper bound ("abstain").
        checkpoint: file that is written at intervals, on Ctrl-C and at the end; if it exists, sampling goes on from it.
        progress: True prints lines to stderr, a callable is told (`Progress`), about twice a second.

    Returns:
        The certificate, on the CPU.

    Raises:
        TypeError, ValueError: a bad argument. ModelError: a model that cannot be explained. NonFiniteError: see
        on_nonfinite. CertifyInterrupted (a KeyboardInterrupt): Ctrl-C; holds the certificate so far.

    Source: Levine, Singla, Feizi 2019 (arXiv 1905.12105); statements and proofs in docs/certificates.md.
    """
    check_images(x)
    sigma = _check.positive("sigma", sigma)
    tau, gamma = _check.fractions(tau, gamma)
    if levels is not None:
        _check.integer("levels", levels, 1, 15)
    _check.integer("samples", samples, 1, 2**31 - 1)
    _check.integer("first_sample", first_sample, 0, 2**32 - samples)
    check_explain(explain, channel_sum, x)
    bound = bound or ("betting" if levels is not None else "kl")
    check_bound(bound, levels)
    if stop is not None and bound != "betting":
        raise ValueError(f"stop: got a stop rule with bound={bound!r}; early stopping takes bound='betting'")
    _check.integer("retain", retain, 4, 8192)
    second_moment = second_moment and levels is not None
    if keep_samples and not second_moment:
        raise ValueError(
            "keep_samples: got True without second moments, which alone need samples (second_moment, levels)"
        )
    chosen = check_autocast(autocast, x)
    classes_wanted = check_target(target, x)
    ids = check_image_ids(image_ids, x)
    private = _model.private_copy(model)
    sampler = Sampler(
        private,
        x,
        sigma=sigma,
        target=classes_wanted,
        explain=explain,
        seed=seed,
        image_ids=ids,
        autocast=chosen,
    )
    settings = Settings(
        sigma=sigma,
        shape=tuple(x.shape[2:] if channel_sum else x.shape[1:]),
        levels=levels,
        tau=tau,
        gamma=gamma,
        channel_sum=channel_sum,
        explain=_model.explanation_name(explain),
        target=None if classes_wanted is None else tuple(classes_wanted.tolist()),
        seed=seed,
        stream_version=STREAM_VERSION,
        image_ids=tuple(ids.tolist()),
        planned_samples=(samples,) * x.shape[0],
        alpha=alpha,
        bound=bound,
        slack=slack,
        second_moment=second_moment,
        retain=retain if second_moment else 0,
        on_nonfinite=on_nonfinite,
        batch_images=x.shape[0],
        autocast=None if chosen is None else _model.dtype_name(chosen),
        model_fingerprint=_model.fingerprint(model),
        input_hashes=tuple(_model.input_hash(image) for image in x),
        **environment(x.device),
    )
    if stop is not None and not 1 <= stop.k <= settings.n // 2:
        raise ValueError(f"stop.k: got {stop.k}, takes an integer in [1, n/2 = {settings.n // 2}]")
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"checkpoint: got {path}, takes a file in a folder that exists")
    if path is not None and not _model.is_identified(settings.explain):
        raise ValueError(
            f"checkpoint: explain={settings.explain} cannot be told from another callable of that name; takes a named "
            "function of a module with a checkpoint"
        )
    is_measured = autocast == "auto"
    resumed = None if path is None else _resumable(path, settings, first_sample, any_autocast=is_measured)
    if resumed is not None:
        earlier = resumed.settings
        settings = dataclasses.replace(
            settings,
            autocast=earlier.autocast,
            versions=joined(earlier.versions, settings.versions),
            backends=joined(earlier.backends, settings.backends),
        )
        sampler.autocast = _model.dtype_named(earlier.autocast)
    with torch.autocast(x.device.type, enabled=False):
        classes = sampler.prepare()
        fused = fused_sampling(settings, sampler)
        if fused is not None:
            settings = dataclasses.replace(settings, backends=settings.backends | {"mlp_smoothgrad": "triton"})
            if batch_size == "auto":
                batch_size = min(LARGEST_BATCH, samples * x.shape[0])
        if resumed is None:
            # Rows beyond the first look of every image would be padding.
            useful = x.shape[0] * (samples if stop is None else min(samples, _FIRST_LOOK))
            autocasts = (None, _MEASURED) if is_measured and fused is None else ()
            total = samples * x.shape[0]
            sampler.set_batch_size(batch_size, total, memory_format, largest=useful, autocasts=autocasts)
            size: int | None = sampler.batch_size
            folded: bool | None = sampler.folded
        else:
            then = resumed.settings
            sampler.set_batch_size(then.batch_size or batch_size, samples, then.memory_format or memory_format)
            size, folded = then.batch_size, sampler.folded if sampler.folded == then.folded else None
        settings = dataclasses.replace(
            settings,
            folded=folded,
            memory_format=sampler.memory_format,
            autocast=None if sampler.autocast is None else _model.dtype_name(sampler.autocast),
        )
        state = State(settings, x.shape[0], classes, x.device, keep_samples=keep_samples)
        if resumed is not None and path is not None:
            state.restore(path)
        report = _print_progress if progress is True else progress or None
        return _Run(sampler, state, first_sample, samples, stop, path, report, size, fused).finish()
