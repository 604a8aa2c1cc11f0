"""The progress bar of `certify`: samples per second, time left, what is certified so far. Silent off a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from robattr_fast.certificates import Progress as Event
from robattr_fast.inputs.names import printable
from robattr_fast.report.rounding import percent

# A look at the certificate may take at most one part in so many of the run; the first is due after so many seconds.
_LOOK_SHARE, _FIRST_LOOK = 40, 2.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g} samples/s", style="progress.data.speed")


class SampleProgress:
    """``with SampleProgress(...) as progress: ...``; one bar per group of images, replaced by the next."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("[cyan]{task.fields[certified]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> SampleProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.stop()

    def images(self, named: Sequence[tuple[int, str]], images: int, samples: int, *, k: int, radius: float):
        """Start the bar of images (index in the run, name), of so many, that are sampled together.

        Returns the callable for `certify`'s ``progress``, or False off a terminal.
        """
        if self._bar.disable:
            return False
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        task = self._bar.add_task("", total=samples * len(named), certified="")
        next_look = self._clock() + _FIRST_LOOK

        def progress(event: Event) -> None:
            nonlocal next_look
            start = self._clock()
            if start >= next_look:
                share = float(event.certificate().overlap(k, radius).share.squeeze())
                self._bar.update(task, certified=f"{percent(share)} at {radius:g}")
                now = self._clock()
                next_look = now + _LOOK_SHARE * (now - start)
            index, name = named[event.image]
            # Earlier images of the group are done, whether they took all samples or stopped.
            done = samples * event.image + event.samples
            self._bar.update(task, completed=done, description=f"{printable(name)} ({index + 1}/{images})")

        return progress
