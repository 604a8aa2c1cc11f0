"""Every operator in plain PyTorch: the definition that all backends are tested against."""

from robattr_fast.reference.noisy_samples import noisy_samples
from robattr_fast.reference.pack_levels import pack_levels, unpack_levels
from robattr_fast.reference.packed_gram import packed_gram

__all__ = ["noisy_samples", "pack_levels", "packed_gram", "unpack_levels"]
