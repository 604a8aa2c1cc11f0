"""The logits in what a model returns."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from robattr_fast.errors import ModelError

_WRAPPER = "class Logits(torch.nn.Module): __init__ keeps the model as self.net, forward(self, x) returns "


def logits_in(returned: object) -> tuple[object, str]:
    """(the logits, where they were): "" for a tensor, else ".logits", "['logits']" or "[0]" of a single element."""
    if isinstance(returned, torch.Tensor):
        return returned, ""
    if isinstance(getattr(returned, "logits", None), torch.Tensor):
        return returned.logits, ".logits"  # type: ignore[attr-defined]
    if isinstance(returned, Mapping) and isinstance(returned.get("logits"), torch.Tensor):
        return returned["logits"], "['logits']"
    if isinstance(returned, tuple | list) and len(returned) == 1:
        return returned[0], "[0]"
    return returned, ""


def checked_logits(returned: object, batch: torch.Tensor) -> torch.Tensor:
    """What a model returned for a batch [N, *S], if it has floating-point logits [N, classes]; else ModelError."""
    logits, _ = logits_in(returned)
    if not isinstance(logits, torch.Tensor):
        raise ModelError(
            f"model: it returned {type(logits).__name__}, expected one tensor of logits [{batch.shape[0]}, classes], "
            f"or .logits or ['logits'] that is one; wrap it: {_WRAPPER}{_line(logits, batch)}"
        )
    if logits.dim() != 2 or logits.shape[0] != batch.shape[0]:
        remedy = ""
        if logits.dim() > 2 and logits.shape[0] == batch.shape[0]:
            remedy = f"; wrap it: {_WRAPPER}self.net(x).flatten(2).mean(2), or what else makes one number per class"
        elif logits.dim() == 1 and logits.shape[0] == batch.shape[0]:
            remedy = f"; a score whose sign is the class: {_WRAPPER}{_SIGNED.replace('z', 'z[:, None]')}"
        raise ModelError(
            f"model: it returned shape {tuple(logits.shape)}, expected logits [{batch.shape[0]}, classes]{remedy}"
        )
    if not logits.is_floating_point():
        raise ModelError(f"model: it returned dtype {logits.dtype}, expected floating-point logits")
    return logits


_SIGNED = "torch.cat([-z, z], 1) / 2 of z = self.net(x)"


def check_classes(classes: int) -> None:
    """ModelError for a single logit, whose largest is always the first: its class would be 0 whatever the input."""
    if classes == 1:
        raise ModelError(
            "model: it returned logits [N, 1], expected two classes or more: the class of a single score is its sign. "
            f"Wrap it: {_WRAPPER}{_SIGNED}, so that class 1 is the positive one"
        )


def _line(returned: object, batch: torch.Tensor) -> str:
    """The expression that takes logits out of what a model returns."""
    fits = [f"self.net(x){where}" for where, value in _parts(returned) if _fits(value, batch)]
    parts = [f"self.net(x){where}" for where, value in _parts(returned) if isinstance(value, torch.Tensor)]
    return " or ".join((fits or parts)[:4]) or "the tensor of logits in self.net(x)"


def _fits(value: object, batch: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and len(value) == len(batch)


def _parts(returned: object) -> list[tuple[str, object]]:
    if isinstance(returned, Mapping):
        return [(f"[{key!r}]", value) for key, value in returned.items()]
    if isinstance(returned, tuple | list):
        return [(f"[{index}]", value) for index, value in enumerate(returned)]
    return [(f".{name}", value) for name, value in getattr(returned, "__dict__", {}).items() if name[0] != "_"]
