"""What all entries of one run share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from robattr_fast.bench.process import HERE, Process


@dataclass(frozen=True)
class Base:
    """Another commit, checked out and built: it is measured in turns with ours."""

    commit: str
    tree: Path

    @property
    def label(self) -> str:
        """Of its side."""
        return f"base {self.commit[:9]}"


@dataclass(frozen=True)
class Context:
    """The options of a run.

    Attributes:
        quick: less of everything; such figures are no record of anything.
        base: the commit to compare with, in place of all peers.
        certificates: where certificates at looks are kept and looked for.
        told: is told what happens.
    """

    quick: bool = False
    base: Base | None = None
    certificates: Path = Path("out") / "bench"
    told: Callable[[str], None] = lambda what: None

    def process(self, *, threads: int | None = None, tune: bool = True, base: bool = False) -> Process:
        """A fresh process; ``base``: with the package of the base."""
        tree = self.base.tree if base and self.base else HERE
        return Process(tree=tree, threads=threads, tune=tune)
