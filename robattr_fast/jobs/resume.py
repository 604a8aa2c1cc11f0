"""Going on where an earlier run of the same command into the same folder ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robattr_fast import model as _model
from robattr_fast.certificates import Certificate, Settings
from robattr_fast.errors import CertificateFileError, ModelError
from robattr_fast.inputs import images
from robattr_fast.jobs.folder import Folder, Say
from robattr_fast.jobs.options import stop_rule
from robattr_fast.jobs.record import CERTIFICATE, CHECKPOINT, PICTURE, Record
from robattr_fast.jobs.results import Row
from robattr_fast.model import input_hash
from robattr_fast.ops import _check
from robattr_fast.sampling.map import Map, Stream
from robattr_fast.sampling.preparation import prepared

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


class KnownModel:
    """Which model the run has: what it is made of, and what it does with images of a shape, computed when needed."""

    def __init__(self, module: nn.Module, settings: dict[str, Any], device: torch.device) -> None:
        self.fingerprint = _model.fingerprint(module)
        self._first = {"first": _model.first_fingerprint(module)}
        self._module, self._device = module, device
        self._sigma, self._autocast = settings["sigma"], settings["autocast"]
        self._behaviours: dict[tuple[torch.Size, torch.dtype], dict[str, Any]] = {}

    def differs(self, earlier: Settings, x: torch.Tensor | None = None) -> bool:
        """Whether a certificate's model is another one; with an image [C, H, W] also by what it does with such."""

        def other(identity: dict[str, Any]) -> bool:
            recorded = earlier.model_fingerprint, earlier.model_identity
            return _model.other_model(*recorded, self.fingerprint, identity) is not None

        if other(self._first) or x is None or not (earlier.model_identity or {}).get("behaviour"):
            return other(self._first)
        try:
            return other({**self._first, "behaviour": self._behaviour(x)})
        except ModelError:  # it was explained once, and cannot be any more: sampling will say why
            return True

    def _behaviour(self, x: torch.Tensor) -> dict[str, Any]:
        key = x.shape, x.dtype
        if key not in self._behaviours:
            one = x[None].to(self._device)
            map = Map.checked(one, sigma=self._sigma, autocast=self._autocast)
            with torch.autocast(one.device.type, enabled=False):
                self._behaviours[key] = prepared(self._module, one, map, Stream(0, (0,))).behaviour(map.autocast)
        return self._behaviours[key]


class Earlier:
    """What the folder held before this run. ``fresh``: nothing of it counts."""

    def __init__(self, folder: Folder, sources: Sequence[images.Source], *, fresh: bool, say: Say) -> None:
        self._folder, self._fresh, self._say = folder, fresh, say
        if fresh:
            for source in sources:
                self.checkpoint(source).unlink(missing_ok=True)

    def _file(self, source: images.Source) -> Path:
        return self._folder.file(source.name, CERTIFICATE)

    def checkpoint(self, source: images.Source) -> Path:
        """Where the unfinished samples of an image are kept."""
        return self._folder.file(source.name, CHECKPOINT)

    def held(self, source: images.Source) -> tuple[int, ...]:
        """The ids of the images in the checkpoint named after this one; none if it cannot be read."""
        try:
            return Certificate.load(self.checkpoint(source)).settings.image_ids or ()
        except (CertificateFileError, OSError):
            return ()

    def finished(
        self, source: images.Source, x: torch.Tensor, known: KnownModel, settings: dict[str, Any], device: torch.device
    ) -> Certificate | None:
        """The certificate of this image, model and settings, if the folder has it and nothing is left to sample.

        Raises ValueError if the certificate of that name is of another image, from another place.
        """
        if self._fresh or not self._file(source).exists():
            return None
        try:
            cert = Certificate.load(self._file(source))
        except CertificateFileError:
            return None  # it is sampled anew
        of_image = {"image_ids": (images.image_id(x),), "input_hashes": (input_hash(x),), "exploration": None}
        differ = _differences(cert, settings, known, device, x)
        differ += [name for name, value in of_image.items() if getattr(cert.settings, name) != value]
        if differ:
            self._spare_another(source, differ)
            samples = int(cert.samples[0])
            self._say(
                "warning",
                f"{self._file(source)} of {samples} samples is of another run ({', '.join(differ)}): it is replaced",
            )
            return None
        if not cert.stopped_off_plan:
            return cert
        stop = stop_rule(settings, cert.settings.n)
        return cert if stop and float(cert.overlap(stop.k, stop.radius).share) >= stop.overlap else None

    def check_checkpoints(
        self, sources: Sequence[images.Source], known: KnownModel, settings: dict[str, Any], device: torch.device
    ) -> None:
        """ValueError before anything is sampled if unfinished samples are of another run: they would be lost."""
        for source in sources:
            path = self.checkpoint(source)
            if not path.exists():
                continue
            try:
                cert = Certificate.load(path)
            except CertificateFileError:
                continue  # refused where it is used
            differ = [name for name in _differences(cert, settings, known, device) if name != "keep_samples"]
            if differ:
                raise ValueError(
                    f"checkpoint: {path} holds another run (differs in {', '.join(differ)}); "
                    "expected the options of that run, another --out, or --fresh"
                )

    def _spare_another(self, source: images.Source, differ: list[str]) -> None:
        """The same name, but neither the same image nor the same file: two photographs of one stem."""
        known = self.record(source).source
        if "input_hashes" in differ and known is not None and Path(known).resolve() != source.path.resolve():
            raise ValueError(
                f"{self._file(source)} is of {known} and would be replaced; expected another --out, or --fresh"
            )

    def record(self, source: images.Source) -> Record:
        """What the folder's manifest and table said of the image; with `fresh` nothing."""
        return Record() if self._fresh else self._folder.before.of(self._file(source), strict=False)

    def seconds(self, source: images.Source, cert: Certificate, settings: dict[str, Any]) -> float:
        """What earlier runs with the same options spent on the samples of this image, as far as it was written down."""
        record = self.record(source)
        same = record.image.get("input_hash") in (cert.settings.input_hashes or ())
        same = same and all((record.settings or {}).get(name) == settings[name] for name in SAMPLING)
        return (record.seconds or 0.0) if same else 0.0

    def row(
        self,
        source: images.Source,
        cert: Certificate,
        settings: dict[str, Any],
        class_names: Sequence[str] | None,
        index: int,
    ) -> Row | None:
        """The row of a finished certificate as it was written, if these settings ask for the same numbers."""
        record = self.record(source)
        if record.settings != settings or record.image.get("input_hash") not in (cert.settings.input_hashes or ()):
            return None
        try:
            row = Row.from_tsv(record.row, settings["radius"], index)
        except (KeyError, ValueError):
            return None
        row.seconds = self.seconds(source, cert, settings)
        row = row.explained(cert, settings["radius"], class_names)
        return row if row.samples == int(cert.samples[0]) and row.source == str(source.path) else None

    def drawn(self, source: images.Source, settings: dict[str, Any]) -> bool:
        """Whether the picture of a finished certificate shows what these settings ask for."""
        return self.record(source).settings == settings and self._folder.file(source.name, PICTURE).exists()


def _differences(
    cert: Certificate, settings: dict[str, Any], known: KnownModel, device: torch.device, x: torch.Tensor | None = None
) -> list[str]:
    """In what a certificate is not of these options, model and device, whatever its images are."""
    tau, gamma = _check.fractions(settings["tau"], settings["gamma"])
    target, images = settings["target"], len(cert)
    wanted = {name: settings[name] for name in SAMPLING if name not in ("samples", "keep_samples")} | {
        "tau": tau,
        "gamma": gamma,
        "target": None if target is None else (target,) * images,
        "planned_samples": (settings["samples"],) * images,
        "device": str(device),
    }
    differ = [name for name, value in wanted.items() if getattr(cert.settings, name) != value]
    differ += ["model_fingerprint"] if known.differs(cert.settings, x) else []
    return differ + (["keep_samples"] if (cert.packed is not None) != settings["keep_samples"] else [])
