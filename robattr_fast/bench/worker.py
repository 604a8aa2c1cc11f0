"""The process that runs sides of benchmarks: one JSON request a line on stdin, one JSON answer a line.

It is started by path and takes `robattr_fast` from the path that it is given: the same sides measure any commit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

_FILES = ("operator_sides", "job_sides")


def _load(name: str) -> ModuleType:
    """A file of this package, under a name of its own: the package that is measured may be another commit's."""
    path = (Path(__file__).parent / f"{name}.py").resolve()
    spec = importlib.util.spec_from_file_location(f"_robattr_fast_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_sides() -> tuple[dict[str, Any], dict[str, Any]]:
    """All SIDES and all GATES of the files beside this one."""
    modules = [_load(name) for name in _FILES]
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
            tuned, what = _load("../allocator").tune_allocator()
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
