"""What a run of `certify` is told, with the defaults of the command line; and checks of what several commands take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from robattr_fast.certificates import StopWhen
from robattr_fast.certificates.settings import Settings
from robattr_fast.model import AUTOCAST
from robattr_fast.ops import _check
from robattr_fast.report.sizes import checked_size, top_size

DEFAULT_RADII = (0.01, 0.03, 0.06)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a run, the same for all of its images; ``robattr-fast certify --help`` says what each means.

    Raises:
        ValueError: one that can be told to be wrong without image and model.
    """

    samples: int = 8192
    sigma: float = 0.2
    tau: float = 0.1
    gamma: float | None = None
    levels: int = 1
    alpha: float = 0.05
    bound: str = "betting"
    slack: int | None = None
    retain: int = 2048
    second_moment: bool = True
    keep_samples: bool = False
    k: float = 0.2
    radius: Sequence[float] = DEFAULT_RADII
    stop_overlap: float | None = None
    stop_radius: float | None = None
    on_nonfinite: str = "raise"
    seed: int = 0
    target: int | None = None
    channel_sum: bool = False
    size: int | None = None
    batch_size: int | str = "auto"
    memory_format: str | None = None
    autocast: str | None = None
    device: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", checked_radii(list(self.radius)))
        object.__setattr__(self, "k", checked_size(self.k))
        stop_rule(self.settings(""), n=max(2, 2 * int(self.k)))
        _check.positive("sigma", self.sigma)
        _check.fractions(self.tau, self.gamma)
        for name, most in (("levels", 15), ("samples", 2**31 - 1)):
            _check.integer(name, getattr(self, name), 1, most)
        _check.integer("seed", self.seed, 0, 2**64 - 1)
        fields = ("sigma", "levels", "alpha", "bound", "slack", "second_moment", "retain", "on_nonfinite")
        Settings(shape=(2**31 - 1,), **{name: getattr(self, name) for name in fields})
        if self.batch_size != "auto":
            at_least_one("batch-size", self.batch_size)
        if self.autocast not in (None, *AUTOCAST):
            expected = f"{' or '.join(AUTOCAST)}: all certificates of a folder are of one function"
            raise ValueError(f"autocast: got {self.autocast!r}, expected {expected}")
        if self.threads is not None:
            at_least_one("threads", self.threads)

    def settings(self, model: str) -> dict[str, Any]:
        """As the manifest has them."""
        return {"model": model, **dataclasses.asdict(self)}


def stop_rule(settings: dict[str, Any], n: int) -> StopWhen | None:
    """The stop rule of the options for maps of ``n`` elements."""
    overlap, radius = settings["stop_overlap"], settings["stop_radius"]
    if (overlap is None) != (radius is None):
        raise ValueError("stop-overlap, stop-radius: got one of them, expected both or none")
    return None if overlap is None else StopWhen(top_size(settings["k"], n), radius, overlap)


def checked_radii(radii: list[float] | None) -> list[float]:
    """Sorted, each once; the default if none was given."""
    for radius in radii or ():
        if not (math.isfinite(radius) and radius >= 0):
            raise ValueError(f"radius: got {radius}, expected a finite number >= 0")
    return sorted(set(radii or DEFAULT_RADII))


def at_least_one(name: str, value: Any) -> int:
    """A positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected an integer >= 1")
    return value


def checked_device(device: str | None) -> torch.device:
    """cpu or cuda; the default is cuda where there is one."""
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device: got {device!r}, expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch sees no CUDA device (robattr-fast doctor says more)")
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
