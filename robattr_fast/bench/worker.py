"""The process that runs sides of benchmarks: one JSON request a line on stdin, one JSON answer a line.

It is started by path and takes `robattr_fast` from the path that it is given: the same sides measure any commit.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

_FILES = ("operator_sides", "attention_sides", "job_sides", "perceptron_sides")
_PACKAGE = "_robattr_fast_sides"


def load(name: str) -> ModuleType:
    """A file of this package, in a package of its own: the one that is measured may be another commit's."""
    if _PACKAGE not in sys.modules:
        here = Path(__file__).resolve().parent
        package = ModuleType(_PACKAGE)
        package.__path__ = [str(here), str(here.parent)]
        sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.{name}")


def load_sides() -> tuple[dict[str, Any], dict[str, Any]]:
    """All SIDES and all GATES of the files beside this one."""
    modules = [load(name) for name in _FILES]
    sides = {name: make for module in modules for name, make in module.SIDES.items()}
    return sides, {name: check for module in modules for name, check in module.GATES.items()}


class _Worker:
    def __init__(self) -> None:
        import torch

        import robattr_fast

        self.torch, self.package = torch, robattr_fast
        self.sides, self.gates = load_sides()
        self.prepared: dict[str, Any] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The result of one request; see the methods of `process.Process`."""
        kind = request["do"]
        if kind == "hello":
            if request["threads"]:
                self.torch.set_num_threads(request["threads"])
            return {"package": str(Path(self.package.__file__).parent), "threads": self.torch.get_num_threads()}
        if kind == "tune":
            tuned, what = load("machine").tune_allocator()
            return {"tuned": tuned, "what": what}
        if kind == "gate":
            return {"reason": self.gates[request["gate"]](request["spec"])}
        if kind == "prepare":
            self.prepared[request["key"]] = self.sides[request["side"]](request["spec"])
            return {}
        assert kind == "round"
        return self.prepared[request["key"]]()


def main() -> None:
    """Answer until stdin ends."""
    # Whatever a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = _Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
