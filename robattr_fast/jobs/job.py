"""The images of a ``robattr-fast certify`` run, one after the other; small ones of one shape share their batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from robattr_fast.certificates import Certificate, Progress
from robattr_fast.certificates import certify as certify_images
from robattr_fast.errors import CertifyInterrupted, NonFiniteError
from robattr_fast.inputs import images, specs
from robattr_fast.jobs.failures import EXPECTED, one_line
from robattr_fast.jobs.record import CERTIFICATE
from robattr_fast.jobs.results import Results, Row, label
from robattr_fast.jobs.resume import SAMPLING, Earlier, stop_rule
from robattr_fast.model import fingerprint

# Of one image, not of the run: the next image may do better.
_IMAGE_FAILURES = (images.ImageError, NonFiniteError, OSError, torch.OutOfMemoryError)

# Images share batches as long as they have so many elements together, and are so many: each costs memory for its
# counts, and a run that is killed loses at most the pictures of one group.
_SHARED_ELEMENTS, _SHARED_IMAGES = 2**16, 64


@dataclass(frozen=True)
class _Image:
    index: int
    source: images.Source
    x: torch.Tensor  # [C, H, W]


@dataclass
class Run:
    """One run; `go` certifies and writes its images.

    ``report`` is told each failure, in one line. ``show`` is told which images (index in the run, name) are sampled
    together and what they are to have; what it returns is the ``progress`` of `certify`.
    """

    sources: list[images.Source]
    model: specs.Model
    settings: dict[str, Any]
    results: Results
    earlier: Earlier
    report: Callable[[str], None]
    show: Callable[..., bool | Callable[[Progress], None]]
    batches: dict[torch.Size, dict[str, Any]] = field(default_factory=dict)
    """Batch size and memory format that the first images of a shape were found to be fastest with."""

    def __post_init__(self) -> None:
        self.module = self.model.module.to(self.results.device)
        self.fingerprint = fingerprint(self.module)

    def go(self) -> bool:
        """Certify everything; whether Ctrl-C ended it."""
        return any(self._certify(group) for group in self._groups())

    def _groups(self) -> Iterator[list[_Image]]:
        """Neighbours of one shape that are sampled together."""
        group: list[_Image] = []
        for index, source in enumerate(self.sources):
            try:
                image = _Image(index, source, images.read(source.path, self.model.preprocess))
            except (*_IMAGE_FAILURES, *EXPECTED) as error:
                self._failed([source], error)
                continue
            if group and (image.x.shape != group[0].x.shape or len(group) == self._together(image.x)):
                yield group
                group = []
            group.append(image)
        if group:
            yield group

    def _together(self, x: torch.Tensor) -> int:
        """How many images like this one share their batches: without a stop rule one image fills its own."""
        if self.settings["stop_overlap"] is None:
            return 1
        return max(1, min(_SHARED_IMAGES, _SHARED_ELEMENTS // x.numel()))

    def _certify(self, group: list[_Image]) -> bool:
        """The certificates of a group, found or made; whether Ctrl-C ended it."""
        begun = self._begun(group)
        left = [image for image in group if not any(image in together for together in begun)]
        unfinished = []
        for image in left:
            cert = self.earlier.finished(image.source, image.x, self.fingerprint, self.settings, self.results.device)
            if cert is None:
                unfinished.append(image)
            else:
                drawn = self.earlier.drawn(image.source, self.settings)
                self._write(image, cert, self.earlier.seconds(image.source, cert, self.settings), drawn=drawn)
        return any(self._finish(together) for together in (*begun, unfinished) if together)

    def _begun(self, group: list[_Image]) -> list[list[_Image]]:
        """The images whose samples a checkpoint holds, by checkpoint, finished ones too: the run ends with all."""
        begun: list[list[_Image]] = []
        for image in group:
            if any(image in together for together in begun) or not self.earlier.checkpoint(image.source).exists():
                continue
            held = self.earlier.held(image.source)
            # One that cannot be read, or is of other images, is refused where it is used.
            begun.append([one for one in group if images.image_id(one.x) in held] or [image])
        return begun

    def _finish(self, group: list[_Image]) -> bool:
        """Sample images together; whether Ctrl-C ended it."""
        try:
            return self._sample(group)
        except _IMAGE_FAILURES as error:
            if len(group) == 1:
                self._failed([group[0].source], error)
                return False
            self.earlier.checkpoint(group[0].source).unlink(missing_ok=True)
            return any(self._certify([image]) for image in group)  # one of them failed: each by itself
        except EXPECTED as error:
            self._failed([image.source for image in group], error)
            return False

    def _sample(self, group: list[_Image]) -> bool:
        first = group[0]
        checkpoint = self.earlier.checkpoint(first.source)
        show = self.show(
            [(image.index, image.source.name) for image in group],
            self.settings["samples"],
            k_share=self.settings["k"],
            radius=self.results.radii[0],
        )
        trial = ("batch_size", "memory_format")
        batches = self.batches.get(first.x.shape, {name: self.settings[name] for name in trial})
        start = time.perf_counter()
        interrupted = False
        try:
            certs = certify_images(
                self.module,
                torch.stack([image.x for image in group]).to(self.results.device),
                image_ids=[images.image_id(image.x) for image in group],
                stop=stop_rule(self.settings, first.x[0].numel() if self.settings["channel_sum"] else first.x.numel()),
                checkpoint=checkpoint,
                progress=show,
                **batches,
                **{name: self.settings[name] for name in SAMPLING},
            )
        except CertifyInterrupted as error:
            certs, interrupted = error.certificate, True
        seconds = (time.perf_counter() - start) / len(group)
        for image, cert in zip(group, (certs[i] for i in range(len(group))), strict=True):
            if int(cert.samples[0]) > 0:
                self._write(image, cert, seconds + self.earlier.seconds(image.source, cert, self.settings), drawn=False)
        if not interrupted:
            checkpoint.unlink(missing_ok=True)
            if certs.settings.batch_size is not None:
                self.batches[first.x.shape] = {name: getattr(certs.settings, name) for name in trial}
        return interrupted

    def _write(self, image: _Image, cert: Certificate, seconds: float, *, drawn: bool) -> None:
        """The files of one image (``drawn``: they are there already), and its row of the table."""
        self.results.add(_written(image, cert, self.model.class_names, self.results, seconds, drawn=drawn))

    def _failed(self, sources: Sequence[images.Source], error: Exception) -> None:
        """Say so and go on, unless it is settings or model that fail: those have not worked before."""
        if not isinstance(error, _IMAGE_FAILURES) and not self.results.rows:
            raise
        message = one_line(error)
        for source in sources:
            self.results.fail(source.name, source.path, message)
            self.report(message if str(source.path) in message else f"{source.path}: {message}")


def _written(
    image: _Image,
    cert: Certificate,
    class_names: Sequence[str] | None,
    results: Results,
    seconds: float,
    *,
    drawn: bool,
) -> Row:
    from robattr_fast.report import picture

    name = image.source.name
    k = max(1, int(results.settings["k"] * cert.settings.n))
    row = Row.of(
        cert,
        label(cert, class_names),
        k,
        results.radii,
        name=name,
        source=str(image.source.path),
        seconds=seconds,
        index=image.index,
    )
    if drawn:
        return row
    title = f"{name}: {row.label.name if class_names else f'class {row.label.number}'}"
    figure = picture.certificate_figure(image.x, cert, k=k, radii=results.radii, title=title)
    # The certificate last: where it is finished, so is its picture.
    picture.save(figure, results.folder / f"{name}.png")
    cert.save(results.folder / f"{name}{CERTIFICATE}")
    return row
