"""Whether logits and scores are a fixed function of each row: judged per class and per row.

A class that is masked by a large negative number, or by -inf, must not hide what the others do. So differences are
measured in the units of the logits that compete, and the gradient, which no mask enlarges, is compared as well.
"""

from __future__ import annotations

import torch

from robattr_fast.errors import ModelError

GRADIENT = 0.05
"""Relative, L2 norm: so far gradients of one row may differ. Rounding moves them by as much as the share of units that
it switches at the kink of their ReLU; dropout and statistics of the batch move them by a large part of their norm."""

# Of the logits that compete, RMS, and of the gradient: further off, another dtype makes too much of another model. One
# logit of many may be off by a few times as much.
_NEARLY, _WORST, _NEARLY_GRADIENT = 0.02, 4, 0.5
_ROUNDING = 8.0  # units of the last place of a logit of its own


def competing(logits: torch.Tensor) -> torch.Tensor:
    """bool [classes]: those that are not the same number in every row of logits [N, classes] of different samples."""
    if len(logits) == 1:
        return torch.ones_like(logits[0], dtype=torch.bool)
    return (logits != logits[0]).any(dim=0)


def apart(ours: torch.Tensor, known: torch.Tensor, among: torch.Tensor, eps: float) -> tuple[float, float]:
    """How far logits ``ours`` are from ``known``, both [N, classes]: the largest over rows and classes, and the RMS.

    In units of what competes in a row: the larger of |largest logit| and the lower quartile of the finite |logits| of
    the classes ``among`` (`competing`). Of each difference, what rounding by ``eps`` makes of a logit of its own size
    is taken off. Infinite where one side is infinite and the other is not; NaN is judged elsewhere.
    """
    worst, squares, count = 0.0, 0.0, 0
    for a, b in zip(ours.double(), known.double(), strict=True):
        differ = ~((a == b) | a.isnan() | b.isnan())
        if not bool((a.isfinite() & b.isfinite())[differ].all()):
            return float("inf"), float("inf")
        finite = b.isfinite()
        count += int((among & finite).sum())
        if not bool(differ.any()):
            continue
        unit = float(b[finite].max().abs())
        if bool((among & finite).any()):
            unit = max(unit, float(torch.quantile(b[among & finite].abs(), 0.25)))
        excess = (a - b).abs()[differ] - _ROUNDING * eps * b.abs()[differ]
        excess = excess.clamp(min=0) / max(unit, torch.finfo(torch.float64).tiny)
        worst, squares = max(worst, float(excess.max())), squares + float(excess.square().sum())
    return worst, (squares / max(count, 1)) ** 0.5


def gradients_apart(ours: torch.Tensor, known: torch.Tensor) -> float:
    """Largest over rows of the relative difference of gradients [N, *S], L2 norm; rows with NaN or inf are passed."""
    a, b = ours.double().flatten(1), known.double().flatten(1)
    sound = (a.isfinite() & b.isfinite()).all(dim=1)
    if not bool(sound.any()):
        return 0.0
    a, b = a[sound], b[sound]
    scale = torch.maximum(a.norm(dim=1), b.norm(dim=1)).clamp(min=torch.finfo(torch.float64).tiny)
    return float(((a - b).norm(dim=1) / scale).max())


def other_map(
    ours: tuple[torch.Tensor, torch.Tensor],
    known: tuple[torch.Tensor, torch.Tensor],
    *,
    eps: float,
    allowed: float,
    coarser: bool,
) -> str | None:
    """What differs by more than rounding between two ways, each (scores, logits); None: nothing does.

    eps: of the dtype. allowed: relative difference of logits that rounding may make. coarser: ``ours`` in a dtype of
    fewer digits, which may differ by more.
    """
    worst, usual = apart(ours[1], known[1], competing(known[1]), eps)
    most = _NEARLY if coarser else allowed
    if not (usual <= most and worst <= (_WORST * most if coarser else most)):
        return f"logits (by {worst:.1e} of those that compete)"
    same = (ours[1].argmax(dim=1) == known[1].argmax(dim=1)).nonzero()[:, 0]
    turned = gradients_apart(ours[0][same], known[0][same])
    if turned > (_NEARLY_GRADIENT if coarser else max(GRADIENT, 4 * most)):
        return f"gradients (by {turned:.1e} of their norm)"
    return None


def check_fixed(
    alone: tuple[torch.Tensor, torch.Tensor], mixed: tuple[torch.Tensor, torch.Tensor], half_digits: float, eps: float
) -> None:
    """ModelError unless a sample has the same logits and scores in every row of a batch and beside other samples.

    Args:
        alone, mixed: (scores [N, *S], logits [N, classes]) of batches: one sample in all rows, and that sample in the
            first row with others in the rest.
        half_digits: tolerance of logits in the units of `apart`.
        eps: of the coarsest dtype in which the model computes.
    """
    among = competing(mixed[1])
    rows = alone[1]
    slope = max(GRADIENT, 4 * half_digits)
    first = rows[:1].expand_as(rows)
    far, _ = apart(rows, first, among, eps)
    turned = gradients_apart(alone[0], alone[0][:1].expand_as(alone[0])) if _one_class(rows) else 0.0
    if far > half_digits or turned > slope:
        raise ModelError(
            f"model: equal rows of one batch get different logits or gradients ({_by(far, turned)}): it is random, as "
            "by dropout that is active in eval mode (torch.nn.functional.dropout without training=self.training)"
        )
    far, _ = apart(mixed[1][:1], rows[:1], among, eps)
    same_class = _one_class(torch.cat([mixed[1][:1], rows[:1]]))
    turned = gradients_apart(mixed[0][:1], alone[0][:1]) if same_class else 0.0
    if far > half_digits or turned > slope:
        raise ModelError(
            f"model: the logits or gradients of an input change ({_by(far, turned)}) with the other rows of the batch, "
            "or from call to call: a normalisation by the statistics of the batch, or randomness; expected a fixed "
            "function of each row"
        )


def _one_class(logits: torch.Tensor) -> bool:
    """Whether all rows explain the same class: where two logits tie, rounding decides."""
    classes = logits.argmax(dim=1)
    return bool((classes == classes[0]).all())


def _by(far: float, turned: float) -> str:
    return f"by {far:.1e} of the competing logits, {turned:.1e} of the gradient"


def check_repeatable(once: torch.Tensor, again: torch.Tensor, half_digits: float) -> None:
    """ModelError unless a callable gives one sample the same scores twice; NaN is judged later."""
    difference = float((once.double() - again.double()).nan_to_num().norm())
    if difference > half_digits * float(once.double().nan_to_num().norm()):
        raise ModelError(
            f"explain: the callable gives one sample different scores from call to call, or from row to row "
            f"of a batch (by {difference:.1e}); expected a fixed function of each row"
        )
