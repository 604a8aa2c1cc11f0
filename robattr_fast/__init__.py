"""Saliency maps that come with a proof: fused operators and certificates for robust attribution."""

from robattr_fast import attacks, attributions, backends, metrics, nn, reference
from robattr_fast.attributions.smoothgrad import smoothgrad
from robattr_fast.certificates import Certificate, Progress, StopWhen, Suggestion, certify, suggest
from robattr_fast.errors import (
    BackendError,
    CertificateFileError,
    CertifyInterrupted,
    MergeError,
    ModelError,
    NonFiniteError,
)
from robattr_fast.machine import tune_allocator
from robattr_fast.metrics import overlap
from robattr_fast.ops import (
    betting_bounds,
    count_sparsified_,
    linear_attention,
    mlp_smoothgrad,
    noisy_samples,
    packed_gram,
    soft_topk,
    sparsify,
    topk_threshold,
)

__all__ = [
    "BackendError",
    "Certificate",
    "CertificateFileError",
    "CertifyInterrupted",
    "MergeError",
    "ModelError",
    "NonFiniteError",
    "Progress",
    "StopWhen",
    "Suggestion",
    "attacks",
    "attributions",
    "backends",
    "betting_bounds",
    "certify",
    "count_sparsified_",
    "linear_attention",
    "metrics",
    "mlp_smoothgrad",
    "nn",
    "noisy_samples",
    "overlap",
    "packed_gram",
    "reference",
    "smoothgrad",
    "soft_topk",
    "sparsify",
    "suggest",
    "topk_threshold",
    "tune_allocator",
]
