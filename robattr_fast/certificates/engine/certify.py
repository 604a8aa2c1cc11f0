"""`certify`: noisy samples to counts, and the counts into a `Certificate`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robattr_fast import model as _model
from robattr_fast.certificates.certificate.certificate import Certificate
from robattr_fast.certificates.certificate.merge import joined
from robattr_fast.certificates.engine.clean import as_target, clean_prediction, named_target, warn_of_disagreement
from robattr_fast.certificates.engine.counting import Captured, Counting, FusedCounting
from robattr_fast.certificates.engine.environment import environment
from robattr_fast.certificates.engine.fused import LARGEST_BATCH, fused_sampling
from robattr_fast.certificates.engine.plan import FIRST_LOOK, Plan, StopWhen
from robattr_fast.certificates.engine.run import Progress, Run, print_progress
from robattr_fast.certificates.engine.state import State
from robattr_fast.certificates.settings import Settings
from robattr_fast.certificates.theorems.bounds import check_bound
from robattr_fast.metrics.overlap import set_size
from robattr_fast.ops import _check
from robattr_fast.reference.noisy_samples import STREAM_VERSION
from robattr_fast.sampling.map import Map, Stream
from robattr_fast.sampling.sampler import Sampler, prepared

_MEASURED = torch.bfloat16  # what autocast="auto" tries


@_model.neutral()
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
    target: int | Sequence[int] | torch.Tensor | str | None = None,
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
        target: class or classes [B] to explain; None: the largest logit of each noisy sample, which may be of another
            class than the image is (`Certificate.agreement`; logged where most are); "predicted": the class that the
            model gives to each image. A class chosen by looking at x is part of the map: it stays frozen as x moves.
        explain: "gradient" (|d f_c / d z|), "input_x_gradient" (|z * d f_c / d z|), or a callable
            (model, batch [N, *S], target [N]) -> scores [N, *S], which are selected as they come, or, with
            channel_sum, one per pixel [N, *S[1:]]; `robattr_fast.attributions` has such. It must be a fixed function of
            the noisy batch: the certificate is void for one that also looks at x.
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
    is_predicted = isinstance(target, str)
    given = named_target(target)
    map = Map.checked(
        x,
        sigma=sigma,
        explain=explain,
        target=given,
        channel_sum=channel_sum,
        tau=tau,
        gamma=gamma,
        levels=levels,
        autocast=autocast,
    )
    asked = map.autocast
    stream = Stream.checked(x, seed, image_ids)
    samples = _check.integer("samples", samples, 1, 2**31 - 1)
    first_sample = _check.integer("first_sample", first_sample, 0, 2**32 - samples)
    bound = bound or ("betting" if levels is not None else "kl")
    check_bound(bound, levels)
    if stop is not None and bound != "betting":
        raise ValueError(f"stop: got a stop rule with bound={bound!r}; early stopping takes bound='betting'")
    retain = _check.integer("retain", retain, 4, 8192)
    second_moment = second_moment and levels is not None
    if keep_samples and not second_moment:
        raise ValueError(
            "keep_samples: got True without second moments, which alone need samples (second_moment, levels)"
        )
    plan = Plan(samples, first_sample, stop, second_moment)
    clean_class, clean_score = clean_prediction(model, x, map.autocast)
    if is_predicted:
        map = dataclasses.replace(map, target=as_target(clean_class))
    identity: dict[str, Any] = {"first": _model.first_fingerprint(model)}
    if callable(explain):
        identity["explain"] = _model.callable_fingerprint(explain)
    settings = Settings.of_map(
        map,
        x,
        clean_class=clean_class,
        clean_score=clean_score,
        seed=stream.seed,
        stream_version=STREAM_VERSION,
        image_ids=stream.image_ids,
        planned_samples=(samples,) * x.shape[0],
        alpha=alpha,
        bound=bound,
        slack=slack,
        second_moment=second_moment,
        retain=retain if second_moment else 0,
        on_nonfinite=on_nonfinite,
        batch_images=x.shape[0],
        model_fingerprint=_model.fingerprint(model),
        model_identity=identity,
        input_hashes=tuple(_model.input_hash(image) for image in x),
        **environment(x.device),
    )
    if stop is not None:
        set_size(stop.k, settings.n, settings.n // 2, "stop.k")
    path = _checked_path(checkpoint, settings)
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
        map = dataclasses.replace(map, autocast=_model.dtype_named(earlier.autocast))
    with torch.autocast(x.device.type, enabled=False):
        sampler = prepared(model, x, map, stream, counted=(first_sample, first_sample + samples))
        _model.check_classes(sampler.classes)
        identity["behaviour"] = sampler.behaviour(asked)
        if resumed is not None and path is not None:
            _check_model(path, resumed.settings, dataclasses.replace(settings, model_identity=identity))
        fused = fused_sampling(settings, sampler)
        if fused is not None:
            settings = dataclasses.replace(settings, backends=settings.backends | {"mlp_smoothgrad": "triton"})
            if batch_size == "auto":
                batch_size = min(LARGEST_BATCH, samples * x.shape[0])
        if resumed is None:
            autocasts = (None, _MEASURED) if is_measured and fused is None else ()
            # Rows beyond the first look of every image would be padding.
            useful = x.shape[0] * (samples if stop is None else min(samples, FIRST_LOOK))
            sampler.set_batch_size(batch_size, samples * x.shape[0], memory_format, largest=useful, autocasts=autocasts)
            size: int | None = sampler.batch_size
            folded: bool | None = sampler.folded
        else:
            size = _set_as_before(sampler, resumed.settings, batch_size, memory_format, samples)
            folded = sampler.folded if sampler.folded == resumed.settings.folded else None
        settings = dataclasses.replace(
            settings,
            model_identity=identity,
            folded=folded,
            memory_format=sampler.memory_format,
            autocast=None if sampler.autocast is None else _model.dtype_name(sampler.autocast),
        )
        state = State(
            settings, x.shape[0], sampler.classes, x.device, first_sample=first_sample, keep_samples=keep_samples
        )
        state.witness = sampler.sparing(sampler.witness)
        if resumed is not None and path is not None:
            state.restore(path, sampler)
        counting: Counting = Captured(sampler, state) if fused is None else FusedCounting(fused, state)
        report = print_progress if progress is True else progress or None
        certificate = Run(sampler, state, counting, plan, path, report, size, state.witness).finish()
    warn_of_disagreement(certificate)
    return certificate


def _checked_path(checkpoint: str | os.PathLike | None, settings: Settings) -> Path | None:
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    if not path.parent.is_dir():
        raise ValueError(f"checkpoint: got {path}, takes a file in a folder that exists")
    if not _model.is_identified(settings.explain):
        raise ValueError(
            f"checkpoint: explain={settings.explain} cannot be told from another callable of that name; takes a named "
            "function of a module with a checkpoint"
        )
    return path


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
    _check_model(path, found.settings, wanted)
    # The score of a class rounds as the model does.
    moving = [
        "model_fingerprint",  # judged above
        "model_identity",
        "intervals",
        "batch_size",
        "memory_format",
        "folded",
        "versions",
        "backends",
        "clean_class",
        "clean_score",
    ]
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


def _check_model(path: Path, found: Settings, wanted: Settings) -> None:
    if (reason := found.other_model(wanted)) is not None:
        raise ValueError(
            f"checkpoint: {path} holds another run (differs in model_fingerprint, model_identity: {reason}); "
            "takes a new path, or the model and the method of that run"
        )


def _set_as_before(
    sampler: Sampler, then: Settings, batch_size: int | str, memory_format: str | None, samples: int
) -> int | None:
    """The batches of the run that is resumed; its batch size. ValueError if others are asked for."""
    for name, asked, held in (
        ("batch_size", None if batch_size == "auto" else batch_size, then.batch_size),
        ("memory_format", memory_format, then.memory_format),
    ):
        if asked is not None and held is not None and asked != held:
            default = "'auto'" if name == "batch_size" else "None"
            raise ValueError(
                f"{name}: got {asked!r}, but the checkpoint's samples were taken with {held!r}; expected that, or "
                f"{default} to go on as the run began"
            )
    sampler.set_batch_size(then.batch_size or batch_size, samples, then.memory_format or memory_format)
    return then.batch_size
