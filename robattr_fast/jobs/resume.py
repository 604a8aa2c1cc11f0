"""Going on where an earlier run of the same command into the same folder ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from robattr_fast.certificates import Certificate, StopWhen
from robattr_fast.errors import CertificateFileError
from robattr_fast.inputs import images
from robattr_fast.jobs.record import CERTIFICATE, CHECKPOINT, Record, read_record
from robattr_fast.model import input_hash
from robattr_fast.ops import _check

SAMPLING = (
    "sigma",
    "tau",
    "gamma",
    "levels",
    "samples",
    "target",
    "channel_sum",
    "seed",
    "alpha",
    "bound",
    "slack",
    "second_moment",
    "retain",
    "keep_samples",
    "on_nonfinite",
    "autocast",
)
"""The options that samples and certificate depend on, as arguments of `certify`."""


def stop_rule(settings: dict[str, Any], n: int) -> StopWhen | None:
    """The stop rule of the options for maps of ``n`` elements."""
    overlap, radius = settings["stop_overlap"], settings["stop_radius"]
    if (overlap is None) != (radius is None):
        raise ValueError("stop-overlap, stop-radius: got one of them, takes both")
    return None if overlap is None else StopWhen(max(1, int(settings["k"] * n)), radius, overlap)


class Earlier:
    """What the folder held before this run. ``fresh``: nothing of it counts."""

    def __init__(
        self, folder: Path, sources: Sequence[images.Source], *, fresh: bool, warn: Callable[[str], None]
    ) -> None:
        self._folder, self._fresh, self._warn = folder, fresh, warn
        # Read before this run writes its own manifest.
        self._records = {} if fresh else {source.name: read_record(self._file(source)) for source in sources}
        if fresh:
            for source in sources:
                self.checkpoint(source).unlink(missing_ok=True)

    def _file(self, source: images.Source) -> Path:
        return self._folder / f"{source.name}{CERTIFICATE}"

    def checkpoint(self, source: images.Source) -> Path:
        """Where the unfinished samples of an image are kept."""
        return self._folder / f"{source.name}{CHECKPOINT}"

    def held(self, source: images.Source) -> tuple[int, ...]:
        """The ids of the images in the checkpoint named after this one; none if it cannot be read."""
        try:
            return Certificate.load(self.checkpoint(source)).settings.image_ids or ()
        except (CertificateFileError, OSError):
            return ()

    def finished(
        self, source: images.Source, x: torch.Tensor, fingerprint: str, settings: dict[str, Any], device: torch.device
    ) -> Certificate | None:
        """The certificate of this image, model and settings, if the folder has it and nothing is left to sample."""
        if self._fresh or not self._file(source).exists():
            return None
        try:
            cert = Certificate.load(self._file(source))
        except CertificateFileError:
            return None  # it is sampled anew
        tau, gamma = _check.fractions(settings["tau"], settings["gamma"])
        target = settings["target"]
        wanted = {name: settings[name] for name in SAMPLING if name not in ("samples", "keep_samples")} | {
            "tau": tau,
            "gamma": gamma,
            "target": None if target is None else (target,),
            "planned_samples": (settings["samples"],),
            "image_ids": (images.image_id(x),),
            "input_hashes": (input_hash(x),),
            "model_fingerprint": fingerprint,
            "device": str(device),
            "exploration": None,
        }
        differ = [name for name, value in wanted.items() if getattr(cert.settings, name) != value]
        if (cert.packed is not None) != settings["keep_samples"]:
            differ.append("keep_samples")
        if differ:
            samples = int(cert.samples[0])
            self._warn(
                f"{self._file(source)} of {samples} samples is of another run ({', '.join(differ)}): it is replaced"
            )
            return None
        if not cert.stopped_off_plan:
            return cert
        stop = stop_rule(settings, cert.settings.n)
        return cert if stop and float(cert.overlap(stop.k, stop.radius).share) >= stop.overlap else None

    def _record(self, source: images.Source) -> Record:
        return self._records.get(source.name, Record())

    def seconds(self, source: images.Source, cert: Certificate, settings: dict[str, Any]) -> float:
        """What earlier runs with the same options spent on the samples of this image, as far as it was written down."""
        record = self._record(source)
        same = record.image.get("input_hash") in (cert.settings.input_hashes or ())
        same = same and all((record.settings or {}).get(name) == settings[name] for name in SAMPLING)
        return (record.seconds or 0.0) if same else 0.0

    def of_this_run(self, settings: dict[str, Any]) -> dict[str, Record]:
        """By name what an earlier run with the same settings wrote of the images."""
        return {name: record for name, record in self._records.items() if record.image and record.settings == settings}

    def drawn(self, source: images.Source, settings: dict[str, Any]) -> bool:
        """Whether the picture of a finished certificate shows what these settings ask for."""
        return self._record(source).settings == settings and (self._folder / f"{source.name}.png").exists()
