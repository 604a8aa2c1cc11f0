"""How alike two maps are."""

from robattr_fast.metrics.overlap import overlap

__all__ = ["overlap"]
