"""The entries that are measured on a GPU: `registry.Entry` lines whose sides run on a CUDA device."""

from __future__ import annotations

from typing import Any

from robattr_fast.bench.measure import FLOOR, OURS
from robattr_fast.bench.registry import Entry, Sided, Target, gram, hard_rows

_IMAGE = (3, 224, 224)


def _noise(name: str, what: str, share: float | None, bytes_per_element: int, **spec: Any) -> Entry:
    return Entry(
        name=name,
        title=f"noisy samples on a GPU, n = 150528, {what}",
        unit="ps per element",
        scale=1e12,
        gate="noise",
        # What is written is several times what any cache holds.
        spec={"device": "cuda", "shape": _IMAGE, "samples": 1024, **spec},
        sides=(
            Sided(OURS, "noise.ours"),
            Sided("torch", "noise.torch"),
            Sided("Captum's noise step", "noise.captum"),
            Sided("torch.func._random", "noise.keyed"),
        ),
        targets=(
            Target("torch", None),
            Target("Captum's noise step", 3 if name == "G1" else None),
            Target(FLOOR, share),
        ),
        floor_bytes=bytes_per_element,
    )


def _attention(name: str, what: str, order: int, targets: dict[str, float | None], **spec: Any) -> Entry:
    """Attention with its derivatives up to the order; the floor counts the arrays of the size of q that must move."""
    sides = {"einsum of all pairs": "pairs", "SDPA, fused": "flash", "flash-linear-attention": "fla"}
    shape = {"batch": 256, "heads": 12, "positions": 197, "width": 64, "causal": False, "dtype": "bfloat16", **spec}
    return Entry(
        name=name,
        title=f"attention on a GPU, {what}, D = 64, {shape['dtype']}",
        unit="ps per element of q",
        scale=1e12,
        gate="attention",
        spec={"device": "cuda", "order": order, **shape},
        sides=(
            Sided(OURS, "attention.ours"),
            *(Sided(label, f"attention.{side}") for label, side in sides.items() if label in targets),
        ),
        targets=tuple(Target(label, value) for label, value in targets.items()),
        floor_bytes=(4, 11, 22)[order] * (2 if shape["dtype"] == "bfloat16" else 4),
    )


def _select(name: str, n: int, rows: int, levels: int) -> Entry:
    sides = [Sided(OURS, "select.ours"), Sided("CUDA C++", "select.cuda"), Sided("torch", "select.torch")]
    targets = [Target("CUDA C++", None), Target("torch", None), Target(FLOOR, 0.5)]
    if levels == 1:
        sides.append(Sided("torch.topk, scatter, sum", "select.scatter"))
        targets.append(Target("torch.topk, scatter, sum", 6 if n > 10000 else None))
    return Entry(
        name=name,
        title=f"select and count on a GPU, n = {n}, levels = {levels}, scores out of cache",
        unit="ps per element",
        scale=1e12,
        gate="select",
        spec={"device": "cuda", "n": n, "levels": levels, "rows": rows, "calls": 8, "evicted_mib": 512},
        sides=tuple(sides),
        targets=tuple(targets),
        floor_bytes=4,
    )


ENTRIES: tuple[Entry, ...] = (
    _noise("G1", "float32", 0.4, 4),
    _noise("G1.fast", "float32, the GPU's own functions", 0.75, 4, options={"fast": True}),
    _noise("G1.channels-last", "float32, channels-last", None, 4, options={"channels_last": True}),
    _noise("G1.bfloat16", "bfloat16", None, 2, dtype="bfloat16"),
    *(_select(f"G2.levels{levels}", 150528, 128, levels) for levels in (1, 15)),
    *(
        _select(f"G3.{n}.levels{levels}", n, rows, levels)
        for n, rows in ((784, 32768), (3072, 8192))
        for levels in (1, 15)
    ),
    hard_rows("G4", " on a GPU", "ps per element", 1e12, None, device="cuda", rows=128, evicted_mib=512),
    *(
        Entry(
            name=f"G.bounds.levels{levels}",
            title=f"betting bounds on a GPU, n = 150528, levels = {levels}, q = 8192",
            unit="ms",
            scale=150528e3,
            gate="bounds",
            spec={"device": "cuda", "n": 150528, "levels": levels, "samples": 8192},
            sides=(Sided(OURS, "bounds.ours"),),
            rounds=5,
        )
        for levels in (1, 15)
    ),
    *(gram(f"G.gram.levels{levels}", " on a GPU", 2048, levels, device="cuda") for levels in (1, 15)),
    _attention("G5.forward", "output alone, N = 197, B H = 3072", 0, {FLOOR: 0.7, "SDPA, fused": None}),
    _attention("G5", "output and gradients, N = 197, B H = 3072", 1, {FLOOR: 0.6, "SDPA, fused": None}),
    _attention("G6", "output and gradients, N = 4096", 1, {"SDPA, fused": 10}, batch=8, positions=4096),
    _attention(
        "G7",
        "output, first and second derivatives, N = 1024",
        2,
        {"einsum of all pairs": 3},
        batch=2,
        positions=1024,
        dtype="float32",
    ),
    _attention(
        "G8",
        "causal, output and gradients, N = 1024",
        1,
        {"flash-linear-attention": 2},
        batch=32,
        positions=1024,
        causal=True,
    ),
    *(
        Entry(
            name=f"G.mlp.{model}.{samples}",
            title=f"a perceptron 784-{width}-10, noise to counts, batches of {samples}",
            unit="ns per sample",
            scale=1e9,
            gate="mlp",
            spec={"device": "cuda", "model": model, "samples": samples},
            sides=(Sided(OURS, "mlp.ours"), Sided("published batch as a CUDA graph", "mlp.captured")),
            targets=(Target("published batch as a CUDA graph", 5),),
        )
        for model, width in (("perceptron", 256), ("narrow-perceptron", 32))
        for samples in (256, 8192)
    ),
    Entry(
        name="G9",
        title="whole job on a GPU, ResNet-50, 224x224: bfloat16 and graph replay, peers in float32",
        unit="ms per sample",
        scale=1e3,
        gate="job",
        spec={"device": "cuda", "model": "resnet50", "samples": 1024, "batch_size": 64, "batch_sizes": [64]},
        sides=(
            Sided(OURS, "job.whole", {"dtype": "bfloat16", "samples": 8192}),
            Sided("published loop, batch 64", "job.published", tune=False),
            Sided("Captum NoiseTunnel", "job.captum"),
        ),
        targets=(Target("published loop, batch 64", 5), Target("Captum NoiseTunnel", None)),
        rounds=3,
        apart=True,
    ),
)
