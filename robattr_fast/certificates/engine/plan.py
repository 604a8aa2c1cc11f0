"""What is fixed before sampling: how many samples, which of the stream, and when the run looks at them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from robattr_fast.certificates.moments.concentration import look_schedule
from robattr_fast.metrics.overlap import set_size
from robattr_fast.ops import _check

# Looks for a stop grow geometrically, so that they cost a fixed small share of the run. A run hits them exactly: when
# it stops depends neither on the batch size nor on where it was interrupted.
FIRST_LOOK, _LOOK_GROWTH = 64, 1.1


@dataclass(frozen=True)
class StopWhen:
    """End an image's sampling once ``overlap`` (a share of its top-k) is certified at L2 ``radius``.

    k: a number of elements, or a float in (0, 1), their share of the map.
    """

    k: float
    radius: float
    overlap: float

    def __post_init__(self) -> None:
        set_size(self.k, 2**31 - 1, 2**31 - 1)
        _check.positive("radius", self.radius)
        if not 0 < self.overlap <= 1:
            raise ValueError(f"overlap: got {self.overlap}, takes a share in (0, 1]")


@dataclass(frozen=True)
class Plan:
    """The samples of every image, and the looks at them.

    Attributes:
        samples: of each image.
        first_sample: index of the first of them.
        stop: rule that ends an image's sampling early; None: all samples are taken.
        second_moment: whether there are second moments, which have looks of their own.
        moment_looks: numbers of samples after which second moments may be asked for.
        looks: numbers of samples after which anything may be.
    """

    samples: int
    first_sample: int = 0
    stop: StopWhen | None = None
    second_moment: bool = True
    moment_looks: frozenset[int] = field(init=False)
    looks: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        several = self.stop is not None and self.second_moment and self.samples >= 2
        moment_looks = frozenset(look_schedule(self.samples)) if several else frozenset((self.samples,))
        looks = moment_looks | set(betting_looks(self.samples)) if self.stop else {self.samples}
        object.__setattr__(self, "moment_looks", moment_looks)
        object.__setattr__(self, "looks", tuple(sorted(looks)))

    def next_look(self, done: int) -> int:
        """The first look after ``done`` samples; all of them where there is none."""
        return next((look for look in self.looks if look > done), self.samples)


def betting_looks(samples: int) -> Iterator[int]:
    """Multiples of 64, so that usual batches are not cut."""
    look = FIRST_LOOK
    while look < samples:
        yield look
        look = -(-int(look * _LOOK_GROWTH + 1) // FIRST_LOOK) * FIRST_LOOK
