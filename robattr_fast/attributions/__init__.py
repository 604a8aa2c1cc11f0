"""Which map: attributions of a model's prediction to its input."""

from robattr_fast.attributions.smoothgrad import smoothgrad

__all__ = ["smoothgrad"]
