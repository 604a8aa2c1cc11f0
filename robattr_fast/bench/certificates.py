"""Certificates of one image at growing numbers of samples: how many a method needs to reach what another one has.

Samples are really taken, once: the certificate of q samples is the one that `certify` makes when it is asked for q.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robattr_fast import model
from robattr_fast.certificates import Certificate
from robattr_fast.certificates.engine.clean import clean_prediction
from robattr_fast.certificates.engine.counting import Eager
from robattr_fast.certificates.engine.environment import environment
from robattr_fast.certificates.engine.state import State
from robattr_fast.certificates.moments.summary import Summary
from robattr_fast.certificates.settings import Settings
from robattr_fast.errors import CertificateFileError
from robattr_fast.inputs import images
from robattr_fast.reference.noisy_samples import STREAM_VERSION
from robattr_fast.sampling.batch import next_batch
from robattr_fast.sampling.map import Map, Stream
from robattr_fast.sampling.preparation import prepared

SIGMA, TAU, ALPHA, RETAIN = 0.2, 0.1, 0.05, 2048
RADIUS, K_SHARE, PLANNED = 0.06, 0.2, 8192
"""Of the headline: what is asked of every certificate."""

_FIRST_LOOK, _GROWTH = 256, 2 ** (1 / 6)
_OF_A_RUN = (
    *("planned_samples", "intervals", "batch_size", "memory_format", "folded"),
    *("clean_class", "clean_score", "model_identity"),
)
"""Settings in which certificates at looks may differ from each other, or from another run's."""

METHODS = ("published", "marginal", "second-moment")
"""The published bound (Hoeffding, union over all elements, all of alpha); T3 and T4 by betting; T7."""


def looks(planned: int = PLANNED) -> list[int]:
    """Numbers of samples, growing by a sixth of an octave, in multiples of 64 so that no usual batch is cut."""
    found, look = [], float(_FIRST_LOOK)
    while look < planned:
        found.append(64 * round(look / 64))
        look *= _GROWTH
    return [*dict.fromkeys(found), planned]


def name_of(image: str, samples: int) -> str:
    """Of the file with the certificate of so many samples."""
    return f"{image}.{samples:05d}.safetensors"


def overlaps(cert: Certificate) -> dict[str, float]:
    """The share of the top-K that each of METHODS certifies at RADIUS, from the same counts, each method by itself."""
    k = int(K_SHARE * cert.settings.n)
    counts = cert.counts
    assert counts is not None

    def of_counts(**evaluation: Any) -> float:
        same = Certificate.from_counts(counts, cert.samples, sigma=cert.settings.sigma, alpha=ALPHA, **evaluation)
        return float(same.overlap(k, RADIUS, method="marginal").share[0])

    return {
        "published": of_counts(bound="hoeffding", slack=0),
        "marginal": of_counts(bound="betting", slack=None),
        "second-moment": float(cert.overlap(k, RADIUS, method="second-moment").share[0])
        if cert.has_second_moments
        else 0.0,
    }


def _settings(module: nn.Module, x: torch.Tensor) -> Settings:
    """Of the certificates of image x [C, H, W], but for _OF_A_RUN."""
    return Settings.of_map(
        Map(sigma=SIGMA, tau=TAU, gamma=TAU),
        x[None],
        seed=0,
        stream_version=STREAM_VERSION,
        image_ids=(images.image_id(x),),
        alpha=ALPHA,
        second_moment=True,
        retain=RETAIN,
        model_fingerprint=model.fingerprint(module),
        input_hashes=(model.input_hash(x),),
        batch_images=1,
        **environment(x.device),
    )


def find(folder: Path, module: nn.Module, x: torch.Tensor) -> dict[int, Certificate]:
    """By number of samples the certificates of image x [C, H, W] and module in a folder that fit."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"certificates: got {folder}, takes a folder")
    files = sorted(folder.glob("*.safetensors"))
    wanted = _settings(module, x)
    found = {}
    for file in files:
        try:
            cert = Certificate.load(file)
        except CertificateFileError:
            continue  # not ours to judge: it is not used
        settings = cert.settings
        same = dataclasses.replace(settings, **{name: getattr(wanted, name) for name in _OF_A_RUN}) == wanted
        if len(cert) == 1 and same and settings.planned_samples == (int(cert.samples[0]),):
            found[int(cert.samples[0])] = cert
    return dict(sorted(found.items()))


def make(
    folder: Path,
    name: str,
    module: nn.Module,
    x: torch.Tensor,
    *,
    planned: int = PLANNED,
    told: Callable[[str], None] = lambda what: None,
) -> dict[int, Certificate]:
    """Sample image x [C, H, W] once and keep the certificate of every look as a file of the folder."""
    asked = _settings(module, x)
    assert asked.image_ids is not None
    sampler = prepared(module, x[None], asked.map(), Stream(0, asked.image_ids))
    sampler.set_batch_size("auto", planned)
    clean_class, clean_score = clean_prediction(module, x[None], None)
    settings = dataclasses.replace(
        asked,
        planned_samples=(planned,),
        folded=sampler.folded,
        memory_format=sampler.memory_format,
        clean_class=clean_class,
        clean_score=clean_score,
        model_identity={"first": model.first_fingerprint(module), "behaviour": sampler.behaviour(None)},
    )
    # A run that was planned to end at a look divides its samples into other blocks: all of them are kept.
    state = State(settings, 1, sampler.classes, x.device, keep_samples=True)
    counting = Eager(sampler, state)
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for look in looks(planned):
        while segments := next_batch(state.done, [look], 0, sampler.batch_size):
            for _ in counting(segments):
                pass
            told(f"{name}: {state.done[0]} of {planned} samples")
        so_far = state.certificate(sampler.batch_size, moments=False)
        planned_here = dataclasses.replace(so_far.settings, planned_samples=(look,))
        known = Summary.of_rows(state.retained[0].rows(), look, RETAIN, 1, planned_here.n, 0)
        summary, directions = known.to_tensors()
        held = {"gram_summary": summary[None], "directions": directions[None]}
        found[look] = Certificate(**so_far.tensors, **held, settings=planned_here)
        found[look].save(folder / name_of(name, look))
    return found


def reached(curve: dict[int, dict[str, float]], method: str, share: float) -> int | None:
    """The least number of samples with which a method certifies the share; None if none of these does."""
    return next((samples for samples, shares in sorted(curve.items()) if shares[method] >= share), None)
