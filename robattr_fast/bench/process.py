"""A side in a process of its own, which waits while another side is measured."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

_START = "import runpy, sys; sys.path[0] = sys.argv[1]; runpy.run_path(sys.argv[2], run_name='__main__')"

HERE = Path(__file__).resolve().parents[2]
"""What holds this very package."""


class SideError(RuntimeError):
    """A side cannot run, or its process ended."""


class Process:
    """A running `worker` with the package found in ``tree``. Use it in a ``with`` statement.

    Args:
        tree: the folder that holds ``robattr_fast``; default: of this very package.
        threads: of torch; None: as many as it takes by itself.
        tune: set the allocator's thresholds (`tune_allocator`) first.
    """

    def __init__(self, *, tree: Path = HERE, threads: int | None = None, tune: bool = False) -> None:
        environment = dict(os.environ)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(tree), str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            self.package = Path(self.ask(do="hello", threads=threads)["package"])
            self.tuning = self.ask(do="tune") if tune else {"tuned": False, "what": "as the system has it"}
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request; SideError says what went wrong in the other process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its exit status says more
        line = self._process.stdout.readline()
        if not line:
            raise SideError(f"its process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise SideError(answer["error"])
        return answer

    def gate(self, gate: str, spec: dict[str, Any]) -> str:
        """Why what is measured computes something wrong; empty if it does not."""
        return self.ask(do="gate", gate=gate, spec=spec)["reason"]

    def prepare(self, key: str, side: str, spec: dict[str, Any]) -> None:
        """Make a side ready under a key."""
        self.ask(do="prepare", key=key, side=side, spec=spec)

    def round(self, key: str) -> dict[str, Any]:
        """One round of a prepared side: its ``seconds``, its ``units`` of work, and what else it tells."""
        return self.ask(do="round", key=key)

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()
