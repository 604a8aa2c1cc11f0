"""Sides and gates of single operators. A side is made of its spec and gives the seconds of one round of work.

``device`` of a spec says where it runs; a CPU if it says nothing.

This file is run beside any commit of the package: it takes public names alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

import robattr_fast as rf

Spec = dict[str, Any]
Side = Callable[[], dict[str, Any]]

SIGMA, TAU, GAMMA = 0.2, 0.1, 0.03

_CPU = torch.device("cpu")


def device_of(spec: Spec) -> torch.device:
    return torch.device(spec.get("device", "cpu"))


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Of the work alone, not of telling a GPU to do it, as long as that takes less."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def timed(work: Callable[[], Any], units: float, device: torch.device = _CPU) -> dict[str, Any]:
    return {"seconds": seconds_of(work, device), "units": units}


class _Eviction:
    """Between two calls as many bytes are read and written as push everything else out of the cache."""

    def __init__(self, mebibytes: int, device: torch.device) -> None:
        self._memory = torch.zeros(mebibytes * 2**18, device=device)

    def __call__(self) -> None:
        self._memory.add_(1)


def _copy(spec: Spec) -> Side:
    """The bandwidth of copies far beyond any cache: ``units`` are bytes read and written."""
    source = torch.ones(spec["mebibytes"] * 2**18, device=device_of(spec))
    target = torch.empty_like(source).fill_(0)
    return lambda: timed(lambda: target.copy_(source), 2 * 4 * source.numel(), source.device)


# -- noise: spec shape [*S], samples q, dtype, options of noisy_samples; a unit is one element of the result --


def _noise(draw: Callable[..., Any]) -> Callable[[Spec], Side]:
    """``draw(x, samples, call)``, again and again; ours takes the options of the spec as well."""

    def make(spec: Spec) -> Side:
        dtype = getattr(torch, spec.get("dtype", "float32"))
        x, calls = torch.rand(1, *spec["shape"], device=device_of(spec)).to(dtype), 0
        options = spec.get("options", {}) if draw is _noise_ours else {}
        draw(x, spec["samples"], calls, **options)

        def round() -> dict[str, Any]:
            nonlocal calls
            calls += 1
            units = x.numel() * spec["samples"]
            return timed(lambda: draw(x, spec["samples"], calls, **options), units, x.device)

        return round

    return make


def _noise_ours(x: torch.Tensor, samples: int, call: int, **options: Any) -> None:
    rf.noisy_samples(x, SIGMA, samples, first_sample=call * samples, **options)


def _noise_torch(x: torch.Tensor, samples: int, call: int) -> None:
    torch.add(x, torch.randn(samples, *x.shape[1:], dtype=x.dtype, device=x.device), alpha=SIGMA)


def _noise_numpy(spec: Spec) -> Side:
    rng = np.random.default_rng(0)
    x = np.random.default_rng(1).random(tuple(spec["shape"]), dtype=np.float32)

    def draw() -> None:
        z = rng.standard_normal((spec["samples"], *spec["shape"]), dtype=np.float32)
        z *= np.float32(SIGMA)
        z += x

    return lambda: timed(draw, x.size * spec["samples"])


def _noise_captum(x: torch.Tensor, samples: int, call: int) -> None:
    """As NoiseTunnel of Captum draws it: mean and deviation are expanded, then torch.normal."""
    mean = x.repeat_interleave(samples, dim=0)
    torch.normal(mean, torch.tensor(SIGMA, dtype=x.dtype, device=x.device).repeat(mean.shape))


def _noise_keyed(x: torch.Tensor, samples: int, call: int) -> None:
    """torch's own counter-based generator."""
    try:
        from torch.func import _random

        key = _random.fold_in(_random.key(0, device=x.device) if x.is_cuda else _random.key(0), call)
        z = _random.normal(key, (samples, *x.shape[1:]))
    except (ImportError, NotImplementedError) as error:
        raise NotImplementedError(f"torch {torch.__version__} has none for {x.device.type} tensors") from error
    torch.add(x, z, alpha=SIGMA)


def _gate_noise(spec: Spec) -> str:
    for shape, samples in (((2, 3, 37, 41), 5), ((1, *spec["shape"]), 1)):
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device_of(spec))
        options: dict[str, Any] = {
            "seed": 2**63 + 5,
            "first_sample": 2**31 - 3,
            "image_ids": torch.arange(shape[0]) + 7,
        }
        ours, known = (f(x, SIGMA, samples, **options) for f in (rf.noisy_samples, rf.reference.noisy_samples))
        if not torch.equal(ours, known):
            return f"noisy_samples: {int((ours != known).sum())} of {known.numel()} elements are not the reference's"
    return ""


# -- selection: spec n, rows per call, levels, calls per round, kind of row; a unit is one element --


def scores_of(kind: str, rows: int, n: int, seed: int) -> torch.Tensor:
    """float32 [rows, n] scores of one kind: "random" as gradients are, or made to be hard to select from."""
    rng = np.random.default_rng(seed)
    made = {
        "random": lambda: np.abs(rng.standard_normal((rows, n))),
        "all equal": lambda: np.full((rows, n), 0.3),
        "one ulp": lambda: np.where(rng.random((rows, n)) < 0.5, np.float32(1.5), np.nextafter(np.float32(1.5), 2)),
        "ascending": lambda: np.sort(rng.random((rows, n))),
        "descending": lambda: np.sort(rng.random((rows, n)))[:, ::-1],
        "99 % zeros": lambda: np.where(rng.random((rows, n)) < 0.01, rng.random((rows, n)), 0),
    }[kind]()
    return torch.from_numpy(np.ascontiguousarray(made, dtype=np.float32))


_SMALL = 64  # elements of a row that brings the code back into the caches, and none of what is measured


def _select(make: Callable[[int, int, torch.device], Callable[[torch.Tensor], Any]]) -> Callable[[Spec], Side]:
    """``make(n, levels, device)`` gives what adds the maps of scores [rows, n] to counts of its own."""

    def side(spec: Spec) -> Side:
        n, rows = spec["n"], spec["rows"]
        device = device_of(spec)
        pool = [scores_of(spec.get("kind", "random"), rows, n, seed).to(device) for seed in range(4)]
        evict = _Eviction(spec["evicted_mib"], device)
        add, add_small = make(n, spec["levels"], device), make(_SMALL, spec["levels"], device)
        small = scores_of("random", 1, _SMALL, 0).to(device)
        add(pool[0])

        def round() -> dict[str, Any]:
            calls = []
            for call in range(spec["calls"]):
                evict()
                add_small(small)
                calls.append(seconds_of(partial(add, pool[call % len(pool)]), device))
            # Calls are short: one that the system interrupts would stand for all.
            return {"seconds": float(np.median(calls)), "units": n * rows}

        return round

    return side


def _select_ours(n: int, levels: int, device: torch.device) -> Callable[[torch.Tensor], Any]:
    counts = torch.zeros(1, n, levels, dtype=torch.int32, device=device)
    return lambda scores: rf.count_sparsified_(counts, scores[None], TAU, GAMMA)


def _select_cuda(n: int, levels: int, device: torch.device) -> Callable[[torch.Tensor], Any]:
    """Ours by the kernels in CUDA C++."""
    ours = _select_ours(n, levels, device)

    def add(scores: torch.Tensor) -> None:
        try:
            with rf.backends.use(count_sparsified_="cuda", strict=True):
                ours(scores)
        except rf.BackendError as error:
            raise NotImplementedError(str(error)) from error

    return add


def _sizes(n: int) -> tuple[int, int]:
    return max(1, int(TAU * n + 1e-9)), max(1, int(GAMMA * n + 1e-9))


def _select_torch(n: int, levels: int, device: torch.device) -> Callable[[torch.Tensor], Any]:
    """As the published code does it: topk, where, sum; for more than one level the relaxed map, not rounded."""
    (k_tau, k_gamma), sums = _sizes(n), torch.zeros(n, device=device)
    one, none = torch.ones((), device=device), torch.zeros((), device=device)

    def add(scores: torch.Tensor) -> None:
        top = scores.topk(k_tau).values
        kept = scores >= top[:, -1:]
        value = one if levels == 1 else (scores / top[:, k_gamma - 1, None]).clamp(max=1)
        sums.add_(torch.where(kept, value, none).sum(0))

    return add


def _select_scatter(n: int, levels: int, device: torch.device) -> Callable[[torch.Tensor], Any]:
    """topk, scatter and sum; one level."""
    k_tau, sums = _sizes(n)[0], torch.zeros(n, device=device)

    def add(scores: torch.Tensor) -> None:
        sums.add_(torch.zeros_like(scores).scatter_(1, scores.topk(k_tau).indices, 1).sum(0))

    return add


def _select_numpy(n: int, levels: int, device: torch.device) -> Callable[[torch.Tensor], Any]:
    (k_tau, k_gamma), sums = _sizes(n), np.zeros(n, np.float32)

    def add(scores: torch.Tensor) -> None:
        rows = scores.numpy()
        places = [n - k_tau] if levels == 1 else [n - k_tau, n - k_gamma]
        parted = np.partition(rows, places, axis=1)
        kept = rows >= parted[:, places[0], None]
        value = 1 if levels == 1 else np.minimum(rows / parted[:, places[1], None], 1)
        np.add(sums, np.where(kept, value, 0).sum(0), out=sums)

    return add


def sorted_counts(scores: np.ndarray, tau: float, gamma: float, levels: int) -> np.ndarray:
    """int32 [n, levels] by full sorting, float32 scores [rows, n]: the definition, independent of the package."""
    n = scores.shape[1]
    k_tau, k_gamma = (max(1, int(share * n + 1e-9)) for share in (tau, gamma))
    counts = np.zeros((n, levels), np.int32)
    for row in scores:
        descending = np.sort(row)[::-1]
        kept = row >= descending[k_tau - 1]
        if kept.sum() > k_tau:
            kept = row > descending[k_tau - 1]
        kept &= row > 0
        g = np.float32(max(descending[k_gamma - 1], 0))
        edges = [g * (np.float32(level) / np.float32(levels)) for level in range(levels)]
        level = sum((row > edge).astype(np.int64) for edge in edges)
        counts[np.flatnonzero(kept), level[kept] - 1] += 1
    return counts


def _gate_select(spec: Spec) -> str:
    n, levels = spec["n"], spec["levels"]
    for kind in ("random", "all equal", "one ulp", "99 % zeros"):
        scores = scores_of(kind, 3, n, 11)
        counts = torch.zeros(1, n, levels, dtype=torch.int32, device=device_of(spec))
        rf.count_sparsified_(counts, scores[None].to(counts.device), TAU, GAMMA)
        wrong = int((counts[0].cpu().numpy() != sorted_counts(scores.numpy(), TAU, GAMMA, levels)).sum())
        if wrong:
            return f"count_sparsified_: {wrong} counters of {kind} rows are not what sorting gives"
    return ""


# -- bounds: spec n, levels, samples; a unit is one element --


def _level_counts(n: int, levels: int, samples: int) -> torch.Tensor:
    """int32 [1, n, levels] of ``samples`` samples whose elements differ."""
    rng = np.random.default_rng(3)
    shares = rng.dirichlet(np.ones(levels + 1), size=n)
    return torch.from_numpy(rng.multinomial(samples, shares)[:, 1:].astype(np.int32))[None]


def _bounds(bound: Callable[..., Any]) -> Callable[[Spec], Side]:
    def make(spec: Spec) -> Side:
        device = device_of(spec)
        counts = _level_counts(spec["n"], spec["levels"], spec["samples"]).to(device)
        samples, delta = torch.tensor([spec["samples"]], device=device), 0.0225 / spec["n"]
        return lambda: timed(lambda: bound(counts, samples, delta), spec["n"], device)

    return make


def _gate_bounds(spec: Spec) -> str:
    samples = spec["samples"]
    counts = _level_counts(512, spec["levels"], samples)
    device = device_of(spec)
    ours = [bound.cpu() for bound in rf.betting_bounds(counts.to(device), torch.tensor([samples], device=device), 1e-6)]
    known = rf.reference.betting_bounds(counts, torch.tensor([samples]), 1e-6)
    allowed = max(1e-9, 1e-13 * samples)
    for side, a, b, size in (("lower", ours[0], known[0], known[0]), ("upper", ours[1], known[1], 1 - known[1])):
        worst = float(((a - b).abs() / size.clamp_min(1e-300)).max())
        if not worst <= 2 * allowed:
            return f"betting_bounds: a {side} bound is {worst:.1e} off the reference, relative; {allowed:.1e} allowed"
    return ""


# -- Gram matrices: spec rows m, n, levels; a unit is one product of two elements --


def _levels(m: int, n: int, levels: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    return (rng.integers(1, levels + 1, (m, n)) * (rng.random((m, n)) < TAU)).astype(np.uint8)


def _gram_ours(spec: Spec) -> Side:
    levels = torch.from_numpy(_levels(spec["rows"], spec["n"], spec["levels"]))
    rows = rf.reference.pack_levels(levels, spec["levels"]).to(device_of(spec))
    return lambda: timed(lambda: rf.packed_gram(rows, spec["levels"]), spec["rows"] ** 2 * spec["n"], rows.device)


def _gram_torch(spec: Spec) -> Side:
    rows = torch.from_numpy(_levels(spec["rows"], spec["n"], spec["levels"])).float().to(device_of(spec))
    return lambda: timed(lambda: rows @ rows.T, spec["rows"] ** 2 * spec["n"], rows.device)


def _gate_gram(spec: Spec) -> str:
    levels = _levels(20, 5000, spec["levels"])
    packed = rf.reference.pack_levels(torch.from_numpy(levels), spec["levels"]).to(device_of(spec))
    ours = rf.packed_gram(packed, spec["levels"]).cpu().numpy()
    wide = levels.astype(np.int64)
    return "" if (ours == wide @ wide.T).all() else "packed_gram: products are not those of the unpacked levels"


SIDES: dict[str, Callable[[Spec], Side]] = {
    "copy": _copy,
    "noise.ours": _noise(_noise_ours),
    "noise.torch": _noise(_noise_torch),
    "noise.numpy": _noise_numpy,
    "noise.captum": _noise(_noise_captum),
    "noise.keyed": _noise(_noise_keyed),
    "select.ours": _select(_select_ours),
    "select.cuda": _select(_select_cuda),
    "select.torch": _select(_select_torch),
    "select.scatter": _select(_select_scatter),
    "select.numpy": _select(_select_numpy),
    "bounds.ours": _bounds(rf.betting_bounds),
    "bounds.reference": _bounds(rf.reference.betting_bounds),
    "gram.ours": _gram_ours,
    "gram.torch": _gram_torch,
}
"""Name to a function of the spec that makes the side."""

GATES: dict[str, Callable[[Spec], str]] = {
    "noise": _gate_noise,
    "select": _gate_select,
    "bounds": _gate_bounds,
    "gram": _gate_gram,
}
"""Name to a function of the spec that says what is wrong, or nothing."""
