"""Entries run: the gate first, then all sides in turns, then a record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from robattr_fast.bench import records
from robattr_fast.bench.context import Context
from robattr_fast.bench.measure import FLOOR, OURS, Result, interleave, limit, rates, ratio, short, spread
from robattr_fast.bench.process import Process, SideError
from robattr_fast.bench.registry import Entry, Sided


def run(entries: Sequence[Entry], context: Context, path: Path | None) -> Iterator[Result]:
    """The result of each entry as it comes; each is added to the records at ``path`` (None: kept nowhere)."""
    provenance = records.provenance()
    for entry in entries:
        context.told(f"{entry.name}: {entry.title}")
        result = run_entry(entry, context)
        if path is not None:
            records.append(path, {**result.to_json(), **provenance})
        yield result


def run_entry(entry: Entry, context: Context) -> Result:
    """One entry. Where its gate is red, nothing is measured."""
    result = Result(entry.name, entry.title, entry.unit, quick=context.quick)
    result.base = context.base.commit if context.base else None
    rounds = entry.quick_rounds if context.quick else entry.rounds
    try:
        with ExitStack() as stack:
            ours = stack.enter_context(context.process(threads=entry.threads))
            base = stack.enter_context(context.process(threads=entry.threads, base=True)) if context.base else None
            spec = entry.spec_of(None, quick=context.quick)
            for process, whose in ((ours, ""), (base, "base: ")):
                if process is not None and (reason := process.gate(entry.gate, spec)):
                    result.gate = whose + reason
                    return result
            if entry.measure is None:
                _measure(entry, context, result, rounds, ours, base, stack)
                return result
        # Its sides start processes of their own; nobody else holds memory then.
        entry.measure(context, spec, rounds, result)
    except SideError as error:
        result.sides[OURS] = {"error": short(error)}
    return result


def _measure(
    entry: Entry,
    context: Context,
    result: Result,
    rounds: int,
    ours: Process,
    base: Process | None,
    stack: ExitStack,
) -> None:
    sides: dict[str, tuple[Process, str]] = {}
    errors: dict[str, str] = {}
    for side in _sides(entry, context):
        try:
            if side.label == OURS:
                process = ours
            elif base is not None:
                process = base
            elif entry.apart:
                process = stack.enter_context(context.process(threads=entry.threads, tune=side.tune))
            else:
                process = ours
            process.prepare(side.label, side.side, entry.spec_of(side, quick=context.quick))
            sides[side.label] = (process, side.label)
        except SideError as error:
            errors[side.label] = short(error)
    found, stopped = interleave(sides, rounds, context.told)
    errors |= stopped
    seconds = {label: rates(rows) for label, rows in found.items() if label not in errors}
    for label, values in seconds.items():
        result.sides[label] = {**spread([entry.scale * value for value in values]), "rounds": len(values)}
    for label, reason in errors.items():
        result.sides[label] = {"error": reason}
    if OURS not in seconds:
        return
    if base is not None and context.base is not None and context.base.label in seconds:
        result.ratios.append(ratio(seconds[context.base.label], seconds[OURS], of=context.base.label, target=None))
        return
    for target in entry.targets:
        if target.of == OURS:
            values = [entry.scale * value for value in seconds[OURS]]
            result.ratios.append(limit(values, of=OURS, unit=entry.unit, target=target.value))
        elif target.of in seconds and target.at_least:
            result.ratios.append(ratio(seconds[target.of], seconds[OURS], of=target.of, target=target.value))
        elif target.of in seconds:
            shares = [a / b for a, b in zip(seconds[target.of], seconds[OURS], strict=True)]
            result.ratios.append(limit(shares, of=target.of, unit="times", target=target.value))
    if entry.floor_bytes is not None:
        result.floor = _floor(ours, entry.floor_bytes, entry.scale, entry.spec.get("device", "cpu"))
        floor = [float(result.floor["median"]) / entry.scale] * len(seconds[OURS])
        for target in entry.targets:
            if target.of == FLOOR:
                result.ratios.append(ratio(floor, seconds[OURS], of=FLOOR, target=target.value))


def _sides(entry: Entry, context: Context) -> list[Sided]:
    """Ours and the peers; with a base, ours twice."""
    if context.base is None:
        return list(entry.sides)
    ours = entry.sides[0]
    return [ours, Sided(context.base.label, ours.side, ours.spec)]


def _floor(process: Process, bytes_per_unit: float, scale: float, device: str) -> dict[str, float | str]:
    """The time that moving so many bytes takes at the bandwidth of a large copy, measured now, by the same threads."""
    mebibytes = 128 if device == "cpu" else 1024  # far beyond any cache
    process.prepare("copy", "copy", {"mebibytes": mebibytes, "device": device})
    per_byte = spread(rates([process.round("copy") for _ in range(5)]))["median"]
    return {
        "median": scale * bytes_per_unit * per_byte,
        "bytes": bytes_per_unit,
        "gigabytes_per_second": 1e-9 / per_byte,
        "how": f"copy of {mebibytes} MiB, bytes read and written",
    }
