"""When two certificates speak of disjoint samples of one smoothed map, and what their union says."""

import dataclasses

from robattr_fast.certificates.settings import SAME_MAP, Interval, Settings
from robattr_fast.errors import MergeError
from robattr_fast.model import is_identified

_EQUAL = (
    *SAME_MAP,
    "input_hashes",
    "seed",
    "stream_version",
    "image_ids",
    "alpha",
    "bound",
    "slack",
    "second_moment",
    "on_nonfinite",
    "exploration",
)


def _union(first: tuple[Interval, ...], second: tuple[Interval, ...], image: int) -> tuple[Interval, ...]:
    """Sorted union of disjoint intervals, neighbours joined."""
    union: list[Interval] = []
    for start, end in sorted((*first, *second)):
        if union and start < union[-1][1]:
            raise MergeError(f"image {image}: both certificates hold the samples {start}..{min(end, union[-1][1]) - 1}")
        if union and start == union[-1][1]:
            union[-1] = (union[-1][0], end)
        else:
            union.append((start, end))
    return tuple(union)


def joined(first: dict[str, str], second: dict[str, str]) -> dict[str, str]:
    """Both values where they differ, names in their order."""
    names = dict.fromkeys((*first, *second))
    values = {name: sorted({side[name] for side in (first, second) if name in side}) for name in names}
    return {name: " + ".join(found) for name, found in values.items()}


def merge_settings(first: Settings, second: Settings) -> Settings:
    """The settings of the union of the samples.

    The plan stays what it was (the smaller one, if two were made): a union of another size is evaluated by betting.

    Raises MergeError that names the field that differs, the interval that both hold, or what is missing.
    """
    for name in _EQUAL:
        ours, theirs = getattr(first, name), getattr(second, name)
        if ours != theirs:
            raise MergeError(f"{name} differs: {ours!r} and {theirs!r}")
    if (reason := first.other_model(second)) is not None:
        raise MergeError(f"model_fingerprint, model_identity: {reason}")
    if first.intervals is None or second.intervals is None:
        raise MergeError("intervals are unknown: counts without sample indices may hold the same samples twice")
    if len(first.intervals) != len(second.intervals):
        raise MergeError(f"number of images differs: {len(first.intervals)} and {len(second.intervals)}")
    if not is_identified(first.explain):
        raise MergeError(f"explain={first.explain} cannot be told from another callable of that name")
    pairs = zip(first.intervals, second.intervals, strict=True)
    plans = [plan for plan in (first.planned_samples, second.planned_samples) if plan is not None]
    devices = {settings.device for settings in (first, second) if settings.device is not None}
    # An older file does not know them; scores round as the model does, and classes by them.
    known = [settings for settings in (first, second) if settings.clean_class is not None]
    agreed = {settings.clean_class for settings in known}
    return dataclasses.replace(
        first,
        clean_class=known[0].clean_class if len(agreed) == 1 else None,
        clean_score=known[0].clean_score if len(agreed) == 1 else None,
        merged=True,
        intervals=tuple(_union(ours, theirs, image) for image, (ours, theirs) in enumerate(pairs)),
        planned_samples=tuple(map(min, zip(*plans, strict=True))) if plans else None,
        model_identity=first.model_identity or second.model_identity,
        device=" + ".join(sorted(devices)) or None,
        batch_size=first.batch_size if first.batch_size == second.batch_size else None,
        batch_images=first.batch_images if first.batch_images == second.batch_images else None,
        memory_format=first.memory_format if first.memory_format == second.memory_format else None,
        folded=first.folded if first.folded == second.folded else None,
        backends=joined(first.backends, second.backends),
        versions=joined(first.versions, second.versions),
    )
