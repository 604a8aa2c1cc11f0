"""The operators: checks, public functions, fake kernels, autograd and the choice of backend, one file each."""

from robattr_fast.ops.noisy_samples import noisy_samples
from robattr_fast.ops.packed_gram import packed_gram

__all__ = ["noisy_samples", "packed_gram"]
