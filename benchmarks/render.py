"""Tables and the plot of the documents, made from records: ``python -m benchmarks render``.

A document holds blocks ``<!-- bench:NAME -->`` to ``<!-- /bench:NAME -->``; what stands between is replaced.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from robattr_fast.bench import records
from robattr_fast.bench.measure import OURS
from robattr_fast.bench.process import HERE
from robattr_fast.bench.registry import ENTRIES
from robattr_fast.bench.table import figure

DOCUMENTS = (Path("README.md"), Path("docs") / "performance.md")
PLOT = Path("docs") / "certified-overlap.svg"
_BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)

Record = dict[str, Any]
Records = dict[str, Record]
"""By entry the record that stands for it."""


def chosen(path: Path) -> Records:
    """The last complete record of each entry, of the machine that was measured last. Empty without records."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.exists() else []
    read = [records.read(file) for file in files]
    # Those of GPUs stand in docs/gpu.md.
    machines = [of_one for of_one in read if of_one and "gpu" not in of_one[-1]]
    if not machines:
        return {}
    newest = max(machines, key=lambda of_one: of_one[-1]["date"])
    found = {entry.name: records.latest(newest, entry.name) for entry in ENTRIES}
    return {name: record for name, record in found.items() if record is not None}


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "Not measured yet.\n"
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _shown(found: dict[str, Any], unit: str) -> str:
    return f"{figure(found['median'])} {unit} ({figure(found['q1'])} to {figure(found['q3'])})"


def provenance(found: Records) -> str:
    """Where and when."""
    if not found:
        return "No records yet.\n"
    one = max(found.values(), key=lambda record: record["date"])
    commits = sorted({_commit(record) for record in found.values()})
    machine, versions = one["machine"], one["versions"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}; torch {versions['torch']}, "
        f"Python {versions['python']}; commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}, "
        f"{min(r['date'] for r in found.values())[:10]} to {one['date'][:10]}. Medians, quartiles in brackets.\n"
    )


def _commit(record: Record) -> str:
    name = record["commit"][:9] if record["commit"] else "unknown"
    return f"{name} and changes" if record["dirty"] else name


def targets(found: Records) -> str:
    """What is held against a target, and whether it is met."""
    rows = [
        [
            name,
            f"{record['title']}: {one['of']}{' (' + one['what'] + ')' if one.get('what') else ''}",
            _shown(one, one["unit"]),
            f"{one['sense']} {one['target']:g}",
            "yes" if one["met"] else "**no**",
        ]
        for name, record in found.items()
        for one in record["ratios"]
        if one["target"] is not None
    ]
    return _table(["entry", "what", "measured", "target", "met"], rows)


def sides(found: Records) -> str:
    """What every side of every entry takes."""
    rows = []
    for name, record in found.items():
        for label, side in record["sides"].items():
            took = side["error"] if "error" in side else _shown(side, record["unit"])
            settings = [f"batch {side['batch_size']}"] if "batch_size" in side else []
            settings += [side["memory_format"]] if "memory_format" in side else []
            who = f"{label}{', ' + ', '.join(settings) if settings else ''}"
            rows.append([name, record["title"], f"**{who}**" if label == OURS else who, took])
        if record["floor"] is not None:
            floor = record["floor"]
            at = f"floor: {floor['bytes']:g} bytes at {figure(floor['gigabytes_per_second'])} GB/s"
            rows.append([name, record["title"], at, f"{figure(floor['median'])} {record['unit']}"])
    return _table(["entry", "what", "side", "time"], rows)


def headline(found: Records) -> str:
    """P4: the time to the same certificate, each method by itself, statistics and speed stated apart."""
    record = found.get("P4")
    if record is None:
        return "Not measured yet.\n"
    rows = [
        [one["of"], one.get("what", ""), _shown(one, "times"), "" if one["target"] is None else f"{one['target']:g}"]
        for one in record["ratios"]
    ]
    return _table(["against", "what", "factor", "target, at least"], rows)


def overhead(found: Records) -> str:
    """P5: where the time of a run goes."""
    record = found.get("P5")
    parts = record["details"]["seconds of 8192 samples"] if record else {}
    total = sum(part["median"] for part in parts.values())
    rows = [[name, _shown(part, "s"), f"{100 * part['median'] / total:.2f} %"] for name, part in parts.items()]
    return _table(["part of a run of 8192 samples", "time", "share"], rows)


def plot(found: Records) -> str:
    """The picture, and what it shows."""
    if not _curves(found):
        return "Not measured yet.\n"
    return (
        "![Certified overlap against wall time]({plot})\n\n"
        "*Certified share of the top 20 % at L2 radius .06 against wall time, from the same noisy samples: the\n"
        "published procedure at its own pace, and T7 by itself at ours, with all that a run costs.*\n"
    )


BLOCKS: dict[str, Callable[[Records], str]] = {
    "provenance": provenance,
    "targets": targets,
    "sides": sides,
    "headline": headline,
    "overhead": overhead,
    "plot": plot,
}
"""Name of a block to what fills it."""


def filled(text: str, found: Records, path: Path) -> str:
    """The document at ``path`` (below the root) with its blocks made anew. ValueError for a block of another name."""
    picture = os.path.relpath(PLOT, path.parent)

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        if name not in BLOCKS:
            raise ValueError(f"block bench:{name}: unknown, takes one of {', '.join(BLOCKS)}")
        return f"{match[1]}{BLOCKS[name](found).replace('{plot}', picture)}{match[3]}"

    return _BLOCK.sub(fill, text)


def _curves(found: Records) -> dict[str, Any]:
    """What the plot shows: per image seconds and shares of both procedures."""
    record = found.get("P4")
    published = record["sides"].get("published loop, batch 64", {}) if record else {}
    if record is None or "median" not in published or not any(record["details"]["curves"].values()):
        return {}
    theirs, ours = published["median"] / 1e3, record["sides"][OURS]["median"] / 1e3
    # For every point the evaluation of all samples, the longest.
    after = record["details"].get("evaluation", {})
    fixed = {image: record["details"]["setup"] + after.get(image, 0.0) for image in record["details"]["curves"]}
    return {
        image: {
            "published procedure": [[samples * theirs, share] for samples, share, _, _ in rows],
            "this package, second moments": [[fixed[image] + samples * ours, moment] for samples, _, _, moment in rows],
        }
        for image, rows in record["details"]["curves"].items()
    }


def digest(found: Records) -> str:
    """Of the data of the plot; the picture names it."""
    return hashlib.sha256(json.dumps(_curves(found), sort_keys=True).encode()).hexdigest()


def draw(found: Records, path: Path) -> None:
    """The plot as SVG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    curves = _curves(found)
    with pyplot.rc_context({"svg.hashsalt": "robattr_fast", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(
            1, len(curves), figsize=(4.5 * len(curves), 3.2), sharey=True, squeeze=False, layout="constrained"
        )
        for plane, (image, procedures) in zip(axes[0], curves.items(), strict=True):
            for (name, points), style in zip(procedures.items(), ("o--", "o-"), strict=True):
                seconds, shares = zip(*points, strict=True)
                plane.plot(seconds, shares, style, markersize=3, label=name)
            plane.set(title=image, xlabel="seconds", xscale="log", ylim=(0, None))
            plane.grid(alpha=0.3)
        axes[0, 0].set_ylabel("certified overlap at radius .06")
        axes[0, 0].legend(loc="upper left")
        figure.savefig(path, metadata={"Date": None, "Description": digest(found)})
        pyplot.close(figure)


def stale(root: Path, found: Records) -> list[str]:
    """Which documents do not say what the records say."""
    texts = {path: (root / path).read_text(encoding="utf-8") for path in DOCUMENTS}
    wrong = [str(path) for path, text in texts.items() if filled(text, found, path) != text]
    if _curves(found) and not ((root / PLOT).exists() and digest(found) in (root / PLOT).read_text(encoding="utf-8")):
        wrong.append(str(PLOT))
    return wrong


def main(arguments: Sequence[str]) -> int:
    """``render``: write tables and plot. ``render --check``: exit status 1 where something is stale."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks render", description=main.__doc__)
    parser.add_argument("--records", type=Path, default=HERE / records.RECORDS, help="file or folder of records")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    found = chosen(options.records)
    wrong = stale(HERE, found)
    if options.check:
        for name in wrong:
            print(f"{name} does not say what the records say: python -m benchmarks render")
        return int(bool(wrong))
    for path in DOCUMENTS:
        text = (HERE / path).read_text(encoding="utf-8")
        (HERE / path).write_text(filled(text, found, path), encoding="utf-8")
    if str(PLOT) in wrong:
        draw(found, HERE / PLOT)
    for name in wrong:
        print(f"written: {name}")
    return 0
