"""Samples of a certificate taken again, and what that says about its counts.

A file holds counts, not samples. Where all samples are repeated, counts must agree. Where N random ones are, each count
must contain what they show, and what they show must be a plausible random part of it (`consistency`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from robattr_fast import model as _model
from robattr_fast.certificates.certificate.certificate import Certificate
from robattr_fast.certificates.engine.counting import Eager
from robattr_fast.certificates.engine.environment import differences
from robattr_fast.certificates.engine.state import State
from robattr_fast.certificates.moments.summary import Summary
from robattr_fast.certificates.verify.consistency import implausible, mean_refuted
from robattr_fast.metrics.overlap import set_size, top_k
from robattr_fast.ops import _check
from robattr_fast.ops.sparsify import sparsify
from robattr_fast.reference._select import selected
from robattr_fast.reference.noisy_samples import STREAM_VERSION
from robattr_fast.sampling.batch import Segment, next_batch
from robattr_fast.sampling.map import Stream
from robattr_fast.sampling.sampler import Sampler, prepared

FALSE_ALARM = 1e-3
"""Probability, over the choice of the replayed samples, that a true certificate is found at fault."""

FLIPS = 0.01
"""In another environment a model rounds differently: every element may then differ in this share of the samples."""

_BATCH_SIZE = 32  # where none is recorded


@dataclass(frozen=True)
class Replay:
    """What a replay found."""

    samples: int
    """How many of ``total`` samples were taken again."""
    total: int
    faults: tuple[str, ...]
    """Why the certificate cannot be one of this model and image; empty if nothing speaks against it."""
    differences: tuple[str, ...]
    """What of the recorded environment is not as it is here. If empty, repeated samples must be equal bit for bit."""


@_model.neutral()
def replay(
    cert: Certificate,
    model: nn.Module,
    x: torch.Tensor,
    *,
    samples: int | None = 64,
    seed: int = 0,
    k: float | None = None,
) -> Replay:
    """Take samples of a certificate again and compare.

    Model and image are compared by their hashes first; where they differ, nothing is sampled. Then:

    - ``samples=None``: all of them, in their order and batches. Counts, votes and invalid samples must be equal.
    - ``samples=N``: N of them, drawn without replacement, each in the row of the batch that it had. No count may
      exclude what they show (an element that N' of them select has been selected at least N' times), each count must
      be plausible by its hypergeometric tails, and so must be the certificate's total over the displayed top-k. A true
      certificate is found at fault with probability at most `FALSE_ALARM`; choose ``seed`` after it was handed over.

    A replay of N samples bounds how wrong counts can be, it does not prove them: a count that is off by a few per cent
    in few elements stays undetected until N comes near q. Second moments come from all samples; only a replay of all
    repeats them.

    In another environment (`Replay.differences`) rounding may turn single selections; then an element may differ in
    the share `FLIPS` of the replayed samples.

    Args:
        cert: of one image that was certified on its own, with known seed, image id and sample intervals.
        model: the module that was certified.
        x: [*S], its input.
        samples: number of samples, at most as many as there are; None: all.
        seed: of the choice.
        k: size of the top-k set whose total is tested, a number or a share of elements; default n // 5.

    Raises:
        ValueError: a certificate that cannot be replayed, or arguments out of range.
    """
    _check_replayable(cert)
    settings = cert.settings
    total = int(cert.samples[0])
    if samples is not None:
        samples = _check.integer("samples", samples, 1, total)
    k = max(1, settings.n // 5) if k is None else set_size(k, settings.n, settings.n)
    assert settings.input_hashes is not None
    faults = []
    here = {"first": _model.first_fingerprint(model)}
    if reason := _model.other_model(
        settings.model_fingerprint, settings.model_identity, _model.fingerprint(model), here
    ):
        faults.append(f"the model is another one: {reason}")
    if _model.input_hash(x.cpu()) != settings.input_hashes[0]:
        faults.append("the image is another one: its hash is not the recorded one")
    if faults:
        return Replay(0, total, tuple(faults), ())
    elsewhere = differences(settings, x.device)
    sampler, state = _prepared(cert, model, x)
    recorded = (settings.model_identity or {}).get("behaviour")
    if recorded is not None:
        now = sampler.behaviour(_model.dtype_named(recorded["autocast"]))
        if (reason := _model.other_behaviour(recorded, now)) is not None:
            return Replay(0, total, (f"the model is another one: {reason}",), tuple(elsewhere))
    if samples is None or samples == total:
        faults = _compare_all(cert, sampler, exact=not elsewhere)
        return Replay(total, total, tuple(faults), tuple(elsewhere))
    chosen = np.random.default_rng(seed).permutation(total)[:samples]
    drawn = _Drawn(cert, sampler, state, chosen, k, in_place=not elsewhere)
    return Replay(samples, total, tuple(_judge(cert, drawn, k, exact=not elsewhere)), tuple(elsewhere))


def _check_replayable(cert: Certificate) -> None:
    settings = cert.settings
    if len(cert) != 1:
        raise ValueError(f"cert: got {len(cert)} images, takes one")
    for name in ("tau", "explain", "seed", "image_ids", "intervals", "model_fingerprint", "input_hashes"):
        if getattr(settings, name) is None:
            raise ValueError(f"cert: its {name} is unknown, so that its samples cannot be taken again")
    if settings.explain not in _model.EXPLANATIONS:
        raise ValueError(f"cert: it explains by the callable {settings.explain!r}, which a file does not hold")
    if settings.stream_version != STREAM_VERSION:
        raise ValueError(f"cert: noise stream version {settings.stream_version}, this package makes {STREAM_VERSION}")
    if not cert.samples.all():
        raise ValueError("cert: it holds no samples")


def _prepared(cert: Certificate, model: nn.Module, x: torch.Tensor) -> tuple[Sampler, State]:
    settings = cert.settings
    assert settings.seed is not None
    assert settings.image_ids is not None
    sampler = prepared(model, x[None], settings.map(), Stream(settings.seed, settings.image_ids))
    sampler.set_batch_size(settings.batch_size or _BATCH_SIZE, 1, settings.memory_format)
    return sampler, State(settings, 1, sampler.classes, x.device)


def _compare_all(cert: Certificate, sampler: Sampler, *, exact: bool) -> list[str]:
    """Every sample again, interval by interval."""
    assert cert.settings.intervals is not None
    assert cert.class_counts is not None
    sums: dict[str, torch.Tensor] = {}
    moments = []
    for first, end in cert.settings.intervals[0]:
        state = State(cert.settings, 1, cert.class_counts.shape[1], sampler.x.device, first_sample=first)
        counting = Eager(sampler, state)
        while segments := next_batch(state.done, [end - first], first, sampler.batch_size):
            for _ in counting(segments):
                pass
        for name in ("counts", "sums", "invalid", "class_counts"):
            if (part := getattr(state, name)) is not None:
                sums[name] = sums.get(name, 0) + part.cpu()
        moments += [rows.summary().to_tensors() for rows in state.retained]
    allowed = 0 if exact else math.ceil(FLIPS * int(cert.samples[0]))
    faults = []
    for name, again in sums.items():
        off = (again - getattr(cert, name)).abs()
        # Float sums depend on the order of the samples only where intervals were merged.
        tolerance = max(allowed, 1e-6 if name == "sums" else 0)
        if (wrong := int((off > tolerance).sum())) > 0:
            faults.append(
                f"{name}: {wrong} of {off.numel()} entries are not what all samples give, by up to {off.max():g}"
            )
    # Merged certificates have none; elsewhere they move with the counts, by amounts that nothing here bounds.
    recorded = cert.gram_summary
    if exact and recorded is not None and recorded.any() and not same_moments(moments[0], cert, 0):
        faults.append("gram_summary: the second moments are not those of the samples")
    return faults


def same_moments(again: tuple[torch.Tensor, torch.Tensor], cert: Certificate, image: int) -> bool:
    """Whether ``gram_summary`` and ``directions`` made again are those of a certificate."""
    summary, directions = again
    assert cert.gram_summary is not None
    recorded = torch.zeros_like(directions) if cert.directions is None else cert.directions[image]
    apart = (summary - cert.gram_summary[image]).abs()
    return torch.equal(directions, recorded) and bool((apart <= Summary.tolerances() * summary.abs()).all())


class _Drawn:
    """What the chosen samples show: totals per element and level, votes, and per sample the total over the top-k."""

    def __init__(
        self, cert: Certificate, sampler: Sampler, state: State, chosen: np.ndarray, k: int, *, in_place: bool
    ) -> None:
        settings = cert.settings
        assert settings.intervals is not None
        assert settings.tau is not None
        self.samples = len(chosen)
        self.values = np.zeros((settings.n, settings.levels or 1), np.int64 if settings.levels else np.float64)
        self.votes = np.zeros(state.class_counts.shape[1] + 1, np.int64)
        """Per class, and last the samples without one."""
        self.mass = np.zeros(len(chosen))
        """Per sample, in the order of the choice, the sum of its map over the displayed top-k, as a share of k_tau."""
        top = top_k(cert.map.flatten(1), k)[0].to(sampler.x.device)
        largest = selected(settings.tau, settings.n)
        for batch in _batches(chosen, settings.intervals[0], sampler.batch_size, in_place=in_place):
            scored = sampler.run([Segment(0, sample, 1) for sample, _ in batch])
            for (_, position), one in zip(batch, scored, strict=True):
                if position is None:
                    continue
                row = sparsify(
                    state.sizes(one.scores, one.logits), settings.tau, settings.gamma, levels=settings.levels
                )[0]
                if bool(row.isnan().any()):
                    self.votes[-1] += 1
                    continue
                self.votes[int(one.logits.argmax())] += 1
                self.mass[position] = float(row[top].double().sum()) / largest
                if settings.levels is None:
                    self.values[:, 0] += row.double().cpu().numpy()
                    continue
                level = (row * settings.levels).round().long().cpu().numpy()
                inside = level.nonzero()[0]
                self.values[inside, level[inside] - 1] += 1


def _batches(
    chosen: np.ndarray, intervals: tuple[tuple[int, int], ...], batch_size: int, *, in_place: bool
) -> list[list[tuple[int, int | None]]]:
    """Batches of (sample index, position in the choice, or None for a row that only fills).

    ``in_place``: every sample gets the row that it had, because a model may round differently in another one.
    """
    starts = np.cumsum([0, *(end - first for first, end in intervals)])
    located = []
    for position, ordinal in enumerate(chosen.tolist()):
        interval = int(np.searchsorted(starts, ordinal, side="right")) - 1
        offset = ordinal - int(starts[interval])
        located.append((intervals[interval][0] + offset, position, offset % batch_size))
    if not in_place:
        rows: list[tuple[int, int | None]] = [(sample, position) for sample, position, _ in located]
        return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    batches: list[list[tuple[int, int | None]]] = []
    used = [0] * batch_size
    for sample, position, row in located:
        if used[row] == len(batches):
            batches.append([(sample, None)] * batch_size)
        batches[used[row]][row] = (sample, position)
        used[row] += 1
    return batches


def _judge(cert: Certificate, drawn: _Drawn, k: int, *, exact: bool) -> list[str]:
    settings, total, level = cert.settings, int(cert.samples[0]), FALSE_ALARM / 3
    flips = 0 if exact else math.ceil(FLIPS * drawn.samples)
    assert settings.tau is not None
    assert cert.class_counts is not None
    faults = []
    if cert.counts is not None:
        claimed = _with_rest(cert.counts[0].numpy().astype(np.int64), total)
        found = _with_rest(drawn.values, drawn.samples)
        wrong = _implausible(claimed, found, total, drawn.samples, level, flips).any(axis=1)
    else:
        assert cert.sums is not None
        claimed, found = cert.sums[0].numpy(), drawn.values[:, 0]
        tolerance = flips + 1e-6
        wrong = (found > claimed + tolerance) | (drawn.samples - found > total - claimed + tolerance)
    if wrong.any():
        faults.append(
            f"counts: {int(wrong.sum())} of {settings.n} elements do not fit {drawn.samples} replayed samples"
        )
    votes = np.append(cert.class_counts[0].numpy(), 0).astype(np.int64)
    votes[-1] = total - votes.sum()
    if _implausible(votes, drawn.votes, total, drawn.samples, level, flips).any():
        faults.append(f"class_counts: the votes do not fit {drawn.samples} replayed samples")
    top = top_k(cert.map.flatten(1), k)[0]
    mass = float(cert.map.flatten(1)[0, top].sum()) * total / selected(settings.tau, settings.n)
    if mean_refuted(drawn.mass, mass, total, level, margin=0.0 if exact else FLIPS):
        faults.append(
            f"counts: the total over the top {k} elements does not fit {drawn.samples} replayed samples "
            f"({mass / total:.4f} of the selection claimed, {drawn.mass.mean():.4f} found)"
        )
    return faults


def _with_rest(counts: np.ndarray, samples: int) -> np.ndarray:
    """[n, L] to [n, L + 1]: with the samples that had level 0."""
    return np.concatenate([counts, samples - counts.sum(axis=1, keepdims=True)], axis=1)


def _implausible(
    claimed: np.ndarray, found: np.ndarray, total: int, sample: int, level: float, flips: int
) -> np.ndarray:
    """`implausible`, where each found count may be off by ``flips`` in favour of the claim."""
    expected = claimed * (sample / total)
    nearest = np.clip(np.rint(expected).astype(np.int64), found - flips, found + flips)
    return implausible(claimed, nearest, total, sample, level)
