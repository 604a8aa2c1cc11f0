"""The operators: checks, public functions, fake kernels, autograd and the choice of backend, one file each."""

from robattr_fast.ops.betting_bounds import betting_bounds
from robattr_fast.ops.count_sparsified import count_sparsified_
from robattr_fast.ops.linear_attention import linear_attention
from robattr_fast.ops.mlp_smoothgrad import mlp_smoothgrad
from robattr_fast.ops.noisy_samples import noisy_samples
from robattr_fast.ops.packed_gram import packed_gram
from robattr_fast.ops.soft_topk import soft_topk
from robattr_fast.ops.sparsify import sparsify
from robattr_fast.ops.topk_threshold import topk_threshold

__all__ = [
    "betting_bounds",
    "count_sparsified_",
    "linear_attention",
    "mlp_smoothgrad",
    "noisy_samples",
    "packed_gram",
    "soft_topk",
    "sparsify",
    "topk_threshold",
]
