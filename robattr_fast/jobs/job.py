"""The images of one command, one after the other; small ones of one shape share their batches."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from robattr_fast.certificates import Certificate, Progress
from robattr_fast.certificates import certify as certify_images
from robattr_fast.errors import CertifyInterrupted, ModelError, NonFiniteError
from robattr_fast.inputs import images, specs
from robattr_fast.jobs.failures import EXPECTED, one_line
from robattr_fast.jobs.folder import Folder, Say, WriteError
from robattr_fast.jobs.options import Options, checked_device, stop_rule
from robattr_fast.jobs.record import CERTIFICATE, PICTURE, Record
from robattr_fast.jobs.results import Results, Row, describe, entry, label
from robattr_fast.jobs.resume import SAMPLING, Earlier, KnownModel
from robattr_fast.machine import tune_allocator
from robattr_fast.report.sizes import top_size

# Of one image, not of the run: the next image may do better.
_IMAGE_FAILURES = (images.ImageError, NonFiniteError, OSError, torch.OutOfMemoryError)

# Images share batches as long as they have so many elements together, and are so many: each costs memory for its
# counts, and a run that is killed loses at most the pictures of one group.
_SHARED_ELEMENTS, _SHARED_IMAGES = 2**16, 64

# So many images may fail for one reason before anything has succeeded, until it is told that they do.
_HELD_BACK = 8

Show = Callable[..., bool | Callable[[Progress], None]]
"""Is told which images (index in the run, name) of how many are sampled together, and what they are to have; what it
returns is the ``progress`` of `certify`."""


def certify_folder(
    paths: Sequence[str],
    model: str,
    out: str | Path,
    options: Options | None = None,
    *,
    fresh: bool = False,
    say: Say = lambda kind, message: None,
    show: Show = lambda *images, **wanted: False,
) -> Results:
    """Certify images into a folder, as ``robattr-fast certify`` does.

    Args:
        paths: as `inputs.images.find` takes them.
        model: as `inputs.specs.load` takes it.
        out: folder for the results; made if missing. What it has of an earlier run is not sampled again.
        fresh: sample anew what the folder holds.
        say: is told what happens, as kind ("error", "warning", "note") and message.
        show: see `Show`.

    Returns:
        The rows, and the images that failed.

    Raises:
        ValueError, TypeError, OSError, ModelError, CertificateFileError: nothing can be done as it was asked.
    """
    options, out = options or Options(), Path(out)
    settings = options.settings(model)
    device = checked_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    tune_allocator()  # elsewhere than on glibc there is nothing to tune
    sources = images.find(paths, lambda line: say("note", line))
    _spare_inputs(sources, out)
    with Folder(out, [source.name for source in sources]) as folder:
        chosen = specs.load(model, size=options.size)
        module = chosen.module.to(device)
        known = KnownModel(module, settings, device)
        results = Results(folder, settings, describe(settings, known.fingerprint, device))
        earlier = Earlier(folder, sources, fresh=fresh, say=say)
        earlier.check_checkpoints(sources, known, settings, device)
        run = Run(sources, chosen, module, known, device, results, earlier, say=say, show=show)
        try:
            results.interrupted = run.go()
        finally:
            try:
                results.settle(source.name for source in sources)
            except OSError as error:
                say("warning", f"{out}: manifest and table are not in order: {one_line(error)}")
    return results


def _spare_inputs(sources: Sequence[images.Source], folder: Path) -> None:
    """ValueError if a picture would replace an image that is to be read."""
    inputs = {source.path.resolve() for source in sources}
    place = folder.resolve()
    for source in sources:
        picture = place / f"{source.name}{PICTURE}"
        if picture in inputs:
            raise ValueError(f"out: {picture} is an image to certify and would be overwritten; expected another folder")


@dataclass(frozen=True)
class _Image:
    index: int
    source: images.Source
    x: torch.Tensor  # [C, H, W]


@dataclass
class Run:
    """One run; `go` certifies and writes its images."""

    sources: list[images.Source]
    model: specs.Model
    module: torch.nn.Module
    known: KnownModel
    device: torch.device
    results: Results
    earlier: Earlier
    say: Say = lambda kind, message: None
    show: Show = lambda *images, **wanted: False
    clock: Callable[[], float] = time.perf_counter
    batches: dict[torch.Size, dict[str, Any]] = field(default_factory=dict)
    """Batch size and memory format that the first images of a shape were found to be fastest with."""
    held_back: list[tuple[images.Source, Exception]] = field(default_factory=list)
    """Failures that may be of settings or model, as long as nothing has succeeded."""

    @property
    def settings(self) -> dict[str, Any]:
        return self.results.settings

    def go(self) -> bool:
        """Certify everything; whether Ctrl-C ended it.

        Raises what all images failed for, if that was not of the images and nothing else happened.
        """
        interrupted = any(self._certify(group) for group in self._groups())
        if self.held_back:
            _, first = self.held_back[0]
            if len(self.held_back) == len(self.sources) and len({one_line(error) for _, error in self.held_back}) == 1:
                raise first
            self._tell_held_back()
        return interrupted

    def _groups(self) -> Iterator[list[_Image]]:
        """Neighbours of one shape that are sampled together."""
        group: list[_Image] = []
        for index, source in enumerate(self.sources):
            try:
                image = _Image(index, source, images.read(source.path, self.model.preprocess))
                top_size(self.settings["k"], self._elements(image.x))
            except Exception as error:  # preprocess is the user's: it may raise anything
                self._failed([source], error if isinstance(error, EXPECTED) else _named(error))
                continue
            if group and (image.x.shape != group[0].x.shape or len(group) == self._together(image.x)):
                yield group
                group = []
            group.append(image)
        if group:
            yield group

    def _elements(self, x: torch.Tensor) -> int:
        """Of the map."""
        return x[0].numel() if self.settings["channel_sum"] else x.numel()

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
            try:
                cert = self.earlier.finished(image.source, image.x, self.known, self.settings, self.device)
            except EXPECTED as error:
                self._failed([image.source], error)
                continue
            if cert is None:
                unfinished.append(image)
            else:
                self._found(image, cert)
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
        except WriteError:
            raise
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
        self._check_room(first.x, len(group))
        checkpoint = self.earlier.checkpoint(first.source)
        progress = self.show(
            [(image.index, image.source.name) for image in group],
            len(self.sources),
            self.settings["samples"],
            k=top_size(self.settings["k"], self._elements(first.x)),
            radius=self.results.radii[0],
        )
        trial = ("batch_size", "memory_format")
        batches = {name: self.settings[name] for name in trial}
        if not checkpoint.exists():  # which goes on as it began
            batches = self.batches.get(first.x.shape, batches)
        start = self.clock()
        interrupted = False
        logger = logging.getLogger("robattr_fast")
        logger.addFilter(_told_by_name)
        try:
            certs = certify_images(
                self.module,
                torch.stack([image.x for image in group]).to(self.device),
                image_ids=[images.image_id(image.x) for image in group],
                stop=stop_rule(self.settings, self._elements(first.x)),
                checkpoint=checkpoint,
                progress=progress,
                **batches,
                **{name: self.settings[name] for name in SAMPLING},
            )
        except CertifyInterrupted as error:
            certs, interrupted = error.certificate, True
        except ModelError as error:
            if self.model.preprocess is not images.to_tensor or "forward" not in str(error):
                raise
            raise ModelError(
                f"{error} (it was given images {list(first.x.shape)}, in RGB and of their own size; a model that "
                "expects others is named by a callable that returns (module, preprocess), or gets float .npy arrays)"
            ) from error
        finally:
            logger.removeFilter(_told_by_name)
        seconds = (self.clock() - start) / len(group)
        for image, cert in zip(group, (certs[i] for i in range(len(group))), strict=True):
            if int(cert.samples[0]) > 0:
                before = self.earlier.seconds(image.source, cert, self.settings)
                self._keep(image, cert)
                self._note(image, cert, self._row(image, cert, seconds + before), drawn=False)
        if not interrupted:
            checkpoint.unlink(missing_ok=True)
            if certs.settings.batch_size is not None:
                self.batches[first.x.shape] = {name: getattr(certs.settings, name) for name in trial}
        return interrupted

    def _check_room(self, x: torch.Tensor, count: int) -> None:
        """WriteError now rather than after all samples if the disk has no room for the files of these images."""
        elements, settings = self._elements(x), self.settings
        kept = settings["retain"] * elements * (1 if settings["levels"] == 1 else 4) // 8
        each = 4 * elements * settings["levels"] + 2 * elements + (kept if settings["keep_samples"] else 0) + 2**20
        # The checkpoint holds the retained maps, and while a file is replaced there are two of it.
        needed = count * (2 * each + 2 * kept * settings["second_moment"])
        free = shutil.disk_usage(self.results.folder.path).free
        if needed > free:
            raise WriteError(f"out: an image takes up to {needed / 2**20:.0f} MiB there, {free / 2**20:.0f} are free")

    def _found(self, image: _Image, cert: Certificate) -> None:
        """A finished certificate of an earlier run."""
        seconds = self.earlier.seconds(image.source, cert, self.settings)
        names = self.model.class_names
        row = self.earlier.row(image.source, cert, self.settings, names, image.index)
        row = row or self._row(image, cert, seconds)
        self._note(image, cert, row, drawn=self.earlier.drawn(image.source, self.settings))

    def _row(self, image: _Image, cert: Certificate, seconds: float) -> Row:
        return Row.of(
            cert,
            label(cert, self.model.class_names),
            top_size(self.settings["k"], cert.settings.n),
            self.results.radii,
            name=image.source.name,
            source=str(image.source.path),
            seconds=seconds,
            values=image.x.numel(),
            class_names=self.model.class_names,
            index=image.index,
        )

    def _keep(self, image: _Image, cert: Certificate) -> None:
        """The certificate, before all else: a picture can be drawn again."""
        try:
            cert.save(self.results.folder.file(image.source.name, CERTIFICATE))
        except OSError as error:
            raise WriteError(str(error)) from error

    def _note(self, image: _Image, cert: Certificate, row: Row, *, drawn: bool) -> None:
        """Picture (``drawn``: it is there already), manifest and table."""
        self._tell_held_back()
        if row.differs is not None:
            self.say("warning", f"{image.source.path}: {row.differs}")
        problem = None if drawn else self._draw(image, cert, row)
        record = Record() if not drawn else self.earlier.record(image.source)
        self.results.add(row, entry(row, cert), record)
        if problem is not None:
            self._fail(image.source, problem)

    def _draw(self, image: _Image, cert: Certificate, row: Row) -> str | None:
        """What kept the picture from being drawn, which costs the picture alone."""
        from robattr_fast.report import picture

        title = f"{row.name}: {row.classes if self.model.class_names else f'class {row.classes}'}"
        try:
            figure = picture.certificate_figure(image.x, cert, k=row.k, radii=self.results.radii, title=title)
            picture.save(figure, self.results.folder.file(row.name, PICTURE))
        except OSError as error:
            raise WriteError(str(error)) from error
        except Exception as error:  # of matplotlib, for a map or name that it was never tried with
            return f"is certified, but its picture cannot be drawn: {one_line(_named(error))}"
        return None

    def _failed(self, sources: Sequence[images.Source], error: Exception) -> None:
        """Say so and go on. What may be of settings or model is held back until something succeeds, or much fails."""
        held = not isinstance(error, _IMAGE_FAILURES) and not self.results.rows
        if held and len(self.held_back) < _HELD_BACK:
            self.held_back += [(source, error) for source in sources]
            return
        self._tell_held_back()
        for source in sources:
            self._fail(source, one_line(error))

    def _tell_held_back(self) -> None:
        for source, error in self.held_back:
            self._fail(source, one_line(error))
        self.held_back.clear()

    def _fail(self, source: images.Source, message: str) -> None:
        self.results.fail(source.name, source.path, message)
        self.say("error", message if str(source.path) in message else f"{source.path}: {message}")


def _told_by_name(record: logging.LogRecord) -> bool:
    """What the library logs of disagreeing classes knows images by number alone; each is told by its name here."""
    return "most noisy copies" not in record.getMessage()


def _named(error: Exception) -> ValueError:
    return ValueError(f"{type(error).__name__}: {error}")
