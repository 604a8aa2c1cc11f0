"""Which model and which method it was: names, fingerprints, hashes."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from robattr_fast.model import structure
from robattr_fast.model.gradient import Explanation
from robattr_fast.model.private import unwrapped
from robattr_fast.model.probe import other_behaviour

_CALLABLE = "callable:"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def explanation_name(explain: str | Explanation) -> str:
    """What a certificate records; a callable never has the name of a built-in method.

    A functools.partial has the name of its function and of its keywords, where these are plain values or callables.
    """
    if isinstance(explain, str):
        return explain
    if isinstance(explain, functools.partial) and not explain.args:
        settings = sorted(explain.keywords.items())
        if all(callable(value) or _is_plain(value) for _, value in settings):
            named = [f"{key}={explanation_name(value) if callable(value) else repr(value)}" for key, value in settings]
            return f"{explanation_name(explain.func)}({', '.join(named)})"
    module = getattr(explain, "__module__", None) or "?"
    return f"{_CALLABLE}{module}.{getattr(explain, '__qualname__', f'<{type(explain).__name__}>')}"


def is_identified(explanation: str | None) -> bool:
    """Whether the name tells which method it was: lambdas, local functions and callable objects share theirs."""
    return explanation is None or not (explanation.startswith(_CALLABLE) and "<" in explanation)


_OF_MODULES = vars(nn.Module()).keys()
"""Attributes of every module: containers that are looked into by name, hooks, mode."""


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(_is_plain(item) for item in value)
    if type(value) is dict:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype))


def fingerprint(model: nn.Module) -> str:
    """2-<python>-<SHA-256> of everything that the model is made of, see `structure`."""
    return structure.fingerprint(unwrapped(model))


def callable_fingerprint(explain: Explanation) -> str:
    """The same of a callable that explains: its code, and what that refers to."""
    return structure.fingerprint(explain)


def first_fingerprint(model: nn.Module) -> str:
    """The one of files before `fingerprint`: SHA-256 of the architecture as printed, and of what its modules hold.

    Tensors by name, dtype, shape, bytes; numbers, strings and dtypes, also in lists, tuples and dicts, as printed.
    """
    model = unwrapped(model)
    digest = hashlib.sha256(_ADDRESS.sub("", repr(model)).encode())
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, fx.GraphModule):  # printed, it names its parts and not what it does with them
            digest.update(module.code.encode())
        plain = {key: value for key, value in vars(module).items() if key not in _OF_MODULES and _is_plain(value)}
        digest.update(f"{name} {sorted(plain.items())}".encode())
        # Plain attributes too: torch.export keeps constants so.
        tensors |= {f"{name}.{key}": value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type != "meta":
            digest.update(structure.tensor_bytes(tensor))
        else:
            for part in structure.tensor_parts(tensor):
                digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def other_model(
    recorded: str | None,
    recorded_identity: Mapping[str, Any] | None,
    here: str | None,
    identity: Mapping[str, Any] | None,
) -> str | None:
    """Why two models cannot be the same; None where nothing speaks against it.

    Each is a fingerprint and an identity ("first": `first_fingerprint`, "explain": fingerprint of a callable that
    explains, "behaviour": `probe.behaviour`), of which parts may be unknown. Fingerprints of one kind and one
    Python version must be equal. Else those of the first kind must be, and behaviour decides.
    """
    theirs, ours = recorded_identity or {}, identity or {}
    if recorded is None or here is None:
        return None if recorded == here else "the fingerprint of one is unknown"
    for what, one, two in (("model", recorded, here), ("explain", theirs.get("explain"), ours.get("explain"))):
        if one is None or two is None or one == two:
            continue
        if structure.comparable(one, two):
            return f"the fingerprint of the {what} is another one"
        if what == "model" and _first(one, theirs) != _first(two, ours):
            return "the fingerprint of the model is another one"
    if theirs.get("behaviour") and ours.get("behaviour"):
        return other_behaviour(theirs["behaviour"], ours["behaviour"])
    return None


def _first(fingerprint: str, identity: Mapping[str, Any]) -> str | None:
    return identity.get("first") if fingerprint.startswith(f"{structure.PREFIX}-") else fingerprint


def values_hash(tensor: torch.Tensor, before: str = "") -> str:
    """SHA-256, in hexadecimal digits, of a text and the values in C order."""
    digest = hashlib.sha256(before.encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def input_hash(x: torch.Tensor) -> str:
    """SHA-256 of one image: dtype, shape, bytes."""
    return values_hash(x, f"{x.dtype} {tuple(x.shape)}")
