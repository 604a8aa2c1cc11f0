"""How alike two maps are: batches [B, *M] in, one float64 per image out. A constant or non-finite map gives NaN."""

from robattr_fast.certify.overlap import overlap
from robattr_fast.metrics.similarity import cosine

__all__ = ["cosine", "overlap"]
