"""How noisy copies go through the model: arguments, a measured trial, batches, the captured step."""

from robattr_fast.sampling.sampler import Sampler

__all__ = ["Sampler"]
