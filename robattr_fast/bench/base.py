"""``--base REV``: another commit of this checkout, built in a folder that is removed afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from robattr_fast.bench.context import Base
from robattr_fast.bench.process import HERE
from robattr_fast.bench.records import git


@contextmanager
def built(revision: str, *, root: Path = HERE) -> Iterator[Base]:
    """The commit of a revision, checked out below a temporary folder and with its extension built.

    Raises:
        ValueError: no checkout, no such revision, or the build fails (the message ends with what it said).
    """
    commit = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", folder=root)
    if commit is None:
        raise ValueError(f"base: got {revision!r}, takes a revision of the git checkout that the package runs from")
    with tempfile.TemporaryDirectory(prefix="robattr-fast-base-") as folder:
        tree = Path(folder) / "tree"
        if git("worktree", "add", "--detach", "--force", str(tree), commit, folder=root) is None:
            raise ValueError(f"base: git cannot check out {commit} below {folder}")
        try:
            _build(tree)
            yield Base(commit, tree)
        finally:
            git("worktree", "remove", "--force", str(tree), folder=root)


def _build(tree: Path) -> None:
    build = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tree,
        env=os.environ | {"ROBATTR_FAST_REQUIRE_EXT": "1"},
        capture_output=True,
        text=True,
    )
    if build.returncode != 0:
        said = (build.stderr or build.stdout).strip().splitlines()
        raise ValueError(f"base: its extension cannot be built: {said[-1] if said else build.returncode}")
