"""Every operator in plain PyTorch: the definition that all backends are tested against."""

from robattr_fast.reference.noisy_samples import noisy_samples

__all__ = ["noisy_samples"]
