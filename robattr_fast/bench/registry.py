"""The entries: what is measured, against whom, behind which gate, and the target that it is held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from robattr_fast.bench import headline
from robattr_fast.bench.context import Context
from robattr_fast.bench.measure import OURS, Result


@dataclass(frozen=True)
class Sided:
    """One side of an entry: its label, its name in SIDES, and where its spec differs from the entry's."""

    label: str
    side: str
    spec: dict[str, Any] = field(default_factory=dict)
    tune: bool = True


@dataclass(frozen=True)
class Target:
    """At least so many times the time of the side ``of``; for an entry's own side (`OURS`), at most so many units.

    Of `FLOOR`: the floor is at least this share of our time.
    """

    of: str
    value: float | None
    at_least: bool = True


@dataclass(frozen=True)
class Entry:
    """One line of the registry.

    Attributes:
        name: of --only; entries of a family share what stands before the first point.
        title: what a reader sees.
        unit, scale: of the figures, and how many of them a second per unit of work is.
        gate: name in GATES; it runs first, with ``spec``.
        spec: of the sides; ``quick``: what --quick changes in it.
        sides: ours first.
        targets: see `Target`.
        rounds, quick_rounds: of each side, in turns.
        threads: of torch; None: all.
        apart: every side in a process of its own; else ours and the peers share one.
        floor_bytes: bytes that a unit of work must move.
        measure: ``measure(context, spec, rounds, result)`` of entries that need more than rounds of their sides.
    """

    name: str
    title: str
    unit: str
    scale: float
    gate: str
    spec: dict[str, Any]
    sides: tuple[Sided, ...] = ()
    targets: tuple[Target, ...] = ()
    quick: dict[str, Any] = field(default_factory=dict)
    rounds: int = 15
    quick_rounds: int = 5
    threads: int | None = None
    apart: bool = False
    floor_bytes: float | None = None
    measure: Callable[[Context, dict[str, Any], int, Result], None] | None = None

    def spec_of(self, side: Sided | None, *, quick: bool) -> dict[str, Any]:
        """What a side is made of."""
        return {**self.spec, **(self.quick if quick else {}), **(side.spec if side else {})}


_PEERS_OF_NOISE = (
    Sided("torch", "noise.torch"),
    Sided("numpy", "noise.numpy"),
    Sided("Captum's noise step", "noise.captum"),
    Sided("torch.func._random", "noise.keyed"),
)


def _noise(name: str, shape: tuple[int, ...], samples: int, threads: int | None, target: float | None) -> Entry:
    count = 1
    for size in shape:
        count *= size
    with_threads = "1 thread" if threads == 1 else "all threads"
    return Entry(
        name=name,
        title=f"noisy samples, n = {count}, {with_threads}",
        unit="ns per element",
        scale=1e9,
        gate="noise",
        spec={"shape": shape, "samples": samples},
        sides=(Sided(OURS, "noise.ours"), *_PEERS_OF_NOISE),
        targets=(Target("torch", target),),
        threads=threads,
        floor_bytes=4,
    )


def _select(name: str, n: int, levels: int, target: float) -> Entry:
    long = n > 10000
    return Entry(
        name=name,
        title=f"select and count, n = {n}, levels = {levels}, counts out of cache",
        unit="ns per element",
        scale=1e9,
        gate="select",
        # Long rows one by one, short ones as many at a time as the published code takes. In between as many bytes are
        # touched as the activations of a large model, or of a small CNN for 64 rows.
        spec={"n": n, "levels": levels, "rows": 1 if long else 64, "calls": 8, "evicted_mib": 64 if long else 16},
        sides=(Sided(OURS, "select.ours"), Sided("torch", "select.torch"), Sided("numpy", "select.numpy")),
        targets=(Target("torch", target),),
        threads=1,
        floor_bytes=4,
    )


def _attention(name: str, what: str, causal: bool, targets: dict[str, float | None]) -> Entry:
    sides = {"einsum of all pairs": "pairs", "SDPA, math": "softmax", "eager sums": "sums"}
    spec = {"batch": 2, "heads": 12, "positions": 1024, "width": 64, "causal": causal}
    return Entry(
        name=name,
        title=f"attention with first and second derivatives, {what}, N = 1024, D = 64, B H = 24",
        unit="ms",
        scale=24 * 1024 * 64 * 1e3,
        gate="attention",
        spec=spec,
        sides=(Sided(OURS, "attention.ours"), *(Sided(label, f"attention.{sides[label]}") for label in targets)),
        targets=tuple(Target(label, value) for label, value in targets.items()),
        quick={"heads": 1},
        rounds=9,
        quick_rounds=3,
        # 3 inputs and the output; for the gradients 4 and 3; for theirs 7 and 4.
        floor_bytes=22 * 4,
    )


def hard_rows(name: str, where: str, unit: str, scale: float, threads: int | None, **spec: Any) -> Entry:
    """Rows that are hard to select from beside random ones, n = 150528, one level."""
    kinds = ("all equal", "one ulp", "ascending", "descending", "99 % zeros")
    return Entry(
        name=name,
        title=f"select and count{where}, rows that are hard to select from, n = 150528, levels = 1",
        unit=unit,
        scale=scale,
        gate="select",
        spec={"n": 150528, "levels": 1, "calls": 8, **spec},
        sides=(Sided(OURS, "select.ours"), *(Sided(kind, "select.ours", {"kind": kind}) for kind in kinds)),
        targets=tuple(Target(kind, 1.5, at_least=False) for kind in kinds),
        threads=threads,
        floor_bytes=4,
    )


def gram(name: str, where: str, rows: int, levels: int, **spec: Any) -> Entry:
    """The Gram matrix of ``rows`` packed maps of n = 150528."""
    return Entry(
        name=name,
        title=f"Gram matrix of {rows} packed maps{where}, n = 150528, levels = {levels}",
        unit="ms",
        scale=rows**2 * 150528 * 1e3,
        gate="gram",
        spec={"rows": rows, "n": 150528, "levels": levels, **spec},
        sides=(Sided(OURS, "gram.ours"), Sided("torch, float32", "gram.torch")),
        targets=(Target("torch, float32", None),),
        rounds=5,
        quick_rounds=3,
    )


ENTRIES: tuple[Entry, ...] = (
    _noise("P1", (3, 224, 224), 16, 1, 4),
    _noise("P1.threads", (3, 224, 224), 16, None, None),
    _noise("P1.784", (1, 28, 28), 1024, 1, None),
    _select("P2", 150528, 1, 6),
    _select("P2.levels15", 150528, 15, 6),
    hard_rows("P2.adversarial", "", "ns per element", 1e9, 1, rows=1, evicted_mib=64),
    *(_select(f"P3.{n}.levels{levels}", n, levels, 3) for n in (784, 3072) for levels in (1, 15)),
    *(
        Entry(
            name=f"bounds.levels{levels}",
            title=f"betting bounds, n = 150528, levels = {levels}, q = 8192",
            unit="s",
            scale=150528,
            gate="bounds",
            spec={"n": 150528, "levels": levels, "samples": 8192},
            sides=(Sided(OURS, "bounds.ours"), Sided("reference, of n = 2352", "bounds.reference", {"n": 2352})),
            targets=(Target(OURS, 0.5, at_least=False), Target("reference, of n = 2352", None)),
            rounds=5,
            quick_rounds=3,
        )
        for levels in (1, 15)
    ),
    *(gram(f"gram.levels{levels}", "", 256, levels) for levels in (1, 15)),
    _attention("attention", "all pairs", False, {"einsum of all pairs": 3, "SDPA, math": 5, "eager sums": 1.2}),
    _attention("attention.causal", "causal", True, {"einsum of all pairs": None, "SDPA, math": None}),
    Entry(
        name="P4",
        title="time to the certificate that the published procedure has at q = 8192 (P4, P4b)",
        unit="ms per sample",
        scale=1e3,
        gate="job",
        spec={"model": "demo", "image": "chelsea", "images": ["chelsea", "coffee"], "samples": 192, "planned": 8192},
        quick={"samples": 32},
        rounds=3,
        quick_rounds=1,
        measure=headline.same_certificate,
    ),
    Entry(
        name="P5",
        title="what certify adds to the model's own forward pass and input gradient, 224x224, q = 8192",
        unit="ms per sample",
        scale=1e3,
        gate="job",
        spec={"model": "demo", "image": "chelsea", "samples": 256, "planned": 8192},
        quick={"samples": 32},
        rounds=3,
        quick_rounds=1,
        measure=headline.overhead,
    ),
    Entry(
        name="P6",
        title="whole job, 28x28 CNN, q = 8192",
        unit="ms per sample",
        scale=1e3,
        gate="job",
        spec={"model": "small-cnn", "samples": 8192, "batch_size": 64, "batch_sizes": [64]},
        sides=(
            Sided(OURS, "job.whole"),
            Sided("ours without second moments", "job.whole", {"second_moment": False}),
            Sided("published loop, batch 64", "job.published", {"samples": 2048}, tune=False),
            Sided("Captum NoiseTunnel", "job.captum", {"samples": 2048}),
        ),
        targets=(
            Target("ours without second moments", None),
            Target("published loop, batch 64", 3),
            Target("Captum NoiseTunnel", None),
        ),
        rounds=5,
        quick_rounds=2,
        apart=True,
    ),
    Entry(
        name="P7",
        title="peak memory of certify, 224x224, q from 2048 to 65536",
        unit="MiB",
        scale=1 / 2**20,
        gate="job",
        spec={"model": "small-cnn", "measured": "pooled", "retain": 2048, "samples": [2048, 65536]},
        quick={"samples": [2048, 8192]},
        measure=headline.memory,
    ),
)


def chosen(only: list[str] | None) -> list[Entry]:
    """The entries of these names or families, in the order of the registry; all if none is named."""
    for name in only or ():
        if not any(_is(entry, name) for entry in ENTRIES):
            takes = ", ".join(dict.fromkeys(entry.name.partition(".")[0] for entry in ENTRIES))
            raise ValueError(f"only: got {name!r}, takes a name or a family of names: {takes}")
    return [entry for entry in ENTRIES if not only or any(_is(entry, name) for name in only)]


def _is(entry: Entry, name: str) -> bool:
    return entry.name == name or entry.name.startswith(f"{name}.")
