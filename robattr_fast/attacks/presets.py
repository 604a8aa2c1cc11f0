"""Attacks with the settings they were published with. Radii and steps are in the units of the images given."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from robattr_fast.attacks.attribution import AttributionPGD
from robattr_fast.attacks.maps import Attribution
from robattr_fast.attacks.objectives import Distance, MassCenter, Measured, Objective, Region, TargetMap, TopK
from robattr_fast.attacks.surrogate import Softplus
from robattr_fast.attributions import integrated_gradients

GOALS = ("topk", "mass_center", "target")


def ghorbani(
    model: nn.Module,
    goal: str = "topk",
    *,
    eps: float = 8 / 255,
    k: int = 1000,
    mask: torch.Tensor | None = None,
    explain: str | Attribution = "gradient",
    **changes: Any,
) -> AttributionPGD:
    """Ghorbani, Abid, Zou (2019): sign steps of .5/255 within linf eps, 300 of them, from the image itself.

    Directions by softplus of beta 1; of the points with the image's label the best by the goal's measure is kept.
    (Theirs walks on through points with another label; here such a step is halved.)

    Args:
        model: its images in [0, 1].
        goal: "topk": overlap of the k largest pixels; "mass_center"; "target": mass in ``mask``, bool [H, W].
        explain: "gradient" or "ig" (100 right Riemann steps; they begin at the mean image, here at 0).
        changes: arguments of `AttributionPGD` to replace.
    """
    goals: dict[str, Objective] = {"topk": TopK(k, channels="sum"), "mass_center": MassCenter()}
    if goal not in GOALS:
        raise ValueError(f"goal: got {goal!r}, expected one of {', '.join(GOALS)}")
    if (goal == "target") != (mask is not None):
        raise ValueError(f"mask: got {'None' if mask is None else 'one'} for goal {goal!r}, expected one for 'target'")
    if mask is not None:
        goals["target"] = Region(mask, channels="sum")
    settings: dict[str, Any] = {
        "norm": "linf",
        "eps": eps,
        "steps": 300,
        "step_size": 0.5 / 255,
        "restarts": 1,
        "start": "zero",
        "surrogate": Softplus(1.0),
        "keep": "label",
    }
    return AttributionPGD(model, _riemann(explain), goals[goal], **settings | changes)


def levine_l2(
    model: nn.Module, k: int, eps: float, *, explain: str | Attribution = "gradient", **changes: Any
) -> AttributionPGD:
    """Levine, Singla, Feizi (2019): L2, 5 restarts of 20 steps from random points of norm eps.

    The first step of a restart has length eps, the others are of its scale: as long as their gradients are. At most 100
    starts are drawn until one has the image's label; a step that loses it is halved, up to 200 times. K = n / 4 and
    radii of .006, .02, .2 (of pixels in [0, 1]) are theirs on CIFAR-10. Their directions come from another network,
    trained with softplus; here they come from the same weights, which is the stronger attack.
    """
    settings: dict[str, Any] = {
        "norm": "l2",
        "eps": eps,
        "steps": 20,
        "step_size": eps,
        "restarts": 5,
        "start": "sphere",
        "tries": 100,
        "halvings": 200,
        "scale": "first",
        "keep": "label",
    }
    return AttributionPGD(model, explain, TopK(k), **settings | changes)


def dombrowski(
    model: nn.Module, target_map: torch.Tensor, *, explain: str | Attribution = "gradient", **changes: Any
) -> AttributionPGD:
    """Dombrowski et al. (2019): make the map look like ``target_map`` [H, W] and keep the output, without a ball.

    Adam with learning rate 2e-4 for 1500 steps, softplus of beta 10 growing to 100. Their loss is 1e11 times the mean
    squared error of the maps and 1e6 times that of the probabilities; here the second has the same share of the first.
    The size of what comes out is in the result.
    """
    if not isinstance(target_map, torch.Tensor) or target_map.dim() < 2:
        raise ValueError("target_map: expected a tensor [H, W], or [B, H, W]")
    objective = TargetMap(target_map, channels="sum")
    settings: dict[str, Any] = {
        "norm": "l2",
        "eps": float("inf"),
        "steps": 1500,
        "step_size": 2e-4,
        "restarts": 1,
        "start": "zero",
        "rule": "adam",
        "surrogate": Softplus((10.0, 100.0)),
        "keep": "label",
        "output_weight": 1e-5,
    }
    return AttributionPGD(model, explain, objective, **settings | changes)


def rar_topk(
    model: nn.Module, k: int = 200, *, eps: float = 0.3, explain: str | Attribution = "ig", **changes: Any
) -> AttributionPGD:
    """Chen et al. (2019), as on MNIST: linf .3, 100 sign steps of .01, integrated gradients of 100 steps from black.

    Directions by softplus of beta 1, kept is the point of the lowest Kendall correlation with the image's label.
    """
    settings: dict[str, Any] = {
        "norm": "linf",
        "eps": eps,
        "steps": 100,
        "step_size": 0.01,
        "restarts": 1,
        "start": "zero",
        "surrogate": Softplus(1.0),
        "keep": "label",
    }
    objective = Measured(TopK(k, channels="sum"), "kendall", channels="sum")
    return AttributionPGD(model, _riemann(explain), objective, **settings | changes)


def random_sphere(
    model: nn.Module,
    eps: float,
    *,
    objective: Objective | None = None,
    explain: str | Attribution = "gradient",
    **changes: Any,
) -> AttributionPGD:
    """A random point of L2 norm eps, the first of at most 100 with the image's label: what chance alone does."""
    settings: dict[str, Any] = {
        "norm": "l2",
        "eps": eps,
        "steps": 0,
        "restarts": 1,
        "start": "sphere",
        "tries": 100,
        "keep": "label",
    }
    return AttributionPGD(model, explain, Distance() if objective is None else objective, **settings | changes)


def random_sign(
    model: nn.Module,
    eps: float = 8 / 255,
    *,
    objective: Objective | None = None,
    explain: str | Attribution = "gradient",
    **changes: Any,
) -> AttributionPGD:
    """Ghorbani's random attack: a walk of 300 random sign steps of .5/255 within linf eps, its best point kept."""
    settings: dict[str, Any] = {
        "norm": "linf",
        "eps": eps,
        "steps": 300,
        "step_size": 0.5 / 255,
        "restarts": 1,
        "start": "zero",
        "rule": "random",
        "keep": "label",
    }
    return AttributionPGD(model, explain, Distance() if objective is None else objective, **settings | changes)


def _riemann(explain: str | Attribution) -> str | Attribution:
    if explain in ("ig", "integrated_gradients"):
        return functools.partial(integrated_gradients, steps=100, rule="riemann_right")
    return explain
