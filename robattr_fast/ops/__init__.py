"""The operators: checks, public functions, fake kernels, autograd and the choice of backend, one file each."""

from robattr_fast.ops.noisy_samples import noisy_samples

__all__ = ["noisy_samples"]
