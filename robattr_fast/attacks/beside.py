"""What an adversary reaches, beside what is certified: an upper and a lower bound on the same share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from robattr_fast import model as _model
from robattr_fast.attacks.attribution import AttributionPGD
from robattr_fast.attacks.geometry import Bound
from robattr_fast.attacks.maps import smoothgrad_of_own_classes
from robattr_fast.attacks.objectives import State, TopK
from robattr_fast.attributions import smoothgrad
from robattr_fast.certificates import Certificate, certify
from robattr_fast.metrics.overlap import top_k
from robattr_fast.ops import _check
from robattr_fast.sampling.arguments import check_images

_SEEDS = (
    0x6A09E667F3BCC908,
    0xBB67AE8584CAA73B,
)  # of the check and of the noise floor: not those of certificate or attack


@dataclass(frozen=True)
class Beside:
    """Shares of the displayed top-k, at each of R radii and for each of B images, float64.

    Attributes:
        radii: L2, in the units of the images.
        certified: [R, B], at least so much stays, whatever the perturbation.
        attacked: [R, B], so much is left at the point that was found, by a map of fresh samples.
        attacked_most: [R, B], the most that can be left there: by bounds on every element of the map at that point,
            which hold together with probability 1 - alpha, for all radii of an image.
        noise_floor: [B], so much is left without an adversary when the map is sampled anew.
        images: [R, B, *S], the points.
        samples: of the map at each point.
        alpha: error probability of ``attacked_most`` per image; the certificate has its own.
    """

    radii: tuple[float, ...]
    certified: torch.Tensor
    attacked: torch.Tensor
    attacked_most: torch.Tensor
    noise_floor: torch.Tensor
    images: torch.Tensor
    samples: int
    alpha: float

    @property
    def gap(self) -> torch.Tensor:
        """attacked - certified, [R, B]: what a better attack or a better proof could still close."""
        return self.attacked - self.certified

    @property
    def crossed(self) -> torch.Tensor:
        """bool [R, B]: provably less is left than is certified. Beyond the error probabilities: a fault of ours."""
        return self.attacked_most < self.certified


class _Displayed(TopK):
    """Pushes down the elements that the certificate displays, not those of a map sampled anew."""

    def __init__(self, top: torch.Tensor) -> None:
        super().__init__(int(top.sum()))
        object.__setattr__(self, "top", top)

    def prepare(self, before: torch.Tensor) -> State:
        return {"top": self.top[None].to(before.device)}  # type: ignore[attr-defined]


def beside(
    certificate: Certificate,
    model: nn.Module,
    x: torch.Tensor,
    *,
    k: int,
    radii: Sequence[float],
    samples: int = 1024,
    attack_samples: int = 64,
    steps: int = 10,
    restarts: int = 1,
    bounds: tuple[Bound, Bound] | None = None,
    alpha: float = 0.05,
    **changes: Any,
) -> Beside:
    """Attack the very map that is certified, at the certificate's radii.

    The attack is adaptive: it knows the map's sigma, tau, gamma, levels and classes, pushes down the displayed
    elements, climbs along the derivative of a soft top-k of noisy gradients (and of softplus for ReLU), takes fresh
    noise at every step, and keeps the point at which the sparsified map itself has lost most. What it found is then
    judged by a certificate of its own, from samples that nobody has seen.

    Args:
        certificate: of the gradient map of these images, each element by itself (no channel_sum, no autocast).
        model: the certified one.
        x: [B, *S], the certified images.
        k: size of the top set, as in `Certificate.overlap`.
        radii: L2.
        samples: noisy samples of the map at each point.
        attack_samples: noisy samples of one step.
        steps, restarts, bounds: of the attack; bounds=None, since a certificate speaks of the whole ball.
        alpha: see `Beside.attacked_most`.
        changes: more arguments of `AttributionPGD`.

    Raises:
        TypeError, ValueError: a bad argument; the model or an image is not the certified one.
    """
    check_images(x)
    settings = certificate.settings
    _check.integer("samples", samples, 1, 2**31 - 1)
    _check_same(certificate, model, x)
    wanted = sorted(float(radius) for radius in radii)
    share = certificate.overlap(k, wanted).share
    found: list[list[torch.Tensor]] = []
    floor = []
    for image in range(len(x)):
        target = None if settings.target is None else settings.target[image]
        own = x[image : image + 1]
        top = top_k(certificate.map[image].flatten()[None], k)[0]
        explain = functools.partial(
            smoothgrad_of_own_classes if target is None else smoothgrad,
            kind="sparsified",
            sigma=settings.sigma,
            samples=attack_samples,
            tau=settings.tau,
            gamma=settings.gamma,
            levels=settings.levels,
        )
        attack = AttributionPGD(
            model, explain, _Displayed(top), steps=steps, restarts=restarts, bounds=bounds, **{"keep": None} | changes
        )
        sweep = attack.sweep(own, wanted, target)
        judge = functools.partial(_judged, certificate, model, top=top, samples=samples, image=image)
        floor.append(judge(own, seed=_SEEDS[1], alpha=alpha)[0])
        points = torch.stack([result.images[0] for result in sweep.results])
        shares = [judge(result.images, seed=_SEEDS[0], alpha=alpha / len(wanted)) for result in sweep.results]
        found.append([points, torch.tensor([left for left, _ in shares]), torch.tensor([most for _, most in shares])])
    return Beside(
        radii=tuple(wanted),
        certified=share,
        attacked=torch.stack([one[1] for one in found], dim=1).double(),
        attacked_most=torch.stack([one[2] for one in found], dim=1).double(),
        noise_floor=torch.tensor(floor, dtype=torch.float64),
        images=torch.stack([one[0] for one in found], dim=1),
        samples=samples,
        alpha=alpha,
    )


def _check_same(certificate: Certificate, model: nn.Module, x: torch.Tensor) -> None:
    settings = certificate.settings
    if settings.explain not in (None, "gradient") or settings.channel_sum or settings.autocast is not None:
        got = f"explain={settings.explain!r}, channel_sum={settings.channel_sum}, autocast={settings.autocast!r}"
        raise ValueError(f"certificate: got {got}, expected one of the gradient, element by element, without autocast")
    if settings.tau is None:
        raise ValueError("certificate: got one that does not tell its tau, expected one that certify made")
    if (len(certificate), *settings.shape) != tuple(x.shape):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected {(len(certificate), *settings.shape)}")
    if settings.model_fingerprint not in (None, _model.fingerprint(model)):
        raise ValueError("model: got another one than was certified")
    hashes = settings.input_hashes or ()
    for image, known in enumerate(hashes):
        if _model.input_hash(x[image]) != known:
            raise ValueError(f"x: image {image} is another one than was certified")


def _judged(
    certificate: Certificate,
    model: nn.Module,
    point: torch.Tensor,
    *,
    top: torch.Tensor,
    samples: int,
    image: int,
    seed: int,
    alpha: float,
) -> tuple[float, float]:
    """(share of ``top`` [n] that is left at point [1, *S], the most that can be left, but for alpha)."""
    settings = certificate.settings
    assert settings.tau is not None  # of _check_same
    there = certify(
        model,
        point,
        sigma=settings.sigma,
        tau=settings.tau,
        gamma=settings.gamma,
        levels=settings.levels,
        samples=samples,
        target=None if settings.target is None else settings.target[image],
        seed=seed,
        alpha=alpha,
        bound="hoeffding" if settings.levels is None else "betting",
        second_moment=False,
        batch_size=min(64, samples),
    )
    k = int(top.sum())
    left = top_k(there.map.flatten(1), k)[0] & top
    kindest = torch.where(top, there.upper.flatten(1)[0], there.lower.flatten(1)[0])
    # Elements outside that are above one of ours whatever the bounds leave open; ties are ours.
    order = torch.where(top, kindest, torch.nextafter(kindest, torch.full_like(kindest, -1.0)))
    most = top_k(order[None], k)[0] & top
    return float(left.sum()) / k, float(most.sum()) / k
