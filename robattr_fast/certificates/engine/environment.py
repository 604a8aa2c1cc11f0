"""Where samples are taken. Equal environments give equal counts; elsewhere a model may round differently."""

from __future__ import annotations

from typing import Any

import torch

from robattr_fast import backends
from robattr_fast.certificates.settings import Settings
from robattr_fast.machine import versions

_VERSIONS = ("torch", "numpy", "python")
_OPERATORS = ("noisy_samples", "count_sparsified_")


def environment(device: torch.device) -> dict[str, Any]:
    """The fields ``device``, ``versions`` and ``backends`` of `Settings` for samples that are taken here."""
    return {
        "device": str(device),
        "versions": {
            **{name: version for name, version in versions().items() if name in _VERSIONS},
            "threads": str(torch.get_num_threads()),
        },
        "backends": {name: backends.choose(name, device, torch.float32)[0] for name in _OPERATORS},
    }


def differences(recorded: Settings, device: torch.device) -> list[str]:
    """What of the recorded environment is not as it is here, as "threads 4, here 2"; empty where counts repeat."""
    here = environment(device)
    found = [] if recorded.device == here["device"] else [f"device {recorded.device}, here {here['device']}"]
    for kind in ("versions", "backends"):
        theirs, ours = getattr(recorded, kind), here[kind]
        found += [
            f"{name} {theirs.get(name, 'unknown')}, here {ours.get(name, 'unknown')}"
            for name in sorted(theirs.keys() | ours.keys())
            if theirs.get(name) != ours.get(name)
        ]
    if recorded.batch_images is not None and recorded.batch_images > 1:
        found.append(f"batches shared by {recorded.batch_images} images, here by one")
    if recorded.batch_size is None:
        found.append("batch size unknown")
    return found
