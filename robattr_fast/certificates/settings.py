"""What was fixed before sampling: everything that a certificate says about how its counts came to be."""

import dataclasses
import math
from typing import Any

import torch

from robattr_fast.certificates.fields import (
    Check,
    boolean,
    each,
    integer,
    intervals,
    names,
    number,
    one_of,
    optional,
    shown,
    text,
)
from robattr_fast.certificates.ledger import AlphaLedger
from robattr_fast.certificates.theorems.bounds import BOUNDS, check_bound
from robattr_fast.model import AUTOCAST, EXPLANATIONS, dtype_name, dtype_named, explanation_name, other_model
from robattr_fast.sampling.map import Map

NONFINITE = ("raise", "zero", "abstain")
"""What a sample with NaN or infinite scores does: end the run; count as the map 0; or also as 1 in upper bounds."""

SAME_MAP = (
    "sigma",
    "shape",
    "levels",
    "tau",
    "gamma",
    "channel_sum",
    "explain",
    "target",
    "autocast",
)
"""Fields that define the smoothed map, but for the model: that is told by `Settings.other_model`."""

PER_IMAGE = ("image_ids", "intervals", "planned_samples", "input_hashes", "target", "clean_class", "clean_score")
"""Fields with one entry per image."""

# Not written where unknown, so that files stay what they were.
_SINCE_FORMAT_1 = ("clean_class", "clean_score", "model_identity")
_MOST_ELEMENTS = 2**31 - 1

Interval = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How statements are computed from the counts: alpha, bound, slack, second_moment as in `Settings`."""

    alpha: float
    bound: str
    slack: int | None
    second_moment: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The manifest of a certificate. None says: unknown, or has no meaning (counts that came from elsewhere).

    Attributes:
        sigma: standard deviation of the noise, in the units of x.
        shape: shape [*M] of one map.
        levels: number of levels L above 0; None if sums were kept.
        tau, gamma: shares of the elements that are selected and that saturate.
        channel_sum: scores were summed over channels before selection.
        explain: name of the attribution method.
        target: explained class per image; None: the largest logit of each noisy sample.
        clean_class, clean_score: per image the class that the model gives to the image itself, without noise, and its
            softmax probability; (-1, 0.0) where the logits are not finite.
        seed, stream_version: key and version of the noise stream.
        image_ids: id of each image in the noise stream.
        intervals: per image the sorted, disjoint, half-open intervals of sample indices.
        planned_samples: number of samples fixed in advance, per image; None: as many as there are.
        alpha: error probability of all statements about one image together.
        bound: name of the bound of the marginals, see `bounds.BOUNDS`.
        slack: number m of wrong bounds that are paid for (T4); None: the best for each query with betting, else 0.
        second_moment: a part of alpha is set aside for second moments (T7).
        retain: the most samples of an image whose packed levels are kept at a time, for second moments.
        on_nonfinite: one of `NONFINITE`.
        merged: the union of several runs. What each had when it ended may have depended on what it saw, so a union is
            evaluated by betting, whatever its size.
        exploration: bound, slack, alpha chosen after the fact, in place of those above. Such a certificate explores.
        autocast: name of the dtype in which the model ran under torch.autocast; None: without.
        model_fingerprint, input_hashes: of the model, and of each image.
        model_identity: what else tells the model and its method from others, see `model.other_model`.
        device, batch_size, batch_images, memory_format, folded, backends, versions: where and how the samples were
            taken: rows per forward pass, number of images that shared the passes, "contiguous" or "channels_last"
            (None: contiguous, before there was a choice), whether BatchNorm was folded, backends per operator.

    Raises:
        TypeError: a value of the wrong type. ValueError: a value outside its range.
    """

    sigma: float
    shape: tuple[int, ...]
    levels: int | None = 1
    tau: float | None = None
    gamma: float | None = None
    channel_sum: bool = False
    explain: str | None = None
    target: tuple[int, ...] | None = None
    clean_class: tuple[int, ...] | None = None
    clean_score: tuple[float, ...] | None = None
    seed: int | None = None
    stream_version: int | None = None
    image_ids: tuple[int, ...] | None = None
    intervals: tuple[tuple[Interval, ...], ...] | None = None
    planned_samples: tuple[int, ...] | None = None
    alpha: float = 0.05
    bound: str = "betting"
    slack: int | None = None
    second_moment: bool = False
    retain: int = 0
    on_nonfinite: str = "raise"
    merged: bool = False
    exploration: Evaluation | None = None
    autocast: str | None = None
    model_fingerprint: str | None = None
    model_identity: dict[str, Any] | None = None
    input_hashes: tuple[str, ...] | None = None
    device: str | None = None
    batch_size: int | None = None
    batch_images: int | None = None
    memory_format: str | None = None
    folded: bool | None = None
    backends: dict[str, str] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, check in _FIELDS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.n > _MOST_ELEMENTS:
            raise ValueError(f"shape must have at most {_MOST_ELEMENTS} elements, got {self.shape}")
        if self.gamma is not None and self.tau is not None and self.gamma > self.tau:
            raise ValueError(f"gamma must be at most tau, got gamma={self.gamma}, tau={self.tau}")
        for evaluation in (self.declared, self.evaluation):
            check_bound(evaluation.bound, self.levels)
            self._allot(evaluation)
            if evaluation.slack is not None and not 0 <= evaluation.slack < self.n:
                raise ValueError(f"slack must be None or an integer in 0..n-1, got {evaluation.slack}")
        if (self.clean_class is None) != (self.clean_score is None):
            raise ValueError("clean_class and clean_score must both be known, or neither")
        lengths = {name: len(value) for name in PER_IMAGE if (value := getattr(self, name)) is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the fields with one entry per image differ in length: {lengths}")

    @classmethod
    def of_map(cls, map: Map, x: torch.Tensor, **fields: Any) -> "Settings":
        """Of certificates of this map of images like x [B, *S]; ``fields`` are all that the map does not say."""
        return cls(
            sigma=map.sigma,
            shape=map.shape(x),
            levels=map.levels,
            tau=map.tau,
            gamma=map.gamma,
            channel_sum=map.channel_sum,
            explain=explanation_name(map.explain),
            target=map.target,
            autocast=None if map.autocast is None else dtype_name(map.autocast),
            **fields,
        )

    def map(self) -> Map:
        """The map again; ValueError if it is unknown, or of a callable, which has only its name here."""
        if self.explain not in EXPLANATIONS:
            raise ValueError(f"explain: got {self.explain!r}, expected one of {', '.join(EXPLANATIONS)}")
        return Map(
            sigma=self.sigma,
            explain=self.explain,
            target=self.target,
            channel_sum=self.channel_sum,
            tau=self.tau,
            gamma=self.gamma,
            levels=self.levels,
            autocast=dtype_named(self.autocast),
        )

    @property
    def n(self) -> int:
        """Number of elements of one map."""
        return math.prod(self.shape)

    @property
    def declared(self) -> Evaluation:
        """What was fixed before sampling; slack None where the best one is taken, which betting alone allows."""
        return _resolved(Evaluation(self.alpha, self.bound, self.slack, self.second_moment))

    @property
    def evaluation(self) -> Evaluation:
        """What is used: the exploration, if there is one."""
        return self.declared if self.exploration is None else _resolved(self.exploration)

    @property
    def ledger(self) -> AlphaLedger:
        """The split of alpha."""
        return self._allot(self.evaluation)

    def _allot(self, used: Evaluation) -> AlphaLedger:
        return AlphaLedger.allot(used.alpha, bound=used.bound, slack=used.slack, second_moment=used.second_moment)

    def exploring(self, evaluation: Evaluation) -> "Settings":
        """The same settings evaluated differently; with what was declared it is the certificate itself again."""
        declared = _resolved(evaluation) == self.declared
        return dataclasses.replace(self, exploration=None if declared else evaluation)

    def other_model(self, other: "Settings") -> str | None:
        """Why model or method cannot be the same as those of other settings; None where nothing speaks against it."""
        return other_model(self.model_fingerprint, self.model_identity, other.model_fingerprint, other.model_identity)

    def select(self, images: list[int]) -> "Settings":
        """The settings of some of the images."""
        chosen: dict[str, Any] = {}
        for name in PER_IMAGE:
            if (entries := getattr(self, name)) is not None:
                chosen[name] = tuple(entries[image] for image in images)
        return dataclasses.replace(self, **chosen)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, with the ledger spelled out."""
        values = dataclasses.asdict(self)
        for name in _SINCE_FORMAT_1:
            if values[name] is None:
                del values[name]
        return {**values, "ledger": dataclasses.asdict(self.ledger)}

    @classmethod
    def from_json(cls, manifest: dict[str, Any]) -> "Settings":
        """Inverse of `to_json`. Raises ValueError if a field is unknown, missing or out of range."""
        fields = dict(manifest)
        ledger = fields.pop("ledger", None)
        unknown = fields.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown fields {shown(sorted(unknown))}")
        try:
            if fields.get("exploration") is not None:
                fields["exploration"] = Evaluation(**fields["exploration"])
            settings = cls(**fields)
        except TypeError as error:
            raise ValueError(f"a field is missing or of the wrong type: {error}") from error
        if ledger != dataclasses.asdict(settings.ledger):
            raise ValueError(f"the ledger {shown(ledger)} is not that of its alpha, bound and slack: {settings.ledger}")
        return settings


def _resolved(evaluation: Evaluation) -> Evaluation:
    """Slack None means 0 for every bound but betting."""
    if evaluation.slack is None and evaluation.bound != "betting":
        return dataclasses.replace(evaluation, slack=0)
    return evaluation


_SIZE = integer(1, 2**31 - 1)
_SHARE = optional(number(0, 1, beyond=True))
_ALPHA = number(1e-100, 1)  # below, the level of a single bound leaves the range of float64
_NAME = optional(text)


def _retain(name: str, value: Any) -> int:
    rows = integer(0, 8192)(name, value)
    if 0 < rows < 4:
        raise ValueError(f"{name} must be 0 or lie in 4..8192, got {rows}")
    return rows


def _exploration(name: str, value: Any) -> Evaluation | None:
    if value is not None and not isinstance(value, Evaluation):
        raise TypeError(f"{name} must be an Evaluation or None, got {shown(value)}")
    if value is None:
        return None
    return Evaluation(**{part: _FIELDS[part](f"{name}.{part}", getattr(value, part)) for part in _EVALUATION})


def _identity(name: str, value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    rows = each(each(optional(number(-1e300, 1e300, beyond=True))))
    parts: dict[str, Check] = {
        "shape": each(_SIZE),
        "dtype": one_of("float64", "float32", "bfloat16", "float16"),
        "autocast": one_of(None, *AUTOCAST),
        "output": text,
        "logits": rows,
        "gradients": rows,
        "scores": rows,
    }
    checks: dict[str, Check] = {
        "first": text,
        "explain": text,
        "behaviour": lambda name, part: _parts(name, part, parts),
    }
    return _parts(name, value, checks)


def _parts(name: str, value: Any, checks: dict[str, Check]) -> dict[str, Any]:
    if not isinstance(value, dict) or not set(value) <= set(checks):
        raise TypeError(f"{name} must have parts among {', '.join(checks)}, got {shown(value)}")
    return {part: checks[part](f"{name}.{part}", entry) for part, entry in value.items()}


_EVALUATION = tuple(field.name for field in dataclasses.fields(Evaluation))
_FIELDS: dict[str, Check] = {
    "sigma": number(1e-30, 1e30),  # noise is float32
    "shape": each(_SIZE, fewest=1, most=64),
    "levels": optional(integer(1, 255)),
    "tau": _SHARE,
    "gamma": _SHARE,
    "channel_sum": boolean,
    "explain": _NAME,
    "target": optional(each(integer(0, 2**31 - 1))),
    "clean_class": optional(each(integer(-1, 2**31 - 1))),
    "clean_score": optional(each(number(0, 1))),
    "seed": optional(integer(0, 2**64 - 1)),
    "stream_version": optional(_SIZE),
    "image_ids": optional(each(integer(0, 2**32 - 1))),
    "intervals": optional(each(intervals)),
    "planned_samples": optional(each(_SIZE)),
    "alpha": _ALPHA,
    "bound": one_of(*BOUNDS),
    "slack": optional(integer(0, _MOST_ELEMENTS)),
    "second_moment": boolean,
    "retain": _retain,
    "on_nonfinite": one_of(*NONFINITE),
    "merged": boolean,
    "exploration": _exploration,
    "autocast": one_of(None, *AUTOCAST),
    "model_fingerprint": _NAME,
    "model_identity": _identity,
    "input_hashes": optional(each(text)),
    "device": _NAME,
    "batch_size": optional(integer(1, 2**20)),
    "batch_images": optional(_SIZE),
    "memory_format": one_of(None, "contiguous", "channels_last"),
    "folded": optional(boolean),
    "backends": names,
    "versions": names,
}
"""Of every field what it may be."""
