"""Projected gradient descent on the class (Madry et al. 2018): the same ascent, on the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from robattr_fast import model as _model
from robattr_fast.attacks.ascent import Judged, Plan, ascend
from robattr_fast.attacks.geometry import Ball, Bound, check_start, default_step, image_ids
from robattr_fast.attributions.contract import recording
from robattr_fast.errors import NonFiniteError
from robattr_fast.sampling.arguments import check_images, check_target

LOSSES = ("cross_entropy", "margin")


def pgd(
    model: nn.Module,
    x: torch.Tensor,
    y: int | Sequence[int] | torch.Tensor,
    *,
    norm: str = "linf",
    eps: float,
    steps: int = 40,
    step_size: float | None = None,
    start: str | torch.Tensor = "ball",
    restarts: int = 1,
    bounds: tuple[Bound, Bound] | None = (0.0, 1.0),
    targeted: bool = False,
    loss: str = "cross_entropy",
    last: bool = False,
    seed: int = 0,
    batch_size: int = 64,
) -> torch.Tensor:
    """Images near x that the model takes for something else than y.

    Args:
        model: returns logits [N, classes]. It is attacked in eval mode on a private copy, so that this can be called in
            the middle of training; gradients of its parameters are left alone.
        x: [B, *S] float images within ``bounds``.
        y: true class or classes [B]; with ``targeted`` those to reach.
        norm, eps: "l2" or "linf", and the radius of the ball.
        steps, step_size: moves, and their length; None: 2.5 eps / steps.
        start: "ball" (uniform in it), "sphere", "zero" (x itself), or points [B, *S].
        restarts: starts per image; the best counts.
        bounds: (low, high), numbers or tensors; None: no box.
        loss: "cross_entropy", or "margin": the largest other logit less that of y, whose gradient does not vanish where
            the model is sure.
        last: return the last point of the (first) restart instead of that of the largest loss; so do foolbox and
            torchattacks.
        seed: of the starts. An image's own depend on its values, not on its place.
        batch_size: rows of a pass.

    Returns:
        [B, *S] in x's dtype.

    Raises:
        TypeError, ValueError: a bad argument. ModelError: no logits. NonFiniteError: a NaN logit; it names the image.
    """
    check_images(x)
    check_start(start)
    if start == "curved":
        raise ValueError("start: got 'curved', expected 'ball', 'sphere', 'zero' or points [B, *S]")
    if loss not in LOSSES:
        raise ValueError(f"loss: got {loss!r}, expected one of {', '.join(LOSSES)}")
    ball = Ball(norm, eps, bounds)
    ball.check(x)
    plan = Plan(
        steps=steps,
        step_size=default_step(eps, steps) if step_size is None else step_size,
        restarts=restarts,
        start=start,
        seed=seed,
        batch_size=batch_size,
    )
    classes = check_target(y, x)
    if classes is None:
        raise TypeError("y: got None, expected a class or one per image")
    with recording():
        images = x.detach().clone()
        with _evaluating(model):
            copy = _model.private_copy(model)
        problem = _Classes(copy, classes.clone(), loss, -1.0 if targeted else 1.0)
        known = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
        found = ascend(problem, images, image_ids(images), ball, plan, known=known)
        each = (len(x), restarts, *x.shape[1:])
        if last:
            return found.last.view(each)[:, 0]
        chosen = found.measure.view(len(x), restarts).argmax(dim=1)
        return found.best.view(each)[torch.arange(len(x), device=x.device), chosen]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and each of its modules back in its own."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


class _Classes:
    """The loss of a model at points around images, as a problem for `ascend`."""

    def __init__(self, model: nn.Module, classes: torch.Tensor, loss: str, sign: float) -> None:
        self.model, self.classes, self.loss, self.sign = model, classes, loss, sign

    def judge(self, points: torch.Tensor, images: torch.Tensor, step: int, gradient: bool) -> Judged:
        leaf = points.detach().clone().requires_grad_(gradient)
        logits = _model.forward(self.model, leaf)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        classes = self.classes[images]
        if self.loss == "cross_entropy":
            value = self.sign * F.cross_entropy(logits, classes, reduction="none")
        else:
            own = F.one_hot(classes, logits.shape[1]).bool()
            value = self.sign * (logits.masked_fill(own, -torch.inf).amax(dim=1) - logits[own])
        unknown = value.detach().isnan()
        if bool(unknown.any()):
            raise NonFiniteError(f"model: image {int(images[unknown][0])} has a NaN logit")
        found = torch.autograd.grad(value.sum(), leaf)[0] if gradient else None
        return Judged(value.detach().double(), torch.ones_like(unknown), found)
