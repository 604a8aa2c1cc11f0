"""`suggest`: which sparsified map certifies most, judged on a few pilot samples that no certificate uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from robattr_fast import model as _model
from robattr_fast.certificates.certificate.certificate import Certificate
from robattr_fast.certificates.engine.clean import as_target, clean_prediction, named_target
from robattr_fast.certificates.engine.expected import Expected, expected
from robattr_fast.certificates.engine.state import State
from robattr_fast.certificates.settings import Settings
from robattr_fast.certificates.theorems.bounds import check_bound
from robattr_fast.metrics.overlap import set_size
from robattr_fast.ops import _check
from robattr_fast.sampling.batch import Segment
from robattr_fast.sampling.map import Map, Stream
from robattr_fast.sampling.sampler import Sampler, prepared

_LAST_SAMPLE = 2**32

TAUS = (0.05, 0.1, 0.2, 0.4)
GAMMAS = (None, 0.01, 0.03)
LEVELS = (1, 15)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A sparsified map, and what a certificate of it is expected to say of each image.

    overlap: the certified share of the top-k at the radius asked for. radius: up to which half of the top-k stays.
    method: which certifies the overlap. agreement: of the pilot samples, the share that has the class of the image
    itself (1 where the class to explain was given).
    """

    tau: float
    gamma: float | None
    levels: int
    overlap: tuple[float, ...]
    radius: tuple[float, ...]
    method: tuple[str, ...]
    agreement: tuple[float, ...]

    @property
    def score(self) -> tuple[float, float]:
        """What candidates are ranked by: the mean overlap over the images; where equal, the mean radius.

        Images count by their agreement: what is certified of a map of another class is worth less.
        """
        return self._mean(self.overlap), self._mean(self.radius)

    def _mean(self, values: Sequence[float]) -> float:
        weights = self.agreement if any(self.agreement) else (1.0,) * len(values)
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


@dataclasses.dataclass(frozen=True, repr=False)
class Suggestion:
    """The candidate that is expected to certify most; ``rf.certify(model, x, **suggestion.settings)`` tries it.

    Attributes:
        settings: keyword arguments for `certify`: the map chosen, and all that `suggest` was told.
        overlap: the expected certified share of the top-k at the radius, mean over the images. Not a proof.
        k, radius: what was asked for.
        pilot: pilot samples per image.
        candidates: all that were tried, best first.
    """

    settings: dict[str, Any]
    overlap: float
    k: int
    radius: float
    pilot: int
    candidates: tuple[Candidate, ...]

    def __repr__(self) -> str:
        lines = [
            f"Suggestion: expected overlap of the top {self.k} at radius {self.radius:g}, "
            f"{self.settings['samples']} samples, from {self.pilot} pilot samples",
            f"{'tau':>7} {'gamma':>7} {'levels':>6} {'overlap':>8} {'radius of half':>15}  method",
        ]
        for candidate in self.candidates:
            overlap, radius = candidate.score
            gamma = "tau" if candidate.gamma is None else f"{candidate.gamma:g}"
            methods = " + ".join(dict.fromkeys(candidate.method))
            lines.append(
                f"{candidate.tau:>7g} {gamma:>7} {candidate.levels:>6} {overlap:>8.3f} {radius:>15.4g}  {methods}"
            )
        agreement = self.candidates[0].agreement
        if (mean := sum(agreement) / len(agreement)) < 0.5:
            lines.append(
                f"Only {100 * mean:.0f} % of the noisy copies have the class that the model gives to the image: the "
                "map would be of another class; a smaller sigma, or target='predicted', helps"
            )
        return "\n".join(lines)


@_model.neutral()
def suggest(
    model: nn.Module,
    x: torch.Tensor,
    k: float,
    radius: float,
    *,
    sigma: float,
    samples: int = 8192,
    pilot: int = 256,
    taus: Sequence[float] = TAUS,
    gammas: Sequence[float | None] = GAMMAS,
    levels: Sequence[int] = LEVELS,
    image_ids: torch.Tensor | Sequence[int] | None = None,
    target: int | Sequence[int] | torch.Tensor | str | None = None,
    explain: str | _model.Explanation = "gradient",
    channel_sum: bool = False,
    seed: int = 0,
    alpha: float = 0.05,
    bound: str = "betting",
    slack: int | None = None,
    second_moment: bool = True,
    retain: int = 2048,
    batch_size: int | str = "auto",
    on_nonfinite: str = "raise",
) -> Suggestion:
    """Which (tau, gamma, levels) is expected to certify the largest overlap, from one set of pilot samples.

    The deflation that `certify` makes is counted in; there are no other weights to choose. The expectation is a
    heuristic, for choosing only: each candidate's counts and second moments are extrapolated from ``pilot`` to
    ``samples`` samples and evaluated nearly as a certificate is. The proof is untouched by the choice, for the
    pilot samples are the last of the noise stream, [2^32 - pilot, 2^32), which `certify` with its default
    ``first_sample`` never reaches. A candidate is judged by the top-k of its own map.

    One forward and backward pass per pilot sample serves all candidates. Memory: per candidate the counts, and the
    packed maps of the pilot samples, of one image.

    Args:
        model, x, sigma, samples, image_ids, target, explain, channel_sum, seed, alpha, bound, slack, second_moment,
            retain, batch_size, on_nonfinite: as for `certify`; they describe the run that is planned.
        k: size of the top-k set: a number of elements in 1..n//2, or a float, their share in (0, 1/2].
        radius: L2 radius, in the units of x.
        pilot: pilot samples per image, 8 to 8192.
        taus, gammas, levels: every combination is a candidate, but for gamma > tau. gamma=None is tau, the map of
            levels=1, which needs no gamma.

    Returns:
        The best candidate on average over the images, its settings, and the table of all.

    Raises:
        As `certify`; ValueError where no candidate is left.
    """
    radius = _check.positive("radius", radius)
    pilot = _check.integer("pilot", pilot, 8, 8192)
    samples = _check.integer("samples", samples, 2, 2**31 - 1)
    retain = _check.integer("retain", retain, 4, 8192)
    maps = _combinations(taus, gammas, levels)
    for _, _, number in maps:
        check_bound(bound, number)
    is_predicted = isinstance(target, str)
    given = named_target(target)
    scored = Map.checked(x, sigma=sigma, explain=explain, target=given, channel_sum=channel_sum)
    clean, _ = clean_prediction(model, x, scored.autocast)
    if is_predicted:
        scored = dataclasses.replace(scored, target=as_target(clean))
    stream = Stream.checked(x, seed, image_ids)
    wanted = [
        Settings.of_map(
            dataclasses.replace(scored, tau=tau, gamma=gamma, levels=number, target=None),
            x,
            planned_samples=(samples,),
            alpha=alpha,
            bound=bound,
            slack=slack,
            second_moment=second_moment,
            retain=retain if second_moment else 0,
            on_nonfinite=on_nonfinite,
        )
        for tau, gamma, number in maps
    ]
    k = set_size(k, wanted[0].n, wanted[0].n // 2)

    sampler = prepared(model, x, scored, stream)
    _model.check_classes(sampler.classes)
    sampler.set_batch_size(batch_size, pilot * x.shape[0], largest=pilot)  # batches hold one image
    found: list[list[Expected]] = [[] for _ in maps]
    agreement = []
    for image in range(x.shape[0]):
        pilots = _pilot(sampler, image, wanted, pilot)
        votes = pilots[0].class_counts
        assert votes is not None
        # A class that the user chose is explained whatever the copies' own.
        agreement.append(
            1.0 if given is not None else float(votes[0, clean[image]]) / pilot if clean[image] >= 0 else 0.0
        )
        for row, settings, seen in zip(found, wanted, pilots, strict=True):
            row.append(expected(seen, settings))
    candidates = sorted(
        (_judged(row, settings, k, radius, agreement) for row, settings in zip(found, wanted, strict=True)),
        key=lambda candidate: candidate.score,
        reverse=True,
    )
    best = candidates[0]
    told = {
        "sigma": sigma,
        "tau": best.tau,
        "gamma": best.gamma,
        "levels": best.levels,
        "samples": samples,
        "image_ids": image_ids,
        "target": target,
        "explain": explain,
        "channel_sum": channel_sum,
        "seed": seed,
        "alpha": alpha,
        "bound": bound,
        "slack": slack,
        "second_moment": second_moment,
        "retain": retain,
        "batch_size": batch_size,
        "on_nonfinite": on_nonfinite,
    }
    return Suggestion(told, best.score[0], k, radius, pilot, tuple(candidates))


def _combinations(
    taus: Sequence[float], gammas: Sequence[float | None], levels: Sequence[int]
) -> list[tuple[float, float | None, int]]:
    """All (tau, gamma, levels) that make sense, once each. gamma=tau leaves two values, whatever the levels."""
    maps: dict[tuple[float, float | None, int], None] = {}
    for number in levels:
        number = _check.integer("levels", number, 1, 15)
        for tau in taus:
            _check.fractions(tau, None)
            for gamma in (None,) if number == 1 else gammas:
                if gamma is not None:
                    _check.fractions(1.0, gamma)
                if gamma is None or gamma == tau:
                    maps[tau, None, 1] = None
                elif gamma < tau:
                    maps[tau, gamma, number] = None
    if not maps:
        raise ValueError(
            f"taus, gammas, levels: got {list(taus)}, {list(gammas)}, {list(levels)}, which leave no candidate "
            "(gamma may not exceed tau)"
        )
    return list(maps)


def _pilot(sampler: Sampler, image: int, wanted: Sequence[Settings], pilot: int) -> list[Certificate]:
    """The pilot samples of one image as every candidate counts them."""
    first_sample = _LAST_SAMPLE - pilot
    states = [
        State(
            dataclasses.replace(settings, planned_samples=(pilot,), retain=pilot if settings.second_moment else 0),
            1,
            sampler.classes,
            sampler.x.device,
            first_sample=first_sample,
            keep_samples=settings.second_moment,
        )
        for settings in wanted
    ]
    while (done := states[0].done[0]) < pilot:
        count = min(sampler.batch_size, pilot - done)
        for scored in sampler.run([Segment(image, first_sample + done, count)]):
            alone = dataclasses.replace(scored, segment=dataclasses.replace(scored.segment, image=0))
            for state in states:
                state.add(alone)
    return [state.certificate(sampler.batch_size) for state in states]


def _judged(
    planned: Sequence[Expected], settings: Settings, k: int, radius: float, agreement: Sequence[float]
) -> Candidate:
    """A candidate with what it is expected to certify for each image."""
    overlaps, methods, radii = zip(*(image.judged(k, radius) for image in planned), strict=True)
    assert settings.tau is not None
    assert settings.levels is not None
    return Candidate(settings.tau, settings.gamma, settings.levels, overlaps, radii, methods, tuple(agreement))
