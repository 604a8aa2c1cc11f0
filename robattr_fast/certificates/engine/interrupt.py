"""Ctrl-C and SIGTERM, held back until the counts agree with each other."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class DeferredInterrupt:
    """Inside, the first SIGINT or SIGTERM only sets ``requested``; a second one raises KeyboardInterrupt at once.

    Acts in the main thread, and only on signals that nobody else handles; elsewhere it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._replaced: dict[int, object] = {}

    def __enter__(self) -> DeferredInterrupt:
        if threading.current_thread() is threading.main_thread():
            for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
                if signal.getsignal(number) == default:
                    self._replaced[number] = default
                    signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_: object) -> None:
        for number, default in self._replaced.items():
            signal.signal(number, default)  # type: ignore[arg-type]
