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


def load_sides() -> list[ModuleType]:
    """The modules with SIDES and GATES beside this file, under names of their own: the package may be another's."""
    modules = []
    for name in _FILES:
        spec = importlib.util.spec_from_file_location(f"_robattr_fast_{name}", Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        modules.append(module)
    return modules


class _Worker:
    def __init__(self) -> None:
        import torch

        import robattr_fast

        self.torch, self.package = torch, robattr_fast
        modules = load_sides()
        self.sides = {name: make for module in modules for name, make in module.SIDES.items()}
        self.gates = {name: check for module in modules for name, check in module.GATES.items()}
        self.prepared: dict[str, Any] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The result of one request; see the methods of `process.Process`."""
        kind = request["do"]
        if kind == "hello":
            if request["threads"]:
                self.torch.set_num_threads(request["threads"])
            return {"package": str(Path(self.package.__file__).parent), "threads": self.torch.get_num_threads()}
        if kind == "tune":
            tuned, what = self.package.tune_allocator()
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
