"""Entries that put several measurements together: time to the same certificate, overhead, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robattr_fast.bench import certificates, records
from robattr_fast.bench.context import Context
from robattr_fast.bench.measure import OURS, Result, interleave, limit, rates, ratio, spread
from robattr_fast.bench.process import Process

PUBLISHED, AT_ITS_BEST = "published loop, batch 64", "published loop, best batch, tuned allocator"

_TARGETS = {
    ("marginal", PUBLISHED): 15,
    ("second-moment", PUBLISHED): 30,
    ("marginal", AT_ITS_BEST): 5,
    ("second-moment", AT_ITS_BEST): 9,
}


def _paces(
    context: Context, spec: dict[str, Any], rounds: int, result: Result, *, peers: bool
) -> dict[str, list[dict[str, Any]]]:
    """Rounds of our `certify`, of the base's, and of the published loop, each in a process of its own."""
    processes: list[Process] = []
    sides: dict[str, tuple[Process, str]] = {}

    def add(label: str, side: str, *, tune: bool = True, base: bool = False, **changed: Any) -> None:
        context.told(f"preparing: {label}")
        processes.append(context.process(tune=tune, base=base))
        processes[-1].prepare(label, side, {**spec, **changed})
        sides[label] = (processes[-1], label)

    try:
        add(OURS, "job.ours")
        if context.base is not None:
            add(context.base.label, "job.ours", base=True)
        elif peers:
            add(PUBLISHED, "job.published", tune=False, samples=64, batch_sizes=[64])
            add(AT_ITS_BEST, "job.published", samples=64, batch_sizes=[1, 2, 4, 8, 16] if context.quick else _SIZES)
        found, errors = interleave(sides, rounds, context.told)
    finally:
        for process in processes:
            process.close()
    for label, rows in found.items():
        result.sides[label] = {"error": errors[label]} if label in errors else _said(rows)
    if context.base is not None and not errors:
        label = context.base.label
        result.ratios.append(ratio(rates(found[label]), rates(found[OURS]), of=label, target=None))
    return {label: rows for label, rows in found.items() if label not in errors}


_SIZES = [1, 2, 4, 8, 16, 32]


def _said(rows: list[dict[str, Any]]) -> dict[str, Any]:
    kept: dict[str, Any] = {
        name: rows[-1][name] for name in ("batch_size", "memory_format", "setup") if name in rows[-1]
    }
    return {**spread([1e3 * rate for rate in rates(rows)]), "rounds": len(rows), **kept}


def _evaluation(context: Context, n: int, retain: int, samples: int, image: str) -> dict[str, float]:
    """Seconds of what follows the samples: Gram matrices, ``retain`` maps at a time (0: none), bounds and overlap.

    Of the real certificate of the image, where P4 has made it at this commit.
    """
    context.told(f"evaluating a certificate of {samples} samples")
    file = _certificates(context) / certificates.name_of(image, samples)
    spec = {"n": n, "retain": retain, "samples": samples, "file": str(file.resolve()) if file.exists() else None}
    with context.process() as process:
        process.prepare("evaluation", "job.evaluation", spec)
        both = [process.round("evaluation") for _ in range(1 if context.quick else 3)]
    return {name: spread([one[name] for one in both])["median"] for name in ("seconds", "gram", "look", "last")}


def same_certificate(context: Context, spec: dict[str, Any], rounds: int, result: Result) -> None:
    """P4, P4b: seconds to the certificate that the published procedure has at q = 8192.

    Paces come from a bounded number of samples per side, the number of samples that each method needs from real
    certificates. With --quick none are made: without those of an earlier run the factor of speed stands alone.
    """
    paces = _paces(context, spec, rounds, result, peers=True)
    if OURS not in paces or context.base is not None:
        return
    ours = rates(paces[OURS])
    peers = {label: rates(paces[label]) for label in (PUBLISHED, AT_ITS_BEST) if label in paces}
    for label, pace in peers.items():
        result.ratios.append({**ratio(pace, ours, of=label, target=None), "what": "speed per sample"})
    result.details = {
        "radius": certificates.RADIUS,
        "k": certificates.K_SHARE,
        "alpha": certificates.ALPHA,
        "setup": paces[OURS][-1]["setup"],
        "curves": {},
        "needed": {},
        "evaluation": {},
    }
    for image in spec["images"]:
        curve = _curve(context, spec["model"], image, spec["planned"], result)
        if spec["planned"] not in curve:
            result.details["needed"][image] = None
            continue
        _compare(context, image, curve, spec["planned"], ours, peers, result)
        evaluation = _evaluation(context, result.details["n"], certificates.RETAIN, spec["planned"], image)
        result.details["evaluation"][image] = evaluation["seconds"]


def _certificates(context: Context) -> Path:
    """Their folder: another commit may make others of the same samples."""
    return context.certificates / (records.commit()["commit"] or "")[:9]


def _curve(context: Context, model: str, image: str, planned: int, result: Result) -> dict[int, dict[str, float]]:
    """By number of samples what each method certifies of an image."""
    from robattr_fast.inputs import images, specs

    loaded = specs.load(model)
    x = images.read(images.find([image])[0].path, loaded.preprocess)
    result.details["n"] = x.numel()
    folder = _certificates(context)
    found = certificates.find(folder, loaded.module, x)
    if not set(found) >= set(certificates.looks(planned)):
        # Of a few certificates alone it cannot be told how many samples are enough.
        if context.quick:
            return {}
        found = certificates.make(folder, image, loaded.module, x, planned=planned, told=context.told)
    curve = {}
    for samples, cert in found.items():
        context.told(f"{image}: what {samples} samples certify")
        curve[samples] = certificates.overlaps(cert)
    result.details["curves"][image] = [[samples, *shares.values()] for samples, shares in curve.items()]
    return curve


def _compare(
    context: Context,
    image: str,
    curve: dict[int, dict[str, float]],
    planned: int,
    ours: list[float],
    peers: dict[str, list[float]],
    result: Result,
) -> None:
    """The factors of one image: samples saved, speed, and both with everything else that a run costs."""
    share = curve[planned]["published"]
    needed = {method: certificates.reached(curve, method, share) for method in ("marginal", "second-moment")}
    result.details["needed"][image] = {"share": share, **needed}
    for method, samples in needed.items():
        if samples is None or share == 0:
            continue
        retain = certificates.RETAIN if method == "second-moment" else 0
        after = _evaluation(context, result.details["n"], retain, samples, image)["seconds"]
        fixed = result.details["setup"] + after
        result.details["needed"][image][f"{method} seconds"] = spread([fixed + samples * pace for pace in ours])
        for label, pace in peers.items():
            factors = ratio(
                [planned * rate for rate in pace],
                [fixed + samples * rate for rate in ours],
                of=label,
                target=_TARGETS[method, label],
            )
            what = f"{image}, {method}: time; samples alone {planned / samples:.2f} times less ({samples})"
            result.ratios.append({**factors, "what": what})


def overhead(context: Context, spec: dict[str, Any], rounds: int, result: Result) -> None:
    """P5: the share of a run of ``planned`` samples that is not spent in the model.

    Seconds in the model are taken inside the run itself. Trial and folding are those of a first call; looks are as many
    as a stop rule takes, with second moments at its scheduled looks: Gram matrices grow from one to the next, so that
    those inside of the first block add their summaries alone, whose time grows with the square of the rows at least.
    """
    from robattr_fast.certificates.engine.plan import betting_looks
    from robattr_fast.certificates.moments.concentration import look_schedule

    paces = _paces(context, spec, rounds, result, peers=False)
    if OURS not in paces:
        return
    planned = spec["planned"]
    after = _evaluation(context, 150528, certificates.RETAIN, planned, spec["image"])
    looks = len(list(betting_looks(planned)))
    early = [look for look in look_schedule(planned) if look < planned]
    inside = sum((look / certificates.RETAIN) ** 2 for look in early if look < certificates.RETAIN)
    gram = after["gram"] * (1 + inside * certificates.RETAIN / planned)
    # A norm is deflated once there are samples beyond the first block.
    searches = sum(look > certificates.RETAIN for look in early)
    stop = looks * after["look"] + searches * (after["last"] - after["look"])
    shares = []
    parts: dict[str, list[float]] = {}
    for one in paces[OURS]:
        model = planned * one["model_seconds"] / one["units"]
        seconds = {
            "model": model,
            "noise, selection, counts": planned * one["seconds"] / one["units"] - model,
            "copies, folding, trial of batches": one["setup"],
            "looks for a stop": stop,
            "second moments": gram,
            "last bounds": after["last"],
        }
        total = sum(seconds.values())
        shares.append(100 * (total - model) / total)
        for part, value in seconds.items():
            parts.setdefault(part, []).append(value)
    result.details["seconds of 8192 samples"] = {part: spread(values) for part, values in parts.items()}
    result.ratios.append(limit(shares, of="everything but the model", unit="%", target=3))
    looked = [100 * stop / sum(values) for values in zip(*parts.values(), strict=True)]
    result.ratios.append(limit(looked, of="looks for a stop", unit="%", target=2))


def memory(context: Context, spec: dict[str, Any], rounds: int, result: Result) -> None:
    """P7: peak memory of runs of different lengths, each in a fresh process."""

    def peak(samples: int, *, base: bool) -> float:
        context.told(f"{samples} samples")
        with context.process(tune=False, base=base) as process:
            made = {"model": spec["measured"], "samples": samples, "retain": spec["retain"]}
            process.prepare("memory", "job.memory", made)
            return process.round("memory")["bytes"]

    few, many = (peak(samples, base=False) for samples in spec["samples"])
    result.details = {"samples": spec["samples"], "bytes": [few, many]}
    result.sides[OURS] = {**spread([many / 2**20]), "rounds": 1}
    grown = 100 * (many / few - 1)
    result.ratios.append(limit([grown], of=f"growth from q = {spec['samples'][0]}", unit="%", target=2))
    if context.base is not None:
        result.sides[context.base.label] = {**spread([peak(spec["samples"][1], base=True) / 2**20]), "rounds": 1}
