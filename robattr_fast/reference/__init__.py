"""Every operator in plain PyTorch: the definition that all backends are tested against."""

from robattr_fast.reference._pack_levels import pack_levels, unpack_levels
from robattr_fast.reference.betting_bounds import betting_bounds
from robattr_fast.reference.count_sparsified import count_sparsified_
from robattr_fast.reference.linear_attention import linear_attention
from robattr_fast.reference.mlp_smoothgrad import mlp_smoothgrad
from robattr_fast.reference.noisy_samples import noisy_samples
from robattr_fast.reference.packed_gram import packed_gram
from robattr_fast.reference.soft_topk import soft_topk
from robattr_fast.reference.sparsify import sparsify
from robattr_fast.reference.topk_threshold import topk_threshold

__all__ = [
    "betting_bounds",
    "count_sparsified_",
    "linear_attention",
    "mlp_smoothgrad",
    "noisy_samples",
    "pack_levels",
    "packed_gram",
    "soft_topk",
    "sparsify",
    "topk_threshold",
    "unpack_levels",
]
